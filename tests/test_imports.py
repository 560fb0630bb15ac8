"""Heavy libraries stay out of light commands: each runs in a process of its own, which tells what it has loaded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from pipeline import nets
from pipeline.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "torchmetrics",
    "mlflow",
    "pandas",
    "pyarrow",
    "matplotlib",
    "sklearn",
    "scipy",
    "cv2",
    "albumentations",
    "requests",
    "huggingface_hub",
    "dvc",
    "optuna",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as a fresh clone is: nothing has been run."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "no-weights").touch()
    return tmp_path


def _loaded(words: list[str], *, folder: Path) -> tuple[int, set[str]]:
    """A command's exit code, and which of HEAVY it loads."""
    code = (
        "import sys; from pipeline.__main__ import main\n"
        f"try: code = main({words!r})\n"
        "except SystemExit as stop: code = stop.code\n"
        "import json\n"
        "print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    status, modules = json.loads(done.stderr.splitlines()[-1])
    return status, HEAVY & set(modules)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_light(command: str, project: Path) -> None:
    assert _loaded([command, "--help"] if command else ["--help"], folder=project) == (0, set())


def test_check_is_light_in_a_fresh_clone(project: Path) -> None:
    assert _loaded(["check", "--show"], folder=project) == (0, set())


@pytest.mark.parametrize(("name", "code"), [("resnet50", 0), ("scratch/lenet5", 0), ("resnet5O", 2), ("scratch/l", 2)])
def test_check_knows_every_net_without_loading_it(name: str, code: int, project: Path) -> None:
    path = project / "params.yaml"
    path.write_text(re.sub(r"(?m)^  name: tf_\S+", f"  name: {name}", path.read_text()))
    assert _loaded(["check"], folder=project) == (code, set())


@pytest.mark.parametrize("setting", ["pretrained: false", "name: scratch/lenet5"])
def test_the_weights_stage_with_nothing_to_bring_is_light(setting: str, project: Path) -> None:
    path, key = project / "params.yaml", setting.split(":")[0]
    head, model = path.read_text().split("\nmodel:\n")
    path.write_text(f"{head}\nmodel:\n{re.sub(rf'(?m)^  {key}: [^ ]+', f'  {setting}', model, count=1)}")
    assert _loaded(["weights"], folder=project) == (0, set())


def test_studies_are_listed_without_heavy_libraries() -> None:
    assert _loaded(["study"], folder=ROOT) == (0, set())


def test_timms_nets_are_read_from_its_source_as_it_lists_them() -> None:
    assert nets._timm_names() == set(timm.list_models())
