"""Sweeps: what varies, who begins which trial, what is kept, and how it goes on after any end.

Most trainings here are stand-ins, which have a run in MLflow, tell their epochs and leave a model as the real ones do.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ruamel.yaml import YAML

from pipeline import config, experiment, paths, search_space, study, tracking, trials, tune
from pipeline.analysis import tune_report
from pipeline.data import store
from pipeline.data.store import Row
from pipeline.errors import UserError
from pipeline.training import job
from pipeline.training.job import Job
from pipeline.training.pretrained import Origin
from pipeline.training.progress import STATE
from pipeline.training.record import Record

ROOT = Path(__file__).parents[1]
NET, PX = "scratch/lenet5", 32
SPACE = "train.lr: {low: 1.0e-4, high: 1.0, log: true}\ntrain.batch_size: {choices: [6, 9]}\n"
OVERRIDES: dict[str, Any] = {
    "data.name": "digits",
    "augment.px": PX,
    "model.name": NET,
    "train.accelerator": "cpu",
    "train.optimizer": "sgd",
    "train.phases": {"head": {"trainable": "head", "epochs": 1}, "all": {"trainable": "all", "epochs": 2}},
    "tracking.system_metrics": False,
}


def _project() -> None:
    """What weights and augment leave, in the present folder, and a space to vary."""
    shutil.copyfile(ROOT / "params.yaml", paths.PARAMS)
    config.write(overrides=OVERRIDES)
    for folder in (paths.pretrained(NET), paths.prepared("digits"), Path("data/pictures")):
        folder.mkdir(parents=True)
    paths.NO_WEIGHTS.touch()
    Path("space.yaml").write_text(SPACE)
    Origin(start="random", source="a test").write(paths.pretrained(NET))
    rng = np.random.default_rng(0)
    rows = (
        (Row(f"{i}", split, i % 3, 0, PX, PX), rng.integers(0, 256, (PX, PX, 1), dtype=np.uint8))
        for i, split in enumerate(["train"] * 18 + ["val"] * 6)
    )
    store.write(
        paths.prepared("digits"), rows, dataset="digits", classes=("a", "b", "c"), px=PX, channels=1, skipped=[]
    )


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to create a store."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.ensure_store()
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv(tracking.PARENT, raising=False)
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    _project()
    return tmp_path


def _loss(one: Job, epoch: int) -> float:
    """Least at a rate of 0.01; a worse one is worse from the first epoch on."""
    assert not isinstance(one.config.train.lr, str)
    return abs(float(np.log10(one.config.train.lr)) + 2) + 1 / epoch


def _stand_in(one: Job, loss: Callable[[Job, int], float] = _loss) -> pd.DataFrame:
    """In place of a training: three epochs, the first in a phase of its own."""
    assert one.watch is not None
    spool = one.progress / "metrics.spool"
    run = tracking.Run.start(experiment="thaw", name=one.name, tags=one.tags, spool=spool)
    (one.progress / STATE).write_text(json.dumps({"run": run.id}))
    rows = []
    with tracking.ending(run):
        for epoch, phase in enumerate(["head", "all", "all"], start=1):
            figures = {"val/loss": loss(one, epoch), "val/top1": 1 / (1 + loss(one, epoch))}
            one.watch({"lr": 0.1, "train/step_loss": 0.0}, step=10 * epoch - 5)
            one.watch({**figures, "epoch": epoch}, step=10 * epoch)
            rows.append({"epoch": epoch, "phase": phase, **figures})
    one.out.mkdir()
    (one.out / "model.safetensors").write_text(one.name)
    Record(run_id=run.id, run_name=run.name, minutes=0.0, steps=30, monitor=one.config.train.monitor, phases=()).write(
        one.out
    )
    return pd.DataFrame(rows)


class Trainings:
    """Notes each training's job."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.train: Callable[[Job], pd.DataFrame] = _stand_in

    def __call__(self, one: Job) -> pd.DataFrame:
        self.jobs.append(one)
        return self.train(one)

    def rates(self) -> list[Any]:
        return [one.config.train.lr for one in self.jobs]


@pytest.fixture
def trainings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Trainings:  # noqa: ARG001, the folder to work in
    noted = Trainings()
    monkeypatch.setattr(job, "run", noted)
    return noted


def _run(number: int = 3, **given: Any) -> None:
    tune.run(**{"trials": number, "name": "a", "space": Path("space.yaml"), "as_experiment": False, **given})


def _study(name: str = "a") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{trials.folder_of(name) / 'optuna.db'}")


def _states(name: str = "a") -> list[str]:
    return [trial.state.name for trial in _study(name).trials]


def _parents() -> list[tracking.RunRow]:
    return [run for run in tracking.runs() if run.name.startswith("tune-") and "trial" not in run.tags]


def _table(name: str = "a") -> pd.DataFrame:
    return pd.read_csv(f"models/tune/{name}/{tune_report.TRIALS}")


def test_the_best_trials_settings_are_written_and_its_model_alone_is_kept(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(7, pruner="none")
    assert len(trainings.jobs) == 7
    losses = [_loss(one, 3) for one in trainings.jobs]
    best = losses.index(min(losses))
    wanted = trainings.jobs[best].config.train
    written = YAML(typ="safe").load(Path("models/tune/a/best.yaml"))
    assert written == {"train.lr": wanted.lr, "train.batch_size": wanted.batch_size}
    table = _table()
    assert table["val/loss"].tolist() == pytest.approx(losses)
    assert table["train.lr"].tolist() == pytest.approx(trainings.rates())
    assert set(table["state"]) == {"complete"}
    assert [path.name for path in trials.folder_of("a").glob("trial-*")] == [f"trial-{best}"]
    assert not list((trials.folder_of("a") / "working").iterdir())
    assert Path("models/tune/a/history.png").stat().st_size > 1000
    assert not any(one.config.tracking.log_model for one in trainings.jobs)
    told = capsys.readouterr().out.splitlines()
    shown = [line.split()[:2] for line in told]
    ranked = sorted(range(7), key=lambda number: losses[number])
    place = shown.index([f"{ranked[0]}", f"{losses[ranked[0]]:.4f}"])
    assert shown[place : place + 5] == [[f"{number}", f"{losses[number]:.4f}"] for number in ranked[:5]]
    assert shown[place + 5] == ["7", "trials:"]
    (line,) = (line for line in told if line.startswith("importance of each: "))
    assert line.startswith("importance of each: train.lr ")
    assert sum(told_of.startswith("== a, trial 3: val/loss ") for told_of in told) == 1


def test_mlflow_has_the_trials_under_one_run_that_has_the_results(trainings: Trainings) -> None:
    _run()
    (parent,) = _parents()
    best = _study().best_trial
    assert (parent.status, parent.tags[tracking.SERVES]) == ("FINISHED", "tune")
    assert parent.metrics == {"best/val/loss": pytest.approx(best.value), "best/trial": best.number}
    assert json.loads(parent.params["tune.train.batch_size"]) == {"choices": [6, 9]}
    assert parent.params["model.name"] == NET
    children = {run.tags["trial"]: run for run in tracking.runs() if "trial" in run.tags}
    assert sorted(children) == ["0", "1", "2"]
    for run in children.values():
        assert (run.tags[tracking.PARENT_TAG], run.tags[tracking.SERVES]) == (parent.id, "tune")
    artifacts = Path(os.environ["DVC_ROOT"]) / "mlartifacts" / parent.id / "artifacts"
    assert sorted(path.name for path in artifacts.iterdir()) == ["best.yaml", "history.png", "trials.csv"]
    assert tracking.PARENT not in os.environ
    assert len(trainings.jobs) == 3


def test_the_figure_is_the_best_epochs_of_the_last_phase(trainings: Trainings) -> None:
    trainings.train = lambda one: _stand_in(one, lambda _, epoch: {1: 0.1, 2: 0.3, 3: 0.5}[epoch])
    _run(1)
    assert _study().best_value == 0.3


def test_with_accuracy_as_the_monitor_the_highest_is_best(trainings: Trainings) -> None:
    config.write(overrides={"train.monitor": "val/top1"})
    _run(4)
    losses = [_loss(one, 3) for one in trainings.jobs]
    assert _study().best_trial.number == losses.index(min(losses))
    assert _study().best_value == pytest.approx(1 / (1 + min(losses)))


def test_a_trial_below_the_median_ends_early_as_a_killed_run_that_says_so(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings.train = lambda one: _stand_in(one, lambda one, epoch: int(one.tags["trial"]) + 1 / epoch)
    _run(7)
    assert _states() == ["COMPLETE"] * 5 + ["PRUNED"] * 2
    runs = {run.tags["trial"]: run for run in tracking.runs() if "trial" in run.tags}
    assert [runs[f"{i}"].status for i in range(7)] == ["FINISHED"] * 5 + ["KILLED"] * 2
    assert [runs[f"{i}"].tags.get("pruned") for i in range(7)] == [None] * 5 + ["true"] * 2
    assert not list((trials.folder_of("a") / "working").iterdir())
    table = _table()
    assert table["state"].tolist()[5:] == ["pruned", "pruned"]
    assert table["epochs"].tolist() == [3] * 5 + [1, 1]
    assert table["val/loss"].isna().tolist() == [False] * 5 + [True] * 2
    assert (
        "== a, trial 5: ended after epoch 1: worse than the median (best: 0.3333, trial 0)" in capsys.readouterr().out
    )


def test_without_a_pruner_every_trial_is_trained_to_its_end(trainings: Trainings) -> None:
    trainings.train = lambda one: _stand_in(one, lambda one, epoch: int(one.tags["trial"]) + 1 / epoch)
    _run(7, pruner="none")
    assert _states() == ["COMPLETE"] * 7


def test_settings_that_do_not_train_are_failed_trials_and_not_the_end(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    mistakes = {
        "1": "the loss became nan in phase all, epoch 1, step 2; lower its lr",
        "2": "the device's memory does not hold train.batch_size 9; lower it",
    }

    def train(one: Job) -> pd.DataFrame:
        if mistake := mistakes.get(one.tags["trial"]):
            raise UserError(mistake)
        return _stand_in(one)

    trainings.train = train
    _run()
    assert _states() == ["COMPLETE", "FAIL", "FAIL"]
    table = _table()
    assert table["state"].tolist() == ["complete", "failed", "failed"]
    assert table["why"].tolist()[1:] == list(mistakes.values())
    captured = capsys.readouterr()
    assert f"== a, trial 1: failed: {mistakes['1']} (best: " in captured.out
    assert captured.err == ""  # Optuna's own words


def test_where_no_trial_comes_to_a_figure_the_sweep_fails_and_says_where_to_look(trainings: Trainings) -> None:
    def train(_: Job) -> pd.DataFrame:
        raise UserError("the loss became inf in phase all")

    trainings.train = train
    with pytest.raises(UserError, match=r"no trial came to a figure \(see models/tune/a/trials\.csv\); narrow the"):
        _run(2)
    assert _table()["state"].tolist() == ["failed"] * 2
    assert [run.status for run in _parents()] == ["FAILED"]


def test_any_other_mistake_ends_the_sweep_and_its_trial_does_not_count(trainings: Trainings) -> None:
    def train(one: Job) -> pd.DataFrame:
        if one.tags["trial"] == "1":
            raise UserError("16-mixed needs a GPU")
        return _stand_in(one)

    trainings.train = train
    with pytest.raises(UserError, match="16-mixed needs a GPU"):
        _run()
    assert [run.status for run in _parents()] == ["FAILED"]
    _run()
    assert _states() == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert _table()["state"].tolist() == ["complete", "stopped", "complete", "complete"]
    assert [run.status for run in _parents()] == ["FINISHED"]


def test_the_same_seed_draws_the_same_settings_and_another_start_draws_others(trainings: Trainings) -> None:
    _run(2)
    _run(2, name="b")
    assert trainings.rates()[:2] == trainings.rates()[2:]
    _run(4)
    assert len(set(trainings.rates()[:2] + trainings.rates()[4:])) == 4


def test_more_trials_go_on_with_the_sweep_in_the_same_run(trainings: Trainings) -> None:
    _run(2)
    _run(2)
    assert len(trainings.jobs) == 2
    config.write(overrides={"train.workers": 1, "tracking.experiment": "other"})  # which change no result
    _run(3)
    assert len(trainings.jobs) == 3
    assert trainings.jobs[-1].config.train.workers == 1
    assert len(_parents()) == 1
    assert len(_table()) == 3


@pytest.mark.parametrize(
    ("changed", "space", "told"),
    [
        ({"train.weight_decay": 0.5}, SPACE, r"train\.weight_decay was 0\.01 and is 0\.5; take another --name"),
        ({"train.clip": 1, "train.epochs": 9}, SPACE, r"train\.epochs was 3 and is 9 \(and 1 more\)"),
        ({}, SPACE.replace("[6, 9]", "[6, 12]"), r"space train\.batch_size was .*\[6, 9\]\} and is .*\[6, 12\]\}"),
        ({}, SPACE.splitlines()[0], r"space train\.batch_size was .* and is unset \(and 1 more\)"),
    ],
)
def test_a_sweep_that_was_begun_otherwise_is_refused(
    changed: dict[str, Any], space: str, told: str, trainings: Trainings
) -> None:
    _run(1)
    config.write(overrides=changed)
    Path("space.yaml").write_text(space)
    with pytest.raises(UserError, match=rf"^the sweep a was begun otherwise: {told}"):
        _run(2)
    assert len(trainings.jobs) == 1


def test_other_pictures_are_another_sweep(trainings: Trainings) -> None:
    _run(1)
    shutil.rmtree("data")
    Path("data/pictures").mkdir(parents=True)
    paths.prepared("digits").mkdir(parents=True)
    rows = [(Row("0", "train", 0, 0, PX, PX), np.zeros((PX, PX, 1), dtype=np.uint8))]
    store.write(paths.prepared("digits"), rows, dataset="digits", classes=("a",), px=PX, channels=1, skipped=[])
    with pytest.raises(UserError, match=r"data\.sha256 was \w+ and is \w+"):
        _run(2)
    assert len(trainings.jobs) == 1


def test_editing_params_yaml_does_not_change_the_trials_that_come(trainings: Trainings) -> None:
    def train(one: Job) -> pd.DataFrame:
        config.write(overrides={"train.weight_decay": 0.7})
        return _stand_in(one)

    trainings.train = train
    _run(2)
    assert [one.config.train.weight_decay for one in trainings.jobs] == [0.01, 0.01]


def test_a_stopped_trial_goes_on_from_its_checkpoints_with_its_settings(trainings: Trainings) -> None:
    def stopped(one: Job) -> pd.DataFrame:
        assert one.watch is not None
        if one.tags["trial"] == "1":
            one.progress.mkdir(parents=True)
            (one.progress / "checkpoint").touch()
            one.watch({"val/loss": 0.5, "val/top1": 0.5, "epoch": 1}, step=10)
            raise SystemExit(143)
        return _stand_in(one)

    trainings.train = stopped
    with pytest.raises(SystemExit, match="143"):
        _run()
    assert [run.status for run in _parents()] == ["KILLED"]
    assert tracking.PARENT not in os.environ
    assert _states() == ["COMPLETE", "FAIL", "WAITING"]
    held: list[bool] = []

    def resumed(one: Job) -> pd.DataFrame:
        held.append((one.progress / "checkpoint").exists())
        return _stand_in(one)

    trainings.train = resumed
    _run()
    first, again, _ = trainings.jobs[1:]
    assert held == [True, False]
    assert (again.config, again.progress) == (first.config, first.progress)
    assert _states() == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert _study().trials[2].intermediate_values[1] == 0.5  # what was told before the stop, and not again
    assert [run.status for run in _parents()] == ["FINISHED"]
    assert not list((trials.folder_of("a") / "working").iterdir())


def _worker(*, kill: bool, alone: bool) -> None:
    """What the processes below run: a sweep of four trials with stand-ins for trainings."""

    def train(one: Job) -> pd.DataFrame:
        with Path("begun.txt").open("a") as file:
            file.write(f"{one.tags['trial']} {os.getpid()} {one.config.train.lr}\n")
        if kill:
            one.progress.mkdir(parents=True)
            (one.progress / "checkpoint").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 100
        while not alone and len({process for _, process, _ in _begun()}) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return _stand_in(one)

    job.run = train
    if alone:
        trials.HEARTBEAT_S, trials.STALE_S = 1, 3
    _run(4, pruner="none")


def _start(*, kill: bool = False, alone: bool = True) -> "subprocess.Popen[str]":
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('tests_of_tune', {str(Path(__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"module._worker(kill={kill}, alone={alone})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _begun() -> list[list[str]]:
    return [line.split() for line in Path("begun.txt").read_text().splitlines()]


@pytest.mark.usefixtures("folder")
def test_two_processes_share_the_trials_and_one_writes_the_results() -> None:
    processes = [_start(alone=False) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    begun = _begun()
    assert sorted(trial for trial, _, _ in begun) == [f"{i}" for i in range(4)]
    assert len({rate for _, _, rate in begun}) == 4
    assert len({process for _, process, _ in begun}) == 2
    assert sum("best trial: " in text for text in printed) == 1
    assert sum("other processes are at its last trials" in text for text in printed) == 1
    assert _table()["state"].tolist() == ["complete"] * 4
    (parent,) = _parents()
    assert parent.status == "FINISHED"
    assert len([run for run in tracking.runs() if run.tags.get(tracking.PARENT_TAG) == parent.id]) == 4
    assert len(list(trials.folder_of("a").glob("trial-*"))) == 1


@pytest.mark.usefixtures("folder")
def test_a_killed_processes_trial_is_begun_again_from_its_checkpoints() -> None:
    killed = _start(kill=True)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert _states() == ["RUNNING"]
    (checkpoint,) = trials.folder_of("a").glob("working/*/checkpoint")
    other = _start()
    printed, _ = other.communicate(timeout=120)
    assert other.returncode == 0, printed
    assert sorted(_states()) == ["COMPLETE"] * 4 + ["FAIL"]
    assert _table()["state"][0] == "stopped"
    begun = _begun()
    (again,) = (trial for trial in _study().trials if trial.user_attrs.get("first") == 0)
    assert begun[0][2] in {rate for trial, _, rate in begun if trial == f"{again.number}"}
    assert not checkpoint.exists()  # cleared away once the trial was done


def test_a_trial_that_takes_its_process_with_it_is_not_begun_for_ever() -> None:
    sweep = optuna.create_study()
    trial = sweep.ask({"x": FloatDistribution(0, 1)})
    for _ in range(trials.TRIES - 1):
        sweep.tell(trial, state=optuna.trial.TrialState.FAIL)
        trials._again(sweep, sweep.trials[trial.number])
        trial = sweep.ask({"x": FloatDistribution(0, 1)})
    assert [trial.user_attrs["tries"], trial.user_attrs["first"]] == [trials.TRIES, 0]
    assert len({trial.params["x"] for trial in sweep.trials}) == 1
    sweep.tell(trial, state=optuna.trial.TrialState.FAIL)
    trials._again(sweep, sweep.trials[trial.number])
    assert len(sweep.trials) == trials.TRIES


@pytest.mark.parametrize(
    ("line", "distribution"),
    [
        ("{low: 1, high: 5}", IntDistribution(1, 5)),
        ("{low: 1, high: 9, step: 2}", IntDistribution(1, 9, step=2)),
        ("{low: 1, high: 64, log: true}", IntDistribution(1, 64, log=True)),
        ("{low: 1.0, high: 5}", FloatDistribution(1, 5)),
        ("{low: 0, high: 0.3, step: 0.1}", FloatDistribution(0, 0.3, step=0.1)),
        ("{low: 1e-5, high: 1.0e-1, log: true}", FloatDistribution(1e-5, 0.1, log=True)),
        ("{choices: [1, 0.5, true, adamw]}", CategoricalDistribution((1, 0.5, True, "adamw"))),
    ],
)
def test_a_line_of_a_space_is_optunas_distribution(line: str, distribution: Any) -> None:
    if "choices" in line:
        with pytest.raises(ValueError, match="twice"):
            search_space.Choices(choices=(1, True))
        line = line.replace("1, ", "2, ")
        distribution = CategoricalDistribution((2, 0.5, True, "adamw"))
    read = search_space._SPACE.validate_python({"x": YAML(typ="safe").load(line)})
    sweep = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = sweep.ask()
    value = search_space.suggest(read["x"], trial, "x")
    assert trial.distributions == {"x": distribution}
    assert distribution._contains(distribution.to_internal_repr(value))


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("train.lr: {low: 0.1, high: 0.1}", "train.lr: an empty range: low 0.1 is not below high 0.1"),
        ("train.lr: {low: 0.0, high: 0.1, log: true}", "train.lr: log needs a low above 0, got 0.0"),
        (
            "train.epochs: {low: 1, high: 4, step: 2}",
            "train.epochs: from low 1 to high 4 is no whole number of steps of 2",
        ),
        ("train.lr: {low: 0.1, high: 0.2, step: 0.1, log: true}", "train.lr: log and step do not go together"),
        ("train.lr: {low: 0.1, higher: 0.2}", "train.lr: higher: no such key; did you mean high?"),
        ("train.lr: {low: 0.1}", "train.lr: high: missing; give low and high, or choices"),
        ("train.lr: 0.1", "train.lr: expected a range such as {low: 0, high: 1}, or choices, got 0.1"),
        ("train.lr: {low: small, high: 1}", "train.lr: low: Input should be a valid"),
        ("train.batch_size: {choices: [6, 6]}", "train.batch_size: choices: one stands there twice"),
        ("train.batch_size: {choices: [6]}", "train.batch_size: choices: Tuple should have at least 2 items"),
        ("train.batch_size: {choices: [6, [7]]}", "train.batch_size: choices: Input should be a valid"),
        ("- train.lr", "expected parameters, each with its range or choices"),
        ("{}", "expected parameters, each with its range or choices"),
        ("train.lrr: {low: 0.1, high: 0.2}", "train.lrr: no such parameter; did you mean lr?"),
        ("trian.lr: {low: 0.1, high: 0.2}", "trian: no such parameter; did you mean train"),
        ("train.lr: {low: 0.1, high: 1000}", "train.lr: input should be less than or equal to 100"),
        ("train.loss: {choices: [bce, bcee]}", "train.loss: 'bcee' is not 'cross_entropy', 'bce' or 'focal'"),
        ("train.phases.al.lr: {low: 0.1, high: 0.2}", "train.phases.al.trainable: missing"),
        ("train.px: {low: 32, high: 64}", "train.px: 64 is larger than augment.px, 32"),
        ("train.px: {low: 16, high: 32}", "train.px 16: scratch/lenet5 takes pictures of 32 px or more, got 16"),
        ("model.name: {choices: [scratch/lenet5, scratch/lenet]}", "scratch/lenet: no such net; did you mean"),
        ("augment.px: {low: 8, high: 64}", "augment.px: not to be varied: each trial would have to pack the pictures"),
        ("data.name: {choices: [digits, mnist]}", "data.name: not to be varied: it would change the pictures"),
        ("train.seed: {low: 0, high: 9}", "train.seed: not to be varied: the best seed is luck"),
        ("evaluate.seed: {low: 0, high: 9}", "evaluate.seed: not to be varied: trials are not judged on the test"),
        ("train.monitor: {choices: [val/loss, val/top1]}", "train.monitor: not to be varied: it is what trials are"),
        ("train.devices: {low: 1, high: 2}", "train.devices: not to be varied: it changes no result"),
        ("model.stem: {choices: [default, cifar]}", "model.stem: not to be varied: each trial would have to fetch"),
        (
            "train.phases: {choices: [linear_probe, discriminative]}\ntrain.phases.all.epochs: {low: 1, high: 2}",
            "train.phases.all.epochs: it is a part of train.phases, which varies, too; leave one out",
        ),
        ("train.epochs: {low: 1, high: 2}", "train.epochs: it changes nothing, since every phase has its own"),
        ("train.lr: {low: 1", "1: not valid YAML"),
    ],
)
def test_a_wrong_space_is_refused_in_one_line_with_its_file(space: str, told: str, trainings: Trainings) -> None:
    Path("space.yaml").write_text(space)
    with pytest.raises(UserError) as error:
        _run()
    message = str(error.value)
    assert message.startswith("space.yaml:")
    assert told in message
    assert "\n" not in message
    assert not trainings.jobs
    assert not trials.folder_of("a").exists()


def test_a_net_is_a_choice_where_its_first_weights_are_there(trainings: Trainings) -> None:
    Path("space.yaml").write_text("model.name: {choices: [scratch/lenet5, scratch/resnet20]}")
    with pytest.raises(
        UserError, match=r"resnet20: no weights to start from here; run `dvc repro weights` for scratch"
    ):
        _run()
    paths.pretrained("scratch/resnet20").mkdir(parents=True)
    Origin(start="random", source="a test").write(paths.pretrained("scratch/resnet20"))
    _run(6)
    assert {one.config.model.name for one in trainings.jobs} == {"scratch/lenet5", "scratch/resnet20"}


def test_the_shipped_space_goes_with_the_shipped_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    space = search_space.read(search_space.SPACE, given=config.load())
    assert "train.lr" in space
    assert "tune" not in study.names()


@pytest.mark.parametrize(
    ("given", "changed", "told"),
    [
        ({"trials": 0}, {}, "--trials 0: it must be 1 or more"),
        ({"pruner": "medium"}, {}, "--pruner medium: it is median or none; did you mean median?"),
        ({"name": "a b"}, {}, "--name a b: letters, digits, - and _ alone, such as scratch-lenet5-digits"),
        ({"space": Path("no.yaml")}, {}, "no.yaml: no such file; it says what the sweep may vary"),
        ({"apply": True}, {}, "--apply applies the best trial's experiment; leave --no-experiment out"),
        ({}, {"train.devices": 2}, "a trial trains on one device; set it to 1"),
        ({}, {"augment.px": 64}, "packed at 32 px where augment.px is 64; run `dvc repro augment`"),
        ({}, {"train.optimizer": "sgd", "model.name": "scratch/resnet20"}, "no weights to start from here; run `dvc"),
        ({"as_experiment": True}, {}, "needs a git repository with a commit; without one, say --no-experiment"),
        ({"storage": "sqlite:////no/folder/a.db"}, {}, "--storage sqlite:////no/folder/a.db cannot be used: "),
        ({"storage": "nosql://me:secret@here/a"}, {}, "--storage nosql://here/a cannot be used: "),
        ({"storage": "not a URL"}, {}, "--storage not a URL cannot be used: "),
    ],
)
def test_what_cannot_work_is_refused_before_any_trial(
    given: dict[str, Any], changed: dict[str, Any], told: str, trainings: Trainings
) -> None:
    config.write(overrides=changed)
    with pytest.raises(UserError) as error:
        _run(**{"number": 3, **{("number" if key == "trials" else key): value for key, value in given.items()}})
    assert told in str(error.value)
    assert "secret" not in str(error.value)
    assert not trainings.jobs


def test_without_optuna_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"^tune needs optuna: pip install 'thaw\[tune\]'$"):
        _run()


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, pipeline.tune\n"
        "heavy = {'optuna', 'sqlalchemy', 'mlflow', 'torch', 'lightning', 'timm', 'pandas', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importance_is_that_of_the_parameter_that_decides() -> None:
    sweep = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("decides", 0, 1) + 0.01 * trial.suggest_float("does little", 0, 1)

    sweep.optimize(objective, n_trials=tune_report.ENOUGH - 1)
    assert tune_report.importance(sweep) == {}
    sweep.optimize(objective, n_trials=20)
    shares = tune_report.importance(sweep)
    assert list(shares) == ["decides", "does little"]
    assert shares["decides"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)


def test_figures_that_are_all_the_same_tell_nothing_of_importance() -> None:
    sweep = optuna.create_study()
    sweep.optimize(lambda trial: 0 * trial.suggest_float("x", 0, 1), n_trials=tune_report.ENOUGH)
    assert tune_report.importance(sweep) == {}


class Chain:
    """Stands in for DVC: notes what it is called with, and writes what the chain writes."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], dict[str, Any], str]] = []
        self.code = 0

    def __call__(self, arguments: list[str]) -> int:
        self.calls.append((arguments, config.flat(config.load()), os.environ[tracking.PARENT]))
        test = {"top1": 0.9, "top1_low": 0.8, "top1_high": 0.95}
        paths.METRICS.write_text(json.dumps({"test": test, "run": {"name": "lenet5-digits-1"}}))
        Path("dvc.lock").write_text("of the best")
        return self.code


@pytest.fixture
def chain(trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> Chain:  # noqa: ARG001, comes before
    made = Chain()
    monkeypatch.setattr(experiment, "dvc", made)
    subprocess.run(["git", "init", "--quiet"], check=True)
    identity = ["-c", "user.name=T", "-c", "user.email=t@localhost"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    Path("dvc.lock").write_text("before")
    return made


def test_the_best_settings_become_an_experiment_and_nothing_is_left_changed(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    before = paths.PARAMS.read_bytes()
    _run(as_experiment=True)
    ((arguments, wanted, parent),) = chain.calls
    assert arguments == ["exp", "run", "evaluate", "--quiet", "--name", "tune-a-best"]
    best = _study().best_params
    assert {key: wanted[key] for key in best} == best
    assert {**wanted, **best} == {**config.flat(config.load()), **best}
    assert parent == _parents()[0].id
    assert paths.PARAMS.read_bytes() == before
    assert Path("dvc.lock").read_text() == "before"
    assert not paths.METRICS.exists()
    told = capsys.readouterr().out
    assert "trained by the chain with the best settings (lenet5-digits-1): test top-1 0.9000 (0.8000 to 0.9500)" in told
    assert "take them into the workspace: dvc exp apply tune-a-best" in told


def test_applied_the_best_settings_stay_in_the_workspace(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    _run(as_experiment=True, apply=True)
    assert len(chain.calls) == 1
    best = _study().best_params
    assert {key: config.flat(config.load())[key] for key in best} == best
    assert Path("dvc.lock").read_text() == "of the best"
    assert paths.METRICS.exists()
    assert "params.yaml has them now" in capsys.readouterr().out


def test_an_experiment_that_fails_loses_no_results(chain: Chain) -> None:
    chain.code = 255
    with pytest.raises(SystemExit) as stopped:
        _run(as_experiment=True, apply=True)
    assert stopped.value.code == 1
    assert len(_table()) == 3
    assert [run.status for run in _parents()] == ["FAILED"]
    assert Path("dvc.lock").read_text() == "before"
    chain.code = 0
    _run(as_experiment=True)
    assert [run.status for run in _parents()] == ["FINISHED"]


def test_a_sweep_of_one_batch_of_everything_is_no_experiment(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    config.write(overrides={"train.fast_dev_run": True})
    _run(as_experiment=True)
    assert not chain.calls
    assert "A TRIAL of one batch of everything: the figures mean nothing" in capsys.readouterr().out


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[None]:
    """Three trials of a real net; the second is ended after its first epoch."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(optuna.Trial, "should_prune", lambda trial: trial.number == 1)
        shutil.copyfile(empty_store, folder / "mlflow.db")
        _project()
        _run()
        yield


@pytest.mark.usefixtures("real")
def test_a_real_trials_figure_is_what_its_run_saw() -> None:
    from mlflow import MlflowClient

    assert _states() == ["COMPLETE", "PRUNED", "COMPLETE"]
    runs = {run.tags["trial"]: run for run in tracking.runs() if "trial" in run.tags}
    assert [runs[f"{i}"].status for i in range(3)] == ["FINISHED", "KILLED", "FINISHED"]
    client = MlflowClient(tracking.store_uri())
    for trial in _study().trials:
        run = runs[f"{trial.number}"]
        assert run.params["train.lr"] == str(trial.params["train.lr"])
        assert run.params["train.batch_size"] == str(trial.params["train.batch_size"])
        seen = [point.value for point in client.get_metric_history(run.id, "val/loss")]
        assert list(trial.intermediate_values.values()) == pytest.approx(seen)
        assert len(seen) == (1 if trial.number == 1 else 3)
        if trial.number != 1:
            assert trial.value == pytest.approx(min(seen[1:]))


@pytest.mark.usefixtures("real")
def test_the_best_real_trials_model_is_there_with_its_run() -> None:
    best = _study().best_trial
    (kept,) = trials.folder_of("a").glob("trial-*")
    assert kept.name == f"trial-{best.number}"
    (run,) = (run for run in tracking.runs() if run.id == Record.read(kept).run_id)
    assert _table()["run"][best.number] == run.id
    assert run.tags["trial"] == f"{best.number}"
    assert (kept / "model.safetensors").exists()


@pytest.mark.usefixtures("real")
def test_a_pruned_training_gives_the_signals_back() -> None:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.slow
def test_dvc_takes_the_best_settings_into_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if name not in ("dvc.lock", "models/metrics.json") and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    config.write(overrides={**OVERRIDES, "augment.train_size": 300, "tracking.log_model": False})
    Path("space.yaml").write_text(SPACE)
    run("git", "init", "--quiet")
    run("git", "add", "--all")
    run("git", "-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "--quiet", "--message", "all of it")
    run("dvc", "repro", "weights", "augment")
    before = [Path(name).read_bytes() for name in ("params.yaml", "dvc.lock")]
    told = run(*["python", "-m", "pipeline", "tune", "--trials", "2", "--name", "a", "--space", "space.yaml"])
    assert "take them into the workspace: dvc exp apply tune-a-best" in told
    assert [Path(name).read_bytes() for name in ("params.yaml", "dvc.lock")] == before
    run("dvc", "exp", "apply", "tune-a-best")
    best = YAML(typ="safe").load(Path("models/tune/a/best.yaml"))
    assert {key: config.flat(config.load())[key] for key in best} == best
    metrics = json.loads(paths.METRICS.read_text())
    assert f"({metrics['run']['name']}): test top-1 {metrics['test']['top1']:.4f}" in told
    (parent,) = _parents()
    (chained,) = (run for run in tracking.runs() if run.id == metrics["run"]["id"])
    assert chained.tags[tracking.PARENT_TAG] == parent.id
    assert tracking.SERVES not in chained.tags  # it has figures on the test split, and is to be compared
    # Trained by the chain, the settings come to what they came to as a trial.
    assert min(pd.read_csv(paths.CURVES).query("phase == 'all'")["val/loss"]) == pytest.approx(_study().best_value)
