"""The finder's rates train well, each layer has its own, and the search leaves no trace."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.training import finder, optim
from pipeline.training.finder import Found

Pair = tuple[Tensor, Tensor]


def _batches(count: int, size: int = 16) -> list[Pair]:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=draw)
    labels = [torch.randint(0, 3, (size,), generator=draw) for _ in range(count)]
    return [(centres[each] + 0.7 * torch.randn(size, 8, generator=draw), each) for each in labels]


def _net(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def _cross_entropy(net: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def _find(
    net: nn.Module, batches: Any, *, step: Callable[[nn.Module, Any], Tensor] = _cross_entropy, **changed: Any
) -> Found:
    arguments: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 0.0, "layer_decay": 1.0, "clip": 0.0}
    return finder.find(step, net, batches, **(arguments | {"accumulate": 1, "seed": 0} | changed))


class Layers(nn.Module):
    """A chain that speaks as much of timm's interface as layers of their own need."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        pairs = list(pairwise(sizes))
        self.blocks = nn.ModuleList(nn.Linear(*pair) for pair in pairs[:-1])
        self.head = nn.Linear(*pairs[-1])
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.gain * block(x).relu()
        return self.head(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002, timm's interface
        return {"blocks": r"^blocks\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        return self.head


class Bowls(Layers):
    """Two independent quadratics, the lower layer's as much more curved as said; both begin at a loss of 1/2."""

    def __init__(self, *, curvature: float) -> None:
        super().__init__(1, 4, 4)
        self.requires_grad_(False)
        self.curvatures = (curvature, 1.0)
        for weight, size in zip(self.weights(), self.curvatures, strict=True):
            weight.fill_((size * weight.numel()) ** -0.5)
            weight.requires_grad_(True)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.blocks[0].weight, self.head.weight

    def loss(self) -> Tensor:
        pairs = zip(self.weights(), self.curvatures, strict=True)
        return sum((0.5 * size * weight.square().sum() for weight, size in pairs), torch.zeros(()))


def _bowls(net: nn.Module, batch: None) -> Tensor:  # noqa: ARG001
    assert isinstance(net, Bowls)
    return net.loss()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_rate_is_within_a_factor_of_ten_of_the_best(name: str) -> None:
    batches = _batches(8)
    grid = np.geomspace(1e-5, 1, 16)
    reached = []
    for rate in grid:
        net = _net()
        made = optim.optimizer(net, name=name, lr=float(rate), weight_decay=0.0, layer_decay=1.0)
        for number in range(24):
            made.zero_grad()
            _cross_entropy(net, batches[number % 8]).backward()
            made.step()
        with torch.no_grad():
            reached.append(sum(float(_cross_entropy(net, batch)) for batch in batches))
    best = grid[int(np.argmin(reached))]
    found = _find(_net(), batches, optimizer=name)
    (rate,) = set(found.rates)
    assert len(found.rates) == 2  # kernels, and biases and norms
    assert best / 10 < rate < best * 10
    assert found.sweeps[0].suggestion == rate


def test_one_batch_is_enough() -> None:
    net, (batch,) = _net(), _batches(1)
    (rate,) = set(_find(net, [batch]).rates)
    made = optim.optimizer(net, name="sgd", lr=rate, weight_decay=0.0, layer_decay=1.0)
    first = _cross_entropy(net, batch).item()
    for _ in range(24):
        made.zero_grad()
        _cross_entropy(net, batch).backward()
        made.step()
    assert _cross_entropy(net, batch).item() < first / 4


def test_a_bowl_a_hundred_times_as_curved_gets_a_hundredth_of_the_rate() -> None:
    rates = []
    for curvature in (10.0, 1000.0):
        net = Bowls(curvature=curvature)
        net.head.requires_grad_(False)
        (rate,) = _find(net, [None], step=_bowls).rates
        assert rate < 2 * (1 + 0.9) / (1 + 2 * 0.9) / curvature  # where Nesterov's momentum diverges
        rates.append(rate)
    assert rates[0] / rates[1] == pytest.approx(100, rel=0.35)


def test_layers_of_other_sensitivity_get_other_rates_around_the_joint_one() -> None:
    found = _find(Bowls(curvature=9.0), [None], step=_bowls, layer_decay=0.5)
    joint, low, high = found.sweeps
    assert [low.group, high.group] == ["blocks.0", "head"]
    assert found.rates == [low.suggestion, high.suggestion]
    assert high.suggestion == pytest.approx(3 * low.suggestion, rel=0.35)  # half-way to 9, in logarithms
    assert (low.suggestion * high.suggestion) ** 0.5 == pytest.approx(joint.suggestion)


def test_no_layer_learns_at_more_than_twice_the_joint_rate() -> None:
    found = _find(Bowls(curvature=1000.0), [None], step=_bowls, layer_decay=0.5)
    joint, low, high = found.sweeps
    assert low.suggestion < joint.suggestion
    assert found.rates[1] == high.suggestion == pytest.approx(2 * joint.suggestion)


def test_a_layer_that_does_nothing_alone_does_not_end_above_the_joint_rate() -> None:
    assert finder._balanced(0.3, [None, 0.03]) == [0.3, pytest.approx(0.3 * 10**-0.25)]
    assert finder._balanced(0.3, [None, 3.0]) == [pytest.approx(0.3 * 10**-0.25), pytest.approx(0.3 * 10**0.25)]


def test_layers_alike_get_rates_alike() -> None:
    found = _find(Bowls(curvature=1.0), [None], step=_bowls, layer_decay=0.5)
    assert found.rates == [pytest.approx(found.sweeps[0].suggestion)] * 2


def test_a_layer_whose_input_is_amplified_learns_more_slowly_than_the_classifier() -> None:
    net = Layers(8, 16, 3)
    net.gain = 30.0
    with torch.no_grad():
        net.head.weight /= 30.0
    found = _find(net, _batches(8), optimizer="adamw", layer_decay=0.5)
    groups = optim.groups(net, weight_decay=0.0, layer_decay=0.5)
    rates = {name: rate for group, rate in zip(groups, found.rates, strict=True) for name in group.names}
    assert rates["blocks.0.weight"] == rates["blocks.0.bias"] != rates["head.weight"] == rates["head.bias"]
    made = optim.optimizer(net, name="adamw", lr=found.rates, weight_decay=0.0, layer_decay=0.5)
    assert [group["lr"] for group in made.param_groups] == found.rates


def test_a_layer_without_gradient_below_a_head_of_zeros_counts_as_one_at_the_joint_rate() -> None:
    net = Layers(8, 16, 3)
    nn.init.zeros_(net.head.weight)
    found = _find(net, _batches(8), layer_decay=0.5)
    joint, head = found.sweeps
    assert head.group == "head"
    body, *_, top = found.rates
    assert body * top == pytest.approx(joint.suggestion**2)


def test_many_layers_are_swept_in_a_few_blocks_and_the_classifier_by_itself() -> None:
    net = Layers(8, *[32] * 12, 3)
    net.gain = 6**0.5  # keeps the size of what passes through
    found = _find(net, _batches(2), optimizer="adamw", layer_decay=0.9)
    assert len(found.sweeps) <= 1 + finder.BLOCKS
    assert [sweep.group for sweep in found.sweeps][-2:] == ["blocks.11", "head"]
    assert "blocks.0 to blocks.1" in [sweep.group for sweep in found.sweeps]
    assert len(found.rates) == 26


def test_a_head_alone_needs_no_sweeps_of_single_layers() -> None:
    net = Layers(8, 16, 3)
    net.blocks.requires_grad_(False)
    found = _find(net, _batches(8), layer_decay=0.5)
    assert len(found.sweeps) == 1
    assert found.rates == [found.sweeps[0].suggestion] * 2


def test_the_search_leaves_net_modes_and_random_numbers_as_they_were() -> None:
    net = _net(dropout=0.5)
    net[1].eval()
    before = deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    torch.manual_seed(7)
    np.random.seed(7)
    _find(net, _batches(3), optimizer="adamw")
    drawn, numpy_drawn = torch.rand(3), np.random.rand(3)
    torch.manual_seed(7)
    np.random.seed(7)
    assert torch.equal(drawn, torch.rand(3))
    assert np.array_equal(numpy_drawn, np.random.rand(3))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.grad is None for parameter in net.parameters())


def test_random_numbers_are_kept_where_the_search_fails() -> None:
    net = _net()
    torch.manual_seed(7)
    with pytest.raises(UserError):
        _find(net, _batches(1), step=lambda net, batch: 0 * _cross_entropy(net, batch) + 1)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


def test_the_search_is_the_same_again_and_another_for_another_seed() -> None:
    first, again, other = (_find(_net(dropout=0.5), _batches(3), seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.sweeps[0].losses != other.sweeps[0].losses


def test_a_sweep_ends_where_the_loss_is_four_times_the_lowest() -> None:
    (sweep,) = _find(Bowls(curvature=100.0), [None], step=_bowls).sweeps
    assert len(sweep.rates) == len(sweep.losses) < 100
    assert max(sweep.losses[sweep.losses.index(min(sweep.losses)) :]) <= 4 * min(sweep.losses)
    assert sweep.rates[0] == 1e-6
    assert sweep.rates[-1] < 1


def test_parts_of_a_batch_make_one_step() -> None:
    batches = _batches(2)
    halves = [(x[part], y[part]) for x, y in batches for part in (slice(8), slice(8, 16))]
    net = Layers(8, 16, 3)
    (whole,), (parts,) = _find(net, batches).sweeps, _find(net, halves, accumulate=2).sweeps
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_a_gradient_that_is_clipped_bears_a_higher_rate() -> None:
    net = Bowls(curvature=100.0)
    free, clipped = (_find(net, [None], step=_bowls, clip=clip).rates[0] for clip in (0.0, 0.1))
    assert clipped > 5 * free


def test_a_loss_that_falls_at_no_rate_asks_for_a_number() -> None:
    with pytest.raises(UserError, match=r"train.lr find: the loss falls at no rate between 1e-06 and 1; give a number"):
        _find(_net(), _batches(1), step=lambda net, batch: 0 * _cross_entropy(net, batch) + 1)


def test_a_loss_that_is_not_finite_is_told_at_once() -> None:
    with pytest.raises(UserError, match=r"train\.lr find: the loss is not finite before any step"):
        _find(_net(), [(torch.full((4, 8), float("nan")), torch.tensor([0, 1, 2, 0]))])


RATES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
FINE = [float(rate) for rate in np.geomspace(1e-6, 1, 101)]


def _curve(*, falls: float = 1e-3, rises: float = 0.3, noise: float = 0.0) -> list[float]:
    """A loss from 2 to 1 that falls around one rate and explodes from another on."""
    drawn = np.random.default_rng(0).standard_normal(len(FINE))
    lasting = np.convolve(drawn, 0.2 * 0.8 ** np.arange(30))[: len(FINE)]  # as the smoothing leaves it
    logs = np.log10(FINE)
    fall = 1 / (1 + np.exp(-4 * (logs - np.log10(falls))))
    rise = np.exp(np.maximum(0, 12 * (logs - np.log10(rises)))) - 1
    return [float(loss) for loss in 2 - fall + rise + noise * lasting]


def test_the_rate_is_one_at_which_the_loss_falls_steeply() -> None:
    losses = _curve()
    found = finder.suggest(FINE, losses, level=2.0)
    assert found is not None
    assert 1e-3 <= found <= 3e-3
    slopes = -np.diff(losses)
    assert slopes[FINE.index(found)] > 0.7 * slopes[:80].max()


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2])
def test_noise_moves_the_rate_little(noise: float) -> None:
    found = finder.suggest(FINE, _curve(noise=noise), level=2.0)
    assert found is not None
    assert 2.5e-4 <= found <= 6e-3


def test_the_last_zigzag_before_the_loss_explodes_is_no_descent() -> None:
    losses = _curve()
    last = FINE.index(min(FINE, key=lambda rate: abs(rate - 0.22)))
    for place, change in ((last - 2, 0.1), (last - 1, 0.2), (last, -0.1)):  # up, and steeply down to the minimum
        losses[place] += change
    assert losses[last] == min(losses)
    found = finder.suggest(FINE, losses, level=2.0)
    assert found == pytest.approx(finder.suggest(FINE, _curve(), level=2.0), rel=0.5)


def test_the_rate_keeps_a_margin_to_the_lowest_loss() -> None:
    losses = _curve(falls=0.03, rises=0.04)  # explodes in mid-descent
    found = finder.suggest(FINE, losses, level=2.0)
    assert found is not None
    assert found <= FINE[int(np.argmin(losses))] / 3
    assert finder.suggest(RATES, [1.5, 1.6, 1.7], level=2.0) == 1e-4  # at the begin there is nothing below


def test_a_fall_of_less_than_a_hundredth_is_none() -> None:
    assert finder.suggest(RATES, [2.0, 1.985, 2.5], level=2.0) is None
    assert finder.suggest(RATES, [2.0, 1.975, 2.5], level=2.0) is not None
    assert finder.suggest([], [], level=2.0) is None
