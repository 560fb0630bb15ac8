import math
from typing import Any

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.nets import mobilenet
from pipeline.nets.mobilenet import SeparableBlock

PARAMETERS = {
    "mobilenet_v1": 4_231_976,
    "mobilenet_v1_075": 2_585_560,
    "mobilenet_v1_050": 1_331_592,
    "mobilenet_v1_025": 470_072,
}
WIDTHS = {"mobilenet_v1": 1.0, "mobilenet_v1_075": 0.75, "mobilenet_v1_050": 0.5, "mobilenet_v1_025": 0.25}
MULTIPLY_ADDS = {
    "mobilenet_v1": 568_740_352,
    "mobilenet_v1_075": 325_400_448,
    "mobilenet_v1_050": 149_497_088,
    "mobilenet_v1_025": 41_030_272,
}


@pytest.fixture
def thin() -> Any:
    torch.manual_seed(0)
    return mobilenet.mobilenet_v1_025(num_classes=7).eval()


def on_paper(name: str) -> Any:
    """The full net without memory for its weights: shapes only."""
    with torch.device("meta"):
        return getattr(mobilenet, name)(num_classes=1000).eval()


def pictures(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PARAMETERS)
def test_width_thins_every_layer_alike(name: str) -> None:
    net, full = on_paper(name), on_paper("mobilenet_v1")
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert net.name == name
    width = WIDTHS[name]
    for (key, layer), (_, whole) in zip(net.named_modules(), full.named_modules(), strict=True):
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels == width * whole.out_channels, key
    assert net.num_features == net.head_hidden_size == 1024 * width


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_work_is_that_of_the_table(name: str) -> None:
    net = on_paper(name)
    work = [net.classifier.weight.numel()]
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            size = layer.weight.numel()
            layer.register_forward_hook(lambda _, __, out, size=size: work.append(size * math.prod(out.shape[2:])))
    assert net(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    assert sum(work) == MULTIPLY_ADDS[name]


def test_names_and_shapes_are_timm_s() -> None:
    with torch.device("meta"):
        theirs = timm.create_model("mobilenetv1_100")
    shapes = [(key, tensor.shape) for key, tensor in on_paper("mobilenet_v1").state_dict().items()]
    assert shapes == [(key, tensor.shape) for key, tensor in theirs.state_dict().items()]


def test_depthwise_convolution_keeps_channels_apart_and_pointwise_pixels() -> None:
    torch.manual_seed(0)
    block = SeparableBlock(in_chans=4, out_chans=6, stride=1)
    x = pictures(1, 4, 5, 5)
    changed = x.clone()
    changed[:, 1, 2, 2] += 1
    around = (block.conv_dw(changed) - block.conv_dw(x)).abs() > 1e-6
    assert around.any((2, 3)).flatten().tolist() == [False, True, False, False]
    assert around[0, 1, 1:4, 1:4].all()
    mixed = (block.conv_pw(changed) - block.conv_pw(x)).abs() > 1e-6
    assert mixed.any((0, 1)).nonzero().tolist() == [[2, 2]]
    assert mixed[0, :, 2, 2].all()


@pytest.mark.parametrize(("px", "side"), [(7, 4), (8, 4)])
def test_block_of_stride_two_halves_the_map(px: int, side: int) -> None:
    assert SeparableBlock(in_chans=4, out_chans=6, stride=2)(pictures(2, 4, px, px)).shape == (2, 6, side, side)


def test_values_are_capped_at_six(thin: Any) -> None:
    features = thin.forward_features(1000 * pictures(1, 3, 64, 64))
    assert features.shape == (1, 256, 2, 2)
    assert features.min() == 0
    block = thin.blocks[0][0]
    assert block(1000 * pictures(1, 8, 16, 16)).max() == 6


def test_initialisation_is_he_s_with_a_depthwise_filter_s_own_fan() -> None:
    torch.manual_seed(0)
    net: Any = mobilenet.mobilenet_v1_050(num_classes=7)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = 9 if module.groups > 1 else module.out_channels * math.prod(module.kernel_size)
            tolerance = 4 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=tolerance), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert net.classifier.weight.abs().max() <= 1 / math.sqrt(512)


def test_smallest_picture_can_be_trained_on(thin: Any) -> None:
    thin.train()(pictures(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in thin.parameters())
    assert thin.forward_features(pictures(2, 3, 32, 32)).shape == (2, 256, 1, 1)


def test_channels_last_and_bfloat16_give_nearly_the_same_logits(thin: Any) -> None:
    x = pictures(2, 3, 64, 80)
    with torch.no_grad():
        expected = thin(x)
        scale = expected.abs().max().item()
        thin.to(memory_format=torch.channels_last)
        found = thin(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(thin(x).float(), expected, atol=0.05 * scale, rtol=0)


def test_groups_are_stem_blocks_and_classifier(thin: Any) -> None:
    assert len(group_parameters(thin, thin.group_matcher())) == 15
    assert len(group_parameters(thin, thin.group_matcher(coarse=True))) == 7
