"""`make train`: what is asked for is what DVC writes, and a failure leaves params.yaml as it was.

tests/test_chain.py has the whole of it, with the real DVC.
"""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import config, experiment
from pipeline.errors import UserError

PARAMS = Path(__file__).parents[1] / "params.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with params.yaml, where `python -m dvc` is whatever dvc.py is there."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(PARAMS, tmp_path)
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "no-weights").touch()
    subprocess.run(["git", "init", "--quiet"], check=True)
    identity = ["-c", "user.name=T", "-c", "user.email=t@localhost"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    return tmp_path


@pytest.mark.parametrize(
    "setting",
    [
        "train.batch_size=32",
        "train.phases.finetune.lr=1e-5",
        "train.phases.finetune.trainable=last:2",
        "train.transforms.horizontal_flip.p=0",
        "train.transforms.rotate.limit=10",
        "train.transforms.random_resized_crop.scale=[0.5, 1]",
        "augment.train_size=all",
        "model.pretrained=true",
        "model.pretrained=auto",
        "model.weights=weights/mine (2).safetensors",
        "data.path=/srv/pictures of ö/it's, {mine}=[1]",
        "data.path='a\\b\\'",
        "tracking.experiment='12'",
        "tracking.experiment='true'",
    ],
)
def test_dvc_writes_exactly_what_was_checked(tmp_path: Path, setting: str) -> None:
    from dvc.utils.hydra import apply_overrides

    overrides = config.parse_settings([setting])
    expected = config.load(PARAMS, overrides=overrides)
    assert expected != config.load(PARAMS) or "auto" in setting
    path = tmp_path / "params.yaml"
    shutil.copy(PARAMS, path)
    apply_overrides(path, experiment.words(overrides))
    assert config.load(path) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["augment.px=32"], r"^scratch/alexnet takes pictures of 63 px or more, got 32"),
        (["model.recompute=true"], r"^model.name: scratch/alexnet takes no recompute; set model.recompute=false"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_net_is_refused_before_any_stage_runs(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("^scratch", "^model.name: scratch")):
        experiment.run(model="scratch/alexnet", epochs=None, settings=settings)


def test_a_mapping_is_not_set_as_a_whole() -> None:
    with pytest.raises(UserError, match=r"^train\.transforms: set one value of it, as train\.transforms\.NAME=VALUE"):
        experiment.run(model="", epochs=None, settings=["train.transforms={rotate: {limit: 10}}"])


def test_without_a_commit_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    shutil.copy(PARAMS, tmp_path)
    with pytest.raises(UserError, match="experiments need a git repository with a commit"):
        experiment.run(model="scratch/lenet5", epochs=None, settings=[])


def test_a_failed_experiment_leaves_the_parameters_as_they_were(folder: Path) -> None:
    (folder / "dvc.py").write_text("open('params.yaml', 'a').write('# changed'); raise SystemExit(255)")
    with pytest.raises(SystemExit) as stopped:
        experiment.run(model="scratch/lenet5", epochs=3, settings=["train.seed=1"])
    assert stopped.value.code == 1
    assert (folder / "params.yaml").read_bytes() == PARAMS.read_bytes()


def test_dvc_is_asked_for_one_target_with_every_setting(folder: Path) -> None:
    (folder / "dvc.py").write_text("import sys; open('words', 'w').write(repr(sys.argv[1:])); raise SystemExit(1)")
    with pytest.raises(SystemExit):
        experiment.run(model="scratch/lenet5", epochs=3, settings=["train.seed=1"])
    settings = ["++train.seed=1", "++model.name='scratch/lenet5'", "++train.phases.finetune.epochs=3"]
    expected = ["exp", "run", "evaluate", *(word for setting in settings for word in ("-S", setting))]
    assert (folder / "words").read_text() == repr(expected)


def test_stopping_it_stops_the_stage_and_lets_dvc_end(folder: Path) -> None:
    (folder / "dvc.py").write_text(
        "import pathlib, signal, subprocess, sys\n"
        "stage = subprocess.Popen([sys.executable, '-c', 'import time; open(\"started\", \"w\"); time.sleep(60)'])\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "stage.wait()\n"
        "pathlib.Path('dvc ended').touch()\n"
    )
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "experiment", "--model", "scratch/lenet5"])
    deadline = time.monotonic() + 60
    while not (folder / "started").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert (folder / "dvc ended").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data.name=digit", r"^data\.name: no dataset 'digit'; did you mean digits"),
        ("data.path=/nowhere", r"^data\.path: /nowhere: no such folder; put class folders there$"),
        ("model.weights=mine.pth", r"^model\.weights: mine\.pth: no such file of weights$"),
        ("model.name=scratch/lenet", r"^model\.name: scratch/lenet: no such net; did you mean scratch/lenet5"),
    ],
)
def test_what_does_not_exist_is_named_before_dvc_stumbles_over_it(folder: Path, setting: str, expected: str) -> None:
    (folder / "dvc.py").write_text("open('asked', 'w')")
    with pytest.raises(UserError, match=expected):
        experiment.run(model="", epochs=None, settings=[setting])
    assert not (folder / "asked").exists()


@pytest.mark.parametrize("parameter", ["model.weights", "train.teacher"])
@pytest.mark.parametrize(
    "written", ["models/{}/train/model.safetensors", "./models/{}/../{}/train/best.ckpt", "{root}/model.safetensors"]
)
def test_a_net_does_not_start_from_the_very_files_that_it_makes(folder: Path, parameter: str, written: str) -> None:
    name = "scratch/lenet5"
    made = folder / "models" / name / "train"
    made.mkdir(parents=True)
    (folder / "in DVC's cache").touch()
    (made / "model.safetensors").symlink_to(folder / "in DVC's cache")
    (made / "best.ckpt").touch()
    given = written.format(name, Path(name).name, root=made)
    (folder / "dvc.py").write_text("open('asked', 'w')")
    with pytest.raises(UserError) as caught:
        experiment.run(model=name, epochs=None, settings=[f"{parameter}={given}"])
    copy = f"data/weights/scratch-lenet5{Path(given).suffix}"
    assert str(caught.value) == (
        f"{parameter}: {given}: this experiment makes it anew, so it cannot start from it; copy it first: "
        f"mkdir -p data/weights && cp {given} {copy}, then {parameter}={copy}"
    )
    assert not (folder / "asked").exists()
    # Another net may; and so may this one, from the copy that is told of.
    wanted = config.load(overrides={"model.name": "resnet18", parameter: given})
    (folder / "models" / "pretrained" / "resnet18").mkdir(parents=True)
    experiment.check_names(wanted)
    (folder / "data" / "weights").mkdir()
    (folder / copy).touch()
    experiment.check_names(config.load(overrides={"model.name": name, parameter: copy}))


def test_no_epochs_at_all_are_refused(folder: Path) -> None:  # noqa: ARG001, the place to run in
    with pytest.raises(UserError, match="greater than or equal to 1, got 0"):
        experiment.run(model="", epochs=0, settings=[])


@pytest.mark.parametrize("trial", [True, False])
def test_a_trial_leaves_nothing_behind_for_the_next_training(
    folder: Path, capsys: pytest.CaptureFixture[str], trial: bool
) -> None:
    metrics = {
        "test": {"top1": 0.5, "top1_low": 0.4, "top1_high": 0.6},
        "run": {"name": "n", "id": "i", "start": "random", "weights": "no reason", "fast_dev_run": trial},
    }
    (folder / "dvc.py").write_text(
        "import json, pathlib\n"
        "with open('params.yaml', 'a') as file: file.write('# set')\n"
        f"pathlib.Path('models/metrics.json').write_text(json.dumps({metrics!r}))\n"
    )
    experiment.run(model="scratch/lenet5", epochs=None, settings=[f"train.fast_dev_run={str(trial).lower()}"])
    assert ((folder / "params.yaml").read_bytes() == PARAMS.read_bytes()) == trial
    printed = capsys.readouterr().out
    assert ("A TRIAL of one batch" in printed) == trial
    assert ("params.yaml now has model.name: tf_efficientnet_lite0 -> scratch/lenet5" in printed) != trial
    assert "RANDOM weights (no reason)" in printed
    assert "tries the sources again" not in printed  # a net of ours has none
