"""Groups, optimisers and schedules: who learns at which rate, step by step, and after a resume."""

import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline import nets
from pipeline.errors import UserError
from pipeline.training import optim, schedule

NAMES = ["constant", "cosine", "step", "plateau", "onecycle"]
NETS = ["test_resnet", "test_efficientnet", "test_vit", "scratch/lenet5", "scratch/resnet20"]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def _learn(net: nn.Module, made: torch.optim.Optimizer, *, step: int) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    made.zero_grad()
    F.cross_entropy(net(x), torch.tensor([0, 1, 0, 1])).backward()
    made.step()


def _optimizer(net: nn.Module, **changed: Any) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {"name": "adamw", "lr": 0.1, "weight_decay": 0.05, "layer_decay": 1.0}
    return optim.optimizer(net, **(arguments | changed))


def _two_rates() -> torch.optim.Optimizer:
    return _optimizer(_net(), lr=[0.1, 0.004])


def _scheduler(made: torch.optim.Optimizer, name: str, **changed: Any) -> Any:
    return optim.scheduler(made, **({"name": name, "total_steps": 20, "warmup": "auto"} | changed))


def _steps(made: torch.optim.Optimizer, moves: Any, count: int) -> Iterator[list[float]]:
    """The rates that each step is made at."""
    for _ in range(count):
        yield [group["lr"] for group in made.param_groups]
        made.step()
        if moves is not None:
            moves.step()


def _first_rates(name: str, *, steps: int = 20, **changed: Any) -> list[float]:
    made = _optimizer(_net())
    moves = _scheduler(made, name, total_steps=steps, **changed)
    return [rates[0] for rates in _steps(made, moves, steps)]


def test_weight_decay_is_for_kernels() -> None:
    kernels, others = optim.groups(_net(), weight_decay=0.05, layer_decay=1.0)
    assert kernels == (("0.weight", "3.weight"), 0, 1.0, 0.05)
    assert others == (("0.bias", "1.weight", "1.bias", "3.bias"), 0, 1.0, 0.0)


def test_only_what_learns_is_optimised() -> None:
    net = _net()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    made = _optimizer(net)
    assert {p for group in made.param_groups for p in group["params"]} == set(net[3].parameters())


@pytest.mark.parametrize("name", NETS)
def test_each_layer_learns_at_a_share_of_the_one_above_and_the_classifier_at_the_top(name: str) -> None:
    net = nets.build(name, num_classes=3)
    found = optim.groups(net, weight_decay=0.05, layer_decay=0.5)
    names = [name for group in found for name in group.names]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    layers = [group.layer for group in found]
    assert layers == sorted(layers)
    assert sorted(set(layers)) == list(range(layers[-1] + 1))
    assert [group.scale for group in found] == [0.5 ** (layers[-1] - layer) for layer in layers]
    top = {id(parameter) for parameter in net.get_classifier().parameters()}
    parameters = dict(net.named_parameters())
    assert {id(parameters[n]) for group in found if group.layer == layers[-1] for n in group.names} == top
    made = _optimizer(net, lr=0.3, layer_decay=0.5)
    assert [(g["lr"], g["weight_decay"]) for g in made.param_groups] == [(0.3 * g.scale, g.weight_decay) for g in found]


def test_a_layers_rate_does_not_depend_on_what_learns_beside_it() -> None:
    net = nets.build("test_resnet", num_classes=3)
    whole = {(group.layer, group.scale) for group in optim.groups(net, weight_decay=0.0, layer_decay=0.5)}
    schedule.thaw(net, "last:1")
    part = {(group.layer, group.scale) for group in optim.groups(net, weight_decay=0.0, layer_decay=0.5)}
    assert part < whole
    assert sorted(scale for _, scale in part) == [0.5, 1.0]


def test_rates_of_its_own_are_a_groups_as_they_are() -> None:
    net = nets.build("test_resnet", num_classes=3)
    count = len(optim.groups(net, weight_decay=0.05, layer_decay=0.5))
    rates = [0.01 * (1 + number) for number in range(count)]
    assert [g["lr"] for g in _optimizer(net, lr=rates, layer_decay=0.5).param_groups] == rates


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_timms_factory_steps_as_torch_does(name: str) -> None:
    ours, theirs = _net(), _net()
    made = _optimizer(ours, name=name, lr=[0.01, 0.002])
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.05, "lr": 0.01},
        {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0, "lr": 0.002},
    ]
    torchs = torch.optim.AdamW(groups) if name == "adamw" else torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    for step in range(5):
        _learn(ours, made, step=step)
        _learn(theirs, torchs, step=step)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert not torch.equal(ours[3].weight, _net()[3].weight)


@pytest.mark.parametrize("name", ["lamb", "lion", "adan", "lars", "muon", "madgrad", "adafactor"])
def test_another_optimiser_lowers_the_loss_at_its_groups_rates_through_one_cycle(name: str) -> None:
    optim.check_optimizer(name)
    net = _net()
    made = _optimizer(net, name=name, lr=0.01)
    moves = _scheduler(made, "onecycle", total_steps=10)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1])
    losses = []
    for _ in range(10):

        def closure() -> torch.Tensor:
            made.zero_grad()
            loss = F.cross_entropy(net(x), labels)
            loss.backward()
            return loss

        losses.append(float(made.step(closure).detach()))  # as Lightning steps
        moves.step()
    assert losses[-1] < losses[0]
    assert [group["weight_decay"] for group in made.param_groups] == [0.05, 0.0]


def test_an_unknown_optimiser_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^rmsprob: timm has no such optimiser; did you mean rmsprop or "):
        optim.check_optimizer("rmsprob")
    with pytest.raises(UserError, match="lookahead_adamw: timm has no such optimiser"):
        optim.check_optimizer("lookahead_adamw")


@pytest.mark.parametrize(
    ("name", "needs"), [("adahessian", "second derivatives"), ("bnbadam", "bitsandbytes"), ("fusedlamb", "apex")]
)
def test_an_optimiser_that_does_not_run_here_is_refused_with_what_it_needs(
    name: str, needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "find_spec", lambda package: None)  # noqa: ARG005, as importlib's
    with pytest.raises(UserError, match=f"^{name}: this optimiser needs .*{needs}.*; take another, such as adamw"):
        optim.check_optimizer(name)


def test_an_optimiser_that_needs_a_package_runs_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "find_spec", lambda package: None)  # noqa: ARG005
    with pytest.raises(UserError, match="kron: this optimiser needs the package opt_einsum"):
        optim.check_optimizer("kron")
    monkeypatch.setattr(optim, "find_spec", lambda package: package)
    optim.check_optimizer("kron")


def test_constant_needs_no_schedule() -> None:
    assert _scheduler(_two_rates(), "constant") is None
    assert _scheduler(_two_rates(), "constant", warmup=0.0) is None
    assert _first_rates("constant") == [0.1] * 20


def test_cosine_is_torchs() -> None:
    made, theirs = _two_rates(), _two_rates()
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=200)
    ours = _steps(made, _scheduler(made, "cosine", total_steps=200), 201)
    for mine, expected in zip(ours, _steps(theirs, torchs, 201), strict=True):
        assert mine == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_step_drops_to_a_tenth_at_half_and_at_three_quarters() -> None:
    expected = [0.1] * 10 + [0.1 * 0.1] * 5 + [0.1 * 0.1**2] * 5
    assert _first_rates("step") == expected


def test_one_cycle_peaks_where_the_warm_up_ends() -> None:
    rates = _first_rates("onecycle", steps=100)
    assert rates[29] == max(rates) == pytest.approx(0.1, rel=1e-12)
    assert rates[0] == pytest.approx(0.1 / 25)
    assert rates[-1] == pytest.approx(0.1 / 25 / 1e4)
    rates = _first_rates("onecycle", steps=100, warmup=0.1)
    assert rates[9] == max(rates) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize(("steps", "warmup"), [(1, "auto"), (2, "auto"), (10, 0.1), (20, 0.05), (10, 0.0)])
def test_one_cycle_over_few_steps_has_rates_all_the_same(steps: int, warmup: Any) -> None:
    rates = _first_rates("onecycle", steps=steps, warmup=warmup)
    assert all(0 < rate <= 0.1 for rate in rates)
    assert max(rates) > 0.08


def test_an_optimiser_without_momentum_has_a_cycle_of_rates_alone() -> None:
    made = _optimizer(_net(), name="adagrad")
    assert max(rates[0] for rates in _steps(made, _scheduler(made, "onecycle"), 20)) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["constant", "cosine", "step", "plateau"])
def test_a_warm_up_climbs_in_a_line_to_the_base_rate(name: str) -> None:
    rates = _first_rates(name, warmup=0.2)
    assert rates[:5] == pytest.approx([0.1 * share / 5 for share in range(1, 6)], rel=1e-15)
    assert rates[4] == 0.1


def test_cosine_after_a_warm_up_falls_to_nothing_over_the_other_steps() -> None:
    rates = _first_rates("cosine", warmup=0.2)
    assert rates[4:] == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 16)) for step in range(16)], rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", ["auto", 0.25])
def test_groups_keep_the_ratio_of_their_rates_at_every_step(name: str, warmup: Any) -> None:
    made = _two_rates()
    for upper, lower in _steps(made, _scheduler(made, name, warmup=warmup), 20):
        assert lower == pytest.approx(0.04 * upper, rel=1e-12)


def test_plateau_drops_after_two_validations_that_are_no_better() -> None:
    made = _two_rates()
    moves = _scheduler(made, "plateau")
    seen = []
    for value in [1.0, 0.9, 0.9, 0.95, 0.95, 0.8, 0.9, 0.9]:
        list(_steps(made, moves, 1))
        moves.judge(value, mode="min")
        seen.append([group["lr"] for group in made.param_groups])
        assert moves.get_last_lr() == seen[-1]
    drops = [0, 0, 0, 1, 1, 1, 1, 2]  # the second 0.95 is the first of a new count
    assert seen == [[0.1 * 0.1**n, 0.004 * 0.1**n] for n in drops]


def test_plateau_of_accuracies_wants_higher_ones() -> None:
    made = _two_rates()
    moves = _scheduler(made, "plateau")
    for value in (0.5, 0.6, 0.7):
        moves.judge(value, mode="max")
    assert made.param_groups[0]["lr"] == 0.1
    for value in (0.7, 0.2):
        moves.judge(value, mode="max")
    assert made.param_groups[0]["lr"] == 0.1 * 0.1


def test_a_judgement_moves_no_other_schedule() -> None:
    made = _two_rates()
    moves = _scheduler(made, "cosine")
    for value in (1.0, 2.0, 3.0, 4.0):
        moves.judge(value, mode="min")
    assert made.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_phase_has_the_rates_and_the_weights_of_an_uninterrupted_one(name: str) -> None:
    def run(begin: int, end: int, kept: bytes | None) -> tuple[list[Any], nn.Module, bytes]:
        net = _net()
        made = _optimizer(net, lr=[0.1, 0.004])
        moves = _scheduler(made, name, warmup=0.25)
        if kept is not None:
            state = torch.load(io.BytesIO(kept), weights_only=True)
            net.load_state_dict(state["net"])
            made.load_state_dict(state["optimizer"])
            moves.load_state_dict(state["scheduler"])
        rates = []
        for step in range(begin, end):
            rates.append([group["lr"] for group in made.param_groups])
            _learn(net, made, step=step)
            moves.step()
            if step % 3 == 2 and isinstance(moves, optim.Rates):
                moves.judge(1.0, mode="min")
        buffer = io.BytesIO()
        state = {"net": net.state_dict(), "optimizer": made.state_dict(), "scheduler": moves.state_dict()}
        torch.save(state, buffer)
        return rates, net, buffer.getvalue()

    whole_rates, whole, _ = run(0, 20, None)
    _, _, kept = run(0, 7, None)
    rates, net, _ = run(7, 20, kept)
    assert rates == whole_rates[7:]
    assert all(map(torch.equal, net.parameters(), whole.parameters()))


def test_torch_finds_the_calls_in_order() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name in NAMES:
            _first_rates(name, warmup=0.25)
    assert told == []


@pytest.mark.parametrize("name", ["adamw", "sgd", "adam", "lamb"])
def test_one_kernel_for_all_takes_the_same_steps(name: str) -> None:
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))
        pixels = torch.randn(8, 1, 4, 4)
        made = optim.optimizer(net, name=name, lr=0.01, weight_decay=0.1, layer_decay=1.0, fused=fused)
        assert bool(made.defaults.get("fused")) == (fused and name != "lamb")
        for _ in range(3):
            made.zero_grad()
            net(pixels).square().sum().backward()
            made.step()
        found.append([parameter.detach().clone() for parameter in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
