import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.provenance import run_tags

LOCK = """\
schema: '2.0'
stages:
  augment:
    cmd: python -m pipeline augment
    deps:
    - path: data/raw/mnist
      hash: md5
      md5: 00.dir
    outs:
    - path: data/prepared/mnist
      hash: md5
      md5: 0123456789abcdef0123456789abcdef.dir
  weights:
    cmd: python -m pipeline weights
    outs:
    - path: models/pretrained/resnet18
      hash: md5
      md5: fedcba9876543210fedcba9876543210.dir
  setup:
    cmd: true
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def tags() -> dict[str, str]:
    return run_tags(dataset="mnist", model="resnet18")


def test_the_commit_and_whether_it_was_changed(folder: Path) -> None:
    git("init", "-q")
    (folder / "params.yaml").write_text("a: 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    (folder / "untracked").touch()
    assert (tags()["git.commit"], tags()["git.dirty"]) == (git("rev-parse", "HEAD"), "false")
    (folder / "params.yaml").write_text("a: 2\n")
    assert tags()["git.dirty"] == "true"


def test_what_is_not_known_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {key for key in tags() if key.startswith(("git.", "dvc."))}
    monkeypatch.setenv("PATH", "")
    assert "git.commit" not in tags()


def test_machine_and_packages() -> None:
    found = tags()
    assert found["hardware.cpu"]
    assert int(found["hardware.cores"]) >= 1
    assert float(found["hardware.memory_gib"]) > 0.1
    assert found["version.python"] == platform.python_version()
    assert found["version.torch"] == version("torch")
    assert all(isinstance(value, str) for value in found.values())


def test_the_hashes_of_the_data_and_of_the_weights(folder: Path) -> None:
    (folder / "dvc.lock").write_text(LOCK)
    found = {key: value for key, value in tags().items() if key.startswith("dvc.")}
    assert found == {
        "dvc.prepared": "0123456789abcdef0123456789abcdef.dir",
        "dvc.pretrained": "fedcba9876543210fedcba9876543210.dir",
    }
    other = run_tags(dataset="mnist", model="densenet121")
    assert "dvc.pretrained" not in other
