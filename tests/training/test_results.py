"""What a training says of its phases."""

from pathlib import Path

import pytest

from pipeline.training import results
from pipeline.training.progress import Outcome


def _outcome(phase: str, first: int, *values: float, monitor: str, best: int) -> Outcome:
    rows = [{"epoch": first + i, "phase": phase, monitor: value} for i, value in enumerate(values)]
    return Outcome(rows=rows, best=Path("b"), last=Path("l"), best_epoch=best, steps=1, gradients=[])


@pytest.mark.parametrize(
    ("monitor", "after", "told"),
    [("val/loss", 0.6, True), ("val/loss", 0.5, False), ("val/loss", 0.4, False), ("val/top1", 0.4, True)],
)
def test_a_phase_that_ends_worse_than_the_one_before_is_told_of(monitor: str, after: float, told: bool) -> None:
    """By their best epochs, not by their last."""
    first = _outcome("frozen", 1, 0.5, 0.9 if monitor == "val/loss" else 0.1, monitor=monitor, best=1)
    second = _outcome("finetune", 3, 0.9 if monitor == "val/loss" else 0.1, after, monitor=monitor, best=4)
    line = results.worse([first, second], monitor=monitor)
    assert bool(line) == told
    assert results.worse([first], monitor=monitor) == ""
    if told:
        assert line == (
            f"phase finetune ends at {monitor} {after:.4f}, worse than phase frozen before it (0.5000): "
            "try a lower lr or more epochs there, or leave it out"
        )
