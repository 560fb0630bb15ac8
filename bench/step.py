"""A training step of Thaw against the same step in a bare torch loop, on tensors that lie in memory.

    python bench/step.py --net scratch/lenet5 --px 32 --batch 256
    python bench/step.py --net resnet18 --px 64 --pairs 7 --json step.json

Both sides do the same: normalise, forward, cross-entropy, backward, the same optimiser and schedule, as many steps an
epoch and the same validation after it. Thaw's epoch is the whole of it, with metrics and checkpoints, but for the
tracking store. The two take turns, in one process; the ratio of a pair is the bare loop's seconds by Thaw's, so 1 is
a step without any overhead.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pipeline import config, nets
from pipeline.parameters import TrainParams
from pipeline.training import optim, schedule
from pipeline.training.classifier import Classifier
from pipeline.training.fit import fit

CLASSES = 10
EPOCHS = 3
"""Of which the first warms up, on both sides."""
VALIDATED = 1
"""Batches of validation after an epoch."""
ROOT = Path(__file__).parents[1]

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
    """Seconds of a warm epoch by Thaw."""
    module = _module(net, batches, params)
    outcome = fit(
        module,
        InMemory(batches),  # type: ignore[arg-type]
        params=params,
        folder=folder,
        first_epoch=0,
        first_step=1,  # without the summary that a training begins with
        log=_unlogged,
        sync=lambda: None,
    )
    return statistics.median(row["seconds"] for row in outcome.rows[1:])


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


def _unlogged(metrics: Mapping[str, float], *, step: int) -> None:
    """Tracking has a comparison of its own."""


def _device(params: TrainParams) -> torch.device:
    gpu = torch.cuda.is_available() and params.accelerator != "cpu"
    return torch.device("cuda" if gpu else "cpu")


def _params(asked: argparse.Namespace) -> TrainParams:
    phase = {"trainable": "all", "epochs": EPOCHS, "lr": 1e-3, "weight_decay": 0.01}
    knobs: dict[str, Any] = {
        "phases": {"all": phase},
        "batch_size": asked.batch,
        "precision": asked.precision,
        "channels_last": asked.channels_last,
        "average": "none",
    }
    return config.load(ROOT / "params.yaml", overrides={f"train.{key}": value for key, value in knobs.items()}).train


def _seconds(
    side: Callable[[torch.nn.Module, Batches, TrainParams, Path], float], asked: argparse.Namespace, batches: Batches
) -> float:
    torch.manual_seed(0)
    net = nets.build(asked.net, num_classes=CLASSES)
    # What an epoch prints would stand between the rows.
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        return side(net, batches, _params(asked), Path(folder))


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50, help="an epoch")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    return parser.parse_args()


def main() -> None:
    """Measures the pairs and prints them."""
    asked = _asked()
    drawn = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randint(0, 256, (asked.batch, 3, asked.px, asked.px), dtype=torch.uint8, generator=drawn),
            torch.randint(0, CLASSES, (asked.batch,), generator=drawn),
        )
        for _ in range(asked.steps)
    ]
    pairs = []
    print(f"{asked.net}, {asked.px} px, batch {asked.batch}, {torch.get_num_threads()} threads; ms a step")
    print(f"{'pair':>6} {'bare':>9} {'Thaw':>9} {'ratio':>7}")
    for number in range(asked.pairs):
        sides = (bare, thaw) if number % 2 else (thaw, bare)
        found = {side.__name__: 1000 * _seconds(side, asked, batches) / asked.steps for side in sides}
        pairs.append({**found, "ratio": found["bare"] / found["thaw"]})
        print(f"{number + 1:>6} {found['bare']:>9.2f} {found['thaw']:>9.2f} {pairs[-1]['ratio']:>7.3f}", flush=True)
    ratios = [pair["ratio"] for pair in pairs]
    print(f"median ratio {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    if asked.json:
        figures = {
            "net": asked.net,
            "px": asked.px,
            "batch": asked.batch,
            "threads": torch.get_num_threads(),
            "pairs": pairs,
            "ratio": statistics.median(ratios),
        }
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
