"""The one interface: what it lists is there, it does nothing twice, and CI calls it and tidies up."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ("help", "setup", "repro", "train", "test", "test-all", "lint", "ui", "compare", "models", "clean")


def _make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, check=False)


def _listed() -> set[str]:
    return set(re.findall(r"^  make (\S+)", _make(ROOT).stdout, flags=re.MULTILINE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what `make setup` reads, and an environment that was made after it."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.lock-installed").touch()
    return tmp_path


def test_make_alone_lists_every_target() -> None:
    assert _make(ROOT).stdout == _make(ROOT, "help").stdout
    assert set(TARGETS) <= _listed()


def test_what_the_documents_tell_one_to_make_exists() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        told = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(_code((ROOT / name).read_text()))))
        assert told, name
        assert told <= _listed(), name


def _code(markdown: str) -> list[str]:
    """Code in a line and indented or fenced lines: elsewhere `make` may be a verb."""
    inline = re.findall(r"`([^`\n]+)`", markdown)
    return inline + [line for line in markdown.splitlines() if line.startswith(("    ", "make "))]


def test_setup_does_nothing_when_nothing_changed(folder: Path) -> None:
    assert _make(folder, "--question", "setup").returncode == 0
    done = _make(folder, "setup")
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip" not in done.stdout


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_setup_runs_again_when_its_files_change(folder: Path, name: str) -> None:
    later = (folder / ".venv/.lock-installed").stat().st_mtime + 10
    os.utime(folder / name, (later, later))
    assert "--require-hashes -r requirements.lock" in _make(folder, "--dry-run", "setup").stdout


def test_setup_refuses_an_old_python(folder: Path) -> None:
    (folder / ".venv/.lock-installed").unlink()
    old = folder / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = _make(folder, "setup", f"PYTHON={old}")
    assert done.returncode == 2
    assert "Thaw needs Python 3.11 or later" in done.stderr


def test_the_lock_without_cuda_lacks_cuda_alone(folder: Path) -> None:
    assert _make(folder, ".venv/without-cuda.lock").returncode == 0
    entry = re.compile(r"^[a-z0-9.-]+==[^ ]+(?=.*\\\n)", flags=re.MULTILINE)
    whole = entry.findall((folder / "requirements.lock").read_text())
    rest = entry.findall((folder / ".venv/without-cuda.lock").read_text())
    left_out = [line for line in whole if line.startswith(("cuda-", "nvidia-", "torch==", "torchvision==", "triton=="))]
    assert len(left_out) > 10
    assert rest == [line for line in whole if line not in left_out]
    told = _make(folder, "--dry-run", "setup-cpu").stdout
    assert "--torch-backend=cpu" in told


def test_clean_keeps_what_cannot_be_made_again(folder: Path) -> None:
    kept = ["models/no-weights", "models/metrics.json", "data/pictures/ants/1.jpg", "mlflow.db", "mlartifacts/1/a"]
    made = ["models/resnet18/train/model.safetensors", "data/raw/digits/x", "data/prepared/digits/x", ".dvc/cache/x"]
    for name in (*kept, *made):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert _make(folder, "clean").returncode == 0
    assert [name for name in (*kept, *made) if (folder / name).exists()] == kept
    assert not (folder / ".venv").exists()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What .ci/run needs of a clone, each step in a blink."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/metrics.json").write_text('{"test": {"top1": 0.99}}')
    (tmp_path / "Makefile").write_text(
        "TOP1 := 0.91\n"
        f"setup:\n\tmkdir -p .venv/bin; ln -s /bin/true .venv/bin/dvc; ln -s {sys.executable} .venv/bin/python\n"
        "lint:\n\ttouch linting; if [ -e slow ]; then sleep 60; fi\n"
        "test:\n\t@echo '===== 3 passed, 1 deselected in 0.12s ====='\n"
        'repro:\n\techo \'{"test": {"top1": $(TOP1), "top1_low": 0.9, "top1_high": 0.92, "pictures": 10000}}\''
        " > models/metrics.json\n"
    )
    return tmp_path


def _ci(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [clone / ".ci/run"], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_ci_ends_with_its_summary_and_removes_the_environment(clone: Path) -> None:
    done = _ci(clone)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, setup, lint, test, repro, check, verdict = done.stdout.splitlines()
    assert setup.startswith("setup ")
    assert "environment " in setup
    assert lint.startswith("lint ")
    assert test.endswith("pytest: ===== 3 passed, 1 deselected in 0.12s =====")
    assert repro.startswith("repro ")
    assert check.endswith("test top-1 0.9100 (0.9000 to 0.9200) of 10000 pictures")
    assert verdict == "CI: passed"
    assert not (clone / ".venv").exists()


def test_ci_fails_below_the_promised_accuracy(clone: Path) -> None:
    done = _ci(clone, MAKEFLAGS="TOP1=0.8999")
    assert done.returncode == 1
    assert "top-1 is below 0.90" in done.stdout
    assert done.stdout.splitlines()[-1] == "CI: FAILED in check (exit code 1)"
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_ci_removes_the_environment_when_it_is_stopped(clone: Path, number: signal.Signals, code: int) -> None:
    (clone / "slow").touch()
    ours = signal.signal(number, signal.SIG_DFL)  # nohup and its like have a signal ignored, and bash cannot undo that
    process = subprocess.Popen([clone / ".ci/run"], stdout=subprocess.PIPE, text=True)
    signal.signal(number, ours)
    deadline = time.monotonic() + 30
    while not (clone / "linting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert output.splitlines()[-1] == f"CI: FAILED in lint (exit code {code})"
    assert not (clone / ".venv").exists()
