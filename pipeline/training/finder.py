"""The learning-rate finder: a short trial training whose rate climbs, for all layers together and for each by itself.

Smith, "Cyclical Learning Rates for Training Neural Networks", 2017. A rate is judged by how fast the loss falls while
the rates around it are at work, so that a handful of batches, over and over, is enough.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.training import optim
from pipeline.training.optim import Group

BLOCKS = 8
"""Sweeps of single layers at most: beyond that, neighbours are swept together."""
SMOOTHING = 0.8
"""Share of the average of losses that a step keeps."""
DIVERGED = 4.0
"""Times the lowest loss, at which a sweep ends."""
FALL = 0.01
"""Share of the first loss by which it must fall somewhere; less is noise."""
STEEP = 0.8
"""Share of the steepest slope that counts as steep: the highest such rate is taken. With this and what follows, on six
pairs of net and optimiser (LeNet-5 with adamw and lamb; tf_efficientnet_lite0's head and all of it, each with adamw and
mixup and with sgd; Fashion-MNIST at 32 px) the rate lay at 0.3 to 2.4 of the best of a grid for 40 one-cycle steps."""
WINDOW = 0.5
"""Powers of ten of the rate that a slope is taken over; one between two steps of a sweep is mostly noise."""
DESCENT = 0.9
"""Share of the whole fall after which the loss has arrived: it may zigzag on and find its minimum much later."""
MARGIN = 3.0
"""The rate to train with is at most the one of the lowest loss divided by this: the smoothed loss lags behind."""
CEILING = 2.0
"""A layer's own rate is at most this times the joint one, which is what the whole net was seen to bear."""


B = TypeVar("B")


class Sweep(NamedTuple):
    """A trial training whose rate climbs from step to step."""

    group: str
    """The layers that learn in it."""
    rates: list[float]
    losses: list[float]
    """Smoothed: after the step at that rate, an exponential average over the steps before, corrected for its start."""
    suggestion: float
    """The rate to train with; of all layers, where they have rates of their own, what these are balanced around."""


class Found(NamedTuple):
    """What the finder found."""

    rates: list[float]
    """One a group of `optim.groups`, in their order, as `optim.optimizer` takes them."""
    sweeps: list[Sweep]


def find(
    step: Callable[[nn.Module, B], Tensor],
    net: nn.Module,
    batches: Sequence[B],
    *,
    optimizer: str,
    weight_decay: float,
    layer_decay: float,
    clip: float,
    accumulate: int,
    seed: int,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
) -> Found:
    """Looks for the learning rates of a phase.

    First all layers together, at one rate that climbs in equal factors from `low` to `high`. Where layers have rates of
    their own (`layer_decay` below 1) and several learn, those are found as well, in place of what `layer_decay` would
    give: each layer is swept alone, in a quarter of the steps, the others standing still. Standing still and not
    learning slowly: else the loss would fall whatever the layer does, and the sweep would tell of the others. Where the
    loss is read for the rate is told by `suggest`, and what becomes of the layers' own rates by `_balanced`.

    A batch's loss is taken relative to what it was at first, and its random numbers (dropout, mixup) are the same each
    time, so that batches are comparable, however few.

    Every sweep trains a deep copy: the net, its buffers and modes, and the random numbers to come stay as they are.

    Args:
        step: the loss of a batch on the net, as training has it (same precision, loss, penalties).
        net: in the phase's mode, with the phase's parameters learning.
        batches: on the net's device; gone through again and again, so one is enough.
        optimizer, weight_decay, layer_decay: as `optim.optimizer` takes them.
        clip: largest norm of the gradient; 0 for no limit.
        accumulate: batches that make one step together.
        seed: of what is random in `step`.
        low, high: rates to look between.
        steps: of the sweep of all layers.

    Raises:
        UserError: the loss is not finite at first, or falls at no rate.
    """
    groups = optim.groups(net, weight_decay=weight_decay, layer_decay=layer_decay)
    wholes = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    everyone = range(len(groups))
    make = partial(
        optim.optimizer, name=optimizer, lr=[low] * len(groups), weight_decay=weight_decay, layer_decay=layer_decay
    )
    with _random_numbers_kept():
        trial = _Trial(step=step, net=net, wholes=wholes, make=make, clip=clip, seed=seed, low=low, high=high)
        levels = trial.levels()
        joint = trial.sweep("all layers", everyone, levels=levels, steps=steps)
        if joint is None:
            raise UserError(f"train.lr find: the loss falls at no rate between {low:g} and {high:g}; give a number")
        blocks = _blocks(groups)
        if len(blocks) == 1:
            return Found([joint.suggestion for _ in everyone], [joint])
        sweeps = [trial.sweep(block.name, block.groups, levels=levels, steps=steps // 4) for block in blocks]
    fell = [(block, sweep) for block, sweep in zip(blocks, sweeps, strict=True) if sweep is not None]
    alone = {number: sweep.suggestion for block, sweep in fell for number in block.groups}
    rates = [min(high, rate) for rate in _balanced(joint.suggestion, [alone.get(number) for number in everyone])]
    return Found(rates, [joint, *(sweep._replace(suggestion=rates[block.groups[0]]) for block, sweep in fell)])


def _balanced(joint: float, alone: Sequence[float | None]) -> list[float]:
    """Groups' rates in company, from the one that suits all and those that suit each alone.

    Alone a layer bears a higher rate than in company, and a short sweep is rough: so each rate is half-way, in
    logarithms, from the joint one to its own, all times one factor that leaves the joint one their geometric mean. None
    is for a layer that does nothing alone (below a head of zeros there is no gradient): it counts as at the joint rate,
    and does not end above it. The others end at CEILING times the joint rate at most.
    """
    departures = np.array([0.0 if own is None else math.log(own / joint) / 2 for own in alone])
    most = [joint if own is None else CEILING * joint for own in alone]
    return [float(rate) for rate in np.minimum(joint * np.exp(departures - departures.mean()), most)]


class _Block(NamedTuple):
    """Layers that are swept together."""

    name: str
    groups: list[int]
    """Their places among all groups."""


@dataclass(frozen=True, kw_only=True)
class _Trial(Generic[B]):
    """What all sweeps of a phase have in common."""

    step: Callable[[nn.Module, B], Tensor]
    net: nn.Module
    wholes: list[Sequence[B]]
    """The batches of each step."""
    make: Callable[[nn.Module], torch.optim.Optimizer]
    clip: float
    seed: int
    low: float
    high: float

    def levels(self) -> list[float]:
        """The loss of each whole batch at first.

        Raises:
            UserError: One is not finite.
        """
        copy = deepcopy(self.net)
        with torch.no_grad():
            found = [sum(float(loss) for loss in self._losses(copy, number)) for number in range(len(self.wholes))]
        if not np.isfinite(found).all():
            raise UserError("train.lr find: the loss is not finite before any step; look at the pictures and weights")
        return found

    def sweep(self, name: str, numbers: Iterable[int], *, levels: Sequence[float], steps: int) -> Sweep | None:
        """Trains the groups of these numbers at a rate that climbs; None where the loss does not fall."""
        net = deepcopy(self.net)
        optimizer = self.make(net)
        # The others stand still: optimisers pass over what has no gradient.
        moving = [optimizer.param_groups[number] for number in numbers]
        parameters = [parameter for group in moving for parameter in group["params"]]
        rates = [float(rate) for rate in np.geomspace(self.low, self.high, steps + 1)]
        level = best = float(np.mean(levels))
        change = 0.0
        losses: list[float] = []
        for number, rate in enumerate(rates):
            optimizer.zero_grad()
            loss = 0.0
            for part in self._losses(net, number % len(levels)):
                part.backward(inputs=parameters)  # type: ignore[no-untyped-call]
                loss += float(part.detach())
            if number:  # what the step before has come to, at the rate before
                change = SMOOTHING * change + (1 - SMOOTHING) * (loss - levels[number % len(levels)])
                losses.append(level + change / (1 - SMOOTHING**number))
                best = min(best, losses[-1])
                if not losses[-1] <= DIVERGED * best:  # nor if it is not a number
                    losses.pop()
                    break
            if self.clip:
                nn.utils.clip_grad_norm_(parameters, self.clip)
            for group in moving:
                group["lr"] = rate
            optimizer.step()
        rates = rates[: len(losses)]
        suggestion = suggest(rates, losses, level=level)
        return None if suggestion is None else Sweep(name, rates, losses, suggestion)

    def _losses(self, net: nn.Module, number: int) -> Iterator[Tensor]:
        """The parts of a step's loss, each computed when it is asked for."""
        keys = np.random.SeedSequence((self.seed, number)).generate_state(2)
        torch.manual_seed(int(keys[0]))
        np.random.seed(int(keys[1]))  # timm's mixup draws from it
        for batch in self.wholes[number]:
            yield self.step(net, batch) / len(self.wholes[number])


def suggest(rates: Sequence[float], losses: Sequence[float], *, level: float) -> float | None:
    """The rate to train with, by how steeply the loss falls over the rate's logarithm; None where it falls nowhere.

    It is the highest rate at which the loss still falls about as steeply as anywhere: a descent over several powers of
    ten has its steepest point anywhere in it. A slope is that of a straight line through the points around it (least
    squares, over half a power of ten), and only the descent counts, to where nine tenths of the fall are done: what
    zigzags after that is noise. At any rate it stays well below where the loss is lowest.

    Args:
        rates: climbing in equal factors.
        losses: smoothed, one a rate.
        level: the loss before the first step.
    """
    lowest = int(np.argmin(losses)) if losses else 0
    if not losses or losses[lowest] > (1 - FALL) * level:
        return None
    arrived = level - DESCENT * (level - losses[lowest])
    end = int(np.flatnonzero(np.array(losses) <= arrived)[0])
    most = max(rates[0], rates[lowest] / MARGIN)
    slopes = _slopes(rates, losses, level=level, last=lowest)[: end + 1]
    steep = rates[int(np.flatnonzero(slopes <= STEEP * slopes.min())[-1])]
    return min(steep, most)


def _slopes(rates: Sequence[float], losses: Sequence[float], *, level: float, last: int) -> npt.NDArray[np.float64]:
    """The slope at each rate to the last one that counts, over steps of the rate's logarithm; before the first, the
    loss is at its level."""
    step = math.log10(rates[1] / rates[0]) if len(rates) > 1 else WINDOW
    reach = max(1, round(WINDOW / step / 2))
    points = np.array([*[level] * reach, *losses[: last + 1]])
    found = []
    for place in range(last + 1):
        around = points[place : place + 2 * reach + 1]  # from `reach` before it, to as many after it
        found.append(np.polyfit(np.arange(len(around)), around, 1)[0])
    return np.array(found)


def _blocks(groups: Sequence[Group]) -> list[_Block]:
    """The layers in a few blocks of neighbours, the input side first; the uppermost is by itself."""
    layers = sorted({group.layer for group in groups})
    below = np.array_split(layers[:-1], min(BLOCKS - 1, max(1, len(layers) - 1)))
    found = []
    for block in [*(part.tolist() for part in below if len(part)), layers[-1:]]:
        ends = [_name(groups, layer) for layer in (block[0], block[-1])]
        name = ends[0] if len(block) == 1 else " to ".join(ends)
        found.append(_Block(name, [number for number, group in enumerate(groups) if group.layer in block]))
    return found


def _name(groups: Sequence[Group], layer: int) -> str:
    """What the names of a layer's parameters begin with in common; else the first one's module."""
    names = [name for group in groups if group.layer == layer for name in group.names]
    modules = [name.split(".")[:-1] or [name] for name in names]
    pairs = zip(min(modules), max(modules), strict=False)
    return ".".join([one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)] or modules[0])


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """What is drawn in the block changes nothing of what is drawn after it."""
    state = np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.accelerator.device_count())):
            yield
    finally:
        np.random.set_state(state)
