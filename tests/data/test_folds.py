"""Folds are stratified, seeded and disjoint, keep groups whole, and leave the test split and the copies alone."""

from collections import Counter

import numpy as np
import pytest

from pipeline.data import folds
from pipeline.data.store import Row
from pipeline.errors import UserError

LABELS = [0] * 60 + [1] * 30 + [2] * 10


def _row(key: str, split: str, label: int, *, copy: int = 0, group: str = "") -> Row:
    return Row(key, split, label, copy, 8, 8, group)


def test_every_fold_has_every_class_in_proportion() -> None:
    fold_of = folds.assign(LABELS, [""] * 100, folds=5, seed=0)
    assert fold_of.dtype == np.int64
    for fold in range(5):
        inside = [label for label, mine in zip(LABELS, fold_of == fold, strict=True) if mine]
        assert Counter(inside) == {0: 12, 1: 6, 2: 2}


def test_groups_stay_whole_with_classes_as_near_as_they_come() -> None:
    rng = np.random.default_rng(0)
    # Groups of one to five pictures of a class; some pictures are by themselves.
    labels, groups = [], []
    for number in range(150):
        size = int(rng.integers(1, 6))
        labels += [number % 3] * size
        groups += [f"animal {number}" if number % 5 else ""] * size
    fold_of = folds.assign(labels, groups, folds=5, seed=0)
    for group in set(groups) - {""}:
        assert len({int(fold) for fold, mine in zip(fold_of, groups, strict=True) if mine == group}) == 1
    whole = Counter(labels)
    for fold in range(5):
        inside = Counter(label for label, mine in zip(labels, fold_of == fold, strict=True) if mine)
        for label, count in whole.items():
            assert abs(inside[label] - count / 5) <= 3


def test_pictures_without_a_group_do_not_stay_together() -> None:
    groups = ["one", "one", *[""] * 98]
    fold_of = folds.assign(LABELS, groups, folds=5, seed=0)
    assert fold_of[0] == fold_of[1]
    assert Counter(fold_of.tolist()) == dict.fromkeys(range(5), 20)


def test_a_group_named_as_a_picture_is_numbered_does_not_take_it_in() -> None:
    # Were picture 2 taken into the group, class 0 would have three groups for the four folds.
    fold_of = folds.assign([0, 0, 0, 0, 0, 1, 1, 1, 1], ["2", "2", "", "", "", "", "", "", ""], folds=4, seed=0)
    assert len(set(fold_of.tolist())) == 4


def test_the_seed_decides() -> None:
    for groups in ([""] * 100, [f"{index // 2}" for index in range(100)]):
        first, again, other = (folds.assign(LABELS, groups, folds=5, seed=seed).tolist() for seed in (0, 0, 1))
        assert first == again
        assert first != other


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([""] * 8, "class number 1 has 2 pictures for 3 folds, and each needs one; add some, or use fewer folds"),
        (
            ["a", "a", "b", "b", "c", "c", "d", "d"],
            "class number 1 has 1 group of pictures for 3 folds, and each needs one; add some, or use fewer folds",
        ),
    ],
)
def test_a_class_that_is_smaller_than_the_number_of_folds_is_refused(groups: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        folds.assign([0, 0, 0, 0, 0, 0, 1, 1], groups, folds=3, seed=0)
    assert str(error.value) == message


def test_the_test_split_is_in_no_fold_and_copies_follow_their_picture_into_training_alone() -> None:
    rows = []
    for index in range(12):
        split = ("train", "train", "val", "test")[index % 4]
        rows.append(_row(f"{index}", split, index // 4 % 2))
        if split == "train":
            rows += [_row(f"{index}", split, index // 4 % 2, copy=copy) for copy in (1, 2)]
    fold_of = folds.divide(rows, folds=3, seed=0)
    assert sorted(set(fold_of.tolist())) == [0, 1, 2, 3]
    judged: list[str] = []
    for fold in (1, 2, 3):
        splits = folds.splits(rows, fold_of, fold=fold)
        by_split = {s: [row for row, mine in zip(rows, splits, strict=True) if mine == s] for s in set(splits)}
        assert {row.key for row in by_split["test"]} == {"3", "7", "11"}
        assert {row.copy for row in by_split["val"]} == {0}
        held_out = {row.key for row in by_split["val"]}
        judged += held_out
        assert {row.key for row in by_split["train"]}.isdisjoint(held_out)
        assert {row.key for row in by_split.get("", [])} <= held_out
        kept = [row for row in rows if row.split != "test" and row.key not in held_out]
        assert by_split["train"] == kept  # with all their copies
    assert sorted(judged, key=int) == ["0", "1", "2", "4", "5", "6", "8", "9", "10"]


def test_the_groups_of_a_store_are_kept_whole() -> None:
    rows = [_row(f"{index}", "train", index % 2, group=f"animal {index // 4}") for index in range(40)]
    fold_of = folds.divide(rows, folds=5, seed=0)
    assert all(len(set(fold_of[start : start + 4].tolist())) == 1 for start in range(0, 40, 4))
