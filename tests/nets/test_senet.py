import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.errors import UserError
from pipeline.nets import senet
from pipeline.nets.resnet import BasicBlock
from pipeline.nets.senet import Residual, SqueezeExcite, se_resnet50
from pipeline.training import weights

PARAMETERS = {"se_resnet50": 28_088_024, "senet154": 115_088_984}


def build(name: str) -> Any:
    with torch.device("meta"):
        return getattr(senet, name)(num_classes=1000)


@pytest.mark.parametrize("name", PARAMETERS)
def test_nets_have_the_published_sizes(name: str) -> None:
    assert sum(p.numel() for p in build(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "theirs"), [("se_resnet50", "legacy_seresnet50"), ("senet154", "legacy_senet154")])
def test_timm_s_names_become_ours(name: str, theirs: str) -> None:
    ours = build(name)
    with torch.device("meta"):
        state = timm.create_model(theirs).state_dict()
    found = weights.renamed_for(ours, state)
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in ours.state_dict().items()
    }


def test_excitation_is_a_factor_a_channel_from_the_averages_of_the_map() -> None:
    torch.manual_seed(0)
    module = SqueezeExcite(nn.Identity(), chans=32)
    x = torch.randn(3, 32, 5, 7)
    averages = x.mean((2, 3))
    hidden = F.relu(averages @ module.fc1.weight[:, :, 0, 0].T + module.fc1.bias)
    factors = torch.sigmoid(hidden @ module.fc2.weight[:, :, 0, 0].T + module.fc2.bias)
    assert module.fc1.weight.shape == (2, 32, 1, 1)
    torch.testing.assert_close(module(x), x * factors[:, :, None, None])


@pytest.mark.parametrize(
    "block",
    [nn.Conv2d(8, 32, 3, stride=2), BasicBlock(in_chans=8, out_chans=32, stride=2, option="B")],
    ids=["convolution", "ResNet's block"],
)
def test_any_block_that_gives_a_map_can_be_wrapped(block: nn.Module) -> None:
    module = SqueezeExcite(block.eval(), chans=32)
    x = torch.randn(3, 8, 9, 9)
    ratio = module(x) / block(x)
    known = ratio.isfinite()
    lowest = ratio.where(known, torch.inf).amin((2, 3))
    assert ((lowest > 0) & (lowest < 1)).all()
    torch.testing.assert_close(lowest, ratio.where(known, -torch.inf).amax((2, 3)))


def test_excitation_does_not_touch_the_shortcut() -> None:
    branch = SqueezeExcite(nn.Conv2d(32, 32, 3, padding=1), chans=32)
    nn.init.constant_(branch.fc2.bias, -1e4)
    x = torch.rand(2, 32, 5, 5)
    assert torch.equal(Residual(branch, downsample=nn.Identity())(x), x)


def test_pool_has_a_last_window_over_the_edge_and_no_padding() -> None:
    net: Any = se_resnet50(num_classes=3)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert net.pool0(x).flatten().tolist() == [10, 11, 14, 15]


def test_stride_is_in_the_first_1x1_of_a_resnet_and_in_the_3x3_of_senet154() -> None:
    for name, strides in (("se_resnet50", [2, 1, 1]), ("senet154", [1, 2, 1])):
        block = build(name).layer3[0]
        convs = [m for m in block.branch.block.modules() if isinstance(m, nn.Conv2d)]
        assert [conv.stride[0] for conv in convs] == strides
        assert block.downsample[0].kernel_size == ((1, 1) if name == "se_resnet50" else (3, 3))


def test_dropout_is_the_paper_s() -> None:
    assert build("se_resnet50").head_drop.p == 0
    assert build("senet154").head_drop.p == 0.2


def test_cifar_stem_takes_small_pictures_and_another_name_is_refused() -> None:
    net: Any = se_resnet50(num_classes=3, stem="cifar").train()
    assert net(torch.randn(4, 3, 8, 8)).isfinite().all()
    assert net.eval().forward_features(torch.randn(1, 3, 33, 33)).shape == (1, 2048, 5, 5)
    with pytest.raises(UserError, match=r"^scratch/se_resnet50 takes pictures of 8 px or more, got 7; raise"):
        net(torch.randn(1, 3, 8, 7))
    with pytest.raises(
        UserError, match=r"^scratch/se_resnet50 has no stem 'deep'; set model.stem to default or cifar$"
    ):
        se_resnet50(num_classes=3, stem="deep")


def test_initialisation_is_he_s_and_every_factor_about_a_half() -> None:
    torch.manual_seed(0)
    net: Any = se_resnet50(num_classes=10)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            tolerance = 4 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance), name
            assert module.bias is None or (module.bias == 0).all()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    for _ in range(2):
        assert net.last_linear.weight.abs().max() <= 1 / math.sqrt(2048)
        assert (net.last_linear.bias == 0).all()
        net.reset_classifier(5)


def test_coarse_groups_are_stem_stages_and_classifier() -> None:
    net = build("se_resnet50")
    assert len(group_parameters(net, net.group_matcher(coarse=True))) == 6
    assert len(group_parameters(net, net.group_matcher())) == 18
