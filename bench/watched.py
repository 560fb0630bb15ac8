"""A train stage that watches itself: what its process allocates, and what checkpoints and tracking take.

Run in Thaw's working folder by the benches that need it. It prints a RESULT line with

    peak          most anonymous memory (RssAnon of /proc/self/status) seen, bytes
    fit           seconds of the phases' epochs, validation and all that is written between them included
    checkpoints   of these, seconds in which checkpoints were written
    logged        of these, seconds in which metric points were taken down
    sent          seconds of processor time of the thread that sends them, wherever training was meanwhile
    system        the same of MLflow's thread that looks at the machine and sends what it sees
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import machine, tracking
from pipeline.__main__ import main

with machine.large_import():  # as the command line imports them
    from pipeline.training import checkpoints, fit

EVERY_S = 0.02
found = dict.fromkeys(("peak", "fit", "checkpoints", "logged", "sent", "system"), 0.0)


def anonymous() -> int:
    """Bytes that this process has allocated, now."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def timed(owner: Any, name: str, kind: str, *, clock: Callable[[], float] = time.perf_counter) -> None:
    """Has a function's seconds added to what was found."""
    whole = getattr(owner, name)

    def watched(*values: Any, **named: Any) -> Any:
        began = clock()
        try:
            return whole(*values, **named)
        finally:
            found[kind] += clock() - began

    setattr(owner, name, watched)


def watching(starts: Callable[[Any], None]) -> Callable[[Any], None]:
    """Has MLflow's own thread timed where it is started: not before, since MLflow is imported by the stage."""

    def start(run: Any) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        timed(SystemMetricsMonitor, "monitor", "system", clock=time.thread_time)
        starts(run)

    return start


def sample() -> None:
    """Looks at the memory again and again."""
    while True:
        found["peak"] = max(found["peak"], anonymous())
        time.sleep(EVERY_S)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    timed(fit.L.Trainer, "fit", "fit")
    timed(checkpoints.Checkpoints, "_save", "checkpoints")
    timed(checkpoints.Checkpoints, "_hold", "checkpoints")
    timed(tracking.Run, "log_metrics", "logged")
    timed(tracking.Run, "_send", "sent", clock=time.thread_time)
    starts = tracking.Run.start_system_metrics
    tracking.Run.start_system_metrics = watching(starts)  # type: ignore[method-assign]
    threading.Thread(target=sample, daemon=True).start()
    code = main(["train"])
    print("RESULT " + json.dumps(found), flush=True)
    sys.exit(code)
