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


def _fit(path: Path, *, batches: int, epochs: int = 1) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Trace(path, batches=batches * epochs)],
    )
    loader: DataLoader[Any] = DataLoader([torch.zeros(1, 1, 8, 8)] * batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(_Module(), loader)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize(("batches", "epochs", "traced"), [(1, 1, 1), (3, 1, 3), (6, 3, profiling.ACTIVE)])
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
