"""Time to an accuracy: who reaches it when, and who is not tried again."""

import importlib
from types import ModuleType

import pytest


@pytest.fixture
def accuracy() -> ModuleType:
    return importlib.import_module("accuracy")


def test_reached_at_the_first_epoch_that_has_it(accuracy: ModuleType) -> None:
    assert accuracy.reached([1.0, 2.0, 3.0], [0.5, 0.9, 0.95], 0.9) == 2.0
    assert accuracy.reached([1.0, 2.0], [0.5, 0.6], 0.9) is None


def test_a_side_that_misses_it_again_and_again_is_not_tried_for_ever(accuracy: ModuleType) -> None:
    given = iter([None, 4.0, None, 5.0])
    taken = accuracy.Patient(lambda: next(given))
    assert [taken() for _ in range(5)] == [None, 4.0, None, None, None]
    assert next(given) == 5.0
