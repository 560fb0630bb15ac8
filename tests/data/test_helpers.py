"""Work shared out among processes comes back in order, whole, and ends with the process that asked for it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.data import helpers
from pipeline.data.helpers import in_order
from pipeline.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="helpers are forks, made on Linux alone")
ROOM = 4096


@pytest.fixture(autouse=True)
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "cores", lambda: 3)


def _table(number: int) -> tuple[int, np.ndarray]:
    """Arrays of 0 to 15 KiB: some have room, most have not."""
    time.sleep(0.001 * (number % 3))
    return os.getpid(), np.full(number * 256, number % 256, dtype=np.uint8)


@pytest.mark.parametrize("room", [1, ROOM, 10**6])
def test_results_are_in_order_and_whole_whether_they_have_room_or_not(room: int) -> None:
    pids = set()
    for number, (pid, array) in enumerate(in_order(range(60), _table, room=room)):
        time.sleep(0.002)  # helpers go on; what they make must not lie where this one does
        assert len(array) == 256 * number
        assert (array == number % 256).all()
        pids.add(pid)
    assert number == 59
    assert os.getpid() in pids
    assert len(pids) > 1
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("tasks", "cores"), [(1, 3), (5, 1)])
def test_one_task_or_one_core_needs_no_helper(monkeypatch: pytest.MonkeyPatch, tasks: int, cores: int) -> None:
    monkeypatch.setattr(helpers, "cores", lambda: cores)
    assert {pid for pid, _ in in_order(range(tasks), _table, room=ROOM)} == {os.getpid()}


def test_many_tasks_are_begun_no_further_ahead_than_that() -> None:
    begun: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(60):
            begun.append(number)
            yield number

    ahead = [len(begun) - number for number, _ in enumerate(in_order(tasks(), _table, room=ROOM))]
    assert max(ahead) <= 3 * helpers.AHEAD


def _fails(number: int) -> int:
    if number == 3:
        raise UserError("03.jpg: truncated", parameter="data.path")
    return number


def test_an_error_comes_in_its_turn_and_ends_the_helpers() -> None:
    results = in_order(range(1000), _fails, room=ROOM)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"^03.jpg: truncated$") as error:
        next(results)
    assert error.value.parameter == "data.path"
    assert multiprocessing.active_children() == []


def _interrupted(number: int) -> int:
    if number == 3:
        raise KeyboardInterrupt
    return number


def test_an_interruption_wherever_it_is_ends_the_helpers_before_the_work_is_done() -> None:
    begun: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            begun.append(number)
            yield number

    with pytest.raises(KeyboardInterrupt):
        list(in_order(tasks(), _interrupted, room=ROOM))
    assert multiprocessing.active_children() == []
    assert len(begun) < 40


def test_who_stops_asking_ends_the_helpers() -> None:
    results = in_order(range(1000), _table, room=ROOM)
    next(results)
    results.close()
    assert multiprocessing.active_children() == []


def _killed(number: int) -> int:
    time.sleep(0.01)
    if number > 3 and multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("cores", [2, 4])
def test_a_killed_helper_is_said_in_one_line_and_ends_the_others(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(helpers, "cores", lambda: cores)
    with pytest.raises(UserError, match="was killed, most likely for want of memory"):
        list(in_order(range(100), _killed, room=ROOM))
    assert multiprocessing.active_children() == []


ASKS = """
import os, time
from pipeline.data import helpers

def make(number):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece
    time.sleep(60)

helpers.cores = lambda: 3
list(helpers.in_order(range(9), make, room=1))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_helpers_end_with_the_process_that_asked(number: int) -> None:
    root = Path(helpers.__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", ASKS], stdout=subprocess.PIPE, text=True, cwd=root) as asker:
        assert asker.stdout is not None
        pids = {int(asker.stdout.readline()) for _ in range(3)}
        assert asker.pid in pids
        asker.send_signal(number)
        asker.wait(20)
        until = time.monotonic() + 20
        while any(map(_runs, pids)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(map(_runs, pids))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
