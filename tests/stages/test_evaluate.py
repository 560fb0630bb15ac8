"""The evaluate stage away from the run that trained the model. tests/test_chain.py has the usual way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline import config, nets, paths, tracking
from pipeline.analysis import plots
from pipeline.data import store
from pipeline.data.store import Row
from pipeline.errors import UserError
from pipeline.parameters import Config
from pipeline.stages import evaluate
from pipeline.training import weights
from pipeline.training.record import PhaseRecord, Record
from pipeline.training.weights import ModelCard

PARAMS = Path(__file__).parents[2] / "params.yaml"
MODEL, PX = "scratch/lenet5", 32


@pytest.fixture(autouse=True)
def _trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What augment and train leave for evaluate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _pack(PX)
    folder = paths.trained(MODEL)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    card = ModelCard(
        name=MODEL,
        in_chans=3,
        stem="default",
        classes=("a", "b"),
        px=PX,
        pack_px=PX,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        start="random",
        start_source="a test",
        fast_dev_run=False,
    )
    weights.save_model(folder / "model.safetensors", nets.build(MODEL, num_classes=2), card)
    phases = (PhaseRecord(name="all", trainable="all", epochs=1, best_epoch=1, lr=0.01),)
    Record(run_id="0" * 32, run_name="away", minutes=0.5, steps=7, monitor="val/loss", phases=phases).write(folder)
    names = ("train/loss", "val/loss", "train/top1", "val/top1")
    plots.curves(pd.DataFrame([{"epoch": 1, "phase": "all", **dict.fromkeys(names, 0.5)}]), folder / "curves.png")


def _pack(px: int) -> None:
    folder = paths.prepared("digits")
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = (
        (Row(f"{i}", "test" if i < 8 else "train", i % 2, 0, px, px), rng.integers(0, 256, (px, px, 1), np.uint8))
        for i in range(12)
    )
    store.write(folder, rows, dataset="digits", classes=("a", "b"), px=px, channels=1, skipped=[])


def _config(**overrides: Any) -> Config:
    return config.load(PARAMS, overrides={"data.name": "digits", "model.name": MODEL, **overrides})


def test_where_the_store_has_not_the_run_that_trained_it_is_a_run_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate.run(_config())
    assert "is not in this store: evaluated as a run of its own" in capsys.readouterr().out
    (run,) = tracking.runs("thaw")
    metrics = json.loads(paths.METRICS.read_text())
    assert (run.name, run.tags["trained_by"], run.status) == ("away-evaluated", "0" * 32, "FINISHED")
    assert metrics["run"]["id"] == run.id
    assert metrics["test"]["pictures"] == 8
    assert run.metrics["test/top1"] == metrics["test"]["top1"]


def test_pictures_of_another_size_than_the_models_are_refused() -> None:
    _pack(PX + 8)
    with pytest.raises(UserError, match="trained on other pictures than data/prepared holds; run `dvc repro`"):
        evaluate.run(_config())
