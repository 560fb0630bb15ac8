"""What repeated runs can tell, against scipy's own test."""

import numpy as np
import pytest
from scipy import stats

from pipeline.analysis.seeds import difference, holm, interval, paired, spread


def test_interval_is_welch_s() -> None:
    first, second = [10.0, 11.0, 12.5], [20.0, 20.5, 19.0, 21.0]
    found = difference(first, second, confidence=0.9)
    test = stats.ttest_ind(first, second, equal_var=False)
    expected = test.confidence_interval(0.9)
    assert found.mean == pytest.approx(np.mean(first) - np.mean(second))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.p == pytest.approx(test.pvalue)


@pytest.mark.parametrize("pairs", [2, 3, 10])
def test_paired_interval_and_chance_are_those_of_scipy_s_paired_test(pairs: int) -> None:
    rng = np.random.default_rng(pairs)
    first = rng.normal(10, 3, size=pairs)
    second = first + rng.normal(0.5, 0.4, size=pairs)
    found = paired(first.tolist(), second.tolist(), confidence=0.9)
    test = stats.ttest_rel(first, second)
    expected = test.confidence_interval(0.9)
    assert found.mean == pytest.approx(np.mean(first - second), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.p == pytest.approx(test.pvalue, rel=1e-12)


def test_a_difference_that_every_seed_shows_is_told_by_pairs_alone() -> None:
    without, whole = [10.4, 14.5, 18.6], [10.0, 14.0, 18.0]
    assert difference(without, whole).verdict == "can't tell"
    assert paired(without, whole).verdict == "higher"


def test_interval_on_a_mean_is_scipy_s() -> None:
    values = [3.0, 4.5, 5.0, 9.0]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.8)
    assert interval(values, confidence=0.8) == pytest.approx((expected.low, expected.high), rel=1e-12)


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


def test_runs_that_are_all_alike_differ_for_certain_or_not_at_all() -> None:
    for compare in (difference, paired):
        assert compare([2.0, 2.0], [2.0, 2.0]).p == 1
        assert compare([1.0, 1.0], [2.0, 2.0]).p == 0


def test_equal_groups_are_mistaken_for_different_as_rarely_as_promised() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2000, 2, 3))
    wrong = sum(difference(list(a), list(b)).verdict != "can't tell" for a, b in draws)
    assert wrong / len(draws) <= 0.05


def test_holm_raises_each_chance_by_how_many_are_left() -> None:
    # 4, 3, 2 and 1 times the ordered ones, none below the one before it and none above 1
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def test_with_holm_one_false_alarm_among_many_is_as_rare_as_promised() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2000, 6, 3)).tolist()
    chances = [[paired(one, whole).p for one in without] for whole, *without in draws]
    plain, held = (np.mean([min(kind(row)) < 0.05 for row in chances]) for kind in (list, holm))
    noise = 2 * np.sqrt(0.05 * 0.95 / len(draws))
    assert held <= 0.05 + noise
    assert plain > 0.15


def test_spread_is_the_standard_deviation_between_runs() -> None:
    assert spread([1.0, 2.0, 3.0]) == 1.0
    assert spread([7.0]) == 0.0
