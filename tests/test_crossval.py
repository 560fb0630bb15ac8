"""Cross-validation judges each picture once, by a net that has not seen it, and goes on where it was interrupted."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from pipeline import config, crossval, nets, paths, tracking
from pipeline.data import store
from pipeline.data.store import Row, Store
from pipeline.errors import UserError
from pipeline.parameters import Config
from pipeline.training import job, weights
from pipeline.training.job import Job
from pipeline.training.pretrained import Origin
from pipeline.training.record import PhaseRecord, Record

ROOT = Path(__file__).parents[1]
NET, PX, FOLDS = "scratch/lenet5", 32, 3
OVERRIDES: dict[str, Any] = {
    "data.name": "tiny",
    "augment.px": PX,
    "model.name": NET,
    "train.batch_size": 6,
    "train.accelerator": "cpu",
    "train.transforms": {},
    "train.phases": {"all": {"trainable": "all", "epochs": 3, "lr": 0.01, "scheduler": "constant"}},
    "evaluate.batch_size": 4,
    "tracking.log_model": False,
    "tracking.system_metrics": False,
}
FOLDER = Path("models/crossval") / NET


def _config(**changed: Any) -> Config:
    return config.load(ROOT / "params.yaml", overrides={**OVERRIDES, **changed})


def _project(*, copies: int = 1) -> None:
    """What weights and augment leave, in the present folder."""
    shutil.copyfile(ROOT / "params.yaml", paths.PARAMS)
    folder = paths.pretrained(NET)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    weights.save_state(folder / "weights.safetensors", nets.build(NET, num_classes=5).state_dict())
    Origin(start="file", source="a test", sha256="1" * 64).write(folder)
    packed = paths.prepared("tiny")
    packed.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def rows() -> Iterator[tuple[Row, np.ndarray]]:
        for i in range(36):
            split = ("train", "train", "val", "test")[i // 3 % 4]
            for copy in range(1 + copies if split == "train" else 1):
                picture = rng.integers(0, 100, (PX, PX, 1), dtype=np.uint8) + np.uint8(70 * (i % 3))
                yield Row(f"{i}.png", split, i % 3, copy, PX, PX, "burst" if i in (0, 12) else ""), picture

    store.write(packed, rows(), dataset="tiny", classes=("a", "b", "c"), px=PX, channels=1, skipped=[])


class Trainings:
    """Notes each training: its job, and the weights that it began with."""

    def __init__(self, train: Callable[[Job], object]) -> None:
        self.jobs: list[Job] = []
        self.began: list[torch.Tensor] = []
        self._train, self._build = train, job.build

    def build(self, *given: Any) -> Any:
        net, card = self._build(*given)
        self.began.append(torch.cat([value.flatten().float().clone() for value in net.state_dict().values()]))
        return net, card

    def run(self, one: Job) -> None:
        self.jobs.append(one)
        self._train(one)

    def folds(self) -> list[int]:
        return [one.facts["fold"] for one in self.jobs]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to create a store."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.ensure_store()
    return folder / "mlflow.db"


def _untrained(one: Job) -> None:
    """In place of a training: the first weights, as an exported model with a run of its own."""
    run = tracking.Run.start(experiment="thaw", name=one.name, tags=one.tags, spool=one.progress / "metrics.spool")
    run.finish("FINISHED")
    net, card = job.build(one.config, one.store, Origin.read(paths.pretrained(NET)))
    one.out.mkdir(parents=True)
    weights.save_model(one.out / "model.safetensors", net, card)
    phases = (PhaseRecord(name="all", trainable="all", epochs=2, best_epoch=2, lr=0.01),)
    Record(run_id=run.id, run_name=run.name, minutes=0.5, steps=7, monitor="val/loss", phases=phases).write(one.out)


@pytest.fixture
def quick(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    """A project of its own, in which nothing is trained."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _project()
    trainings = Trainings(_untrained)
    monkeypatch.setattr(crossval.job, "run", trainings.run)
    return trainings


def _parents() -> list[tracking.RunRow]:
    return [run for run in tracking.runs() if run.tags.get(tracking.SERVES) == "crossval" and "fold" not in run.tags]


@pytest.fixture(scope="module")
def whole(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    """A cross-validation that trains in earnest; the folder that it is in stays the present one."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        _project()
        trainings = Trainings(job.run)
        patch.setattr(job, "build", trainings.build)
        patch.setattr(crossval.job, "run", trainings.run)
        crossval.run(_config(), folds=FOLDS, seed=1)
        yield trainings


def test_each_picture_but_the_test_splits_is_judged_once_by_a_net_that_has_not_seen_it(whole: Trainings) -> None:
    rows = Store(paths.prepared("tiny")).rows
    table = pd.read_parquet(FOLDER / crossval.PREDICTIONS)
    assert table.columns.tolist() == [
        "key",
        "fold",
        "actual",
        "predicted",
        "correct",
        "confidence",
        "p_a",
        "p_b",
        "p_c",
    ]
    wanted = {row.key: "abc"[row.label] for row in rows if row.split != "test"}
    assert sorted(table["key"]) == sorted(wanted)
    assert table["actual"].tolist() == [wanted[key] for key in table["key"]]
    assert whole.folds() == [1, 2, 3]
    for one in whole.jobs:
        judged = set(table["key"][table["fold"] == one.facts["fold"]])
        assert {one.store.rows[index].key for index in one.store.indices("val")} == judged
        seen = {one.store.rows[index].key for index in one.store.indices("train")}
        assert seen == set(wanted) - judged
    assert table["fold"][table["key"] == "0.png"].item() == table["fold"][table["key"] == "12.png"].item()


def test_every_fold_starts_from_the_same_weights_and_trains_away_from_them(whole: Trainings) -> None:
    assert all(torch.equal(began, whole.began[0]) for began in whole.began)
    ends = [weights.load_model(FOLDER / f"fold-{fold}" / "model.safetensors")[0] for fold in (1, 2, 3)]
    flat = [torch.cat([value.flatten().float() for value in net.state_dict().values()]) for net in ends]
    assert len({tuple(state.tolist()) for state in (whole.began[0], *flat)}) == 4


def test_the_figures_are_those_of_the_predictions(whole: Trainings) -> None:  # noqa: ARG001
    table = pd.read_parquet(FOLDER / crossval.PREDICTIONS)
    result = json.loads((FOLDER / crossval.RESULT).read_text())
    top1 = table.groupby("fold")["correct"].mean().tolist()
    nats = -np.log([row[f"p_{row['actual']}"] for _, row in table.iterrows()])
    loss = [float(nats[table["fold"] == fold].mean()) for fold in (1, 2, 3)]
    assert [fold["top1"] for fold in result["per_fold"]] == pytest.approx(top1)
    assert [fold["loss"] for fold in result["per_fold"]] == pytest.approx(loss, rel=1e-5)
    assert result["mean"]["top1"] == pytest.approx(statistics.fmean(top1))
    assert result["sd"]["top1"] == pytest.approx(statistics.stdev(top1))
    assert result["sd"]["loss"] == pytest.approx(statistics.stdev(loss), rel=1e-4)
    pooled = result["out_of_fold"]
    assert pooled["top1"] == pytest.approx(table["correct"].mean())
    assert pooled["top1_low"] <= pooled["top1"] <= pooled["top1_high"]
    assert (pooled["pictures"], result["folds"], result["seed"]) == (27, 3, 1)
    assert {fold["run_id"] for fold in result["per_fold"]} == {
        Record.read(FOLDER / f"fold-{fold}").run_id for fold in (1, 2, 3)
    }


def test_the_best_epochs_figure_in_training_is_the_folds(whole: Trainings) -> None:  # noqa: ARG001
    """The exported model, judged as evaluate does, gives what training saw of it."""
    result = json.loads((FOLDER / crossval.RESULT).read_text())
    for fold in result["per_fold"]:
        history = {point.step: point.value for point in _history(fold["run_id"], "val/loss")}
        assert min(history.values()) == pytest.approx(fold["loss"], rel=1e-4)


def _history(run_id: str, name: str) -> list[Any]:
    from mlflow import MlflowClient

    points: list[Any] = MlflowClient(tracking.store_uri()).get_metric_history(run_id, name)
    return points


def test_mlflow_has_the_folds_under_one_run_with_the_figures(whole: Trainings) -> None:  # noqa: ARG001
    result = json.loads((FOLDER / crossval.RESULT).read_text())
    (parent,) = _parents()
    assert (parent.id, parent.status) == (result["run"]["id"], "FINISHED")
    assert (parent.params["crossval.folds"], parent.params["crossval.seed"]) == ("3", "1")
    assert parent.params["model.name"] == NET
    for name in crossval.FIGURES:
        assert parent.metrics[f"crossval/{name}_mean"] == pytest.approx(result["mean"][name])
        assert parent.metrics[f"crossval/{name}_sd"] == pytest.approx(result["sd"][name])
        points = [(point.step, point.value) for point in _history(parent.id, f"fold/{name}")]
        assert points == [(fold["fold"], fold[name]) for fold in result["per_fold"]]
    children = {run.id: run for run in tracking.runs() if run.tags.get(tracking.PARENT_TAG) == parent.id}
    assert set(children) == {fold["run_id"] for fold in result["per_fold"]}
    assert sorted(run.tags["fold"] for run in children.values()) == ["1", "2", "3"]
    artifacts = Path(os.environ["DVC_ROOT"]) / "mlartifacts" / parent.id / "artifacts"
    assert sorted(path.name for path in artifacts.iterdir()) == [crossval.RESULT, crossval.PREDICTIONS]


def test_what_is_done_is_not_trained_again(whole: Trainings, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
    crossval.run(_config(**{"train.workers": 1}), folds=FOLDS, seed=1)  # which changes no result
    assert whole.folds() == [1, 2, 3]
    assert {path: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()} == before
    (parent,) = _parents()
    assert len(_history(parent.id, "fold/top1")) == 3
    assert len(tracking.runs()) == 4
    result = json.loads((FOLDER / crossval.RESULT).read_text())
    mean, sd = (f"{100 * result[kind]['top1']:.2f}" for kind in ("mean", "sd"))
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[:3] for line in lines]
    assert ["mean", mean] in [cells[:2] for cells in shown]
    assert ["sd", sd] in [cells[:2] for cells in shown]
    assert [cells for cells in shown if cells[1:2] == ["9"]] == [
        [f"{fold['fold']}", "9", f"{100 * fold['top1']:.2f}"] for fold in result["per_fold"]
    ]
    assert "no standard error of the mean" in "".join(lines)
    assert "slightly optimistic" in "".join(lines)
    assert [line for line in lines if line.endswith(": done before")] == [
        f"== {NET}, fold {fold} of 3: done before" for fold in (1, 2, 3)
    ]


def test_an_interrupted_one_goes_on_in_the_same_run_with_the_fold_it_was_at(
    quick: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(one: Job) -> None:
        if one.facts["fold"] == 2:
            raise SystemExit(143)
        quick.run(one)

    with monkeypatch.context() as patch:
        patch.setattr(crossval.job, "run", stopped)
        with pytest.raises(SystemExit, match="143"):
            crossval.run(_config(), folds=2)
    (parent,) = _parents()
    assert parent.status == "KILLED"
    assert tracking.PARENT not in os.environ
    assert not (FOLDER / crossval.RESULT).exists()
    crossval.run(_config(), folds=2)
    assert quick.folds() == [1, 2]
    (same,) = _parents()
    assert (same.id, same.status) == (parent.id, "FINISHED")
    assert [point.step for point in _history(same.id, "fold/loss")] == [1, 2]


@pytest.mark.parametrize(
    ("changed", "folds", "seed", "told"),
    [
        ({"train.batch_size": 7}, 2, 0, "train.batch_size was 6 and is 7"),
        ({}, 3, 1, "folds was 2 and is 3 (and 1 more)"),
    ],
)
def test_another_one_takes_the_place_of_the_first_and_says_why(
    changed: dict[str, Any], folds: int, seed: int, told: str, quick: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    crossval.run(_config(), folds=2, seed=0)
    unfinished = paths.progress(NET) / "crossval" / "fold-9"
    unfinished.mkdir()
    crossval.run(_config(**changed), folds=folds, seed=seed)
    assert not unfinished.exists()
    assert quick.folds() == [1, 2, *range(1, folds + 1)]
    assert f"starting anew, in place of an earlier cross-validation: {told}\n" in capsys.readouterr().out
    assert sorted(path.name for path in FOLDER.glob("fold-*")) == [f"fold-{fold}" for fold in range(1, folds + 1)]
    assert len(_parents()) == 2
    assert [point.step for point in _history(_parents()[0].id, "fold/top1")] == list(range(1, folds + 1))


def test_other_first_weights_begin_anew(quick: Trainings, capsys: pytest.CaptureFixture[str]) -> None:
    crossval.run(_config(), folds=2)
    Origin(start="file", source="a test", sha256="2" * 64).write(paths.pretrained(NET))
    crossval.run(_config(), folds=2)
    assert quick.folds() == [1, 2, 1, 2]
    assert "weights.sha256 was 1111" in capsys.readouterr().out


def test_the_folds_of_a_run_that_mlflow_has_lost_stand_under_the_new_one(quick: Trainings) -> None:
    crossval.run(_config(), folds=2)
    (first,) = _parents()
    from mlflow import MlflowClient

    MlflowClient(tracking.store_uri()).delete_run(first.id)
    crossval.run(_config(), folds=2)
    assert quick.folds() == [1, 2]
    (second,) = _parents()
    copies = [run for run in tracking.runs() if run.tags.get(tracking.PARENT_TAG) == second.id]
    result = json.loads((FOLDER / crossval.RESULT).read_text())
    assert {run.tags["copy_of"]: run.metrics["top1"] for run in copies} == {
        fold["run_id"]: fold["top1"] for fold in result["per_fold"]
    }


def test_a_trial_says_that_it_means_nothing(quick: Trainings, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    crossval.run(_config(**{"train.fast_dev_run": True}), folds=2)
    assert "A TRIAL of one batch of everything: the figures mean nothing." in capsys.readouterr().out
    result = json.loads((FOLDER / crossval.RESULT).read_text())
    assert [fold["pictures"] for fold in result["per_fold"]] == [4, 4]
    assert len(pd.read_parquet(FOLDER / crossval.PREDICTIONS)) == 8


@pytest.mark.parametrize(
    ("folds", "seed", "message"),
    [
        (1, 0, "1 folds: it must be 2 to 100"),
        (101, 0, "101 folds: it must be 2 to 100"),
        (3, -1, "seed -1: it must be 0 or more, and below 2^32"),
        (
            10,
            0,
            "class number 0 has 8 groups of pictures for 10 folds, and each needs one; add some, or use fewer folds",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_begins(
    folds: int, seed: int, message: str, quick: Trainings
) -> None:
    with pytest.raises(UserError) as error:
        crossval.run(_config(), folds=folds, seed=seed)
    assert str(error.value) == message
    assert quick.jobs == []
    assert tracking.runs() == []


def test_without_the_stages_before_it_the_line_says_which_to_run(quick: Trainings) -> None:
    with pytest.raises(UserError, match=r"packed at 32 px where augment\.px is 48; run `dvc repro weights augment`"):
        crossval.run(_config(**{"augment.px": 48}), folds=2)
    shutil.rmtree("data")
    with pytest.raises(UserError, match="no packed pictures here; run `dvc repro augment`"):
        crossval.run(_config(), folds=2)
    shutil.rmtree("models")
    with pytest.raises(UserError, match="lenet5: no weights to start from here; run `dvc repro weights augment`"):
        crossval.run(_config(), folds=2)
    assert quick.jobs == []


def test_two_at_once_are_refused(quick: Trainings) -> None:
    lock = paths.progress(NET) / "crossval" / "lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(UserError, match="is being cross-validated by another process; wait for it"):
        crossval.run(_config(), folds=2)
    assert quick.jobs == []


def _in_a_process(folder: Path, *, settings: dict[str, Any], before: str = "") -> "subprocess.CompletedProcess[str]":
    """A cross-validation of three folds, in a project without copies that is made at the first call."""
    with pytest.MonkeyPatch.context() as patch:
        folder.mkdir(exist_ok=True)
        patch.chdir(folder)
        if not paths.PARAMS.exists():
            _project(copies=0)
    script = folder / "script.py"  # a file, which Lightning starts again for the second process
    run = f"crossval.run(config.load(overrides={ {**OVERRIDES, **settings}!r}), folds=3, seed=1)"
    script.write_text(f"from pipeline import config, crossval\n{before}\n{run}\n")
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, "DVC_ROOT": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def _figures(folder: Path) -> list[tuple[float, float, int]]:
    result = json.loads((folder / FOLDER / crossval.RESULT).read_text())
    return [(fold["top1"], fold["loss"], fold["best_epoch"]) for fold in result["per_fold"]]


@pytest.mark.slow
def test_one_that_is_killed_in_mid_fold_comes_to_the_same_predictions(tmp_path: Path) -> None:
    kill = (
        "import os, signal\n"
        "from pipeline.training.classifier import Classifier\n"
        "step, original = [0], Classifier.training_step\n"
        "def training_step(self, batch, index):\n"
        "    step[0] += 1\n"
        "    if step[0] == 14:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, batch, index)\n"
        "Classifier.training_step = training_step\n"
    )
    settings = {"train.checkpoint_every": 2, "train.transforms": {"horizontal_flip": {"p": 0.5}}}
    assert _in_a_process(tmp_path / "whole", settings=settings).returncode == 0
    killed = _in_a_process(tmp_path / "killed", settings=settings, before=kill)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed" / FOLDER).glob("fold-*")] == ["fold-1"]
    done = _in_a_process(tmp_path / "killed", settings=settings)
    assert done.returncode == 0, done.stderr
    assert "fold 1 of 3: done before" in done.stdout
    assert "going on with run" in done.stdout
    tables = [pd.read_parquet(tmp_path / name / FOLDER / crossval.PREDICTIONS) for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.slow
def test_two_processes_train_every_fold_together(tmp_path: Path) -> None:
    for devices in (1, 2):
        settings = {"train.devices": devices, "train.strategy": "ddp"}
        done = _in_a_process(tmp_path / f"{devices}", settings=settings)
        assert done.returncode == 0, done.stderr
    # 18 pictures in batches of 6: each process has as many, and none is filled in.
    one, two = _figures(tmp_path / "1"), _figures(tmp_path / "2")
    assert np.allclose(one, two, atol=1e-5)
