"""A trace is a file that a browser can open, and the wait for data is counted."""

import gzip
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pipeline.training import profiling
from pipeline.training.profiling import DataWait, Trace


class _Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:  # noqa: ARG002
        loss: torch.Tensor = self.net(batch).mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def _fit(path: Path, *, batches: int, epochs: int = 1, done: int = 0, ends_after: int = -1) -> None:
    """Trains with a trace, from the step that is done on; `ends_after` so many steps, where it was to go on."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        max_steps=ends_after,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Trace(path, steps=batches * epochs + done)],
    )
    loader: DataLoader[Any] = DataLoader([torch.zeros(1, 1, 8, 8)] * batches, batch_size=None)  # type: ignore[arg-type]
    # As a phase that goes on has it from its checkpoint.
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = done
    trainer.fit(_Module(), loader)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize(("batches", "epochs", "traced"), [(1, 1, 1), (3, 1, 3), (8, 1, 8), (6, 3, profiling.ACTIVE)])
def test_a_trace_has_the_steps_operations(
    batches: int, epochs: int, traced: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / profiling.TRACE
    _fit(path, batches=batches, epochs=epochs)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert names.count("aten::conv2d") == traced
    assert [other.name for other in tmp_path.iterdir()] == [path.name]
    assert not [line for line in capfd.readouterr().err.splitlines() if "USDT" in line or "gpuGetDeviceCount" in line]
    before = path.read_bytes()
    _fit(path, batches=batches, epochs=epochs)  # as a resumed phase would
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
def test_a_phase_that_goes_on_for_few_steps_is_traced_as_far_as_it_goes(tmp_path: Path) -> None:
    _fit(tmp_path / profiling.TRACE, batches=3, done=40)
    with gzip.open(tmp_path / profiling.TRACE, "rt", encoding="utf-8") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::conv2d") == 3


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
def test_a_phase_that_ends_before_its_trace_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fit(tmp_path / profiling.TRACE, batches=20, ends_after=3)
    assert "train.profile: the phase ended before a trace could be taken" in capsys.readouterr().err
    assert not (tmp_path / profiling.TRACE).exists()


def test_only_fetches_count_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now)
    waits = DataWait()
    for action, seconds in (("[_TrainingEpochLoop].train_dataloader_next", 2.0), ("run_training_batch", 5.0)):
        waits.start(action)
        now += seconds
        waits.stop(action)
    assert waits.take() == 2.0
    assert waits.take() == 0.0
