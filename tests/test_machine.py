"""Threads follow what a process may use, and what its user says."""

import gc
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import machine


def test_the_least_quota_of_all_levels_counts(tmp_path: Path) -> None:
    (tmp_path / "pod" / "box").mkdir(parents=True)
    (tmp_path / "pod" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "pod" / "box" / "cpu.max").write_text("max 100000\n")
    assert machine.quota("0::/pod/box\n", root=tmp_path) == 1.5
    assert machine.quota("0::/elsewhere\n", root=tmp_path) == math.inf


def test_the_first_version_of_control_groups_is_read_too(tmp_path: Path) -> None:
    group = tmp_path / "cpu" / "docker"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("200000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    told = "5:memory:/docker\n4:cpu,cpuacct:/docker\n"
    assert machine.quota(told, root=tmp_path) == 2
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert machine.quota(told, root=tmp_path) == math.inf


@pytest.mark.parametrize(
    ("environment", "devices", "expected"),
    [
        ({}, 1, 8),
        ({}, "auto", 8),
        ({}, 2, 4),
        ({}, 64, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 1, 2),
        ({"OMP_NUM_THREADS": "3"}, 1, None),
        ({"OMP_NUM_THREADS": "1"}, 1, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}, 2, 4),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}, 2, None),
    ],
)
def test_threads_are_shared_by_the_processes_and_the_user_wins(
    environment: dict[str, str], devices: int | str, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert machine.threads(environment, devices=devices) == expected


def test_a_container_has_no_more_cores_than_its_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    assert machine.cores() == 1


def test_affinity_bounds_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "none")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert machine.cores() == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to keep memory")
@pytest.mark.parametrize(
    ("environment", "keeps"),
    [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1000"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.check=3"}, False)],
)
def test_freed_memory_is_kept_unless_the_user_says_how(environment: dict[str, str], *, keeps: bool) -> None:
    told = """
import resource
from pipeline import machine
import numpy as np
print(machine.keep_memory())
np.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", told], env=clean | environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    assert kept == str(keeps)
    # 128 MiB ten times, in pages of at most 2 MiB
    assert (int(faults) < 64) == keeps


def test_no_garbage_is_looked_for_in_what_an_import_makes_and_later_in_all_else() -> None:
    def cycle() -> list[object]:
        made: list[object] = []
        made.append(made)
        return made

    try:
        with machine.large_import():
            assert not gc.isenabled()
            imported = cycle()
        assert gc.isenabled()
        own = cycle()
        looked_at = {id(found) for found in gc.get_objects()}
        assert id(imported) not in looked_at
        assert id(own) in looked_at
    finally:
        gc.unfreeze()
