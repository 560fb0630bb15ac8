"""auto_tune: how a net computes fastest on this machine, by a short trial before it is trained.

The trial takes real batches through a copy of the net: the net itself, its buffers and the state of every random
generator are left as they were. What it chose is kept below data/cache/tuned by all that it depends on, and a later
training of the same length takes it from there.
"""

import hashlib
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from pipeline import machine, paths
from pipeline.data.datamodule import Batch, PictureData
from pipeline.data.store import Store
from pipeline.files import fresh_file, make_folder
from pipeline.outbox import warn
from pipeline.parameters import Config, ModelParams, TrainParams
from pipeline.training import optim, schedule
from pipeline.training.classifier import Classifier
from pipeline.training.progress import Progress
from pipeline.training.schedule import Phase
from pipeline.training.weights import ModelCard

WARM, STEPS = 3, 20
"""Steps before those that count, and those, of each way of computing."""
FEWEST = 5
"""Steps that count however long they take: the median of fewer may be noise."""
LONGEST_S = 10.0
"""Seconds after which a way has been seen for long enough, if the fewest steps are done."""
PAYS = 3
"""Times the steps of a whole trial that a phase must have: with fewer it costs more than the fastest way gains."""
BATCHES = 4
"""Real batches that the steps go through in turn."""
COMPILED_AFTER_S = 1800.0
"""Seconds of plain training below which compiling is not tried: it takes minutes, and may gain a few per cent."""
WORTH = 0.97
"""A way must take less than this share of the time of the one before it, or the difference may be noise."""
NO_WAIT = 0.03
"""Share of a step's time that loading may take before workers are tried."""
QUIET = 0.8
"""A way with loading takes at least this share of its time without, unless something else disturbed the trial."""
MOST_WORKERS = 8
Option = TypeVar("Option")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What auto_tune sets in `train`."""

    precision: str
    channels_last: bool
    compile: bool
    workers: int | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way of computing, as it was measured."""

    precision: str
    channels_last: bool
    compile: bool
    workers: int | None
    """Processes that loaded its batches; None for batches that were there already."""
    step_ms: float
    """Median of the trial's optimiser steps."""
    first_s: float
    """The first step by itself, with all that is prepared or compiled in it."""
    chosen: bool


class Way(NamedTuple):
    """Of computing a step."""

    precision: str
    channels_last: bool
    compile: bool


class Pace(NamedTuple):
    """Of a way, in seconds: its first step, and the median of those after it."""

    first: float
    step: float


def tuned(
    config: Config,
    store: Store,
    net: nn.Module,
    card: ModelCard,
    *,
    phases: Sequence[Phase],
    cached: Collection[str],
    progress: Progress,
) -> TrainParams:
    """`train` with what auto_tune chose for this training: before a stop, in one of the like, or now.

    One choice serves all phases: that of the phase with the most to compute backwards.

    Args:
        net: as training begins with it.
        cached: phases whose frozen layers run once for each picture. They count as a single epoch from the pictures
            on, and are tried as one: the filling of their cache is what takes long in them.
    """
    params = config.train
    if not params.auto_tune:
        return params
    if progress.tuned:
        print(f"auto_tune goes on with {_named(progress.tuned['choice'])}", flush=True)
    else:
        pictures = len(store.indices("train"))
        steps = {
            phase.name: phase.steps_an_epoch(pictures) if phase.name in cached else phase.total_steps(pictures)
            for phase in phases
        }
        phase = max(phases, key=lambda phase: _learning(net, phase) * steps[phase.name])
        choice, rows = _settled(config, store, net, card, phase=phase, total_steps=steps[phase.name])
        progress.tune(asdict(choice), [asdict(row) for row in rows])
        if rows:
            print(told(choice, rows), flush=True)
    return params.model_copy(update=progress.tuned["choice"])


def _settled(
    config: Config, store: Store, net: nn.Module, card: ModelCard, *, phase: Phase, total_steps: int
) -> tuple[Choice, list[Row]]:
    """What a training of the like found, or a trial, or, where that does not pay, what is set, without rows."""
    params = config.train
    key = key_of(config.model, params, phase, store, px=card.px, total_steps=total_steps)
    make_folder(_kept(key).parent)
    with FileLock(_kept(key).with_suffix(".lock")):  # two that try the same at once would disturb each other
        if (found := known(key)) is None:
            found = _tried(params, store, net, card, phase=phase, total_steps=total_steps)
            keep(key, *found)
        elif found[1]:
            print(f"auto_tune: the like was tried before ({_kept(key)})", flush=True)
    if not found[1]:
        print(f"auto_tune: phase {phase.name} is too short to be tried: it computes as it is set", flush=True)
    return found


def pays(total_steps: int, *, ways: int, step_s: Callable[[], float]) -> bool:
    """Whether a phase is long enough for a trial.

    Args:
        ways: of computing that are tried.
        step_s: finds out how long a step takes, in seconds; called where the answer depends on it.
    """

    def enough(counted: float) -> bool:
        return total_steps >= PAYS * ways * (WARM + counted)

    return enough(FEWEST) and (enough(STEPS) or enough(LONGEST_S / step_s() - WARM))


def choose(
    make: Callable[[Way], Classifier],
    load: Callable[[int], Iterable[Batch]],
    *,
    device: torch.device,
    total_steps: int,
    as_set: Choice,
) -> tuple[Choice, list[Row]]:
    """The fastest way to compute a phase, and the trial's table.

    Args:
        make: a Classifier of the phase that computes in that way, on a copy of the net.
        load: the phase's training batches, loaded by so many worker processes.
        total_steps: optimiser steps of the phase, which the trial and compiling must pay for themselves in.
        as_set: what is taken where the trial would not, without rows.
    """
    ways = _ways(device)
    with untouched_randomness():

        def step_s() -> float:
            found = _fitting(make, ways[0], _endless(load(0)), device=device, steps=1)
            return found.step if found else math.inf

        if not pays(total_steps, ways=len(ways), step_s=step_s):
            return as_set, []
        print("auto_tune: trying a few steps", flush=True)
        batches = list(islice(load(0), BATCHES))
        paces = {way: found for way in ways if (found := _fitting(make, way, cycle(batches), device=device))}
        if not paces:
            raise torch.OutOfMemoryError  # as the training itself would
        best = fastest({way: found.step for way, found in paces.items()})
        plain = paces[best].step * total_steps
        if plain > COMPILED_AFTER_S:
            way = best._replace(compile=True)
            if found := _fitting(make, way, cycle(batches), device=device):
                paces[way] = found
                if found.first + found.step * total_steps < WORTH * plain:
                    best = way
        loaded = {0: pace(make(best), _endless(load(0)), device=device)}
        more = min(machine.cores(), MOST_WORKERS)
        if more > 1 and loaded[0].step > (1 + NO_WAIT) * paces[best].step:
            loaded[more] = pace(make(best), _endless(load(more)), device=device)
        workers = fastest({count: found.step for count, found in loaded.items()})
    if loaded[0].step < QUIET * paces[best].step:
        warn(
            "auto_tune: steps on pictures that had to be loaded were faster than those on pictures in memory, so the "
            "machine was busy otherwise; where the trial should be made again, delete data/cache/tuned"
        )
    rows = [_row(way, found, workers=None, chosen=way == best) for way, found in paces.items()]
    rows += [_row(best, found, workers=count, chosen=count == workers) for count, found in loaded.items()]
    return Choice(**best._asdict(), workers=workers), rows


def _fitting(
    make: Callable[[Way], Classifier],
    way: Way,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    steps: int = STEPS,
) -> Pace | None:
    """The pace of a way of computing; None where the device's memory does not hold it."""
    try:
        return pace(make(way), batches, device=device, steps=steps)
    except torch.OutOfMemoryError:
        print(f"auto_tune: {', '.join(map(str, way))} needs more memory than there is", flush=True)
        return None


def pace(module: Classifier, batches: Iterable[Batch], *, device: torch.device, steps: int = STEPS) -> Pace:
    """Times the optimiser steps of a module that is there for nothing else, on batches that do not end.

    Args:
        steps: that count, at most.
    """
    least = WARM + min(FEWEST, steps)
    module.to(device)
    phase = module.phase
    optimizer = optim.optimizer(
        module.net,
        name=phase.optimizer,
        lr=1e-6,  # the values do not matter, and must not run away
        weight_decay=phase.weight_decay,
        layer_decay=phase.layer_decay,
        fused=module.precision != "16-mixed",
    )
    module.train()
    coming = iter(batches)
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < WARM + steps and (len(seconds) < least or time.perf_counter() - began < LONGEST_S):
        start = time.perf_counter()
        for _ in range(phase.accumulate):
            pixels, labels = next(coming)
            with torch.autocast(device.type, torch.bfloat16, enabled=module.precision == "bf16-mixed"):
                loss = module.losses(module.net, (pixels.to(device), labels.to(device)))[0]
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    module.close()
    return Pace(first=seconds[0], step=statistics.median(seconds[WARM:]))


def fastest(steps: Mapping[Option, float]) -> Option:
    """The option with the shortest step; the earlier one where a later is faster by too little to tell."""
    best, *others = steps
    for option in others:
        if steps[option] < WORTH * steps[best]:
            best = option
    return best


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """The state of every generator after the block is the one before it."""
    own, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(own)
    np.random.set_state(legacy)


def known(key: str) -> tuple[Choice, list[Row]] | None:
    """What an earlier training of the like took on this machine; None where there is none that can be read."""
    try:
        found = json.loads(_kept(key).read_text(encoding="utf-8"))
        return Choice(**found["choice"]), [Row(**row) for row in found["table"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(key: str, choice: Choice, rows: list[Row]) -> None:
    """Keeps what a training takes for later ones of the like."""
    with fresh_file(_kept(key)) as path:
        kept = {"choice": asdict(choice), "table": [asdict(row) for row in rows]}
        path.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def key_of(model: ModelParams, params: TrainParams, phase: Phase, store: Store, *, px: int, total_steps: int) -> str:
    """Names all that a choice depends on: machine, torch, net, pictures, step, how many steps, and what is set."""
    device = machine.device(params.accelerator)
    facts = {
        # By what it is and not by its name, which a container has anew each time.
        "machine": [
            platform.machine(),
            machine.processor(),
            machine.cores(),
            torch.get_num_threads(),
            machine.has_bf16(device),
        ],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "model": model.model_dump(),
        "pictures": [store.meta.dataset, store.meta.px, store.meta.channels],
        "px": [px, phase.px],
        "batch": [phase.batch_size, phase.accumulate],
        "trainable": phase.trainable,
        "optimizer": phase.optimizer,
        "steps": total_steps,
        "train": params.model_dump(include=COUNTS),
        "as set": asdict(_as_set(params)),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


COUNTS = {"frozen_bn", "loss", "l1", "activity", "mixup", "cutmix", "average", "transforms"}
"""Parameters of `train` that change what a step or a batch costs."""


def told(choice: Choice, rows: Sequence[Row]) -> str:
    """The trial's table, for the terminal: ways of computing, then loading for the fastest; an arrow at each's best."""
    lines = [f"{'precision':>12} {'channels_last':>13} {'compile':>7} {'workers':>9} {'ms a step':>10} {'first, s':>9}"]
    for row in rows:
        loaded = "in memory" if row.workers is None else str(row.workers)
        lines.append(
            f"{row.precision:>12} {row.channels_last!s:>13} {row.compile!s:>7} {loaded:>9} {row.step_ms:>10.1f} "
            f"{row.first_s:>9.2f}{'  <-' if row.chosen else ''}"
        )
    return "\n".join([*lines, f"auto_tune takes {_named(asdict(choice))}"])


def _named(choice: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in choice.items())


def _tried(
    params: TrainParams, store: Store, net: nn.Module, card: ModelCard, *, phase: Phase, total_steps: int
) -> tuple[Choice, list[Row]]:
    def make(way: Way) -> Classifier:
        return Classifier(
            deepcopy(net),
            phase=phase,
            params=params.model_copy(update=way._asdict()),
            pictures=len(store.indices("train")),
            num_classes=len(card.classes),
            mean=card.mean,
            std=card.std,
        )  # without a teacher, which costs the same in every way

    def load(workers: int) -> Iterable[Batch]:
        return PictureData(
            store,
            px=card.px,
            in_chans=card.in_chans,
            batch_size=phase.batch_size,
            parts=phase.accumulate,
            chosen=params.transforms,
            strength=phase.strength,
            seed=params.seed,
            workers=workers,
        ).train_dataloader()

    device = machine.device(params.accelerator)
    return choose(make, load, device=device, total_steps=total_steps, as_set=_as_set(params))


def _as_set(params: TrainParams) -> Choice:
    return Choice(**{choice.name: getattr(params, choice.name) for choice in fields(Choice)})


def _ways(device: torch.device) -> list[Way]:
    """Those that are tried first, without compiling."""
    precisions = ["32-true", *(["bf16-mixed"] if machine.has_bf16(device) else [])]
    return [Way(precision, layout, False) for precision in precisions for layout in (False, True)]


def _learning(net: nn.Module, phase: Phase) -> int:
    tried = deepcopy(net)
    schedule.thaw(tried, phase.trainable)
    return sum(parameter.numel() for parameter in tried.parameters() if parameter.requires_grad)


def _row(way: Way, found: Pace, *, workers: int | None, chosen: bool) -> Row:
    return Row(**way._asdict(), workers=workers, step_ms=1000 * found.step, first_s=found.first, chosen=chosen)


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def _kept(key: str) -> Path:
    return paths.cache() / "tuned" / f"{key}.json"
