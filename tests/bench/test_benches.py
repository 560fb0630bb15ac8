"""Every bench runs: `--quick` of each, as a user starts it. Its figures mean nothing, and none is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
QUICK = {
    "startup": (),
    "step": (),
    "evaluate": (),
    "memory": (),
    "upkeep": (),
    "frozen": ("--part", "plain"),
    "loop": (),
    "datapath": ("--part", "wait", "offline"),
    "throughput": (),
    "scaling": ("--part", "epochs"),
    "accuracy": (),
}
"""Each with the parts that need no download."""


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_bench_runs(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.json"
    done = _run(f"bench/{name}.py", "--quick", "--pairs", "1", "--json", str(path), *QUICK[name])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["bench"] == name
    assert found["quick"] is True
    assert found["comparisons"] or found["series"]
    for comparison in found["comparisons"]:
        assert comparison["rounds"] == 1
        assert comparison["median"] > 0


@pytest.mark.parametrize("name", [*QUICK, "gpu"])
def test_a_bench_says_what_it_compares(name: str) -> None:
    done = _run(f"bench/{name}.py", "--help")
    assert done.returncode == 0, done.stderr
    assert f"python bench/{name}.py" in done.stdout
    assert "--quick" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_its_bench_says_so() -> None:
    done = _run("bench/gpu.py")
    assert done.returncode == 2
    assert done.stderr == "bench-gpu: torch sees no CUDA GPU on this machine; nothing was measured\n"


def test_a_wrong_setting_is_refused_in_a_line() -> None:
    done = _run("bench/scaling.py", "--quick", "--part", "epochs", "--set", "train.batch_size")
    assert done.returncode == 2
    assert done.stderr == "train.batch_size: expected section.key=value, such as train.batch_size=64\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("step", "--pairs", "0"), "--pairs: must be 1 or more, got 0"),
        (("loop", "--px", "0"), "--px: must be 1 or more, got 0"),
        (("accuracy", "--against", "timm"), "--against: it takes --peers as well"),
        (("step", "--peers"), "unrecognized arguments: --peers"),
        (("memory", "--pictures", "a"), "unrecognized arguments: --pictures a"),
        (("report", "--foo"), "unrecognized arguments: --foo"),
    ],
)
def test_what_a_bench_cannot_take_is_refused(words: tuple[str, ...], told: str) -> None:
    name, *others = words
    done = _run(f"bench/{name}.py", *others)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
