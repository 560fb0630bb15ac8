import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.errors import UserError
from pipeline.nets import preact_resnet
from pipeline.nets.preact_resnet import (
    BasicUnit,
    BottleneckUnit,
    preact_resnet18,
    preact_resnet50,
    preact_resnet110,
    preact_resnet164,
)

PARAMETERS = {
    ("preact_resnet18", 1000): 11_687_720,
    ("preact_resnet50", 1000): 25_549_352,
    ("preact_resnet110", 10): 1_730_522,
    ("preact_resnet164", 10): 1_703_258,
}


def silence(units: nn.Module) -> None:
    """Every residual branch gives zeros."""
    for unit in units.modules():
        if isinstance(unit, BasicUnit | BottleneckUnit):
            nn.init.zeros_((unit.conv2 if isinstance(unit, BasicUnit) else unit.conv3).weight)


@pytest.mark.parametrize(("name", "num_classes"), PARAMETERS)
def test_nets_have_the_table_s_sizes(name: str, num_classes: int) -> None:
    with torch.device("meta"):
        net = getattr(preact_resnet, name)(num_classes=num_classes)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name, num_classes]


@pytest.mark.parametrize(("build", "depth"), [(preact_resnet110, 110), (preact_resnet164, 164)])
def test_layers_are_as_many_as_the_name_says(build: Any, depth: int) -> None:
    with torch.device("meta"):
        net = build(num_classes=10)
    layers = [key for key, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in key]
    assert len(layers) == depth


@pytest.mark.parametrize("training", [False, True])
def test_identity_path_is_clean(training: bool) -> None:
    """With silent branches a stage whose shape stays gives back its input, negative values and all."""
    stage = preact_resnet18(num_classes=3).get_submodule("stages.0").train(training)
    units = preact_resnet164(num_classes=3).get_submodule("stages.1.blocks")
    assert isinstance(units, nn.Sequential)
    rest = units[1:].train(training)
    for module, chans in ((stage, 64), (rest, 128)):
        silence(module)
        x = torch.randn(2, chans, 6, 6)
        assert torch.equal(module(x), x)


def test_gradient_reaches_the_input_of_a_stage_undimmed() -> None:
    stage = preact_resnet18(num_classes=3).get_submodule("stages.0")
    silence(stage)
    x = torch.randn(2, 64, 6, 6, requires_grad=True)
    direction = torch.randn(2, 64, 6, 6)
    (stage(x) * direction).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, direction)


@pytest.mark.parametrize("unit_class", [BasicUnit, BottleneckUnit])
def test_projection_reads_the_activation_that_the_branch_reads(unit_class: Any) -> None:
    unit = unit_class(in_chans=16, out_chans=32, stride=2, starts=False).eval()
    silence(unit)
    nn.init.constant_(unit.norm1.bias, 0.1)
    x = torch.randn(2, 16, 9, 9)
    active = F.relu(unit.norm1(x))
    expected = F.conv2d(active, unit.downsample.conv.weight, stride=2)
    torch.testing.assert_close(unit(x), expected)


def test_first_unit_of_the_nets_for_cifar_activates_before_the_paths_part() -> None:
    net: Any = preact_resnet110(num_classes=3).eval()
    first, second = net.stages[0].blocks[:2]
    silence(net)
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(first(x), F.relu(first.norm1(x)))
    assert torch.equal(second(x), x)
    assert second.downsample is None


def test_last_sum_is_normalised_and_activated() -> None:
    net: Any = preact_resnet110(num_classes=3).eval()
    nn.init.constant_(net.norm.bias, -0.1)
    x = torch.randn(2, 3, 16, 16)
    before = net.stages(net.stem(x))
    assert (before < 0).any()
    assert torch.equal(net.forward_features(x), F.relu(net.norm(before)))


@pytest.mark.parametrize(
    ("build", "theirs"), [(preact_resnet18, "resnetv2_18"), (preact_resnet50, "resnetv2_50")], ids=["18", "50"]
)
def test_timm_s_weights_give_timm_s_logits(build: Any, theirs: str) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(theirs, num_classes=5, zero_init_last=False).eval()
    state = reference.state_dict()
    for key, tensor in state.items():
        if "norm" in key and tensor.is_floating_point():
            tensor.add_(0.5 * torch.rand(tensor.shape))
    net = build(num_classes=5).eval()
    # timm's classifier is a 1x1 convolution
    net.load_state_dict({key: t.flatten(1) if key == "head.fc.weight" else t for key, t in state.items()})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("stem", "px", "side"), [("default", 65, 3), ("default", 32, 1), ("cifar", 33, 5)])
def test_map_of_a_net_for_imagenet_follows_its_stem(stem: str, px: int, side: int) -> None:
    net: Any = preact_resnet18(num_classes=3, stem=stem).eval()
    assert net.forward_features(torch.randn(1, 3, px, px)).shape == (1, 512, side, side)


def test_cifar_stem_takes_small_pictures_and_another_name_is_refused() -> None:
    net: Any = preact_resnet50(num_classes=3, stem="cifar").train()
    assert net(torch.randn(4, 3, 8, 8)).isfinite().all()
    with pytest.raises(UserError, match=r"^scratch/preact_resnet50 takes pictures of 8 px or more, got 7; raise"):
        net(torch.randn(1, 3, 8, 7))
    with pytest.raises(UserError, match=r"^scratch/preact_resnet18 has no stem 'deep'; set model.stem to default or c"):
        preact_resnet18(num_classes=3, stem="deep")


@pytest.mark.parametrize("build", [preact_resnet18, preact_resnet164])
def test_initialisation_is_he_s(build: Any) -> None:
    torch.manual_seed(0)
    net: Any = build(num_classes=10)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            tolerance = 4 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    for _ in range(2):
        assert net.head.fc.weight.abs().max() <= 1 / math.sqrt(net.num_features)
        assert (net.head.fc.bias == 0).all()
        net.reset_classifier(5)


def test_last_norm_is_in_the_last_unit_s_group() -> None:
    with torch.device("meta"):
        net: Any = preact_resnet50(num_classes=10)
    for coarse, count in ((True, 6), (False, 18)):
        groups = group_parameters(net, net.group_matcher(coarse=coarse))
        assert len(groups) == count
        assert groups[count - 2][-2:] == ["norm.weight", "norm.bias"]
