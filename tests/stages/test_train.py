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


def _phase(**own: Any) -> dict[str, Any]:
    return {"train.phases": {"one": {"trainable": "all", **own}}}


@pytest.mark.parametrize(
    ("overrides", "parameter", "told"),
    [
        ({"train.strategy": "fsdp"}, "train.strategy", "fsdp shards a net over GPUs, and there is none to use"),
        ({"train.accelerator": "gpu"}, "", "this machine cannot give train.accelerator gpu as asked"),
        ({"train.precision": "16-mixed"}, "train.precision", "16-mixed needs a GPU"),
        ({"train.sync_bn": True, "train.devices": 2}, "train.sync_bn", "batch norms meet on GPUs alone"),
        ({"train.accumulate": 3}, "train.batch_size", "a batch of 64 in 3 parts does not divide.* of 63 or 66$"),
        ({"train.devices": 9}, "train.batch_size", "a batch of 64 in 9 processes does not divide.* of 63 or 72$"),
        ({"train.batch_size": 2, "train.devices": 3}, "train.batch_size", "a batch of 2 in 3 .*use a batch_size of 3$"),
        (_phase(batch_size=9, accumulate=2), "train.phases.one.batch_size", "a batch of 9 in 2 parts does not divide"),
        (_phase(accumulate=5), "train.phases.one.accumulate", "a batch of 64 in 5 parts does not divide"),
        ({"train.devices": 8}, "augment.val_fraction", "4 validation pictures for 8 processes are too few"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_a_run_begins(
    overrides: dict[str, Any], parameter: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=told) as refused:
        train.run(_config(**{"train.accelerator": "cpu", "augment.px": 32, **overrides}))
    assert refused.value.parameter == parameter
    assert not (tmp_path / "mlflow.db").exists()


def test_a_batch_of_one_picture_is_refused_where_a_batch_norm_cannot_learn_from_it(tmp_path: Path) -> None:
    name = "scratch/mobilenet_v1_025"
    paths.pretrained(name).mkdir(parents=True)
    Origin(start="random", source="a test").write(paths.pretrained(name))
    asked = {"model.name": name, "augment.px": 32, "train.accelerator": "cpu"}
    told = "the batch norms of scratch/mobilenet_v1_025 learn from no single picture of 32 px, and that is what "
    for overrides, parameter, made in (
        ({"train.batch_size": 1}, "train.batch_size", "a batch of 1 makes; use 2 or more"),
        (_phase(batch_size=4, accumulate=4), "train.phases.one.batch_size", "a batch of 4 in 4 parts makes; use 8"),
    ):
        with pytest.raises(UserError, match=told + made) as refused:
            train.run(_config(**asked, **overrides))
        assert refused.value.parameter == parameter
    assert not (tmp_path / "mlflow.db").exists()
