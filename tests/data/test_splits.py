"""Splits are stratified, seeded, disjoint, and never against the publisher's."""

from collections import Counter

import numpy as np
import pytest

from pipeline.data import splits
from pipeline.errors import UserError

DEFAULTS = {"train_size": "all", "val_fraction": 0.1, "test_fraction": 0.2, "seed": 0}


def _assign(labels: list[int], published: list[str], **changed: object) -> list[str]:
    return splits.assign(labels, published, **{**DEFAULTS, **changed})  # type: ignore[arg-type]


def test_a_flat_dataset_is_split_three_ways_with_every_class_in_proportion() -> None:
    labels = [0] * 600 + [1] * 300 + [2] * 100
    split = _assign(labels, [""] * 1000)
    assert Counter(split) == {"train": 720, "test": 200, "val": 80}
    for name, size in (("test", 200), ("val", 80), ("train", 720)):
        per_class = Counter(label for label, s in zip(labels, split, strict=True) if s == name)
        assert per_class == {0: size * 6 // 10, 1: size * 3 // 10, 2: size // 10}


def test_the_publishers_split_stays() -> None:
    published = ["train"] * 80 + ["val"] * 10 + ["test"] * 10
    assert _assign([0, 1] * 50, published) == published


def test_validation_is_carved_from_train_where_only_test_is_published() -> None:
    published = ["train"] * 100 + ["test"] * 20
    split = _assign([0, 1] * 60, published)
    assert Counter(split[:100]) == {"train": 90, "val": 10}
    assert set(split[100:]) == {"test"}


def test_a_subset_does_not_count_validation_and_leaves_the_rest_out() -> None:
    split = _assign([0, 1] * 500, ["train"] * 900 + ["test"] * 100, train_size=200)
    assert Counter(split) == {"train": 200, "val": 20, "test": 100, "": 680}


def test_the_seed_decides() -> None:
    labels = list(np.random.default_rng(1).integers(0, 3, 300))
    assert _assign(labels, [""] * 300) == _assign(labels, [""] * 300)
    assert _assign(labels, [""] * 300) != _assign(labels, [""] * 300, seed=1)


def test_a_subset_of_another_size_keeps_the_test_split() -> None:
    labels = [0, 1] * 500
    small, large = (_assign(labels, [""] * 1000, train_size=size) for size in (100, 400))
    assert [s == "test" for s in small] == [s == "test" for s in large]


def test_too_large_a_subset_is_refused_with_the_number_left() -> None:
    with pytest.raises(UserError, match="only 80 pictures are left"):
        _assign([0, 1] * 50, ["train"] * 90 + ["test"] * 10, train_size=85, val_fraction=0.12)


def test_a_class_without_a_training_picture_is_refused() -> None:
    with pytest.raises(UserError, match="class number 1 has no training picture"):
        _assign([0] * 50 + [1], [""] * 51, train_size=5)
