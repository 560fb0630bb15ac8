import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.errors import UserError
from pipeline.nets import resnext
from pipeline.nets.resnext import Bottleneck, resnext29_8x64d, resnext50_32x4d

PARAMETERS = {
    ("resnext50_32x4d", 1000): 25_028_904,
    ("resnext101_32x8d", 1000): 88_791_336,
    ("resnext29_8x64d", 10): 34_426_698,
}


@pytest.mark.parametrize(("name", "num_classes"), PARAMETERS)
def test_nets_have_the_published_sizes(name: str, num_classes: int) -> None:
    with torch.device("meta"):
        net = getattr(resnext, name)(num_classes=num_classes)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name, num_classes]


def test_block_is_the_sum_of_its_branches() -> None:
    torch.manual_seed(0)
    block = Bottleneck(in_chans=32, out_chans=32, stride=1, groups=4, group_chans=16).double().eval()
    assert block.conv1.out_channels == 8
    x = torch.randn(2, 32, 5, 5, dtype=torch.float64)
    scale = 1 / math.sqrt(1 + block.bn1.eps)
    total = x.clone()
    for branch in range(4):
        part = slice(2 * branch, 2 * branch + 2)
        y = F.relu(F.conv2d(x, block.conv1.weight[part]) * scale)
        y = F.relu(F.conv2d(y, block.conv2.weight[part], padding=1) * scale)
        total += F.conv2d(y, block.conv3.weight[:, part]) * scale
    torch.testing.assert_close(block(x), F.relu(total))


@pytest.mark.parametrize(("out_chans", "width"), [(256, 128), (512, 256), (2048, 1024)])
def test_branches_widen_with_the_block(out_chans: int, width: int) -> None:
    with torch.device("meta"):
        block = Bottleneck(in_chans=out_chans, out_chans=out_chans, stride=1, groups=32, group_chans=4)
    assert block.conv2.weight.shape == (width, width // 32, 3, 3)


def test_block_with_a_silent_residual_is_its_shortcut() -> None:
    same = Bottleneck(in_chans=32, out_chans=32, stride=1, groups=4, group_chans=16).eval()
    wider = Bottleneck(in_chans=32, out_chans=64, stride=2, groups=4, group_chans=16).eval()
    x = torch.rand(2, 32, 7, 7)
    for block in (same, wider):
        nn.init.zeros_(block.bn3.weight)
    assert torch.equal(same(x), x)
    assert torch.equal(wider(x), wider.downsample(x).relu())
    assert wider(x).shape == (2, 64, 4, 4)


@pytest.mark.parametrize(("stem", "px", "side"), [("default", 65, 3), ("default", 32, 1), ("cifar", 33, 5)])
def test_map_follows_the_stem(stem: str, px: int, side: int) -> None:
    net: Any = resnext50_32x4d(num_classes=3, stem=stem).eval()
    assert net.forward_features(torch.randn(1, 3, px, px)).shape == (1, 2048, side, side)


def test_cifar_stem_takes_small_pictures_and_another_name_is_refused() -> None:
    net: Any = resnext50_32x4d(num_classes=3, stem="cifar").train()
    assert net(torch.randn(4, 3, 8, 8)).isfinite().all()
    with pytest.raises(UserError, match=r"^scratch/resnext50_32x4d takes pictures of 8 px or more, got 7; raise"):
        net(torch.randn(1, 3, 8, 7))
    with pytest.raises(UserError, match=r"^scratch/resnext50_32x4d has no stem 'deep'; set model.stem to default or c"):
        resnext50_32x4d(num_classes=3, stem="deep")


def test_initialisation_is_he_s() -> None:
    torch.manual_seed(0)
    net: Any = resnext50_32x4d(num_classes=10)
    # torch's fan_out, and so torchvision's, counts the channels of all groups
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            tolerance = 4 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    for _ in range(2):
        assert net.fc.weight.abs().max() <= 1 / math.sqrt(2048)
        assert (net.fc.bias == 0).all()
        net.reset_classifier(5)


def test_coarse_groups_are_stem_stages_and_classifier() -> None:
    with torch.device("meta"):
        nets: Any = resnext29_8x64d(num_classes=10), resnext50_32x4d(num_classes=10)
    for net, coarse, fine in zip(nets, (5, 6), (11, 18), strict=True):
        assert len(group_parameters(net, net.group_matcher(coarse=True))) == coarse
        assert len(group_parameters(net, net.group_matcher())) == fine
