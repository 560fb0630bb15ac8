"""A training that is stopped, however and wherever, goes on to the very weights that it would have had."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from pipeline import tracking
from pipeline.data import store
from pipeline.data.store import Row
from pipeline.training import weights
from pipeline.training.pretrained import Origin
from pipeline.training.record import Record

# Of MLflow's own tables.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

ROOT = Path(__file__).parents[2]
NET = "scratch/resnet20"
PX = 32
TRAIN = {
    "batch_size": 6,
    "transforms": {"horizontal_flip": {"p": 0.5}, "gaussian_noise": {"p": 0.5}},
    "mixup": 0.4,
    "cutmix": 0.5,
    "average": "ema",
    "ema_decay": 0.8,
    "sampling": "balanced",
    "clip": 1.0,
    "checkpoint_every": 2,
    "gradient_norms": True,
    "phases": {
        "one": {"epochs": 2, "trainable": "all", "lr": 0.01, "warmup": 0.2, "scheduler": "plateau"},
        "two": {"steps": 7, "trainable": "last:3", "lr": 0.01, "layer_decay": 0.8, "batch_size": 8, "accumulate": 2},
    },
}
"""Phase one: 2 epochs of 4 steps. Phase two: 7 steps, in epochs of 3."""
KEPT = {
    "mixup": 0,
    "cutmix": 0,
    "phases": {
        "one": {"epochs": 2, "trainable": "head", "lr": 0.01, "views": 2},
        "two": {"steps": 6, "trainable": "last:3", "lr": 0.01, "strength": 0},
    },
}
"""What makes the frozen layers' output the same every time: two views in phase one, none but the picture in two."""

DRIVER = """
import os, signal, sys
from pipeline.__main__ import main
from pipeline.training import checkpoints, progress, results, tuning
from pipeline.training.classifier import Classifier

where, name, checkpoints.SPACED_S = sys.argv[1], getattr(signal, sys.argv[2]), float(sys.argv[3])
tuning.PAYS = 0
phase, _, place = where.partition(":")
killed = []
def kill():
    if not killed:  # a second signal would not wait
        killed.append(True)
        os.kill(os.getpid(), name)
def before(owner, method, matches):
    original = getattr(owner, method)
    def wrapped(*args, **kwargs):
        if matches(*args, **kwargs):
            kill()
        return original(*args, **kwargs)
    setattr(owner, method, wrapped)
if place.isdigit():
    before(Classifier, "training_step", lambda m, b, i: m.phase.name == phase and m.global_step == int(place))
elif place.startswith("val"):
    epoch = int(place[3:])
    before(Classifier, "validation_step", lambda m, b, i: m.phase.name == phase and m.current_epoch == epoch)
elif place == "end":
    before(progress.Progress, "finish", lambda p, name, outcome: name == phase)
elif place == "write":
    before(results.weights, "save_model", lambda *a, **k: True)
sys.exit(main(["train"]))
"""


def _project(folder: Path, **changed: Any) -> Path:
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params["data"]["name"] = "tiny"
    params["augment"]["px"] = PX
    params["model"].update({"name": NET})
    params["train"].update({**TRAIN, **changed})
    params["tracking"].update({"log_model": False, "system_metrics": False})
    folder.mkdir()
    yaml.dump(params, folder / "params.yaml")
    (folder / "models" / "pretrained" / NET).mkdir(parents=True)
    (folder / "models" / "no-weights").touch()
    Origin(start="file", source="a test").write(folder / "models" / "pretrained" / NET)
    torch.manual_seed(0)
    from pipeline import nets

    net = nets.build(NET, num_classes=5, in_chans=3)
    weights.save_state(folder / "models" / "pretrained" / NET / "weights.safetensors", net.state_dict())
    packed = folder / "data" / "prepared" / "tiny"
    packed.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = (
        (Row(f"{i}", split, i % 3, 0, PX, PX), rng.integers(0, 256, (PX, PX, 1), dtype=np.uint8))
        for i, split in enumerate(["train"] * 23 + ["val"] * 6)
    )
    store.write(packed, rows, dataset="tiny", classes=("a", "b", "c"), px=PX, channels=1, skipped=[])
    return folder


def _run(
    folder: Path, stop: str = "never", how: str = "SIGKILL", *, spaced: float = 0.0
) -> "subprocess.CompletedProcess[str]":
    """Trains, up to where it is stopped; every epoch's end writes a checkpoint, unless they are to be `spaced`."""
    return subprocess.run(
        [sys.executable, "-c", DRIVER, stop, how, str(spaced)],
        cwd=folder,
        env={**os.environ, "DVC_ROOT": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def _points(folder: Path) -> list[tuple[str, int, float]]:
    """Every point that MLflow has of the one run, doubled ones as often as they are there."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run_id = Record.read(folder / "models" / NET / "train").run_id
    names = client.get_run(run_id).data.metrics
    return sorted((name, p.step, p.value) for name in names for p in client.get_metric_history(run_id, name))


def _same(one: Path, two: Path) -> None:
    """Weights, rows and metric points, bit by bit."""
    first, second = (weights.load_model(f / "models" / NET / "train" / "model.safetensors")[0] for f in (one, two))
    for (name, mine), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    assert _points(one) == _points(two)
    gradients = [(f / "models" / NET / "train" / "gradients.csv").read_text() for f in (one, two)]
    assert gradients[0] == gradients[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _project(tmp_path_factory.mktemp("whole") / "it")
    done = _run(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _project(tmp_path_factory.mktemp("kept") / "it", **KEPT)
    done = _run(folder)
    assert done.returncode == 0, done.stderr
    assert "frozen layers computed for 46 pictures" in done.stdout  # two views of 23
    return folder


def _runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tracking.RunRow]:
    monkeypatch.setenv("DVC_ROOT", str(folder))
    return tracking.runs()


def test_what_is_killed_in_mid_epoch_goes_on_bit_by_bit_in_the_same_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _project(tmp_path / "it")
    for stop in ("one:3", "two:5"):
        assert _run(folder, stop).returncode == -signal.SIGKILL
    done = _run(folder)
    assert done.returncode == 0, done.stderr
    assert "going on with run" in done.stdout
    _same(whole, folder)
    (run,) = _runs(folder, monkeypatch)
    assert run.status == "FINISHED"
    assert not (folder / "models" / "progress" / NET / "state.json").exists()


@pytest.mark.slow
def test_no_place_is_wrong_to_be_killed_at(whole: Path, tmp_path: Path) -> None:
    folder = _project(tmp_path / "it")
    stops = ["one:0", "one:1", "one:2", "one:val0", "one:4", "one:7", "one:val1", "one:end"]
    stops += ["two:0", "two:1", "two:2", "two:val0", "two:3", "two:6", "two:val2", "two:end", "two:write"]
    for stop in stops:
        assert _run(folder, stop).returncode == -signal.SIGKILL, stop
    assert _run(folder).returncode == 0
    _same(whole, folder)


def test_workers_begin_with_the_next_epoch_where_one_is_over(whole: Path, tmp_path: Path) -> None:
    # They make batches before Lightning has said which epoch it is, and an epoch's end leaves the loader no state.
    folder = _project(tmp_path / "it", workers=1)
    for stop in ("one:4", "two:3"):
        assert _run(folder, stop).returncode == -signal.SIGKILL, stop
    assert _run(folder).returncode == 0
    _same(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stops", "how"),
    [
        (("one:val0", "one:val1", "two:val0", "two:val2"), "SIGTERM"),
        (("one:4", "one:7", "one:end", "two:4", "two:6"), "SIGKILL"),
    ],
)
def test_workers_begin_anew_at_the_end_of_any_epoch(
    stops: tuple[str, ...], how: str, whole: Path, tmp_path: Path
) -> None:
    folder = _project(tmp_path / "it", workers=1, checkpoint_every=1000)
    for stop in stops:
        assert _run(folder, stop, how).returncode == (143 if how == "SIGTERM" else -signal.SIGKILL), stop
    assert _run(folder).returncode == 0
    _same(whole, folder)


@pytest.mark.slow
def test_loading_workers_change_nothing_of_it(whole: Path, tmp_path: Path) -> None:
    folder = _project(tmp_path / "it", workers=2)
    for stop in ("one:3", "one:val1", "two:5"):
        assert _run(folder, stop).returncode == -signal.SIGKILL, stop
    assert _run(folder).returncode == 0
    _same(whole, folder)


@pytest.mark.parametrize(
    ("stops", "how"),
    [
        (("one:7", "two:4"), "SIGTERM"),
        pytest.param(("one:5", "one:end", "two:6", "two:write"), "SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_epochs_too_short_for_a_checkpoint_each_change_nothing_of_it(
    stops: tuple[str, ...], how: str, whole: Path, tmp_path: Path
) -> None:
    folder = _project(tmp_path / "it", checkpoint_every=1000)
    for stop in stops:
        ended = _run(folder, stop, how, spaced=1000)
        assert ended.returncode == (143 if how == "SIGTERM" else -signal.SIGKILL), (stop, ended.stderr)
    assert _run(folder, spaced=1000).returncode == 0
    _same(whole, folder)


@pytest.mark.parametrize("how", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_stops_after_a_checkpoint_with_143(
    how: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _project(tmp_path / "it", checkpoint_every=1000)
    stopped = _run(folder, "one:2", how)
    assert stopped.returncode == 143, stopped.stderr
    assert "stopping after step 3 of this phase: the same command goes on from here" in stopped.stdout
    assert not (folder / "models" / NET / "train").exists()
    assert [run.status for run in _runs(folder, monkeypatch)] == ["KILLED"]
    assert _run(folder).returncode == 0
    _same(whole, folder)


def test_a_checkpoint_that_cannot_be_read_gives_way_to_the_one_before(whole: Path, tmp_path: Path) -> None:
    folder = _project(tmp_path / "it")
    assert _run(folder, "two:5").returncode == -signal.SIGKILL
    last = folder / "models" / "progress" / NET / "phases" / "two" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    done = _run(folder)
    assert done.returncode == 0, done.stderr
    assert "last.ckpt cannot be read" in done.stderr
    _same(whole, folder)


@pytest.mark.parametrize("name", ["best.ckpt", pytest.param("last.ckpt", marks=pytest.mark.slow)])
def test_a_phase_that_is_over_is_made_again_where_its_checkpoint_cannot_be_read(
    name: str, whole: Path, tmp_path: Path
) -> None:
    folder = _project(tmp_path / "it")
    assert _run(folder, "two:5").returncode == -signal.SIGKILL
    path = folder / "models" / "progress" / NET / "phases" / "one" / name
    broken = path.read_bytes()[: path.stat().st_size // 2]
    path.unlink()  # which may be one file with another name
    path.write_bytes(broken)
    done = _run(folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING") == 1
    assert f"{name} cannot be read" in done.stderr
    _same(whole, folder)


def test_another_configuration_begins_anew_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _project(tmp_path / "it")
    assert _run(folder, "two:5").returncode == -signal.SIGKILL
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    params["train"].update({"weight_decay": 0.5, "workers": 1})
    yaml.dump(params, folder / "params.yaml")
    done = _run(folder, "one:1")
    assert "not from the checkpoints of an earlier training: train.weight_decay was 0.01 and is 0.5" in done.stdout
    assert "more)" not in done.stdout  # the number of workers changes no result
    state = json.loads((folder / "models" / "progress" / NET / "state.json").read_text())
    assert state["facts"]["train.weight_decay"] == 0.5
    assert not (folder / "models" / "progress" / NET / "phases" / "two").exists()
    assert len(_runs(folder, monkeypatch)) == 2


def test_a_training_goes_on_in_the_way_that_auto_tune_chose_and_the_run_has_it(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder = _project(tmp_path / "it", auto_tune=True, profile=True)
    assert _run(folder, "two:3").returncode == -signal.SIGKILL
    state = json.loads((folder / "models/progress" / NET / "state.json").read_text())["tuned"]
    kept = folder / "data/cache/tuned"
    assert [json.loads(path.read_text())["choice"] for path in kept.glob("*.json")] == [state["choice"]]
    shutil.rmtree(kept)  # or the choice could come from there
    done = _run(folder)
    assert done.returncode == 0, done.stderr
    assert "auto_tune goes on with precision" in done.stdout
    assert "trying" not in done.stdout

    trained = folder / "models" / NET / "train"
    table = pd.read_csv(trained / "auto_tune.csv")
    assert table["step_ms"].tolist() == pytest.approx([row["step_ms"] for row in state["table"]], rel=1e-3)
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run(Record.read(trained).run_id)
    for name, value in state["choice"].items():
        assert run.data.params[f"train.{name}"] == run.data.tags[f"auto_tune.{name}"] == str(value)
    filed = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "train")}
    assert filed >= {f"train/{name}" for name in ("auto_tune.csv", "trace_one.json.gz", "trace_two.json.gz")}
    for phase in ("one", "two"):
        with gzip.open(trained / f"trace_{phase}.json.gz", "rt") as file:
            assert any("convolution" in event.get("name", "") for event in json.load(file)["traceEvents"])


def test_checkpoints_hold_nothing_that_could_run(whole: Path) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        state = torch.load(whole / "models" / NET / "train" / name, weights_only=True)
        assert {"state_dict", "optimizer_states", "lr_schedulers", "loops"} <= set(state)


def test_learning_rates_that_were_found_are_those_of_the_resumed_training(tmp_path: Path) -> None:
    phases = {"one": {"epochs": 1, "trainable": "all", "lr": "find", "layer_decay": 0.8}}
    folder = _project(tmp_path / "it", phases=phases)
    assert _run(folder, "one:3").returncode == -signal.SIGKILL
    found = json.loads((folder / "models" / "progress" / NET / "state.json").read_text())["rates"]["one"]
    assert len(found) > 2  # a group for each layer
    done = _run(folder)
    assert done.returncode == 0, done.stderr
    assert "found a learning rate" not in done.stdout  # it is not looked for again
    trained = folder / "models" / NET / "train"
    assert Record.read(trained).phases[0].lr == max(found)
    state = torch.load(trained / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group["max_lr"] for group in state["param_groups"]] == found
    with Image.open(trained / "lr_find_one.png") as picture:
        assert picture.width > 500


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_together(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    launch = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", str(driver)]
    states, points = [], []
    for name, stops in (("whole", ["never"]), ("stopped", ["one:3", "two:5", "never"])):
        folder = _project(tmp_path / name, devices=2, strategy="ddp", accelerator="cpu")
        environment = {**os.environ, "DVC_ROOT": str(folder), "PYTHONPATH": str(ROOT)}
        for stop in stops:
            done = subprocess.run(
                [*launch, stop, "SIGKILL", "0"],
                cwd=folder,
                env=environment,
                capture_output=True,
                check=False,
                timeout=300,
            )
            assert (done.returncode == 0) == (stop == "never"), done.stderr
        states.append(weights.load_model(folder / "models" / NET / "train" / "model.safetensors")[0].state_dict())
        points.append(_points(folder))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    # Sums over ranks are added up in another order.
    assert [(name, step) for name, step, _ in points[0]] == [(name, step) for name, step, _ in points[1]]
    np.testing.assert_allclose([v for *_, v in points[0]], [v for *_, v in points[1]], rtol=1e-6)


@pytest.mark.parametrize(
    "stop",
    [
        "one:5",
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ["one:2", "one:val1", "one:end", "two:2", "two:4", ":write"]
        ),
    ],
)
def test_a_training_on_kept_features_goes_on_to_the_same_bits(stop: str, kept: Path, tmp_path: Path) -> None:
    folder = _project(tmp_path / "it", **KEPT)
    assert _run(folder, stop).returncode == -signal.SIGKILL
    done = _run(folder)
    assert done.returncode == 0, done.stderr
    assert "frozen layers computed for 0 pictures" in done.stdout or stop in ("one:end", ":write")
    _same(kept, folder)
