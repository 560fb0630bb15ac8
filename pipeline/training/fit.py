"""One phase from start to best weights: a `Trainer`, its callbacks, and what the phase came to."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import psutil
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from pipeline.data.datamodule import PictureData
from pipeline.errors import UserError
from pipeline.parameters import TrainParams
from pipeline.training.checkpoints import BEST, LAST, Checkpoints, Stop, Straight, load_weights, taken_up
from pipeline.training.classifier import Classifier
from pipeline.training.gradients import GradientNorms
from pipeline.training.profiling import TRACE, DataWait, Trace
from pipeline.training.progress import Outcome
from pipeline.training.schedule import Phase

LOG_EVERY = 10
"""Optimiser steps between two points of the learning rate and the step's loss."""
GRACE_S = 10.0
"""Seconds that other ranks have to end after SIGTERM, before SIGKILL."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL error")
"""What collectives say where another rank has died."""


class Log(Protocol):
    """Takes metrics by name, and the optimiser step that they belong to, counting on across phases."""

    def __call__(self, metrics: Mapping[str, float], *, step: int) -> None: ...


class Recorder(L.Callback):
    """Writes down each epoch, and the learning rate between them, for the curves, the terminal and the tracker."""

    def __init__(self, *, phase: str, first_epoch: int, first_step: int, log: Log, waits: DataWait) -> None:
        self.rows: list[dict[str, Any]] = []
        self._waits = waits
        self._phase, self._first_epoch, self._first_step, self._log = phase, first_epoch, first_step, log
        self._started = time.monotonic()
        self._logged_at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        step = trainer.global_step
        if trainer.is_global_zero and step % LOG_EVERY == 0 and step != self._logged_at:
            self._logged_at = step
            point = {"lr": _rate(trainer), "train/step_loss": float(outputs["loss"])}
            self._log(point, step=self._first_step + step)

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:  # noqa: ARG002
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:  # noqa: ARG002
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        epoch = self._first_epoch + trainer.current_epoch + 1
        seconds = time.monotonic() - self._started
        row = {"epoch": epoch, "phase": self._phase, "seconds": seconds, "lr": _rate(trainer), **metrics}
        waited = self._waits.take() / seconds
        self.rows.append({**row, "data_wait": waited})
        if trainer.is_global_zero:
            self._log({**metrics, "epoch": epoch}, step=self._first_step + trainer.global_step)
            print(
                f"{self._phase} {trainer.current_epoch + 1}/{trainer.max_epochs}: "
                f"train loss {metrics['train/loss']:.4f}, top-1 {metrics['train/top1']:.4f}; "
                f"val loss {metrics['val/loss']:.4f}, top-1 {metrics['val/top1']:.4f}; {seconds:.0f} s, "
                f"data wait {waited:.1%} of the epoch",
                flush=True,
            )


def fit(
    module: Classifier,
    data: PictureData,
    *,
    params: TrainParams,
    folder: Path,
    first_epoch: int,
    first_step: int,
    log: Log,
    sync: Callable[[], None],
) -> Outcome:
    """Trains one phase, from where its last checkpoint in `folder` is, if there is one.

    On return the net holds the best epoch's weights, on every rank.

    Args:
        folder: for the phase's checkpoints.
        sync: puts on disk what has been logged, before a checkpoint of the steps behind it is there.
    """
    quiet()
    folder.mkdir(parents=True, exist_ok=True)
    phase = module.phase
    keeper = Checkpoints(
        folder,
        every=params.checkpoint_every,
        monitor=params.monitor,
        mode="min" if params.monitor.endswith("loss") else "max",
        patience=phase.patience,
        steps=phase.steps,
        sync=sync,
    )
    waits = DataWait()
    recorder = Recorder(phase=phase.name, first_epoch=first_epoch, first_step=first_step, log=log, waits=waits)
    norms = GradientNorms(first_epoch=first_epoch)
    epochs = phase.epochs_of(module.pictures)
    trace = Trace(folder / TRACE, steps=1 if params.fast_dev_run else phase.total_steps(module.pictures))
    asked = [*([norms] if params.gradient_norms else []), *([trace] if params.profile else [])]
    # The keeper last: what it writes holds what the others have just noted.
    callbacks = [recorder, *asked, *_optional_callbacks(), keeper]
    trainer = _trainer(params, phase, epochs=epochs, callbacks=callbacks, waits=waits)
    last = taken_up(folder, leader=rank() == 0)
    with ends_together(params, stop=keeper.stop):
        trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    load_weights(module.net, folder / BEST)
    return Outcome(
        rows=recorder.rows,
        best=folder / BEST,
        last=folder / LAST,
        best_epoch=first_epoch + keeper.best_epoch + 1,
        steps=trainer.global_step,
        gradients=norms.rows,
    )


@contextmanager
def ends_together(params: TrainParams, *, stop: Stop | None = None) -> Iterator[None]:
    """Ends the ranks that this process has launched where the block fails: they would wait for it for ever.

    Args:
        stop: what listens to signals in the block, if anything does.

    Raises:
        UserError: the device's memory is too small, or another rank has ended.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        _end_children()
        raise UserError(
            f"the device's memory does not hold train.batch_size {params.batch_size}; lower it or train.px, "
            "or raise train.accumulate"
        ) from None
    except RuntimeError as error:
        _end_children()
        if stop is not None and stop.asked and rank():
            stop.obey()  # the leader has stopped already, and left this one in a collective
        if any(sign in str(error) for sign in LOST):
            raise UserError(
                f"another process of this training has ended ({str(error).splitlines()[0].split('. ')[0]}); "
                "see what it said, and run the same command again to go on"
            ) from None
        raise
    except BaseException:
        _end_children()
        raise


def rank() -> int:
    """This process's number among all that train together, before any Trainer exists."""
    found: int = getattr(rank_zero_only, "rank", 0)
    return found


def num_processes(params: TrainParams, phase: Phase) -> int:
    """Processes that will train together, as Lightning or the launcher has them.

    Raises:
        UserError: this machine does not give what is asked of it.
    """
    quiet()
    return _trainer(params, phase, epochs=1, callbacks=[], waits=DataWait()).world_size


def _trainer(
    params: TrainParams, phase: Phase, *, epochs: int, callbacks: list[L.Callback], waits: DataWait
) -> L.Trainer:
    if params.strategy == "fsdp" and not (params.accelerator in ("auto", "gpu") and torch.cuda.is_available()):
        raise UserError("fsdp shards a net over GPUs, and there is none to use; take ddp", parameter="train.strategy")
    try:
        trainer = L.Trainer(
            accelerator=params.accelerator,
            devices=params.devices,
            num_nodes=params.num_nodes,
            strategy=params.strategy,
            precision=params.precision,
            max_epochs=epochs,
            accumulate_grad_batches=phase.accumulate,
            gradient_clip_val=phase.clip or None,
            limit_train_batches=1 if params.fast_dev_run else None,
            limit_val_batches=1 if params.fast_dev_run else None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=0,  # the Recorder logs; Lightning would work out its metrics at every step
            logger=False,
            profiler=waits,
            enable_progress_bar=Console().is_terminal,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=callbacks,
            plugins=[Straight()],
        )
    except (MisconfigurationException, ValueError) as error:
        told = str(error).splitlines()[0]
        raise UserError(f"this machine cannot give train.accelerator {params.accelerator} as asked: {told}") from None
    if params.precision == "16-mixed" and trainer.strategy.root_device.type == "cpu":
        # Lightning would take bf16 in its place.
        raise UserError("16-mixed needs a GPU; use bf16-mixed or 32-true", parameter="train.precision")
    # Before each step of several processes it would wait for the device, to hear of a signal that `Stop` has caught.
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def quiet() -> None:
    """Silences what Lightning says at each start that a user of Thaw can do nothing about."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Small pictures are read from a memory map faster than a worker could hand them over.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 asks torch 2.14 for the type of a tree's leaf in a way that torch has since deprecated.
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*", category=FutureWarning)
    # Said before fit() refuses the setting.
    warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU.*")
    # A module that is frozen as a whole is in evaluation mode on purpose.
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")


def _end_children() -> None:
    children = psutil.Process().children(recursive=True)
    for child in children:
        child.terminate()
    for child in psutil.wait_procs(children, timeout=GRACE_S)[1]:
        child.kill()


def _optional_callbacks() -> list[L.Callback]:
    return [RichProgressBar()] if Console().is_terminal else []


def _rate(trainer: L.Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["lr"])
