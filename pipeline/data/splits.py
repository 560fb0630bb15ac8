"""Which picture is for training, validation and test: stratified, seeded, and never against the publisher's split.

Pictures of one group (a patient, an animal, a burst) resemble one another, so a group that lies on both sides of a
split makes the figures better than they will be on new pictures: a split takes whole groups.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np

from pipeline.errors import UserError
from pipeline.outbox import warn

SPLITS = ("train", "val", "test")

Draw = Callable[[np.ndarray, int], np.ndarray]
"""draw(candidates, size): about so many of them, sorted; both are numbers of pictures."""


def assign(
    labels: Sequence[int],
    published: Sequence[str],
    *,
    train_size: int | Literal["all"],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    groups: Sequence[str] = (),
) -> list[str]:
    """Gives each picture "train", "val", "test", or "" for left out.

    What the publisher split stays split. A missing test split is carved first, then validation, then the training
    subset, each with every class in proportion, so that a larger subset contains a smaller one's test pictures. With
    groups, each split is as near to its size and to the classes' proportions as whole groups come.

    Args:
        labels: class number of each picture.
        published: the publisher's split of each picture; "" where there is none.
        groups: group of each picture, "" for a group of its own; empty where there are none.

    Raises:
        UserError: too few pictures of a class, `train_size` above what is left, or every group is larger than what is
            to be carved.
    """
    label_of = np.asarray(labels)
    split_of = np.asarray(published, dtype=object)
    split_of[split_of == ""] = "pool"
    split_of[split_of == "train"] = "pool"
    rng = np.random.default_rng(seed)
    draw: Draw = partial(_draw, label_of=label_of, rng=rng)
    if any(groups):
        _warn_of_torn(groups, published)
        draw = partial(_draw_groups, label_of=label_of, groups=groups, rng=rng)

    def pool() -> np.ndarray:
        return np.flatnonzero(split_of == "pool")

    if not (split_of == "test").any():
        split_of[_carved(draw, pool(), round(test_fraction * len(pool())), parameter="test_fraction")] = "test"
    if not (split_of == "val").any():
        of = len(pool()) if train_size == "all" else min(train_size, len(pool()))
        split_of[_carved(draw, pool(), max(1, round(val_fraction * of)), parameter="val_fraction")] = "val"
    rest = pool()
    if train_size != "all" and train_size > len(rest):
        raise UserError(
            f"augment.train_size {train_size}: only {len(rest)} pictures are left after validation and test; "
            "lower it, or set it to all"
        )
    split_of[draw(rest, len(rest) if train_size == "all" else train_size)] = "train"
    split_of[split_of == "pool"] = ""

    for number in np.unique(label_of):
        if not ((label_of == number) & (split_of == "train")).any():
            raise UserError(
                f"class number {number} has no training picture left; add some, or raise augment.train_size"
            )
    return [str(split) for split in split_of]


def _warn_of_torn(groups: Sequence[str], published: Sequence[str]) -> None:
    """A published split is never changed, so that figures can be compared with others'."""
    splits = defaultdict(set)
    for group, split in zip(groups, published, strict=True):
        if group and split:
            splits[group].add(split)
    torn = [group for group, seen in splits.items() if len(seen) > 1]
    if torn:
        warn(
            f"{len(torn)} of {len(splits)} groups lie in more than one published split, the first {torn[0]}; the split "
            "stays as published, and figures on it are better than they would be on new groups"
        )


def _carved(draw: Draw, candidates: np.ndarray, size: int, *, parameter: str) -> np.ndarray:
    drawn = draw(candidates, size)
    if size and not len(drawn):
        raise UserError(
            f"asks for {size} of {len(candidates)} pictures, and the smallest group is too large for that; raise it",
            parameter=f"augment.{parameter}",
        )
    return drawn


def _quota(candidates: np.ndarray, size: int, label_of: np.ndarray) -> dict[int, int]:
    """How many of each class are drawn: in proportion; largest remainders decide who rounds up."""
    numbers, counts = np.unique(label_of[candidates], return_counts=True)
    exact = counts * (size / max(1, counts.sum()))
    quota = np.floor(exact).astype(int)
    short = size - quota.sum()
    quota[np.argsort(-(exact - quota), kind="stable")[:short]] += 1
    return dict(zip(numbers.tolist(), quota.tolist(), strict=True))


def _draw(candidates: np.ndarray, size: int, *, label_of: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`size` of the candidates, each class in proportion."""
    drawn = [
        rng.permutation(candidates[label_of[candidates] == number])[:take]
        for number, take in _quota(candidates, size, label_of).items()
    ]
    return np.sort(np.concatenate(drawn)) if drawn else candidates[:0]


def _draw_groups(
    candidates: np.ndarray, size: int, *, label_of: np.ndarray, groups: Sequence[str], rng: np.random.Generator
) -> np.ndarray:
    """Whole groups of the candidates: each that brings the classes' numbers nearer to what they should be.

    They are tried in random order: by size, the largest would always be drawn. Nearer is by the sum of squares over
    the classes; a second round, which counts the number of all pictures as a class more, fills up what groups of
    several classes or large groups of a rare one leave open.
    """
    short = Counter(_quota(candidates, size, label_of))
    left = size
    members: dict[str | int, list[int]] = defaultdict(list)
    for index in candidates.tolist():
        members[groups[index] or index].append(index)
    waiting = list(members.values())
    waiting = [waiting[place] for place in rng.permutation(len(waiting))]
    drawn: list[int] = []
    for fills_up in (False, True):
        passed = []
        for group in waiting:
            counts = Counter(label_of[group].tolist())
            gain = sum(count * (2 * short[number] - count) for number, count in counts.items())
            gain += len(group) * (2 * left - len(group)) if fills_up else 0
            if gain > 0:
                drawn += group
                short.subtract(counts)
                left -= len(group)
            else:
                passed.append(group)
        waiting = passed
    return np.array(sorted(drawn), dtype=candidates.dtype)
