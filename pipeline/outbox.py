"""What is on its way to a server that may be away: calls in memory, metric points on disk."""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0
"""Seconds until a server that failed is tried again; doubled at each failure."""


class Outbox:
    """Calls of a server. One that fails is kept for `drain`, is told once, and puts off the next."""

    def __init__(self, server: str, *, failures: tuple[type[Exception], ...]) -> None:
        self._server = server
        self._failures = failures
        self._queue: list[tuple[str, Callable[[], object]]] = []
        self._pause = self._rests_until = 0.0
        self._warned = False

    @property
    def rests(self) -> bool:
        """Whether the server failed so lately that it is not tried."""
        return time.monotonic() < self._rests_until

    def attempt(self, call: Callable[[], object]) -> bool:
        """Whether the call went through, now."""
        try:
            call()
        except self._failures as error:
            self._pause = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE)
            self._rests_until = time.monotonic() + self._pause
            if not self._warned:
                self._warned = True
                warn(f"{self._server} fails; training goes on, what is tracked is sent later: {reason(error)}")
            return False
        self._pause = self._rests_until = 0.0
        return True

    def do(self, what: str, call: Callable[[], object]) -> None:
        """Makes the call now, or at `drain`."""
        if self.rests or not self.attempt(call):
            self._queue.append((what, call))

    def drain(self, *, alive: bool) -> list[str]:
        """Makes each call that waits once more if the server is alive, and names those that remain."""
        if alive:
            self._queue = [(what, call) for what, call in self._queue if not self.attempt(call)]
        return [what for what, _ in self._queue]


class Point(NamedTuple):
    """Metrics logged together."""

    time: int
    """Milliseconds since the epoch."""
    step: int
    metrics: dict[str, float]


class Spool:
    """One run's metric points in an append-only file of JSON lines.

    The first line names the run; each other one is a point, or the number of points acknowledged so far. A file of
    another run is begun anew. A line that a kill cut short is skipped. Points may be added by one thread while another
    acknowledges earlier ones.
    """

    def __init__(self, path: Path, *, run_id: str) -> None:
        self.path = path
        self.waiting: list[Point] = []
        """Points not yet acknowledged, oldest first."""
        self._lock = threading.Lock()
        self._sent = 0
        self._added = self._synced = 0
        self._known: set[tuple[int, frozenset[str]]] = set()
        lines = _lines(path)
        if lines[:1] != [{"run": run_id}]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{json.dumps({'run': run_id})}\n", encoding="utf-8")
            return
        self._sent = max((line["sent"] for line in lines if "sent" in line), default=0)
        points = [Point(*line["point"]) for line in lines if "point" in line]
        self._known = {(point.step, frozenset(point.metrics)) for point in points}
        self.waiting = points[self._sent :]
        self._append("")  # ends a line that was cut short

    def add(self, point: Point) -> None:
        """Keeps a point until it is acknowledged."""
        with self._lock:
            self._append(json.dumps({"point": point}))
            self._known.add((point.step, frozenset(point.metrics)))
            self.waiting.append(point)
            self._added += 1

    def knows(self, step: int, names: Iterable[str]) -> bool:
        """Whether a point of this step and these names has been added, by this process or one before."""
        return (step, frozenset(names)) in self._known

    def sync(self) -> None:
        """Sees that what has been added outlasts a power cut."""
        added = self._added
        if added == self._synced:
            return
        with self.path.open("rb") as file:
            os.fsync(file.fileno())  # not under the lock: points are added meanwhile
        self._synced = max(self._synced, added)

    def acknowledge(self, count: int) -> None:
        """The first `count` points that wait have arrived."""
        with self._lock:
            self._sent += count
            self._append(json.dumps({"sent": self._sent}))
            del self.waiting[:count]

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def reason(error: Exception) -> str:
    """An error's first line, cut to what a line of ours can hold."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 300 else f"{lines[0][:300]}..."


def warn(line: str) -> None:
    """A line on standard error that a training's log is not likely to hide."""
    print(without_password(f"WARNING: {line}"), file=sys.stderr, flush=True)


def without_password(line: str) -> str:
    """The line with the user and password of every address left out."""
    return re.sub(r"://[^/@\s]*@", "://", line)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
