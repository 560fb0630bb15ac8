"""Two processes train as one: the same figures, one MLflow run, one set of files, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

from pipeline import config, nets, tracking
from pipeline.data import store
from pipeline.data.store import Row
from pipeline.errors import UserError
from pipeline.training import job, weights
from pipeline.training.fit import ends_together
from pipeline.training.pretrained import Origin
from pipeline.training.record import Record

ROOT = Path(__file__).parents[2]
NET = "scratch/lenet5"
PX = 32


def _project(folder: Path, *, devices: int, epochs: int, pretrained: bool = False, **changed: Any) -> Path:
    """A folder in which the train stage can run: parameters, packed pictures, and weights to start from."""
    settings: dict[str, dict[str, Any]] = {
        "data": {"name": "tiny"},
        "augment": {"px": PX},
        "model": {"name": NET},
        "train": {
            "batch_size": 6,
            "optimizer": "sgd",
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp",
            "phases": {
                "one": {"epochs": 1, "trainable": "head", "lr": 0.01},
                "two": {"epochs": epochs, "trainable": "all", "lr": 0.01, "scheduler": "constant"},
            },
            **changed,
        },
        "tracking": {"log_model": False, "system_metrics": False},
    }
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    for section, knobs in settings.items():
        params[section].update(knobs)
    folder.mkdir()
    yaml.dump(params, folder / "params.yaml")
    (folder / "models" / "pretrained" / NET).mkdir(parents=True)
    Origin(start="file" if pretrained else "random", source="a test").write(folder / "models" / "pretrained" / NET)
    if pretrained:
        torch.manual_seed(0)
        state = nets.build(NET, num_classes=5, in_chans=3).state_dict()
        weights.save_state(folder / "models" / "pretrained" / NET / "weights.safetensors", state)

    packed = folder / "data" / "prepared" / "tiny"
    packed.mkdir(parents=True)
    rng = np.random.default_rng(0)
    # Five pictures for two processes: uneven validation is part of the test.
    rows = (
        (Row(f"{i}", split, i % 3, 0, PX, PX), rng.integers(0, 256, (PX, PX, 1), dtype=np.uint8))
        for i, split in enumerate(["train"] * 18 + ["val"] * 5)
    )
    store.write(packed, rows, dataset="tiny", classes=("a", "b", "c"), px=PX, channels=1, skipped=[])
    return folder


def _start(folder: Path, *command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *(command or ("-m", "pipeline", "train"))],
        cwd=folder,
        env={**os.environ, "DVC_ROOT": str(folder), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    base = tmp_path_factory.mktemp("ddp")
    folders = {devices: _project(base / f"{devices}", devices=devices, epochs=2) for devices in (1, 2)}
    for folder in folders.values():
        process = _start(folder)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    return folders


def test_two_processes_give_the_figures_and_the_weights_of_one(trained: dict[int, Path]) -> None:
    one, two = (pd.read_csv(trained[devices] / "models" / "curves.csv") for devices in (1, 2))
    assert one["phase"].tolist() == two["phase"].tolist() == ["one", "two", "two"]
    for column in ("train/loss", "train/top1", "val/loss", "val/top1"):
        assert np.allclose(one[column], two[column], atol=1e-5), column
    files = [trained[devices] / "models" / NET / "train" / "model.safetensors" for devices in (1, 2)]
    alone, together = (weights.load_model(file)[0].state_dict() for file in files)
    for name, value in alone.items():
        assert torch.allclose(value, together[name], atol=1e-5), name


def test_two_processes_compute_frozen_layers_once_and_share_them(tmp_path: Path) -> None:
    phases = {
        "head": {"epochs": 2, "trainable": "head", "lr": 0.01},
        "top": {"epochs": 1, "trainable": "last:1", "lr": 0.01},
    }
    figures, states = [], []
    for devices, cache in ((1, "none"), (2, "fp32")):
        folder = _project(
            tmp_path / cache, devices=devices, epochs=1, pretrained=True, phases=phases, transforms={}, cache=cache
        )
        process = _start(folder)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        figures.append(pd.read_csv(folder / "models" / "curves.csv"))
        states.append(weights.load_model(folder / "models" / NET / "train" / "model.safetensors")[0].state_dict())
    for phase in phases:
        told = sorted(line.split("layers ")[1] for line in printed.splitlines() if line.startswith(f"{phase}: frozen"))
        assert [line.split(" pictures")[0] for line in told] == ["computed for 0", "computed for 23"], printed
        assert [line.rpartition(" ")[2] for line in told] == ["23", "0"]
    for column in ("train/loss", "train/top1", "val/loss", "val/top1"):
        assert np.allclose(figures[0][column], figures[1][column], atol=1e-5), column
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-5), name


def test_two_processes_make_one_run_with_each_point_once(
    trained: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(trained[2]))
    (run,) = tracking.runs()
    assert run.id == Record.read(trained[2] / "models" / NET / "train").run_id
    assert run.status == "FINISHED"
    assert run.metrics["epoch"] == 3
    assert not (trained[2] / "models" / "progress" / NET / "phases").exists()


def test_stopping_the_first_process_ends_the_second_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _project(tmp_path / "it", devices=2, epochs=10_000)
    process = _start(folder)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("two 3/"):
            break
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert ranks
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    deadline = time.monotonic() + 30
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        assert time.monotonic() < deadline, "a rank is left behind"
        time.sleep(0.1)
    assert not (folder / "models" / NET / "train").exists()
    monkeypatch.setenv("DVC_ROOT", str(folder))
    assert [run.status for run in tracking.runs()] == ["KILLED"]


STOPPED_BETWEEN = """
import os, signal, sys
from pipeline.__main__ import main
from pipeline.training import fit, frozen

computed = frozen.computed
def stopped(*values, phase, **named):
    if phase.name == "top" and fit.rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return computed(*values, phase=phase, **named)
frozen.computed = stopped
sys.exit(main(["train"]))
"""


def test_stopping_the_first_process_between_two_phases_ends_the_second_too(tmp_path: Path) -> None:
    phases = {"head": {"epochs": 1, "trainable": "head"}, "top": {"epochs": 1, "trainable": "last:1"}}
    folder = _project(tmp_path / "it", devices=2, epochs=1, pretrained=True, phases=phases, transforms={}, cache="fp32")
    driver = tmp_path / "driver.py"
    driver.write_text(STOPPED_BETWEEN)
    process = _start(folder, str(driver))
    printed, _ = process.communicate(timeout=120)  # which waits for the second's end of the pipe, too
    assert process.returncode == 143, printed


@pytest.mark.parametrize("processes", [1, 2])
def test_synchronised_batch_norms_keep_the_activation_that_timm_puts_into_them(processes: int) -> None:
    params = config.load(ROOT / "params.yaml", overrides={"train.sync_bn": True}).train
    net = nets.build("test_efficientnet", num_classes=3)
    pictures = torch.randn(4, 3, PX, PX)
    expected = net(pictures)
    synchronised = job._synchronised(net, params, processes=processes)
    norms = [module for module in synchronised.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) == (processes > 1) for norm in norms)
    assert torch.equal(synchronised(pictures), expected)
    assert synchronised.state_dict().keys() == nets.build("test_efficientnet", num_classes=3).state_dict().keys()


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (torch.OutOfMemoryError(), r"^the device's memory does not hold train\.batch_size 64; lower it or train\.px"),
        (RuntimeError("NCCL error: unhandled"), "^another process of this training has ended .NCCL error: unhandled"),
    ],
)
def test_what_a_device_or_another_process_did_is_told_in_a_line(raised: Exception, told: str) -> None:
    params = config.load(ROOT / "params.yaml").train
    with pytest.raises(UserError, match=told), ends_together(params):
        raise raised


SLOW_DISK = """
import sys, time
from pipeline.__main__ import main
from pipeline.training import checkpoints

place = checkpoints._put_in_place
def placed(beside, *, best):
    time.sleep(1)
    place(beside, best=best)
checkpoints._put_in_place = placed
sys.exit(main(["train"]))
"""


@pytest.mark.slow
def test_no_process_goes_on_before_the_best_weights_are_in_place(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(SLOW_DISK)
    process = _start(_project(tmp_path / "it", devices=2, epochs=1), str(driver))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
