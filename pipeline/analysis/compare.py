"""MLflow's runs side by side, best first."""

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import tracking
from pipeline.tracking import RunRow

PIPED_WIDTH = 1000
"""Columns for a pipe, which has no width: more than any table needs, so that nothing in it is folded."""


def run(experiment: str | None = None) -> None:
    """Prints the runs of an experiment, or of all, or what to do where there are none."""
    rows = [row for row in tracking.runs(experiment) if tracking.SERVES not in row.tags]  # no classifier of their own
    if not rows:
        where = f"experiment {experiment!r}" if experiment else "MLflow"
        print(f"No runs in {where} yet: train a model first (make train).")
        return
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    console.print(table(rows))


def table(rows: list[RunRow]) -> Table:
    """A line a run: by top-1 on the test split, then those without figures, then those that mean nothing."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("run", "dataset", "net", "weights", "top-1 %", "top-5 %", "minutes"):
        number = heading in ("top-5 %", "minutes")
        shown.add_column(heading, overflow="fold", justify="right" if number else "left", no_wrap=number)
    for row in sorted(rows, key=_rank):
        cells = (
            row.name,
            row.params.get("data.name", ""),
            row.params.get("model.name", ""),
            row.tags.get("weights", ""),
            _top1(row),
            _percent(row.metrics.get("test/top5")),
            f"{float(row.tags['minutes']):.1f}" if "minutes" in row.tags else "",
        )
        shown.add_row(*(Text(cell) for cell in cells))  # as text: a bracket in a name is no markup
    return shown


def _meaningless(row: RunRow) -> bool:
    return row.tags.get("fast_dev_run", "").lower() == "true"


def _rank(row: RunRow) -> tuple[int, float]:
    top1 = row.metrics.get("test/top1")
    if _meaningless(row):
        return 2, 0.0
    return (1, 0.0) if top1 is None else (0, -top1)


def _top1(row: RunRow) -> str:
    metrics = row.metrics
    if "test/top1" not in metrics:
        text = f"unfinished ({row.status.lower()})"
    elif "test/top1_low" in metrics and "test/top1_high" in metrics:
        low, high = metrics["test/top1_low"], metrics["test/top1_high"]
        text = f"{_percent(metrics['test/top1'])} ({_percent(low)} to {_percent(high)})"
    else:
        text = _percent(metrics["test/top1"])
    return f"{text} meaningless: fast_dev_run" if _meaningless(row) else text


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
