"""What stands around a training: the command line, a chain with nothing to do, the way to the first step.

Every side is a process of its own. A step's time is counted from its process's start to the end of the first optimiser
step, on scikit-learn's digits at 64 px; the tracking store is there already. Processor time, which other work on the
machine hardly touches, stands beside wall time.

    python bench/startup.py [--quick] [--json FILE]
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
from pipeline import config

FOLDER = common.ROOT / "data/cache/bench/startup"
NETS = ("tf_efficientnet_lite0", "scratch/lenet5")
SETTINGS = {
    "data.name": "digits",
    "augment.px": 64,
    "augment.train_size": "all",
    "train.phases": {"whole": {"trainable": "all", "epochs": 1}},
    "train.checkpoint_every": 5,
    "tracking.log_model": False,
}
IMPORTS = "import torch, lightning, timm"
UNTIL = """
import os, sys, threading, time

def watch():
    # Until torch is there, without importing it before the stage does.
    while not hasattr(module := sys.modules.get("torch.optim.optimizer"), "register_optimizer_step_post_hook"):
        time.sleep(0.002)
    module.register_optimizer_step_post_hook(count)

def count(*_):
    global steps
    sys.modules["pipeline.training.checkpoints"].SPACED_S = 0.0  # so that one is there after a few steps
    steps -= 1
    if steps == 0:
        sys.stdout.flush()
        os._exit(0)  # as a kill would, so that the training can be resumed

steps = int(sys.argv.pop(1))
threading.Thread(target=watch, daemon=True).start()
from pipeline.__main__ import main
sys.exit(main(["train"]))
"""
"""A training that ends with its n-th optimiser step."""
Times = tuple[float, float]
"""Wall and processor seconds of one process and its children."""


def main() -> None:
    """Runs the bench."""
    asked = common.parser(__doc__, pairs=7).parse_args()
    bench = common.Bench("startup", asked)
    python = sys.executable
    imports = partial(_timed, [python, "-c", IMPORTS])
    for name in NETS[-1:] if asked.quick else NETS:
        folder = _project(name)
        _until(folder, 1)  # what is read from now on lies in the page cache
        sides = {"imports": imports, "fresh": partial(_fresh, folder), "resumed": partial(_resumed, folder)}
        seconds = common.rounds(sides, number=asked.pairs)
        first = "train's start to its first step"
        _compare(bench, seconds, "fresh", "imports", name=f"{first}, {name}, against `{IMPORTS}`", at_most=1.5)
        _compare(bench, seconds, "resumed", "fresh", name=f"{first}, {name}, resumed against fresh", at_most=1.05)
    folder = _project(NETS[-1])
    dvc = [python, "-m", "dvc"]
    _timed([*dvc, "repro"], folder=folder)
    sides = {
        "python": partial(_timed, [python, "-c", "pass"]),
        "help": partial(_timed, [python, "-m", "pipeline", "--help"], folder=folder),
        "check": partial(_timed, [python, "-m", "pipeline", "check"], folder=folder),
        "weights": partial(_timed, [python, "-m", "pipeline", "weights"], folder=folder),
        "imports": imports,
        "status": partial(_timed, [*dvc, "status"], folder=folder),
        "repro": partial(_timed, [*dvc, "repro"], folder=folder),
    }
    seconds = common.rounds(sides, number=asked.pairs)
    _compare(bench, seconds, "repro", "status", name="`dvc repro` with nothing to do against `dvc status`", at_most=1.5)
    _compare(bench, seconds, "help", "python", name="`pipeline --help` against starting Python")
    _compare(bench, seconds, "check", "imports", name=f"`pipeline check` against `{IMPORTS}`")
    _compare(bench, seconds, "weights", "imports", name=f"weights stage with nothing to do against `{IMPORTS}`")
    bench.write()


def _compare(
    bench: common.Bench,
    seconds: Mapping[str, Sequence[Times]],
    dividend: str,
    divisor: str,
    *,
    name: str,
    at_most: float | None = None,
) -> None:
    for place, kind in enumerate(("wall", "processor")):
        sides = {side: [times[place] for times in seconds[side]] for side in (dividend, divisor)}
        bench.comparisons.append(
            common.Comparison(
                name=name,
                ratio_of=f"{kind} time of {dividend} / of {divisor}",
                ratios=common.ratios(sides[dividend], sides[divisor]),
                target=None if at_most is None else common.Target(at_most=at_most),
                sides=sides,
            )
        )


def _project(name: str) -> Path:
    """A working folder with the chain's files, in which all but train and evaluate have run."""
    folder = FOLDER / name.replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(common.ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("params.yaml", "dvc.yaml", ".dvcignore", "models/no-weights", "data/pictures/README.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(common.ROOT / path, folder / path)
    config.write(folder / "params.yaml", overrides={**SETTINGS, "model.name": name})
    dvc = [sys.executable, "-m", "dvc"]
    _timed([*dvc, "init", "--no-scm", "--quiet"], folder=folder)
    _timed([*dvc, "repro", "weights", "augment"], folder=folder)
    return folder


def _fresh(folder: Path) -> Times:
    shutil.rmtree(folder / "models/progress", ignore_errors=True)
    return _until(folder, 1)


def _resumed(folder: Path) -> Times:
    shutil.rmtree(folder / "models/progress", ignore_errors=True)
    _until(folder, 8)  # the checkpoint is step 5's
    assert any((folder / "models/progress").rglob("last.ckpt"))
    return _until(folder, 1)


def _until(folder: Path, step: int) -> Times:
    return _timed([sys.executable, "-c", UNTIL, str(step)], folder=folder)


def _timed(words: Sequence[str], *, folder: Path = Path()) -> Times:
    """Runs a process in a folder whose own `pipeline` it imports.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_", "THAW_"))}
    told: dict[str, Any] = {"PYTHONPATH": str(folder.resolve()), "HF_HUB_OFFLINE": "1", "DVC_NO_ANALYTICS": "1"}
    told["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, cwd=folder, env={**kept, **told}, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {words}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
