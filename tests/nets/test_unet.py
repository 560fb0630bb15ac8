from typing import Any

import pytest
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.errors import UserError
from pipeline.nets.unet import Up, unet, unet_encoder


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_layers_have_the_table_s_sizes() -> None:
    whole = unet(in_chans=3)
    levels = [38_720, 221_440, 885_248, 3_539_968, 14_157_824]
    ups = [9_176_576, 2_294_528, 573_824, 143_552]
    assert [count(level) for level in whole.encoder["levels"]] == levels
    assert [count(up) for up in whole.ups] == ups
    assert count(whole.output) == 195
    assert count(whole) == sum(levels) + sum(ups) + 195 == 31_031_875
    encoder: Any = unet_encoder(num_classes=1000)
    assert count(encoder) == sum(levels) + 1_025_000
    assert sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in whole.modules()) == 23  # section 2


def test_maps_halve_and_channels_double_from_level_to_level() -> None:
    encoder: Any = unet_encoder(num_classes=2, width=4)
    shapes = [tuple(found.shape) for found in encoder.levels(torch.randn(1, 3, 64, 48))]
    assert shapes == [(1, 4, 64, 48), (1, 8, 32, 24), (1, 16, 16, 12), (1, 32, 8, 6), (1, 64, 4, 3)]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 31), (50, 33), (64, 48)])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_picture_comes_out_in_the_shape_that_went_in(height: int, width: int, in_chans: int) -> None:
    net = unet(in_chans=in_chans, width=2)
    x = torch.randn(2, in_chans, height, width)
    assert net(x).shape == x.shape
    assert net(x).isfinite().all()


def test_picture_below_16_px_is_refused() -> None:
    with pytest.raises(UserError, match="16 px or more, got 15"):
        unet(in_chans=3, width=2)(torch.randn(1, 3, 20, 15))


def test_skip_is_joined_before_the_map_that_comes_from_below() -> None:
    up = Up(2)
    nn.init.zeros_(up.convs.conv1.weight)
    with torch.no_grad():
        up.convs.conv1.weight[:, :2, 1, 1] = torch.eye(2)  # reads the first half of the channels alone
        up.convs.conv2.weight.zero_()
        up.convs.conv2.weight[:, :, 1, 1] = torch.eye(2)
        up.convs.conv1.bias.zero_()
        up.convs.conv2.bias.zero_()
    skip = torch.rand(1, 2, 6, 6)
    torch.testing.assert_close(up(torch.randn(1, 4, 3, 3), skip), skip)


def test_odd_side_is_made_up_for_by_its_last_line() -> None:
    up = Up(1)
    nn.init.ones_(up.up.weight)
    nn.init.zeros_(up.up.bias)
    seen = []
    up.convs.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    up(torch.arange(8.0).reshape(1, 2, 2, 2), torch.zeros(1, 1, 5, 4))
    rows = [[4.0, 4.0, 6.0, 6.0]] * 2 + [[8.0, 8.0, 10.0, 10.0]] * 3
    assert seen[0][0, 1].tolist() == rows


def test_every_parameter_of_the_whole_net_receives_a_gradient() -> None:
    torch.manual_seed(0)
    net = unet(in_chans=1, width=4)
    net(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.parameters())


def test_initialisation_is_that_of_section_3() -> None:
    torch.manual_seed(0)
    for name, module in unet(in_chans=3, width=16).named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # an up-convolution's unit sees one pixel of each channel
            nodes = module.in_channels * (module.kernel_size[0] ** 2 if isinstance(module, nn.Conv2d) else 1)
            std = (2 / nodes) ** 0.5
            assert module.weight.std().item() == pytest.approx(std, rel=5 / (2 * module.weight.numel()) ** 0.5), name
            assert module.bias is not None
            assert (module.bias == 0).all()


def test_whole_net_s_left_side_has_the_encoder_s_names() -> None:
    encoder: Any = unet_encoder(num_classes=2, width=2)
    inside = {key for key in unet(in_chans=3, width=2).state_dict() if key.startswith("encoder.")}
    assert inside == {f"encoder.{key}" for key in encoder.state_dict() if not key.startswith("classifier.")}


def test_groups_are_levels_or_convolutions() -> None:
    net: Any = unet_encoder(num_classes=2, width=2)
    assert len(group_parameters(net, net.group_matcher())) == 1 + 4 * 2 + 1
    assert len(group_parameters(net, net.group_matcher(coarse=True))) == 1 + 4 + 1
