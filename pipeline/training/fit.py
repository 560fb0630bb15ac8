"""One phase from start to best weights: a `Trainer`, its callbacks, and what the phase came to."""

import logging
import signal
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import psutil
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary
from rich.console import Console

from pipeline.config import TrainParams
from pipeline.data.datamodule import PictureData
from pipeline.errors import UserError
from pipeline.training.classifier import Classifier
from pipeline.training.gradients import GradientNorms

LOG_EVERY = 10
"""Optimiser steps between two points of the learning rate and the step's loss."""
GRACE_S = 10.0
"""Seconds that other ranks have to end after SIGTERM, before SIGKILL."""


class Log(Protocol):
    """Takes metrics by name, and the optimiser step that they belong to, counting on across phases."""

    def __call__(self, metrics: Mapping[str, float], *, step: int) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a phase came to."""

    rows: list[dict[str, Any]]
    """A row per epoch: epoch (1-based, counting on across phases), phase, seconds, lr and the four metrics."""
    best: Path
    """Checkpoint of the best epoch by train.monitor."""
    last: Path
    """Checkpoint of the last epoch."""
    best_epoch: int
    """Of the best epoch: its number, counting on across phases."""
    steps: int
    """Optimiser steps of this phase."""
    gradients: list[dict[str, Any]]
    """Rows of GradientNorms, where train.gradient_norms asks for them."""


class Recorder(L.Callback):
    """Writes down each epoch, and the learning rate between them, for the curves, the terminal and the tracker."""

    def __init__(self, *, phase: str, first_epoch: int, first_step: int, log: Log) -> None:
        self.rows: list[dict[str, Any]] = []
        self._phase, self._first_epoch, self._first_step, self._log = phase, first_epoch, first_step, log
        self._started = time.monotonic()
        self._on_sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:  # noqa: ARG002
        # Lightning's handler broadcasts to the other ranks, which may be in another collective; then it lets the
        # stage end with 0, and DVC would record a half-trained model.
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if trainer.is_global_zero and trainer.global_step % LOG_EVERY == 0:
            point = {"lr": _rate(trainer), "train/step_loss": float(outputs["loss"])}
            self._log(point, step=self._first_step + trainer.global_step)

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:  # noqa: ARG002
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:  # noqa: ARG002
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        epoch = self._first_epoch + trainer.current_epoch + 1
        seconds = time.monotonic() - self._started
        self.rows.append({"epoch": epoch, "phase": self._phase, "seconds": seconds, "lr": _rate(trainer), **metrics})
        if trainer.is_global_zero:
            self._log({**metrics, "epoch": epoch}, step=self._first_step + trainer.global_step)
            print(
                f"{self._phase} {trainer.current_epoch + 1}/{trainer.max_epochs}: "
                f"train loss {metrics['train/loss']:.4f}, top-1 {metrics['train/top1']:.4f}; "
                f"val loss {metrics['val/loss']:.4f}, top-1 {metrics['val/top1']:.4f}; {seconds:.0f} s",
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
) -> Outcome:
    """Trains one phase; checkpoints go to `folder`. On return the net holds the best epoch's weights, on every rank."""
    quiet()
    best = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor=params.monitor,
        mode=_mode(params),
        save_last=True,
        enable_version_counter=False,
    )
    recorder = Recorder(phase=module.phase.name, first_epoch=first_epoch, first_step=first_step, log=log)
    norms = GradientNorms(first_epoch=first_epoch)
    callbacks = [best, recorder, *([norms] if params.gradient_norms else []), *_optional_callbacks(params)]
    if first_step == 0 and rank() == 0:
        print(ModelSummary(module, max_depth=2))
    trainer = _trainer(params, epochs=module.phase.epochs, callbacks=callbacks)
    try:
        trainer.fit(module, datamodule=data)
    except torch.OutOfMemoryError:
        _end_children()
        raise UserError(
            f"the device's memory does not hold train.batch_size {params.batch_size}; lower it, or train.px"
        ) from None
    except BaseException:
        # Ranks that this process has launched would wait for it in a collective for ever.
        _end_children()
        raise
    path = Path(best.best_model_path)
    # Weights only: a checkpoint is read without executing what it may hold.
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["state_dict"])
    return Outcome(
        rows=recorder.rows,
        best=path,
        last=Path(best.last_model_path),
        best_epoch=first_epoch + state["epoch"] + 1,
        steps=trainer.global_step,
        gradients=norms.rows,
    )


def rank() -> int:
    """This process's number among all that train together, before any Trainer exists."""
    found: int = getattr(rank_zero_only, "rank", 0)
    return found


def _trainer(params: TrainParams, *, epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    try:
        trainer = L.Trainer(
            accelerator=params.accelerator,
            devices=params.devices,
            num_nodes=params.num_nodes,
            strategy=params.strategy,
            precision=params.precision,
            max_epochs=epochs,
            limit_train_batches=1 if params.fast_dev_run else None,
            limit_val_batches=1 if params.fast_dev_run else None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            logger=False,
            enable_progress_bar=Console().is_terminal,
            enable_model_summary=False,
            callbacks=callbacks,
        )
    except MisconfigurationException as error:
        told = str(error).splitlines()[0]
        raise UserError(f"this machine cannot give train.accelerator {params.accelerator} as asked: {told}") from None
    if params.precision == "16-mixed" and trainer.strategy.root_device.type == "cpu":
        # Lightning would take bf16 in its place.
        raise UserError("16-mixed needs a GPU; use bf16-mixed or 32-true", parameter="train.precision")
    return trainer


def _mode(params: TrainParams) -> str:
    return "min" if params.monitor.endswith("loss") else "max"


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


def _optional_callbacks(params: TrainParams) -> list[L.Callback]:
    chosen: list[L.Callback] = []
    if params.patience:
        chosen.append(EarlyStopping(params.monitor, patience=params.patience, mode=_mode(params)))
    if Console().is_terminal:
        chosen.append(RichProgressBar())
    return chosen


def _rate(trainer: L.Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["lr"])
