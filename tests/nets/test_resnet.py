import math
from typing import Any

import pytest
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.errors import UserError
from pipeline.nets import resnet
from pipeline.nets.resnet import BasicBlock, Bottleneck, resnet18, resnet20, resnet50

IMAGENET = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "plain18": 11_515_688,
    "plain34": 21_623_848,
}
CIFAR = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}


def number_of_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", IMAGENET)
def test_nets_for_imagenet_have_the_table_s_sizes(name: str) -> None:
    with torch.device("meta"):
        net = getattr(resnet, name)(num_classes=1000)
    assert number_of_parameters(net) == IMAGENET[name]


@pytest.mark.parametrize("depth", CIFAR)
def test_nets_for_cifar_have_the_table_s_sizes_and_layers(depth: int) -> None:
    for kind in ("resnet", "plain"):
        with torch.device("meta"):
            net = getattr(resnet, f"{kind}{depth}")(num_classes=10)
        assert number_of_parameters(net) == CIFAR[depth]
        assert len([m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]) == depth


@pytest.mark.parametrize("px", [8, 9])
def test_option_a_is_every_second_pixel_then_zeros(px: int) -> None:
    block = BasicBlock(in_chans=16, out_chans=32, stride=2, option="A")
    assert block.downsample is not None
    x = torch.randn(2, 16, px, px)
    shortcut = block.downsample(x)
    assert shortcut.shape == block(x).shape
    assert torch.equal(shortcut[:, :16], x[:, :, ::2, ::2])
    assert torch.equal(shortcut[:, 16:], torch.zeros_like(shortcut[:, 16:]))
    assert not list(block.downsample.parameters())


def test_option_b_is_a_convolution_of_every_second_pixel() -> None:
    block = BasicBlock(in_chans=16, out_chans=32, stride=2, option="B").eval()
    assert isinstance(block.downsample, nn.Sequential)
    x = torch.randn(2, 16, 9, 9)
    weight = block.downsample[0].weight[:, :, 0, 0]
    expected = torch.einsum("oc,bchw->bohw", weight, x[:, :, ::2, ::2]) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(block.downsample(x), expected)


@pytest.mark.parametrize("option", ["A", "B"])
def test_block_with_a_silent_residual_is_its_shortcut(option: Any) -> None:
    block = BasicBlock(in_chans=16, out_chans=32, stride=2, option=option).eval()
    nn.init.zeros_(block.bn2.weight)
    assert block.downsample is not None
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), block.downsample(x).relu())


@pytest.mark.parametrize("block_class", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("option", ["A", "B"])
def test_shortcut_of_an_equal_block_is_the_identity(option: Any, block_class: Any) -> None:
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(block_class(in_chans=16, out_chans=16, stride=1, option=option).downsample(x), x)


def test_plain_block_lets_nothing_by() -> None:
    block = BasicBlock(in_chans=16, out_chans=16, stride=1, option="plain").eval()
    nn.init.zeros_(block.bn2.weight)
    assert torch.equal(block(torch.rand(2, 16, 5, 5)), torch.zeros(2, 16, 5, 5))


def test_plain_net_is_the_residual_one_without_its_shortcuts() -> None:
    assert set(resnet.plain20(num_classes=10).state_dict()) == set(resnet20(num_classes=10).state_dict())
    with torch.device("meta"):
        plain, residual = resnet.plain34(num_classes=10), resnet.resnet34(num_classes=10)
    assert {key for key in residual.state_dict() if "downsample" not in key} == set(plain.state_dict())


def test_bottleneck_strides_in_its_3x3_at_a_quarter_of_the_channels() -> None:
    block = Bottleneck(in_chans=256, out_chans=512, stride=2, option="B")
    assert [(c.kernel_size[0], c.stride[0], c.out_channels) for c in (block.conv1, block.conv2, block.conv3)] == [
        (1, 1, 128),
        (3, 2, 128),
        (1, 1, 512),
    ]


@pytest.mark.parametrize(("px", "side"), [(28, 7), (32, 8), (50, 13), (64, 16)])
def test_map_of_a_net_for_cifar_is_a_quarter_of_the_picture(px: int, side: int) -> None:
    net: Any = resnet20(num_classes=10).eval()
    assert net.forward_features(torch.randn(1, 3, px, px)).shape == (1, 64, side, side)


@pytest.mark.parametrize(("stem", "px", "side"), [("default", 65, 3), ("default", 32, 1), ("cifar", 33, 5)])
def test_map_of_a_net_for_imagenet_follows_its_stem(stem: str, px: int, side: int) -> None:
    net: Any = resnet50(num_classes=10, stem=stem).eval()
    assert net.forward_features(torch.randn(1, 3, px, px)).shape == (1, 2048, side, side)


def test_cifar_stem_changes_the_first_convolution_and_the_smallest_side_alone() -> None:
    ours: Any = resnet18(num_classes=10, stem="cifar")
    default: Any = resnet18(num_classes=10)
    shapes = {key: tensor.shape for key, tensor in default.state_dict().items()}
    found = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert {key for key in shapes if shapes[key] != found[key]} == {"conv1.weight"}
    assert ours.pretrained_cfg["min_input_size"] == (3, 8, 8)
    assert ours.train()(torch.randn(4, 3, 8, 8)).isfinite().all()
    with pytest.raises(UserError, match=r"^scratch/resnet18 takes pictures of 8 px or more, got 7; raise"):
        ours(torch.randn(1, 3, 8, 7))
    with pytest.raises(UserError, match=r"^scratch/resnet18 takes pictures of 32 px or more, got 31; raise"):
        default(torch.randn(1, 3, 31, 40))
    assert default.train()(torch.randn(4, 3, 32, 32)).isfinite().all()


def test_unknown_stem_is_refused_with_both_names() -> None:
    with pytest.raises(
        UserError, match=r"^scratch/resnet18 has no stem 'imagenet'; set model.stem to default or cifar$"
    ):
        resnet18(num_classes=10, stem="imagenet")


@pytest.mark.parametrize("build", [resnet20, resnet18])
def test_initialisation_is_he_s(build: Any) -> None:
    torch.manual_seed(0)
    net: Any = build(num_classes=10)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            tolerance = 4 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance), name
            assert abs(module.weight.mean()) < 4 * std / math.sqrt(module.weight.numel()), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    for _ in range(2):
        assert net.fc.weight.abs().max() <= 1 / math.sqrt(net.num_features)
        assert (net.fc.bias == 0).all()
        net.reset_classifier(5)


def test_coarse_groups_are_stem_stages_and_classifier() -> None:
    for net, coarse, fine in ((resnet20(num_classes=10), 5, 11), (resnet18(num_classes=10), 6, 10)):
        matcher: Any = net.group_matcher
        assert len(group_parameters(net, matcher(coarse=True))) == coarse
        assert len(group_parameters(net, matcher())) == fine
