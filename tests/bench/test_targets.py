"""`make bench`, `make bench-peers` and `make bench-gpu`: what they would run, nothing is measured."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The Makefile, the benches, and both environments as if they had been made."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    for stamp in (".venv/.lock-installed", ".venv-peers/.installed"):
        (tmp_path / stamp).parent.mkdir()
        (tmp_path / stamp).touch()
    return tmp_path


def _would_run(folder: Path, *words: str) -> list[str]:
    done = subprocess.run(["make", "--dry-run", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return re.findall(r"python (bench/\w+\.py[^&\n]*?) *(?:&&|$)", done.stdout, flags=re.MULTILINE)


def test_every_bench_is_run_from_cheap_to_dear_then_the_page_is_written(folder: Path) -> None:
    found = _would_run(folder, "bench")
    ours = [f"bench/{name}.py" for name in ("datapath", "throughput", "frozen", "loop", "scaling")]
    ours.append("bench/accuracy.py --case fashion_90 photographs fashion_93")
    assert [line for line in found if line in ours] == ours
    assert found[-1] == "bench/report.py"


def test_one_bench_is_given_rounds_and_pictures(folder: Path) -> None:
    found = _would_run(folder, "bench", "NAME=frozen", "PAIRS=7", "PICTURES=a/b")
    assert found == ["bench/frozen.py --pairs '7' --pictures 'a/b'", "bench/report.py"]
    assert _would_run(folder, "bench", "NAME=throughput", "PICTURES=a/b")[0] == "bench/throughput.py"


def test_a_misspelt_bench_is_refused(folder: Path) -> None:
    done = subprocess.run(["make", "bench", "NAME=frozn"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "frozn: no such bench; there are startup step" in done.stderr
    for name in ("common", "watched", "report"):  # files that are no benches
        done = subprocess.run(["make", "-n", "bench", f"NAME={name}"], cwd=folder, capture_output=True, check=False)
        assert done.returncode == 2


def test_one_bench_of_peers(folder: Path) -> None:
    found = _would_run(folder, "bench-peers", "NAME=frozen", "PAIRS=2")
    assert found == [
        "bench/frozen.py --part plain --peers --json bench/results/frozen_peers.json --pairs '2'",
        "bench/report.py",
    ]
    done = subprocess.run(["make", "-n", "bench-peers", "NAME=step"], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 2


def test_peers_keep_results_of_their_own(folder: Path) -> None:
    found = _would_run(folder, "bench-peers")
    for name in ("loop", "frozen", "accuracy"):
        assert any(
            line.startswith(f"bench/{name}.py ") and f"--peers --json bench/results/{name}_peers.json" in line
            for line in found
        )
    (folder / ".venv-peers/.installed").unlink()
    made = subprocess.run(["make", "-n", "bench-peers"], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert ".venv-peers/bin/python -m pip install" in made
    assert "-r bench/peers.txt" in made


def test_peers_have_our_own_torch() -> None:
    pins = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "bench/peers.txt").read_text(), flags=re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "torchvision", "timm"):
        assert f'"{name}=={pins[name]}"' in project
    assert {"fastai", "transformers", "accelerate"} <= pins.keys()
