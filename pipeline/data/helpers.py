"""Work that is shared out among the cores, with what comes of it in the order of the tasks.

By processes: pictures are made in so many short calls that threads would spend their time handing each other the
interpreter's lock. A helper is a fork of this process, which takes milliseconds and needs nothing sent to it, and what
it makes lies in memory that both see. This process takes a part in the work whenever what comes next is not ready, so
that there is one process for each core. Where forks are not safe, which is anywhere but on Linux, it works alone.
"""

import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from pipeline.errors import UserError
from pipeline.machine import cores

AHEAD = 3
"""Tasks begun ahead of the one that is waited for, for each process: bounds the memory that many of them take."""

Task = TypeVar("Task")
Made = TypeVar("Made")
_Told = tuple[bytes, list[int]]
"""A pickle without the bytes of its arrays, and how many each has."""


def in_order(tasks: Iterable[Task], make: Callable[[Task], Made], *, room: int) -> Iterator[Made]:
    """What `make` gives for each task, in their order; arrays hold good until the next one is asked for.

    Args:
        tasks: each worth some milliseconds of work, and small: it is sent to a helper.
        room: bytes that a task's arrays seldom exceed; those that do take longer to come.

    Raises:
        UserError: a helper was killed.
    """
    coming = iter(tasks)
    first = list(islice(coming, 2))
    tasks, helping = chain(first, coming), cores() - 1
    if len(first) < 2 or not helping or sys.platform != "linux":
        yield from map(make, tasks)
        return
    places = [mmap.mmap(-1, room) for _ in range(AHEAD * (1 + helping))]
    with _pool(helping, make, places) as pool:
        begun: Iterator[_Begun[Task, Made]] = (
            _Begun(task, pool, number % len(places), places) for number, task in enumerate(tasks)
        )
        waiting = deque(islice(begun, len(places)))
        while waiting:
            while not waiting[0].ready and any(one.here(make) for one in waiting):
                pass
            yield waiting.popleft().result()
            waiting.extend(islice(begun, 1))


class _Begun(Generic[Task, Made]):
    """A task that a helper may take, as long as this process does not."""

    def __init__(self, task: Task, pool: ProcessPoolExecutor, place: int, places: list[mmap.mmap]) -> None:
        self._task, self._place = task, places[place]
        self._told: Future[_Told] = pool.submit(_help, task, place)
        self._here: Future[Made] | None = None

    @property
    def ready(self) -> bool:
        return self._told.done()

    def here(self, make: Callable[[Task], Made]) -> bool:
        """Does it in this process, unless it is done or a helper has come to it; whether it did."""
        if self._told.done() or not self._told.cancel():
            return False
        self._here = Future()
        try:
            self._here.set_result(make(self._task))
        except Exception as error:
            self._here.set_exception(error)
        return True

    def result(self) -> Made:
        """What came of it, as soon as it is there; raises what `make` raised."""
        if self._here is not None:
            return self._here.result()
        try:
            told, sizes = self._told.result()
        except BrokenProcessPool:
            raise UserError(
                "a process that helped was killed, most likely for want of memory; free some, or use fewer cores"
            ) from None
        buffers, start = [], 0
        for size in sizes:
            buffers.append(memoryview(self._place)[start : start + size])
            start += size
        made: Made = pickle.loads(told, buffers=buffers)
        return made


@contextmanager
def _pool(number: int, make: Callable[[Any], Any], places: list[mmap.mmap]) -> Iterator[ProcessPoolExecutor]:
    """So many helpers, while OpenCV has no threads of its own. What has not begun at an error never does."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    forks = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(number, mp_context=forks, initializer=_become_helper, initargs=(make, places))
    try:
        with warnings.catch_warnings():
            # of threads that a fork does not have: helpers use nobody's but their own
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(os.getpid)  # the first task forks all of them
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(before)


# --- in a helper ------------------------------------------------------------------------------------------------------

_own: tuple[Callable[[Any], Any], list[mmap.mmap]]


def _become_helper(make: Callable[[Any], Any], places: list[mmap.mmap]) -> None:
    global _own
    _own = make, places
    # Ctrl-C is for the first process, which ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A helper whose parent was killed would wait for ever: its siblings hold the pipe open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _help(task: Any, place: int) -> _Told:
    make, places = _own
    made = make(task)
    kept: list[pickle.PickleBuffer] = []
    told = pickle.dumps(made, protocol=5, buffer_callback=kept.append)
    raw = [buffer.raw() for buffer in kept]
    sizes = [len(one) for one in raw]
    if sum(sizes) > len(places[place]):
        return pickle.dumps(made, protocol=5), []
    start = 0
    for one, size in zip(raw, sizes, strict=True):
        places[place][start : start + size] = one
        start += size
    return told, sizes
