"""Time to an accuracy: who reaches it when, and who is not tried again."""

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def accuracy() -> ModuleType:
    return importlib.import_module("accuracy")


def test_the_first_epoch_that_has_it_counts(accuracy: ModuleType) -> None:
    assert accuracy.turn([1.0, 2.0, 3.0], [0.5, 0.9, 0.95], 0.9) == accuracy.Turn(2.0, 0.9, 2, reached=True)


def test_the_whole_training_counts_where_none_has_it(accuracy: ModuleType) -> None:
    assert accuracy.turn([1.0, 2.0], [0.6, 0.5], 0.9) == accuracy.Turn(2.0, 0.6, 2, reached=False)


def test_a_side_that_misses_it_again_and_again_is_not_tried_for_ever(accuracy: ModuleType) -> None:
    late, good = accuracy.Turn(9.0, 0.6, 2, reached=False), accuracy.Turn(4.0, 0.9, 1, reached=True)
    given = iter([late, good, late, good])
    taken = accuracy.Patient(lambda: next(given))
    assert [taken() for _ in range(5)] == [late, good, late, None, None]
    assert next(given) == good


def _compared(accuracy: ModuleType, found: dict[str, list[Any]]) -> Any:
    bench = SimpleNamespace(comparisons=[], missing=[])
    bench.lacks = lambda what, why: bench.missing.append(f"{what}: {why}")
    accuracy._compare(bench, "time to 0.9", found)
    return bench


def test_whoever_is_late_gives_a_lower_bound_and_is_named(accuracy: ModuleType) -> None:
    late, good = accuracy.Turn(9.0, 0.6, 2, reached=False), accuracy.Turn(4.0, 0.9, 1, reached=True)
    bench = _compared(accuracy, {"Thaw": [good] * 3, "A": [late, late, None], "B": [good, late, good], "C": [good] * 3})
    assert [list(row.ratios) for row in bench.comparisons] == [[2.25, 2.25], [1.0, 2.25, 1.0], [1.0] * 3]
    assert [row.notes for row in bench.comparisons] == [
        "A lower bound: they did not reach it in 2 epochs (0.600 at best)",
        "A lower bound: they did not reach it in 2 epochs in 1 of 3 rounds (0.600 at best)",
        "",
    ]


def test_there_is_no_ratio_where_thaw_is_late(accuracy: ModuleType) -> None:
    late, good = accuracy.Turn(9.0, 0.6, 2, reached=False), accuracy.Turn(4.0, 0.9, 1, reached=True)
    bench = _compared(accuracy, {"Thaw": [good, late], "A": [good, good]})
    assert bench.comparisons == []
    assert bench.missing == ["time to 0.9: Thaw did not reach it in 1 of 2 rounds (0.600 at best)"]
