"""A net in two parts gives what the whole gives, and the cut lies below all that learns or is random."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import nets
from pipeline.training import cut, schedule

FAST = [
    "scratch/lenet5",
    "scratch/resnet20",
    "scratch/ablation_inception",
    "scratch/preact_resnet18",
    "scratch/vgg11_bn",
]
FAST += ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "resnet18", "tf_efficientnet_lite0"]
TIMM = [
    "densenet121",
    "swin_tiny_patch4_window7_224",
    "xcit_nano_12_p8_224",
    "levit_128",
    "nfnet_f0",
    "mobilenetv3_small_050",
]
SLOW = sorted({*nets.scratch_names(), *TIMM} - set(FAST))


def _prepared(name: str, trainable: str, **given: Any) -> tuple[nn.Module, int]:
    """A net in a phase's mode, with batch norms that have seen something, and the side of its pictures."""
    torch.manual_seed(0)
    net = nets.build(name, num_classes=5, **given)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    config: Any = net.pretrained_cfg
    px = config["input_size"][1] if config.get("fixed_input_size") else max(nets.min_px(net), 32)
    _phase(net, trainable)
    return net, px


def _phase(net: nn.Module, trainable: str) -> None:
    schedule.thaw(net, trainable)
    net.train()
    schedule.set_mode(net)


def _both(net: nn.Module, found: cut.Cut, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the whole and of the parts, with the same random numbers."""
    whole, parts = deepcopy(net), deepcopy(net)
    torch.manual_seed(1)
    expected = whole(x)
    with torch.no_grad():
        crossing = found.below(parts)(x)
    torch.manual_seed(1)
    return expected, found.logits(parts, crossing)


@pytest.mark.parametrize("trainable", ["head", "last:2"])
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_parts_give_what_the_whole_gives(name: str, trainable: str) -> None:
    net, px = _prepared(name, trainable)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    attributes = set(vars(net))
    found = cut.find(net, in_chans=3, px=px)
    assert modes == [module.training for module in net.modules()]
    assert attributes == set(vars(net))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    x = torch.randn(4, 3, px, px)
    for training in (True, False):
        if not training:
            net.eval()
        expected, parts = _both(net, found, x)
        torch.testing.assert_close(parts, expected, atol=1e-5, rtol=1e-5)
    learning = {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
    assert not any(id(parameter) in learning for parameter in found.below(net).parameters())


@pytest.mark.slow
def test_a_compiled_part_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net, px = _prepared("scratch/resnet20", "last:1")
    found = cut.find(net, in_chans=3, px=px)
    crossing = found.below(net)(torch.randn(4, 3, px, px))
    expected = found.logits(deepcopy(net), crossing)
    compiled: list[torch.nn.Module] = []
    compile_it = torch.fx.GraphModule.compile
    monkeypatch.setattr(torch.fx.GraphModule, "compile", lambda self: (compiled.append(self), compile_it(self))[1])
    torch.testing.assert_close(found.logits(net, crossing, compiled=True), expected, atol=1e-5, rtol=1e-5)
    assert len(compiled) == 2


def test_dropout_stays_above_the_cut_and_draws_anew_each_time() -> None:
    net, px = _prepared("test_efficientnet", "head", drop_rate=0.5)
    found = cut.find(net, in_chans=3, px=px)
    (crossing,) = found.crossings
    assert crossing.shape == (net.head_hidden_size,)
    x = torch.randn(4, 3, px, px)
    expected, parts = _both(net, found, x)
    torch.testing.assert_close(parts, expected)
    features = found.below(net)(x)
    assert torch.equal(features[0], found.below(net)(x)[0])
    assert not torch.equal(found.logits(net, features), found.logits(net, features))
    net.eval()
    assert torch.equal(found.logits(net, features), found.logits(net, features))


def test_stochastic_depth_of_what_learns_stays_above_the_cut() -> None:
    net, px = _prepared("scratch/efficientnet_b0", "last:3", drop_path_rate=0.5)
    found = cut.find(net, in_chans=3, px=px)
    x = torch.randn(4, 3, px, px)
    expected, parts = _both(net, found, x)
    torch.testing.assert_close(parts, expected, atol=1e-5, rtol=1e-5)
    features = found.below(net)(x)
    assert not torch.equal(found.logits(net, features), found.logits(net, features))


def test_batch_norms_that_learn_follow_the_batch() -> None:
    net, px = _prepared("scratch/resnet20", "last:2")
    found = cut.find(net, in_chans=3, px=px)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found.logits(net, found.below(net)(torch.randn(4, 3, px, px)))
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".running_" in name or "num_batches" in name for name in moved)
    assert not moved & set(found.below(net).state_dict())


def test_gradients_are_those_of_the_whole() -> None:
    net, px = _prepared("scratch/resnet20", "last:2")
    found = cut.find(net, in_chans=3, px=px)
    x = torch.randn(4, 3, px, px)
    twin = deepcopy(net)
    net(x).square().sum().backward()
    with torch.no_grad():
        features = found.below(twin)(x)
    found.logits(twin, features).square().sum().backward()
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_a_copy_runs_its_own_weights() -> None:
    net, px = _prepared("test_resnet", "head")
    found = cut.find(net, in_chans=3, px=px)
    features = found.below(net)(torch.randn(2, 3, px, px))
    first = found.logits(net, features)
    other = deepcopy(net)
    with torch.no_grad():
        other.get_classifier().weight.zero_()
        other.get_classifier().bias.fill_(3.0)
    assert torch.equal(found.logits(other, features), torch.full((2, 5), 3.0))
    assert torch.equal(found.logits(net, features), first)


@pytest.mark.parametrize(
    ("trainable", "reason"),
    [
        ("all", "first layers learn"),
        ("head+params:conv1.0.weight", "first layers learn"),
        ("params:*.bias", "too little work"),
    ],
)
def test_where_the_first_layers_learn_there_is_no_cut(trainable: str, reason: str) -> None:
    net, px = _prepared("test_resnet", trainable)
    with pytest.raises(cut.CannotCutError, match=reason):
        cut.find(net, in_chans=3, px=px)


def test_layers_that_mix_pictures_are_not_cut() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
            self.first.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            whole = self.first(x).mean(dim=(0, 2, 3))
            logits: torch.Tensor = self.head(whole)
            return logits

    with pytest.raises(cut.CannotCutError, match="keep pictures apart"):
        cut.find(Mixing(), in_chans=3, px=8)


def test_a_net_that_cannot_be_traced_says_so() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
            self.first.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).mean(dim=(2, 3))
            return self.head(x) if x.sum() > 0 else self.head(-x)  # type: ignore[no-any-return]

    with pytest.raises(cut.CannotCutError, match="cannot be traced"):
        cut.find(Branching(), in_chans=3, px=8)


def test_it_is_found_without_weights() -> None:
    with torch.device("meta"):
        net, px = nets.build("resnet18", num_classes=5), 64
        _phase(net, "head")
        (crossing,) = cut.find(net, in_chans=3, px=px).crossings
    assert crossing.shape == (512,)
