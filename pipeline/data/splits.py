"""Which picture is for training, validation and test: stratified, seeded, and never against the publisher's split."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pipeline.errors import UserError

SPLITS = ("train", "val", "test")


def assign(
    labels: Sequence[int],
    published: Sequence[str],
    *,
    train_size: int | Literal["all"],
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> list[str]:
    """Gives each picture "train", "val", "test", or "" for left out.

    What the publisher split stays split. A missing test split is carved first, then validation, then the training
    subset, each with every class in proportion, so that a larger subset contains a smaller one's test pictures.

    Args:
        labels: class number of each picture.
        published: the publisher's split of each picture; "" where there is none.

    Raises:
        UserError: too few pictures of a class, or `train_size` above what is left.
    """
    label_of = np.asarray(labels)
    split_of = np.asarray(published, dtype=object)
    split_of[split_of == ""] = "pool"
    split_of[split_of == "train"] = "pool"
    rng = np.random.default_rng(seed)

    def pool() -> np.ndarray:
        return np.flatnonzero(split_of == "pool")

    if not (split_of == "test").any():
        split_of[_draw(pool(), label_of, round(test_fraction * len(pool())), rng)] = "test"
    if not (split_of == "val").any():
        of = len(pool()) if train_size == "all" else min(train_size, len(pool()))
        split_of[_draw(pool(), label_of, max(1, round(val_fraction * of)), rng)] = "val"
    rest = pool()
    if train_size != "all" and train_size > len(rest):
        raise UserError(
            f"augment.train_size {train_size}: only {len(rest)} pictures are left after validation and test; "
            "lower it, or set it to all"
        )
    split_of[_draw(rest, label_of, len(rest) if train_size == "all" else train_size, rng)] = "train"
    split_of[split_of == "pool"] = ""

    for number in np.unique(label_of):
        if not ((label_of == number) & (split_of == "train")).any():
            raise UserError(
                f"class number {number} has no training picture left; add some, or raise augment.train_size"
            )
    return [str(split) for split in split_of]


def _draw(candidates: np.ndarray, label_of: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` of the candidates, each class in proportion; largest remainders decide who rounds up."""
    numbers, counts = np.unique(label_of[candidates], return_counts=True)
    exact = counts * (size / max(1, counts.sum()))
    quota = np.floor(exact).astype(int)
    short = size - quota.sum()
    quota[np.argsort(-(exact - quota), kind="stable")[:short]] += 1
    drawn = [
        rng.permutation(candidates[label_of[candidates] == number])[:take]
        for number, take in zip(numbers, quota, strict=True)
    ]
    return np.sort(np.concatenate(drawn)) if drawn else candidates[:0]
