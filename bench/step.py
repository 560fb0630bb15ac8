"""A training step of Thaw against the same step in a bare torch loop, on tensors that lie in memory.

    python bench/step.py [--net NAME ...] [--pairs 5]

Both sides do the same: normalise, forward, cross-entropy, backward, the same optimiser and schedule, as many steps an
epoch and the same validation after it. Thaw's epoch is the whole of it, with metrics and its checkpoint, but for the
tracking store. The two take turns, in one process, which keeps the memory that tensors free; the ratio of a pair is the
bare loop's seconds by Thaw's, so 1 is a step without any overhead: at least 0.95 for nets of some size, 0.85 for
LeNet-5. In bf16 on a processor Thaw's is the faster one, by its ways to a gradient (pipeline/training/backward.py). On
two cores 10 minutes.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common import ROOT, Bench, Comparison, Target, has_bf16, parser, ratios, rounds
from pipeline import machine, nets
from pipeline.parameters import TrainParams
from pipeline.training import optim, schedule
from pipeline.training.classifier import Classifier
from pipeline.training.fit import fit
from project import checked

CLASSES = 10
EPOCHS = 3
"""Of which the first warms up, on both sides."""
VALIDATED = 1
"""Batches of validation after an epoch."""

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class InMemory(L.LightningDataModule):
    """Batches that are there already."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self._batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._batches[:VALIDATED], batch_size=None)  # type: ignore[arg-type]


def thaw(net: torch.nn.Module, batches: Batches, params: TrainParams, folder: Path) -> float:
    """Seconds of a warm epoch by Thaw, from one's end to the next's: with the checkpoint between them."""
    module = _module(net, batches, params)
    ends: list[float] = []

    def noted(metrics: Mapping[str, float], *, step: int) -> None:  # noqa: ARG001
        if "epoch" in metrics:
            ends.append(time.monotonic())

    fit(
        module,
        InMemory(batches),  # type: ignore[arg-type]
        params=params,
        folder=folder,
        first_epoch=0,
        first_step=0,
        log=noted,
        sync=lambda: None,
    )
    return statistics.median(end - begin for begin, end in pairwise(ends))


def bare(net: torch.nn.Module, batches: Batches, params: TrainParams, folder: Path) -> float:  # noqa: ARG001
    """Seconds of a warm epoch by a loop that does nothing else."""
    module = _module(net, batches, params)
    phase, device = module.phase, _device(params)
    module.to(device)
    optimizer = optim.optimizer(net, name=phase.optimizer, lr=float(phase.lr), weight_decay=0.01, layer_decay=1.0)
    rates = optim.scheduler(optimizer, name=phase.scheduler, total_steps=EPOCHS * len(batches), warmup="auto")
    assert rates is not None
    layout = torch.channels_last if params.channels_last else torch.contiguous_format
    bf16 = params.precision == "bf16-mixed"
    seconds = []
    for _ in range(EPOCHS):
        began = time.monotonic()
        net.train()
        for cpu_pixels, cpu_labels in batches:
            pixels, labels = cpu_pixels.to(device), cpu_labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                prepared = module.normalize(pixels).contiguous(memory_format=layout)
                loss = F.cross_entropy(net(prepared), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
        net.eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for cpu_pixels, cpu_labels in batches[:VALIDATED]:
                prepared = module.normalize(cpu_pixels.to(device)).contiguous(memory_format=layout)
                float(F.cross_entropy(net(prepared), cpu_labels.to(device)))
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds[1:])


def _module(net: torch.nn.Module, batches: Batches, params: TrainParams) -> Classifier:
    pixels = batches[0][0]
    (phase,) = schedule.plan(params, net, px=pixels.shape[-1], random_start=False)
    mean, std = nets.normalization(net, in_chans=3)
    pictures = sum(len(labels) for _, labels in batches)
    return Classifier(
        net,
        phase=phase,
        params=params,
        pictures=pictures,
        num_classes=CLASSES,
        mean=mean,
        std=std,
    )


def _device(params: TrainParams) -> torch.device:
    gpu = torch.cuda.is_available() and params.accelerator != "cpu"
    return torch.device("cuda" if gpu else "cpu")


def _params(case: "Case") -> TrainParams:
    phase = {"trainable": "all", "epochs": EPOCHS, "lr": 1e-3, "weight_decay": 0.01}
    knobs: dict[str, Any] = {
        "phases": {"all": phase},
        "batch_size": case.batch,
        "average": "none",
        "precision": case.precision,
    }
    return checked(ROOT / "params.yaml", overrides={f"train.{key}": value for key, value in knobs.items()}).train


class Case(NamedTuple):
    """A net, its pictures, and how long an epoch is."""

    net: str
    px: int
    batch: int
    steps: int
    target: Target
    precision: str = "32-true"

    def __str__(self) -> str:
        at = "" if self.precision == "32-true" else f", {self.precision}"
        return f"{self.net} at {self.px} px, batch {self.batch}{at}"


CASES = (
    Case("scratch/lenet5", 32, 256, 200, Target(at_least=0.85)),
    Case("resnet18", 64, 64, 30, Target(at_least=0.95)),
    Case("tf_efficientnet_lite0", 128, 32, 20, Target(at_least=0.95)),
    Case("tf_efficientnet_lite0", 128, 32, 20, Target(at_least=0.95), "bf16-mixed"),
)


def main() -> None:
    """Measures every case."""
    made = parser(__doc__)
    made.add_argument("--net", nargs="+", choices=list(dict.fromkeys(case.net for case in CASES)), default=[])
    asked = made.parse_args()
    machine.keep_memory()  # as the train stage does
    bench = Bench("step", asked)
    cases = [case for case in CASES if case.net in asked.net] or (CASES[:1] if asked.quick else CASES)
    for case in cases:
        if case.precision == "bf16-mixed" and not has_bf16():
            bench.lacks(str(case), "this processor does not compute bf16 itself")
            continue
        batches = _drawn(case._replace(steps=4) if asked.quick else case)
        sides = {
            side.__name__: lambda side=side, case=case, batches=batches: _seconds(side, case, batches)
            for side in (thaw, bare)
        }
        found = rounds(sides, number=asked.pairs)
        bench.comparisons.append(
            Comparison(
                name=f"a step in memory, {case}",
                ratio_of="time of a bare loop's epoch / Thaw's",
                ratios=ratios(found["bare"], found["thaw"]),
                target=case.target,
                sides={f"{name}, s": values for name, values in found.items()},
            )
        )
    bench.write()


def _drawn(case: Case) -> Batches:
    drawn = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, 256, (case.batch, 3, case.px, case.px), dtype=torch.uint8, generator=drawn),
            torch.randint(0, CLASSES, (case.batch,), generator=drawn),
        )
        for _ in range(case.steps)
    ]


def _seconds(
    side: Callable[[torch.nn.Module, Batches, TrainParams, Path], float], case: Case, batches: Batches
) -> float:
    torch.manual_seed(0)
    net = nets.build(case.net, num_classes=CLASSES)
    # What an epoch prints would stand between the rounds.
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        return side(net, batches, _params(case), Path(folder))


if __name__ == "__main__":
    main()
