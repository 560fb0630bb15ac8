"""Checkpoints of a phase: written whole or not at all, taken up where they can be read, and when a phase is over.

A checkpoint holds everything that the rest of the phase follows from: weights, optimiser, schedule, the place in the
epoch, the rows of earlier epochs. Random numbers need no place in it: they are drawn from (seed, epoch, batch). So a
training that was stopped, however it was stopped, goes on to the very weights that it would have had.
"""

import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from pipeline.errors import UserError
from pipeline.files import fresh_file, sync
from pipeline.outbox import warn

CHECKPOINTS = LAST, BEFORE, BEST = "last.ckpt", "before.ckpt", "best.ckpt"
SPACED_S = 5.0
"""Seconds after a checkpoint in which none is due: of quick steps and short epochs it would be a large part."""
LEADER_S = 20.0
"""Seconds that a rank that was told to stop waits for the leader to do so."""


class Checkpoints(L.Callback):
    """Writes last.ckpt every so many steps, at each epoch's end, and on a signal to stop.

    Where steps or epochs are short, those that would follow the last one within some seconds are left out, but for the
    phase's end and the signal. After an epoch that is the best so far, the same file is best.ckpt as well; where none
    is written then, the epoch's state waits in memory for the next that is. The one before last.ckpt is kept as
    before.ckpt, in case that the last cannot be read.

    Args:
        every: optimiser steps between two checkpoints within an epoch, at least.
        monitor, mode: what the best is judged by; mode is min or max.
        patience: epochs without a better one before the phase ends; 0 for never.
        steps: optimiser steps after which the phase ends; 0 for after its epochs.
        sync: puts on disk what the steps so far have logged, since they will not be taken again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        monitor: str,
        mode: str,
        patience: int,
        steps: int,
        sync: Callable[[], None],
    ) -> None:
        self._folder, self._every, self._sync = folder, every, sync
        self._monitor, self._mode, self._patience, self._steps = monitor, mode, patience, steps
        self.best_epoch = -1
        """Of the best so far: its number within the phase, from 0."""
        self._best_value = float("nan")
        self._bad_epochs = 0
        self._better = False
        """Whether the epoch that has just been validated is the best, and not kept as such yet."""
        self._waiting: dict[str, Any] | None = None
        """The best's state, where it is on disk nowhere yet."""
        self._saved_at, self._saved_when = -1, 0.0
        """Optimiser step and time of the last checkpoint."""
        self._step = 0
        """The last one that was taken."""
        self.stop = Stop()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.best_epoch, "value": self._best_value, "bad_epochs": self._bad_epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_epoch, self._best_value = state_dict["epoch"], state_dict["value"]
        self._bad_epochs = state_dict["bad_epochs"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: ARG002, Lightning's signature
        # Lightning's handler broadcasts to the other ranks, which may be in another collective; then it lets the
        # stage end with 0, and DVC would record a half-trained model.
        self.stop.listen()
        self._step = self._saved_at = trainer.global_step
        self._saved_when = time.monotonic()
        self._end_if_over(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        step, before, self._step = trainer.global_step, self._step, trainer.global_step
        if self._steps and step >= self._steps:
            trainer.should_stop = True  # after validation
        # Lightning cannot resume between an epoch's last batch and its end: that checkpoint is the epoch's. Nor has a
        # checkpoint room for the gradients of a step that is computed in several batches, after the first of them.
        if trainer.is_last_batch or trainer.should_stop or step == before:
            return
        if self.stop.asked:
            self._stop_here(trainer)
        elif step % self._every == 0 and self._is_due(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        value = float(trainer.callback_metrics[self._monitor])
        better = self.best_epoch < 0 or (value < self._best_value if self._mode == "min" else value > self._best_value)
        self._bad_epochs = 0 if better else self._bad_epochs + 1
        if better:
            self._best_value, self.best_epoch = value, trainer.current_epoch
            self._better = True  # for the epoch's end: nothing that is kept changes until then

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        if self.stop.asked:
            self._stop_here(trainer)
        self._end_if_over(trainer)
        over = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if over or self._is_due(trainer):
            self._save(trainer)
        elif self._better:
            self._hold(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        # Every rank goes on with the best weights, which the leader alone may not have put in place yet.
        trainer.strategy.barrier("best.ckpt")

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        self.stop.deafen()

    def _is_due(self, trainer: L.Trainer) -> bool:
        # Several ranks would have to agree on the time, which costs them more than it spares; and of a net that is
        # sharded, no rank can hold the whole state.
        alone = isinstance(trainer.strategy, SingleDeviceStrategy)
        return not alone or time.monotonic() - self._saved_when >= SPACED_S

    def _end_if_over(self, trainer: L.Trainer) -> None:
        tired = 0 < self._patience <= self._bad_epochs
        if tired or (self._steps and trainer.global_step >= self._steps):
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer, *, alone: bool = False) -> None:
        """Writes a checkpoint; `alone` where the other ranks are not known to be here, too."""
        beside = self._folder / f".{LAST}.part"
        trainer.lightning_module.alone = alone  # type: ignore[assignment]
        if alone:
            # The ranks' states are the same after every step, so the leader's is the whole one.
            if trainer.is_global_zero:
                trainer.strategy.checkpoint_io.save_checkpoint(_dump(trainer), beside)
        else:
            trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            self._sync()
            if self._waiting is not None and not self._better:
                self._write_best(trainer, self._waiting)
            _put_in_place(beside, best=self._better)
        self._better, self._waiting = False, None
        self._saved_at, self._saved_when = trainer.global_step, time.monotonic()

    def _hold(self, trainer: L.Trainer) -> None:
        self._waiting, self._better = _copied(_dump(trainer)), False

    def _write_best(self, trainer: L.Trainer, state: dict[str, Any]) -> None:
        """Before last.ckpt says which epoch was the best: a kill between the two leaves epochs to be trained again."""
        with fresh_file(self._folder / BEST) as path:
            trainer.strategy.checkpoint_io.save_checkpoint(state, path)

    def _stop_here(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            # The leader, too, is on its way to stop, and needs the others until then.
            if self.stop.seconds > LEADER_S:
                self.stop.obey()
            return
        if self._saved_at != trainer.global_step:
            self._save(trainer, alone=trainer.world_size > 1)
        print(
            f"stopping after step {trainer.global_step} of this phase: the same command goes on from here", flush=True
        )
        self.stop.obey()


class Straight(TorchCheckpointIO):
    """Writes a checkpoint into its file and nowhere else.

    Lightning's own makes the bytes in memory, twice, and moves them from the folder for temporary files: whoever calls
    this writes beside and renames as it is.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        # A kill may have left a file of this name that has another name, too, such as that of the best.
        Path(path).unlink(missing_ok=True)
        try:
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # Of a file that takes no more, torch says only that it is not as long as expected.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise UserError(
                f"{path} cannot be written: {cause.strerror}; mend that, and run the same command again to go on"
            ) from None


class Stop:
    """A wish to stop, by SIGTERM or Ctrl-C, that waits for the next moment in which nothing is half-done.

    A second signal does not wait.
    """

    def __init__(self) -> None:
        self.asked = 0
        """Number of the signal; 0 for none."""
        self._since = 0.0
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    @property
    def seconds(self) -> float:
        """Time since it was asked."""
        return time.monotonic() - self._since if self.asked else 0.0

    def listen(self) -> None:
        for number in self._before:
            signal.signal(number, self._note)

    def deafen(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def obey(self) -> NoReturn:
        """Does what the signal would have done without this."""
        self.deafen()
        handler = self._before[signal.Signals(self.asked)]
        if callable(handler):
            handler(self.asked, None)
        raise SystemExit(143)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002, signal's signature
        if self.asked:
            self.obey()
        self.asked, self._since = number, time.monotonic()


def taken_up(folder: Path, *, leader: bool) -> Path | None:
    """The checkpoint that a phase goes on from: the last, or the one before if that cannot be read; None to begin anew.

    The leader says what cannot be read, and takes away what is not taken up: a broken file must not push a whole one
    out of its place. Ranks that look before, while or after it does find the same.
    """
    found = next((name for name in (LAST, BEFORE) if whole(folder / name)), None)
    passed_over = [name for name in (LAST, BEFORE)[: (LAST, BEFORE, None).index(found)] if (folder / name).exists()]
    if (folder / BEST).exists() and not whole(folder / BEST):
        # A phase ends with the weights of its best epoch, which may lie behind.
        found, passed_over = None, [BEST]
    if leader and passed_over:
        then = "the one before is taken" if found else "its phase begins anew"
        warn(f"{folder / passed_over[0]} cannot be read (cut short, damaged, or not written by Thaw); {then}")
    if leader:
        for name in {LAST: (), BEFORE: (LAST,), None: CHECKPOINTS}[found]:
            (folder / name).unlink(missing_ok=True)
    return folder / found if found else None


def whole(path: Path) -> bool:
    """Whether a checkpoint is there, can be read, and executes nothing when it is."""
    try:
        # Mapped: the tensors are read once, by whoever loads them. What is cut short or pickled wrongly shows here.
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError):
        return False
    return True


def load_weights(net: torch.nn.Module, path: Path) -> None:
    """Gives a net the weights of a checkpoint of its Classifier: their average, where there is one by then."""
    # Weights only: a checkpoint is read without executing what it may hold.
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "average.net." if int(state.get("average.count", 0)) > 0 else "net."
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    net.load_state_dict({**net.state_dict(), **found})  # what its phase did not change is not in it


def write_whole(path: Path, net: torch.nn.Module, target: Path) -> None:
    """Copies a checkpoint of a net's Classifier, with what its phase did not change."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint["state_dict"]
    prefixes = ["net.", "average.net."] if "average.count" in state else ["net."]
    for name, value in net.state_dict().items():
        for prefix in prefixes:
            state.setdefault(f"{prefix}{name}", value)
    Straight().save_checkpoint(checkpoint, target)


def _put_in_place(beside: Path, *, best: bool) -> None:
    """Makes a whole file the last checkpoint, after making it the best one where it is that, too."""
    folder = beside.parent
    sync(beside)
    if best:
        _also(beside, folder / BEST)
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / BEFORE)
    beside.replace(folder / LAST)
    with _opened(folder) as descriptor:
        os.fsync(descriptor)


def _also(path: Path, name: Path) -> None:
    """Gives a file a second name; the bytes once where the file system can do that."""
    beside = name.with_name(f".{name.name}.part")
    beside.unlink(missing_ok=True)
    try:
        beside.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, beside)
        sync(beside)
    beside.replace(name)


def _dump(trainer: L.Trainer) -> dict[str, Any]:
    """All that a checkpoint holds, as this rank has it."""
    state: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return state


def _copied(state: Any) -> Any:
    """A state that its owners do not change any more, on the processor, whose memory has room for it.

    After each better of short epochs: Lightning's and Python's own ways look at every number's class, for longer.
    """
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return type(state)(map(_copied, state)) if type(state) in (list, tuple) else state


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
