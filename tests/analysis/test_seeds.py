"""What repeated runs can tell, against scipy's own test."""

import numpy as np
import pytest
from scipy import stats

from pipeline.analysis.seeds import difference, spread


def test_interval_is_welch_s() -> None:
    first, second = [10.0, 11.0, 12.5], [20.0, 20.5, 19.0, 21.0]
    found = difference(first, second, confidence=0.9)
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.9)
    assert found.mean == pytest.approx(np.mean(first) - np.mean(second))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([1.0, 1.1, 1.2], [5.0, 5.1, 5.2], "lower"),
        ([5.0, 5.1, 5.2], [1.0, 1.1, 1.2], "higher"),
        ([1.0, 4.0, 6.0], [2.0, 5.0, 7.5], "can't tell"),
        ([2.0, 2.0], [2.0, 2.0], "can't tell"),
        ([1.0, 1.0], [2.0, 2.0], "lower"),
    ],
)
def test_verdict_holds_back_over_zero(first: list[float], second: list[float], verdict: str) -> None:
    assert difference(first, second).verdict == verdict


def test_equal_groups_are_mistaken_for_different_as_rarely_as_promised() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2000, 2, 3))
    wrong = sum(difference(list(a), list(b)).verdict != "can't tell" for a, b in draws)
    assert wrong / len(draws) <= 0.05


def test_spread_is_the_standard_deviation_between_runs() -> None:
    assert spread([1.0, 2.0, 3.0]) == 1.0
    assert spread([7.0]) == 0.0
