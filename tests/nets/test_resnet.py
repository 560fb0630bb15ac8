import math
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.nets.resnet import BasicBlock, resnet20


def test_twenty_layers_have_weights() -> None:
    layers = [m for m in resnet20(num_classes=10).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20


@pytest.mark.parametrize("px", [8, 9])
def test_shortcut_is_every_second_pixel_then_zeros(px: int) -> None:
    block = BasicBlock(in_chans=16, out_chans=32, stride=2)
    x = torch.randn(2, 16, px, px)
    shortcut = block.shortcut(x)
    assert shortcut.shape == block(x).shape
    assert torch.equal(shortcut[:, :16], x[:, :, ::2, ::2])
    assert torch.equal(shortcut[:, 16:], torch.zeros_like(shortcut[:, 16:]))
    assert not [key for key, _ in block.named_parameters() if "shortcut" in key]


def test_block_with_a_silent_residual_is_its_shortcut() -> None:
    block = BasicBlock(in_chans=16, out_chans=32, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), block.shortcut(x))


def test_shortcut_of_an_equal_block_is_the_identity() -> None:
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(BasicBlock(in_chans=16, out_chans=16, stride=1).shortcut(x), x)


@pytest.mark.parametrize(("px", "side"), [(28, 7), (32, 8), (50, 13), (64, 16)])
def test_feature_map_is_a_quarter_of_the_picture(px: int, side: int) -> None:
    net: Any = resnet20(num_classes=10).eval()
    assert net.forward_features(torch.randn(1, 3, px, px)).shape == (1, 64, side, side)


def test_initialisation_is_he_s() -> None:
    torch.manual_seed(0)
    net: Any = resnet20(num_classes=10)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.out_channels * 9))
            tolerance = 4 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance), name
            assert abs(module.weight.mean()) < 4 * std / math.sqrt(module.weight.numel()), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert net.fc.weight.abs().max() <= 1 / 8


def test_coarse_groups_are_stem_stages_and_classifier() -> None:
    from timm.models._manipulate import group_parameters

    net: Any = resnet20(num_classes=10)
    groups = group_parameters(net, net.group_matcher(coarse=True))
    assert len(groups) == 5
    assert len(group_parameters(net, net.group_matcher())) == 11
