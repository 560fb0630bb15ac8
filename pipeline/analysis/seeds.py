"""What repeated runs can tell: better, worse, or can't tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Literal

Verdict = Literal["higher", "lower", "can't tell"]


@dataclass(frozen=True)
class Difference:
    """Mean of one group of runs less the mean of another, with a confidence interval."""

    mean: float
    low: float
    high: float
    p: float
    """Chance of a difference as large or larger, to either side, where there is none."""

    @property
    def verdict(self) -> Verdict:
        """Whether the first group's mean is higher or lower, or whether the interval holds zero."""
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "can't tell"


def spread(values: Sequence[float]) -> float:
    """Standard deviation between runs; 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval on the mean of at least two runs (Student 1908)."""
    found = _from_zero(values, confidence=confidence)
    return found.low, found.high


def difference(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> Difference:
    """Welch's interval on the difference of two means (Welch 1947), for at least two runs each.

    With three seeds a side it is wide, as it should be: three runs do not tell much of a spread.
    """
    assert len(first) > 1
    assert len(second) > 1
    mean = fmean(first) - fmean(second)
    parts = [variance(group) / len(group) for group in (first, second)]
    if not sum(parts):
        return _difference(mean, error=0.0, freedom=1.0, confidence=confidence)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(group) - 1) for part, group in zip(parts, (first, second), strict=True)
    )
    return _difference(mean, error=math.sqrt(sum(parts)), freedom=freedom, confidence=confidence)


def paired(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> Difference:
    """Student's interval on the mean difference of at least two pairs of runs (Student 1908).

    What the two of a pair share (their seed, and so the order of pictures and the first weights) drops out: the more
    of the spread between runs it makes, the narrower this interval is against that of `difference`. Pairs that all
    differ by the same give one of no width.

    Args:
        first: a value per pair.
        second: the other value of each pair, in the same order.
    """
    return _from_zero([one - other for one, other in zip(first, second, strict=True)], confidence=confidence)


def holm(chances: Sequence[float]) -> list[float]:
    """p-values raised for their number, in their order (Holm 1979, A simple sequentially rejective multiple test).

    To take for real what is below 0.05 here is to be mistaken in any of them with a chance of 5 % at most, whatever
    they have to do with one another.
    """
    raised = [0.0] * len(chances)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        least = max(least, min(1.0, (len(chances) - rank) * chances[index]))
        raised[index] = least
    return raised


def _from_zero(values: Sequence[float], *, confidence: float) -> Difference:
    assert len(values) > 1
    error = stdev(values) / math.sqrt(len(values))
    return _difference(fmean(values), error=error, freedom=len(values) - 1, confidence=confidence)


def _difference(mean: float, *, error: float, freedom: float, confidence: float) -> Difference:
    if not error:
        return Difference(mean, mean, mean, 0.0 if mean else 1.0)
    from scipy.stats import t

    reach = float(t.ppf(0.5 + confidence / 2, freedom)) * error
    return Difference(mean, mean - reach, mean + reach, 2 * float(t.sf(abs(mean) / error, freedom)))
