"""Where a phase's time goes: the wait for data, always; a trace of a few steps, where it is asked for."""

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.files import fresh_file
from pipeline.outbox import warn

TRACE = "trace.json.gz"
WAIT, WARM, ACTIVE = 2, 2, 5
"""Batches that a trace leaves out, throws away, and keeps; where fewer are left, all of them are kept."""


class DataWait(Profiler):
    """The seconds that the loops stood still for their next batch: Lightning tells its profiler of each fetch."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds = 0.0
        self._since = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("_next"):
            self._since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("_next"):
            self._seconds += time.perf_counter() - self._since

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Trace(L.Callback):
    """Writes a Chrome trace (chrome://tracing, ui.perfetto.dev) of a phase's first few warm steps.

    Args:
        path: the file, ending in .json.gz; where it is there already, nothing is traced again.
        steps: optimiser steps of the phase at most.
    """

    def __init__(self, path: Path, *, steps: int) -> None:
        self._path, self._steps = path, steps
        self._profile: profile | None = None

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:  # noqa: ARG002, Lightning's signature
        if not trainer.is_global_zero or self._path.exists():
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        else:  # of which the profiler's library would complain on stderr
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        # Of a phase that goes on, what is left of it; none where it is over.
        left = (self._steps - trainer.global_step) * trainer.accumulate_grad_batches
        long = left >= WAIT + WARM + ACTIVE
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM, active=ACTIVE, repeat=1) if long else None,
            on_trace_ready=self._write,
        )
        self._profile.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if self._profile is not None:
            self._profile.step()
            if self._path.exists():
                self._stop()

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:  # noqa: ARG002
        traced = self._profile is not None
        self._stop()
        if traced and not self._path.exists():
            warn("train.profile: the phase ended before a trace could be taken; none is logged for it")

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:  # noqa: ARG002
        self._stop()

    def _stop(self) -> None:
        if self._profile is not None:
            found, self._profile = self._profile, None
            found.stop()

    def _write(self, found: profile) -> None:
        with fresh_file(self._path) as path:
            written = path.with_name(f"{path.name}.json.gz")  # torch goes by the ending
            found.export_chrome_trace(str(written))
            written.replace(path)
