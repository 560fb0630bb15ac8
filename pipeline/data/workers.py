"""Whether loading batches is worth processes of its own, and how many."""

import math
import time
from collections.abc import Callable

from pipeline import machine

EPOCH_S = 5.0
"""Seconds of making batches in an epoch below which workers are not started: starting them takes about as long."""
STEP_S = 0.01
"""Seconds of a quick optimiser step on a GPU: batches that are made faster than one a step keep nobody waiting."""
MOST = 8


def auto(make: Callable[[], object], *, batches: int, processes: int, accelerated: bool) -> int:
    """Workers for a loader of so many batches an epoch, by how long one takes to make here; says so if it is any.

    On a processor the net's own threads want every core: workers get at most a quarter of them. Beside a GPU they get
    all but the one that drives it.

    Args:
        make: makes a batch.
        processes: that train on this machine and share its cores.
        accelerated: whether something else than the processor computes the net.
    """
    mine = machine.cores() // processes
    most = min(MOST, mine - 1 if accelerated else mine // 4)
    if most < 1 or _seconds(make) * batches < EPOCH_S:
        return 0
    # The first batch opens files and imports what it needs.
    one = _seconds(make)
    count = min(most, math.ceil(one / STEP_S)) if one > STEP_S / 2 and one * batches >= EPOCH_S else 0
    if count:
        own = "a process of their own" if count == 1 else f"{count} processes"
        print(f"loading pictures in {own}: a batch takes {1000 * one:.0f} ms to make", flush=True)
    return count


def _seconds(make: Callable[[], object]) -> float:
    start = time.perf_counter()
    make()
    return time.perf_counter() - start
