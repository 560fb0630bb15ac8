"""Several nets side by side: their measures, their speed on this machine, and their published errors."""

import statistics
import time
from dataclasses import dataclass

import torch
from torchvision import models

from pipeline import nets
from pipeline.analysis.anatomy import Anatomy

ROUNDS = 7
"""Batches that each net is timed on."""
WEIGHTS = "IMAGENET1K_V1"
"""torchvision's weights whose errors are shown: those trained most nearly as in the papers."""


@dataclass(frozen=True)
class Compared:
    """A row of --compare."""

    net: str
    px: int
    parameters: int
    macs: int
    activation_bytes: int
    peak_bytes: int
    pictures_per_second: float
    """The median of `ROUNDS` batches."""
    slowest: float
    fastest: float
    top1_error: float | None
    """Percent, published with torchvision's `weights`; None where torchvision has no net of that name."""
    top5_error: float | None
    weights: str | None


def published(name: str) -> tuple[float, float] | None:
    """Top-1 and top-5 error in percent on ImageNet's validation split, of torchvision's net of that name.

    They are those in torchvision's description of its weights `WEIGHTS`; nothing is fetched. None where it has none.
    """
    bare = name.removeprefix("scratch/").partition(".")[0]
    if bare not in models.list_models(module=models):
        return None
    found = models.get_model_weights(bare).__members__.get(WEIGHTS)
    if found is None:
        return None
    metrics = found.value.meta["_metrics"]["ImageNet-1K"]
    return round(100 - metrics["acc@1"], 3), round(100 - metrics["acc@5"], 3)


def compare(measured: list[Anatomy], *, batch: int) -> list[Compared]:
    """Times nets, `batch` pictures at a time, and looks up what is published of them."""
    rows = []
    for anatomy, seconds in zip(measured, _time(measured, batch=batch), strict=True):
        speeds = [batch / second for second in seconds]
        errors = published(anatomy.net)
        row = Compared(
            net=anatomy.net,
            px=anatomy.px,
            parameters=anatomy.parameters,
            macs=anatomy.macs,
            activation_bytes=anatomy.activation_bytes,
            peak_bytes=anatomy.peak_bytes,
            pictures_per_second=statistics.median(speeds),
            slowest=min(speeds),
            fastest=max(speeds),
            top1_error=errors[0] if errors else None,
            top5_error=errors[1] if errors else None,
            weights=WEIGHTS if errors else None,
        )
        rows.append(row)
    return rows


def _time(measured: list[Anatomy], *, batch: int) -> list[list[float]]:
    """Seconds of `ROUNDS` batches for each net, on one thread of the CPU, after one that does not count.

    The nets take turns, so that whatever else the machine does falls on all of them.
    """
    built = [nets.build(one.net, num_classes=one.num_classes, in_chans=one.in_chans).eval() for one in measured]
    pictures = [torch.rand(batch, one.in_chans, one.px, one.px) for one in measured]
    seconds: list[list[float]] = [[] for _ in measured]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(1 + ROUNDS):
                for net, x_bchw, times in zip(built, pictures, seconds, strict=True):
                    start = time.perf_counter()
                    net(x_bchw)
                    times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return [times[1:] for times in seconds]
