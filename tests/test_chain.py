"""The real chain on scikit-learn's digits: `dvc repro`, then another net, then `make train`, then what goes wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from ruamel.yaml import YAML

from pipeline import config, nets, tracking
from pipeline.analysis import inference
from pipeline.tracking import RunRow
from pipeline.training import weights

ROOT = Path(__file__).parents[1]
MADE = ("dvc.lock", "models/metrics.json")
"""Committed files that the chain writes: a copy begins without them."""
FIRST, SECOND, THIRD = "scratch/lenet5", "scratch/resnet20", "test_efficientnet"
"""Nets in the order in which they are trained; the last is timm's, and nothing here has weights for it."""
SETTINGS = {
    "data.name": "digits",
    "augment.px": 32,
    "augment.train_size": 600,
    "model.name": FIRST,
    "train.batch_size": 30,
    "train.phases.frozen.epochs": 2,
    "train.phases.finetune.epochs": 3,
    "train.phases.finetune.lr": 0.01,
    "evaluate.batch_size": 100,
}


class Project:
    """A private copy of the repository with one commit and nothing run yet, driven from outside as a user does.

    Its environment has no git identity, no model hub, no display and one thread a process, so that tests that run at
    the same time do not wait for one another.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a project"
        home = folder / "home"
        home.mkdir()
        _copy_tracked(self.folder)
        _link_environment(self.folder / ".venv")
        self.environment = {
            "PATH": os.pathsep.join([str(self.folder / ".venv/bin"), os.environ["PATH"]]),
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "CI": "true",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "--quiet", "--message", "all of it")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the copy; both streams of output are in `stdout`."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def git(self, *arguments: str) -> str:
        done = self.run("git", *arguments)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def set(self, parameters: Mapping[str, Any]) -> None:
        """Edits params.yaml, as a user would: by dotted name."""
        yaml, path = YAML(), self.folder / "params.yaml"
        document = yaml.load(path)
        for dotted, value in parameters.items():
            *parents, last = dotted.split(".")
            node = document
            for parent in parents:
                node = node[parent]
            node[last] = value
        yaml.dump(document, path)

    def files(self, *folders: str) -> dict[str, bytes]:
        """Every file under some folders, by path."""
        found = (path for folder in folders for path in (self.folder / folder).rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def _copy_tracked(target: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if name not in MADE and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def _link_environment(target: Path) -> None:
    """The running environment under another name, with a stamp of its own, so that `make` finds nothing to install."""
    target.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (target / name).symlink_to(Path(sys.prefix) / name)
    (target / ".lock-installed").touch()


class Done(NamedTuple):
    """A command that has run, and the files of earlier nets before and after it."""

    output: str
    code: int
    before: dict[str, bytes]
    after: dict[str, bytes]


def _run(project: Project, *command: str, watched: tuple[str, ...] = ()) -> Done:
    before = project.files(*watched)
    done = project.run(*command)
    return Done(done.stdout, done.returncode, before, project.files(*watched))


def _results(*models: str) -> tuple[str, ...]:
    return tuple(folder for model in models for folder in (f"models/{model}", f"models/pretrained/{model}"))


def _stages(output: str) -> list[str]:
    return re.findall(r"^Running stage '(\w+)'", output, flags=re.MULTILINE)


def _json(project: Project, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((project.folder / name).read_text())
    return loaded


def _lock(project: Project) -> dict[str, Any]:
    stages: dict[str, Any] = YAML(typ="safe").load(project.folder / "dvc.lock")["stages"]
    return stages


def _runs(project: Project) -> list[RunRow]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project.folder}/mlflow.db")
        return tracking.runs("thaw")


@pytest.fixture(scope="module")
def first(project: Project) -> Done:
    """A whole chain from nothing."""
    project.set(SETTINGS)
    done = _run(project, "dvc", "repro")
    assert done.code == 0, done.output
    return done


@pytest.fixture(scope="module")
def second(project: Project, first: Done) -> Done:  # noqa: ARG001, comes before
    """Another net by editing params.yaml, tried out with one batch of everything."""
    project.set({"model.name": SECOND, "train.fast_dev_run": True, "tracking.log_model": False})
    done = _run(project, "dvc", "repro", watched=_results(FIRST))
    assert done.code == 0, done.output
    return done


@pytest.fixture(scope="module")
def third(project: Project, second: Done) -> Done:  # noqa: ARG001, comes before
    """Another net by `make train`, in a tree with a change and a file of the user's own."""
    project.set({"train.fast_dev_run": False})
    ignored = project.folder / ".gitignore"
    ignored.write_text(f"{ignored.read_text()}# mine\n")
    (project.folder / "notes.txt").write_text("mine\n")
    settings = "SET=train.batch_size=50 train.weight_decay=1e-3"
    done = _run(
        project, "make", "train", f"MODEL={THIRD}", "EPOCHS=1", settings, watched=(*_results(FIRST, SECOND), "data")
    )
    assert done.code == 0, done.output
    return done


@pytest.mark.usefixtures("first")
class TestFirst:
    def test_every_out_is_there(self, project: Project, first: Done) -> None:
        assert sorted(_stages(first.output)) == ["augment", "download", "evaluate", "train", "weights"]
        assert "Warning" not in first.output
        train = "model.safetensors best.ckpt last.ckpt record.json curves.png"
        evaluate = "predictions.parquet per_class.csv report.md confusion.png curves.png"
        expected = {
            "data/raw/digits/digits.npz",
            *(f"data/prepared/digits/{name}" for name in ("pictures.bin", "manifest.csv", "meta.json", "preview.png")),
            f"models/pretrained/{FIRST}/origin.json",
            *(f"models/{FIRST}/train/{name}" for name in train.split()),
            *(f"models/{FIRST}/evaluate/{name}" for name in evaluate.split()),
            *(f"models/{name}" for name in ("metrics.json", "curves.csv", "confusion.csv")),
        }
        assert expected <= set(project.files("data", "models"))
        assert not [name for name in project.files("data", "models") if ".part" in name]

    def test_metrics_are_those_of_the_predictions(self, project: Project) -> None:
        test = _json(project, "models/metrics.json")["test"]
        rows = pd.read_parquet(project.folder / f"models/{FIRST}/evaluate/predictions.parquet")
        shares = rows[[f"p_{digit}" for digit in range(10)]].to_numpy()
        actual = rows["actual"].astype(int).to_numpy()
        assert test["pictures"] == len(rows) == 359
        assert test["top1"] == rows["correct"].mean() == (shares.argmax(axis=1) == actual).mean()
        assert test["top1_error"] == pytest.approx(1 - test["top1"])
        assert test["top5"] == (np.argsort(-shares, axis=1)[:, :5] == actual[:, None]).any(axis=1).mean()
        assert test["loss"] == pytest.approx(-np.log(shares[np.arange(len(rows)), actual]).mean(), rel=1e-4)
        assert test["top1_low"] < test["top1"] < test["top1_high"]
        assert test["top1"] > 0.5  # 0.1 by guessing
        confusion = pd.read_csv(project.folder / "models/confusion.csv", dtype=str)
        assert confusion["predicted"].tolist() == rows["predicted"].tolist()

    def test_curves_have_a_row_an_epoch_over_both_phases(self, project: Project) -> None:
        rows = pd.read_csv(project.folder / "models/curves.csv")
        assert rows["epoch"].tolist() == [1, 2, 3, 4, 5]
        assert rows["phase"].tolist() == ["frozen"] * 2 + ["finetune"] * 3
        record = _json(project, f"models/{FIRST}/train/record.json")
        best = {phase["name"]: phase["best_epoch"] for phase in record["phases"]}
        assert best == {
            name: rows.loc[group["val/loss"].idxmin(), "epoch"] for name, group in rows.groupby("phase", sort=False)
        }

    def test_one_run_in_mlflow_holds_training_and_evaluation(self, project: Project) -> None:
        (run,) = (row for row in _runs(project) if row.params["model.name"] == FIRST)
        metrics = _json(project, "models/metrics.json")
        assert (run.id, run.name, run.status) == (metrics["run"]["id"], metrics["run"]["name"], "FINISHED")
        flat = config.flat(config.load(project.folder / "params.yaml", overrides=SETTINGS))
        assert run.params == {name: str(value) for name, value in flat.items()}
        assert {name: run.metrics[f"test/{name}"] for name in metrics["test"]} == metrics["test"]
        assert run.metrics["phase/finetune/val/top1"] >= run.metrics["phase/frozen/val/top1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project.folder}/mlflow.db")
            client = tracking._client()
            curves = pd.read_csv(project.folder / "models/curves.csv")
            points = client.get_metric_history(run.id, "val/top1")
            assert [point.value for point in points] == pytest.approx(curves["val/top1"].tolist())
            assert [point.step for point in points] == [20, 40, 60, 80, 100]
            assert len(client.get_metric_history(run.id, "lr")) >= 5
            names = {
                file.path for folder in ("", "train", "evaluate") for file in client.list_artifacts(run.id, folder)
            }
            files = "train/model.safetensors train/best.ckpt train/curves.png evaluate/report.md evaluate/confusion.png"
            assert {"params.yaml", *files.split()} <= names
            (output,) = client.get_run(run.id).outputs.model_outputs
            logged = client.get_logged_model(output.model_id)
            assert logged.status == "READY"
            self._predicts_any_number_of_pictures(project, logged.artifact_location)

    def _predicts_any_number_of_pictures(self, project: Project, location: str) -> None:
        """The model in MLflow takes pixels 0 to 255, as its signature says, and gives the trained model's logits."""
        net, card = weights.load_model(project.folder / f"models/{FIRST}/train/model.safetensors")
        ours = inference.with_preprocessing(net, card)
        with tracking._importing_mlflow():  # mlflow warns of types of its own
            from mlflow import pyfunc

            served = pyfunc.load_model(location)
        for number in (1, 2, 5):
            pixels = torch.randint(0, 256, (number, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
            with torch.inference_mode():
                expected = ours(pixels).numpy()
            assert np.allclose(served.predict(pixels.numpy()), expected, atol=1e-5)

    def test_the_run_says_what_it_was_made_from(self, project: Project) -> None:
        tags = next(row.tags for row in _runs(project) if row.params["model.name"] == FIRST)
        assert tags["git.commit"] == project.git("rev-parse", "HEAD").strip()
        assert tags["git.dirty"] == "true"
        assert (tags["start"], tags["weights"], tags["fast_dev_run"]) == ("random", "random", "false")
        assert tags["data.sha256"] == _json(project, "data/prepared/digits/meta.json")["sha256"]
        assert {"dvc.prepared", "dvc.pretrained", "hardware.cpu", "hardware.cores", "version.torch"} <= set(tags)


def test_again_nothing_runs(project: Project, first: Done) -> None:
    assert first.code == 0
    before = project.files("models"), _lock(project), _runs(project)
    again = project.run("dvc", "repro")
    assert (again.returncode, _stages(again.stdout)) == (0, [])
    assert "up to date" in again.stdout
    assert (project.files("models"), _lock(project), _runs(project)) == before


def test_another_net_reruns_weights_train_and_evaluate_alone(second: Done) -> None:
    assert _stages(second.output) == ["weights", "train", "evaluate"]
    assert second.before
    assert second.after == second.before


def test_a_trial_of_one_batch_says_that_it_means_nothing(project: Project, second: Done) -> None:
    assert second.code == 0
    (run,) = (row for row in _runs(project) if row.params["model.name"] == SECOND)
    assert (run.tags["fast_dev_run"], run.metrics["test/pictures"]) == ("true", 100)
    assert [phase["epochs"] for phase in _json(project, f"models/{SECOND}/train/record.json")["phases"]] == [1, 1]
    assert "mean NOTHING" in (project.folder / f"models/{SECOND}/evaluate/report.md").read_text()
    assert "meaningless" in project.run("make", "compare").stdout


def test_make_train_says_what_came_of_it(project: Project, third: Done) -> None:
    metrics = _json(project, "models/metrics.json")
    assert metrics["run"]["model"] == THIRD
    assert f"{THIRD} on digits: test top-1 {metrics['test']['top1']:.4f} (" in third.output
    (run,) = (row for row in _runs(project) if row.params["model.name"] == THIRD)
    assert f"MLflow run: {run.name} ({run.id})" in third.output
    changed = re.findall(r"^params.yaml now has (.*)$", third.output, flags=re.MULTILINE)
    assert changed == [
        f"model.name: {SECOND} -> {THIRD}",
        "train.batch_size: 30 -> 50",
        "train.phases.finetune.epochs: 3 -> 1",
        "train.weight_decay: 0.01 -> 0.001",
    ]
    assert "make ui" in third.output
    now = config.load(project.folder / "params.yaml")
    assert (now.model.name, now.train.batch_size, now.train.phases["finetune"].epochs) == (THIRD, 50, 1)
    assert "# pictures per optimiser step" in (project.folder / "params.yaml").read_text()


def test_make_train_leaves_everything_else_alone(project: Project, third: Done) -> None:
    assert _stages(third.output) == ["weights", "train", "evaluate"]
    assert len(third.before) > 20
    assert third.after == third.before
    assert project.git("log", "--format=%s").splitlines() == ["all of it"]
    assert (project.folder / ".gitignore").read_text().endswith("# mine\n")
    assert (project.folder / "notes.txt").read_text() == "mine\n"


def test_a_random_start_cannot_be_overlooked(project: Project, third: Done) -> None:
    assert "no pretrained weights" in third.output
    assert "starts from RANDOM weights" in third.output
    assert "HF_HUB_OFFLINE is set" in third.output
    assert "WARNING: this net started from RANDOM weights" in third.output
    assert _json(project, "models/metrics.json")["run"]["start"] == "random"
    assert "Started from RANDOM weights" in (project.folder / f"models/{THIRD}/evaluate/report.md").read_text()
    (run,) = (row for row in _runs(project) if row.params["model.name"] == THIRD)
    assert (run.tags["start"], run.tags["weights"]) == ("random", "random")
    # Nothing that is worth keeping is frozen.
    record = _json(project, f"models/{THIRD}/train/record.json")
    assert {phase["trainable"] for phase in record["phases"]} == {"all"}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("MODEL=resnt18", "model.name: resnt18: no such net; did you mean resnet18"),
        ("SET=train.bach_size=8", "train.bach_size: no such parameter; did you mean batch_size?"),
    ],
)
def test_make_train_answers_a_mistake_in_one_line(project: Project, third: Done, argument: str, expected: str) -> None:
    assert third.code == 0
    before = project.files("models"), (project.folder / "params.yaml").read_text()
    done = project.run("make", "train", argument)
    line, makes = done.stdout.splitlines()
    assert line.startswith(f"thaw experiment: {expected}")
    assert makes.endswith("Error 2")
    assert done.returncode == 2
    assert (project.files("models"), (project.folder / "params.yaml").read_text()) == before


@pytest.fixture
def failing(project: Project, third: Done) -> Iterator[Project]:
    """The copy, whose params.yaml is put back afterwards."""
    assert third.code == 0
    path = project.folder / "params.yaml"
    kept = path.read_text()
    yield project
    path.write_text(kept)


def test_a_stopped_training_is_not_recorded(failing: Project) -> None:
    failing.set({"model.name": FIRST, "train.phases.frozen.epochs": 5000})
    before = _lock(failing)["train"]
    log = failing.folder.parent / "stopped.txt"
    with log.open("w") as file:
        dvc = subprocess.Popen(
            ["dvc", "repro"], cwd=failing.folder, env=failing.environment, stdout=file, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 120
    while "frozen 1/5000" not in log.read_text():
        assert dvc.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    stage = next(child for child in psutil.Process(dvc.pid).children(recursive=True) if "train" in child.cmdline())
    stage.terminate()
    assert dvc.wait(timeout=60) == 255
    assert "python -m pipeline train, exited with 143" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert _lock(failing)["train"] == before
    assert not failing.files(f"models/{FIRST}/train", f"models/{FIRST}/.train.part")
    assert _runs(failing)[0].status == "KILLED"


def test_a_loss_that_is_not_a_number_is_the_users_to_mend_and_not_recorded(failing: Project) -> None:
    state = nets.build(FIRST, num_classes=10).state_dict()
    torch.save({name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}, failing.folder / "nan.pth")
    failing.set({"model.name": FIRST, "model.weights": "nan.pth"})
    done = failing.run("dvc", "repro")
    assert _stages(done.stdout) == ["weights", "train"]
    assert done.returncode == 255
    assert "thaw train: the loss became nan in phase frozen, epoch 1, step 1; lower" in done.stdout
    assert "python -m pipeline train, exited with 2" in done.stdout
    assert "Traceback" not in done.stdout
    locked = _lock(failing)
    assert locked["weights"]["params"]["params.yaml"]["model.weights"] == "nan.pth"
    assert "nan.pth" not in json.dumps(locked["train"])
    assert not failing.files(f"models/{FIRST}/train")
    assert _runs(failing)[0].status == "FAILED"


STUDY = """
title: Two small nets
source: nobody
question: Which?
measure: test_error
seeds: [0, 1, 2]
settings: {data.name: digits, augment.px: 32, augment.train_size: 300, tracking.log_model: false}
sizes:
  small: {train.phases: {only: {epochs: 1, trainable: all, lr: 0.01, scheduler: constant}}}
  full: {}
variants:
  lenet: {settings: {model.name: scratch/lenet5}}
  separable: {settings: {model.name: scratch/ablation_separable, train.gradient_norms: true}}
pairs: [[separable, lenet]]
"""


@pytest.mark.slow
def test_a_study_is_a_group_of_experiments_under_one_run_and_repeats_from_the_cache(tmp_path: Path) -> None:
    project = Project(tmp_path)
    (project.folder / "experiments/tiny").mkdir()
    (project.folder / "experiments/tiny/study.yaml").write_text(STUDY)
    (project.folder / "docs/experiments.md").write_text("<!-- tiny: begin -->\n<!-- tiny: end -->\n")
    before = project.files("params.yaml", "data")
    first = _run(project, "make", "study", "NAME=tiny")
    assert first.code == 0, first.output
    assert project.files("params.yaml", "data").items() >= before.items()
    assert not (project.folder / "dvc.lock").exists()
    results = json.loads((project.folder / "experiments/tiny/results-small.json").read_text())
    assert [(r["variant"], r["seed"]) for r in results] == [(v, s) for s in range(3) for v in ("lenet", "separable")]
    assert len({r["test_error"] for r in results}) > 2
    children = {row.id: row for row in _runs(project)}
    (parent,) = (row for row in children.values() if "study" in row.tags)
    assert {r["run"] for r in results} == set(children) - {parent.id}
    assert {row.tags.get("mlflow.parentRunId") for row in children.values() if row is not parent} == {parent.id}
    listed = project.run("dvc", "exp", "list", "--name-only").stdout.split()
    assert {r["experiment"] for r in results} == set(listed)
    assert "± " in (project.folder / "docs/experiments.md").read_text()

    again = _run(project, "make", "study", "NAME=tiny")
    assert again.code == 0, again.output
    assert json.loads((project.folder / "experiments/tiny/results-small.json").read_text()) == results
    assert len(_runs(project)) == len(children)  # nothing was trained, and the parent is the same


@pytest.mark.slow
def test_an_encoder_that_learnt_to_restore_is_fine_tuned(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.set({**SETTINGS, "augment.px": 16, "model.name": "scratch/unet_encoder", "train.phases.finetune.epochs": 1})
    for command in (["dvc", "repro", "augment"], ["make", "restore", "EPOCHS=1"]):
        done = _run(project, *command)
        assert done.code == 0, done.output
    weights_file = "models/restored/unet_encoder.safetensors"
    done = _run(project, "make", "train", "MODEL=scratch/unet_encoder", f"SET=model.weights={weights_file}")
    assert done.code == 0, done.output
    assert "started from file weights" in done.output
    restored = weights.read_state(project.folder / weights_file)
    started = weights.read_state(project.folder / "models/pretrained/scratch/unet_encoder/weights.safetensors")
    assert all(torch.equal(tensor, started[key]) for key, tensor in restored.items())
