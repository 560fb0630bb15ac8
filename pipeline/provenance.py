"""What a result was made from: code, machine, packages, data."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from ruamel.yaml import YAML

from pipeline import machine, paths

PACKAGES = ("torch", "lightning", "timm", "torchmetrics", "albumentations", "mlflow", "dvc")


def run_tags(*, dataset: str, model: str) -> dict[str, str]:
    """A run's origin as flat tags. What cannot be known (no git, no dvc.lock, no GPU) is absent.

    git.commit, git.dirty (true or false); hardware.cpu, .cores (logical), .memory_gib, .gpus; version.python and
    version.PACKAGE; dvc.prepared and dvc.pretrained, the hashes in dvc.lock of the data and the weights started from.
    """
    return _git() | _hardware() | _versions() | _hashes(dataset=dataset, model=model)


def _git() -> dict[str, str]:
    commit = _output("git", "rev-parse", "HEAD")
    # Without the lock, since git may be at work for DVC in the same folder.
    changes = _output("git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {}
    return {"git.commit": commit, "git.dirty": "true" if changes else "false"}


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _hardware() -> dict[str, str]:
    import torch

    tags = {
        "hardware.cpu": machine.processor(),
        "hardware.cores": str(os.cpu_count()),
        "hardware.memory_gib": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}",
    }
    if gpus := [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]:
        tags["hardware.gpus"] = ", ".join(gpus)
    return tags


def _versions() -> dict[str, str]:
    return {"version.python": platform.python_version()} | {f"version.{name}": version(name) for name in PACKAGES}


def _hashes(*, dataset: str, model: str) -> dict[str, str]:
    lock = Path("dvc.lock")
    if not lock.exists():
        return {}
    stages = YAML(typ="safe").load(lock)["stages"].values()
    hashes = {out["path"]: str(out["md5"]) for stage in stages for out in stage.get("outs", []) if "md5" in out}
    wanted = {"dvc.prepared": paths.prepared(dataset), "dvc.pretrained": paths.pretrained(model)}
    return {tag: hashes[path.as_posix()] for tag, path in wanted.items() if path.as_posix() in hashes}
