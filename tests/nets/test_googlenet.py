from typing import Any

import pytest
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.nets.googlenet import Inception, googlenet, googlenet_paper

BOTH = pytest.mark.parametrize("build", [googlenet, googlenet_paper])
SIZES = {
    "conv1": (9_536, 9_472),
    "conv2": (4_224, 4_160),
    "conv3": (110_976, 110_784),
    "inception3a": (155_872, 163_696),
    "inception3b": (340_224, 388_736),
    "inception4a": (364_512, 376_176),
    "aux1": (3_188_968, 3_188_840),
    "inception4b": (425_232, 449_160),
    "inception4c": (486_192, 510_104),
    "inception4d": (573_312, 605_376),
    "aux2": (3_191_016, 3_190_888),
    "inception4e": (803_840, 868_352),
    "inception5a": (978_944, 1_043_456),
    "inception5b": (1_347_040, 1_444_080),
    "fc": (1_025_000, 1_025_000),
}
"""Parameters of each layer of `googlenet` and of `googlenet_paper` at 3 channels and 1000 classes."""


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("build", "column", "with_auxiliary", "without"),
    [(googlenet, 0, 13_004_888, 6_624_904), (googlenet_paper, 1, 13_378_280, 6_998_552)],
)
def test_layers_have_the_table_s_sizes(build: Any, column: int, with_auxiliary: int, without: int) -> None:
    net = build(num_classes=1000)
    assert {name: size for name, layer in net.named_children() if (size := count(layer))} == {
        name: sizes[column] for name, sizes in SIZES.items()
    }
    assert count(net) == with_auxiliary
    assert with_auxiliary - sum(count(head) for head in net.auxiliary_heads()) == without


@BOTH
def test_maps_are_those_of_the_paper_at_224_px(build: Any) -> None:
    net = build(num_classes=2).to("meta")
    at_4a, at_4d, features = net._maps(torch.zeros(1, 3, 224, 224, device="meta"))
    assert (at_4a.shape, at_4d.shape, features.shape) == ((1, 512, 14, 14), (1, 528, 14, 14), (1, 1024, 7, 7))


@pytest.mark.parametrize(("kernel", "reach"), [(3, 1), (5, 2)])
def test_inception_s_third_branch_reaches_as_far_as_its_kernel(kernel: int, reach: int) -> None:
    module = Inception(2, widths=(1, 2, 3, 2, 4, 5), kernel=kernel, batch_norm=False)
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    x = torch.zeros(1, 2, 9, 9)
    x[0, :, 4, 4] = 1
    changed = (module(x) - module(torch.zeros_like(x)))[0].abs() > 0
    # in the paper's order: 1x1, 3x3, 5x5, pool
    for channels, radius in ((slice(0, 1), 0), (slice(1, 4), 1), (slice(4, 8), reach), (slice(8, 13), 1)):
        expected = torch.zeros(9, 9, dtype=torch.bool)
        expected[4 - radius : 5 + radius, 4 - radius : 5 + radius] = True
        assert (changed[channels] == expected).all()


@BOTH
def test_auxiliary_classifiers_cost_nothing_but_where_they_are_asked_for(build: Any) -> None:
    net = build(num_classes=5).train()
    ran = []
    for head in net.auxiliary_heads():
        head.register_forward_hook(lambda *_: ran.append(1))
    x = torch.randn(2, 3, 32, 32)
    assert net(x).shape == (2, 5)
    assert not ran
    assert [logits.shape for logits in net.forward_with_auxiliary(x)] == [(2, 5)] * 3
    assert len(ran) == 2
    net.eval()
    assert torch.equal(net.forward_with_auxiliary(x)[0], net(x))


@BOTH
def test_auxiliary_losses_reach_what_lies_below_them_alone(build: Any) -> None:
    for index, last in ((1, "inception4a"), (2, "inception4d")):
        net = build(num_classes=5)
        net.forward_with_auxiliary(torch.randn(4, 3, 64, 64))[index].square().sum().backward()
        names = [name for name, parameter in net.named_parameters() if parameter.grad is not None]
        assert {name.split(".")[0] for name in names if name.startswith("aux")} == {f"aux{index}"}
        assert [name for name in names if name.startswith("inception")][-1].startswith(last)
        assert net.auxiliary_weight == 0.3


@BOTH
def test_reset_makes_three_new_classifiers(build: Any) -> None:
    net = build(num_classes=5)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    net.reset_classifier(3)
    names = (net.pretrained_cfg["classifier"], *net.pretrained_cfg["auxiliary_classifiers"])
    assert names == ("fc", "aux1.fc2", "aux2.fc2")
    for key, tensor in net.state_dict().items():
        if key.rpartition(".")[0] in names:
            assert tensor.shape[0] == 3
        else:
            assert torch.equal(tensor, before[key])
    assert [logits.shape for logits in net.forward_with_auxiliary(torch.randn(2, 3, 32, 32))] == [(2, 3)] * 3
    assert 0.009 < net.fc.weight.std() < 0.011


def test_torchvision_s_initialisation_is_normal_with_one_hundredth() -> None:
    torch.manual_seed(0)
    for name, module in googlenet(num_classes=100).named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=4 / (2 * module.weight.numel()) ** 0.5), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert module.eps == 0.001


def test_paper_net_s_initialisation_is_he_s_with_small_classifiers() -> None:
    torch.manual_seed(0)
    for name, module in googlenet_paper(num_classes=100).named_modules():
        assert not isinstance(module, nn.BatchNorm2d)
        if isinstance(module, nn.Conv2d | nn.Linear):
            std = 0.01 if module.weight.shape[0] == 100 else (2 / module.weight[0].numel()) ** 0.5
            assert module.weight.std().item() == pytest.approx(std, rel=4 / (2 * module.weight.numel()) ** 0.5), name
            assert (module.bias == 0).all()


def test_dropout_is_the_paper_s_and_torchvision_s() -> None:
    paper, ours = googlenet_paper(num_classes=2), googlenet(num_classes=2)
    assert [module.p for module in paper.modules() if isinstance(module, nn.Dropout)] == [0.7, 0.7, 0.4]
    assert [module.p for module in ours.modules() if isinstance(module, nn.Dropout)] == [0.7, 0.7, 0.2]


@BOTH
def test_smallest_picture_can_be_learnt_from(build: Any) -> None:
    net = build(num_classes=2).train()
    px = net.pretrained_cfg["min_input_size"][1]
    assert px == (15 if build is googlenet else 31)
    assert all(logits.isfinite().all() for logits in net.forward_with_auxiliary(torch.randn(4, 3, px, px)))


def test_auxiliary_classifiers_stand_with_the_inception_that_they_read() -> None:
    net: Any = googlenet(num_classes=2)
    groups = group_parameters(net, net.group_matcher())
    holders = [{name.split(".")[0] for name in groups[index]} for index in sorted(groups)]
    assert holders == [
        {"conv1", "conv2", "conv3"},
        {"inception3a"},
        {"inception3b"},
        {"inception4a", "aux1"},
        {"inception4b"},
        {"inception4c"},
        {"inception4d", "aux2"},
        {"inception4e"},
        {"inception5a"},
        {"inception5b"},
        {"fc"},
    ]
    assert len(group_parameters(net, net.group_matcher(coarse=True))) == 5


def test_colours_are_those_that_torchvision_s_weights_were_trained_with() -> None:
    net: Any = googlenet(num_classes=2)
    assert (net.pretrained_cfg["mean"], net.pretrained_cfg["std"]) == ((0.5,) * 3, (0.5,) * 3)
