"""What the train stage refuses before anything is trained. tests/test_chain.py has the training itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from pipeline import config, paths
from pipeline.data import store
from pipeline.data.store import Row
from pipeline.errors import UserError
from pipeline.parameters import Config
from pipeline.stages import train
from pipeline.training.pretrained import Origin

PARAMS = Path(__file__).parents[2] / "params.yaml"
MODEL = "scratch/lenet5"


@pytest.fixture(autouse=True)
def _prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What augment and weights leave for train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = paths.prepared("digits")
    folder.mkdir(parents=True)
    rows = (
        (Row(f"{i}", "train" if i < 8 else "val", i % 2, 0, 16, 16), np.full((16, 16, 1), i, np.uint8))
        for i in range(12)
    )
    store.write(folder, rows, dataset="digits", classes=("a", "b"), px=16, channels=1, skipped=[])
    paths.pretrained(MODEL).mkdir(parents=True)
    Origin(start="random", source="a test").write(paths.pretrained(MODEL))


def _config(**overrides: Any) -> Config:
    return config.load(PARAMS, overrides={"data.name": "digits", "model.name": MODEL, "augment.px": 16, **overrides})


def test_a_model_is_trained_by_one_process_at_a_time() -> None:
    progress = paths.progress(MODEL)
    progress.mkdir(parents=True)
    with (
        FileLock(progress / "lock"),
        pytest.raises(UserError, match=r"lenet5 is being trained by another process; wait for it, or stop it$"),
    ):
        train.run(_config())


def test_pictures_too_small_for_the_net_are_refused_before_a_run_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scratch/lenet5 takes pictures of 32 px or more, got 16; raise augment\.px"):
        train.run(_config())
    assert not (tmp_path / "mlflow.db").exists()


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    with (paths.prepared("digits") / store.PICTURES).open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(UserError, match="hash has changed"):
        train.run(_config())
    assert not (tmp_path / "mlflow.db").exists()
