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
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from pipeline.errors import UserError
from pipeline.machine import cores

AHEAD = 3
"""Tasks begun ahead of the one that is waited for, for each process: bounds the memory that many of them take."""
OUT = 2
"""Of them, those that are out to a helper: the one that it is at, and the next, so that it never waits for it."""
ROOM = 2**30
"""Bytes of memory that processes share, at most."""

Task = TypeVar("Task")
Made = TypeVar("Made")
_Told = tuple[bytes, list[int]]
"""A pickle without the bytes of its arrays, and how many each has."""


def in_order(tasks: Iterable[Task], make: Callable[[Task], Made], *, room: int) -> Generator[Made, None, None]:
    """What `make` gives for each task, in their order; arrays hold good until the next one is asked for.

    Args:
        tasks: each worth some milliseconds of work, and small: it is sent to a helper.
        room: bytes that a task's arrays seldom exceed; those that do take longer to come.

    Raises:
        UserError: a helper was killed.
    """
    coming = iter(tasks)
    first = list(islice(coming, cores()))
    helping = len(first) - 1
    if helping < 1 or sys.platform != "linux":
        yield from map(make, chain(first, coming))
        return
    ahead = AHEAD * (1 + helping)
    places = [mmap.mmap(-1, min(room, ROOM // ahead)) for _ in range(ahead)]
    entries: Iterator[_Entry[Task, Made]] = (
        _Entry(task, number % ahead) for number, task in enumerate(chain(first, coming))
    )
    waiting: deque[_Entry[Task, Made]] = deque()
    with _pool(helping, make, places) as pool:
        while True:
            waiting.extend(islice(entries, ahead - len(waiting)))
            if not waiting:
                return
            untouched = [entry for entry in waiting if entry.made is None and entry.told is None]
            out = sum(entry.told is not None and not entry.told.done() for entry in waiting)
            for entry in untouched[: max(0, OUT * helping - out)]:
                entry.told = pool.submit(_help, entry.task, entry.place)
            untouched = [entry for entry in untouched if entry.told is None]
            if waiting[0].ready or not untouched:
                yield waiting.popleft().result(places)
            else:
                untouched[0].do(make)


@dataclass
class _Entry(Generic[Task, Made]):
    """A task on its way: with a helper, done in this process, or untouched."""

    task: Task
    place: int
    told: "Future[_Told] | None" = None
    made: "Future[Made] | None" = None

    @property
    def ready(self) -> bool:
        return self.made is not None or (self.told is not None and self.told.done())

    def do(self, make: Callable[[Task], Made]) -> None:
        self.made = Future()
        try:
            self.made.set_result(make(self.task))
        except Exception as error:
            self.made.set_exception(error)  # for its turn

    def result(self, places: list[mmap.mmap]) -> Made:
        """What came of it, as soon as it is there; raises what `make` raised."""
        if self.made is not None:
            return self.made.result()
        assert self.told is not None
        told, sizes = self.told.result()
        ends = list(accumulate(sizes))
        seen = memoryview(places[self.place])
        made: Made = pickle.loads(told, buffers=[seen[end - size : end] for end, size in zip(ends, sizes, strict=True)])
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
    except BrokenProcessPool:
        raise UserError(
            "a process that helped was killed, most likely for want of memory; free some, or use fewer cores"
        ) from None
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
