"""Splits are stratified, seeded, disjoint, never against the publisher's, and tear no group apart."""

import hashlib
from collections import Counter, defaultdict

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


SIZE = 700


def _labels() -> list[int]:
    """Of 700 pictures in five classes, from common to rare."""
    labels: list[int] = np.random.default_rng(7).choice(5, SIZE, p=[0.4, 0.3, 0.15, 0.1, 0.05]).tolist()
    return labels


def _bursts(labels: list[int]) -> list[str]:
    """Groups of up to six pictures of one class; every seventh picture is by itself."""
    seen: Counter[int] = Counter()
    groups = []
    for index, label in enumerate(labels):
        seen[label] += 1
        groups.append("" if index % 7 == 0 else f"{label}-{seen[label] // 6}")
    return groups


def _sides(groups: list[str], split: list[str]) -> dict[str, set[str]]:
    sides = defaultdict(set)
    for group, side in zip(groups, split, strict=True):
        if group:
            sides[group].add(side)
    return sides


@pytest.mark.parametrize(
    ("published", "params", "digest"),
    [
        ([""] * SIZE, {}, "dee0648236c86e0ff456f35a2441c0e46e3784fc299cca22647ed850b93e6f31"),
        (
            ["train"] * 600 + ["test"] * 100,
            {"train_size": 123, "val_fraction": 0.13, "seed": 3},
            "2bb0e470097a5b78159d9fa13b0a91738af6c12820fa13c4e43120f6c5fcd7f7",
        ),
    ],
)
def test_without_groups_a_split_is_what_it_always_was(
    published: list[str], params: dict[str, object], digest: str
) -> None:
    for groups in ([], [""] * SIZE):
        split = _assign(_labels(), published, groups=groups, **params)
        assert hashlib.sha256("\n".join(split).encode()).hexdigest() == digest


@pytest.mark.parametrize("train_size", ["all", 200])
def test_no_group_is_torn_and_the_sizes_and_classes_are_as_near_as_groups_come(train_size: object) -> None:
    labels = _labels()
    groups = _bursts(labels)
    split = _assign(labels, [""] * SIZE, groups=groups, train_size=train_size)
    assert all(len(sides) == 1 for sides in _sides(groups, split).values())
    # Fractions of 0.2 and, of what is left or of 200, 0.1. With single pictures at hand every class comes out exactly.
    wanted = {"test": 140, "val": 56 if train_size == "all" else 20}
    for side, size in wanted.items():
        drawn = Counter(label for label, s in zip(labels, split, strict=True) if s == side)
        assert abs(drawn.total() - size) <= 3
        for label, count in Counter(labels).items():
            assert abs(drawn[label] - size * count / SIZE) <= 3, (side, label)
    if train_size == 200:
        assert abs(split.count("train") - 200) <= 3


def test_patients_with_pictures_of_several_classes_stay_whole() -> None:
    labels = [0, 0, 0, 1] * 50
    groups = [f"patient {index // 4}" for index in range(200)]
    split = _assign(labels, [""] * 200, groups=groups)
    assert Counter(split) == {"test": 40, "val": 16, "train": 144}
    assert all(len(sides) == 1 for sides in _sides(groups, split).values())


def test_groups_larger_than_their_classs_share_fill_a_split_up_to_its_size() -> None:
    # 20 classes of five groups of five: validation's 40 pictures are two of each class.
    labels = [index // 25 for index in range(500)]
    groups = [f"{index // 5}" for index in range(500)]
    assert Counter(_assign(labels, [""] * 500, groups=groups)) == {"test": 100, "val": 40, "train": 360}


def test_groups_of_one_picture_each_give_the_sizes_of_a_split_without_groups() -> None:
    labels = _labels()
    alone = _assign(labels, [""] * SIZE)
    groups = _assign(labels, [""] * SIZE, groups=[f"{index}" for index in range(SIZE)])
    assert Counter(zip(labels, groups, strict=True)) == Counter(zip(labels, alone, strict=True))


def test_the_seed_decides_about_groups_too() -> None:
    labels = _labels()
    first, again, other = (_assign(labels, [""] * SIZE, groups=_bursts(labels), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_groups_that_are_all_too_large_are_refused_with_the_parameter_to_raise() -> None:
    groups = [f"{index // 100}" for index in range(300)]
    with pytest.raises(UserError, match="asks for 30 of 300 pictures, and the smallest group is too large") as error:
        _assign([0, 1] * 150, [""] * 300, groups=groups, test_fraction=0.1)
    assert error.value.parameter == "augment.test_fraction"


def test_a_published_split_that_tears_groups_stays_and_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    published = ["train"] * 100 + ["test"] * 20
    groups = ["torn" if index in (0, 110) else f"{index // 2}" for index in range(120)]
    groups[39] = groups[119] = ""  # each a group of its own, which nothing can tear
    split = _assign([0, 1] * 60, published, groups=groups)
    assert set(split[100:]) == {"test"}
    assert "test" not in split[:100]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "WARNING: 1 of 61 groups lie in more than one published split, the first torn; the split stays as published, "
        "and figures on it are better than they would be on new groups"
    )
