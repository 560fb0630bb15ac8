"""Pictures as published become the packed store: nothing is left out unsaid, and only training pictures have copies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import helpers, packing
from pipeline.data.catalog import Item, Pictures
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.parameters import AugmentParams

PX = 8
BROKEN = "bees/03.jpg: truncated JPEG"


def _pictures(*, channels: int = 3, broken: bool = False) -> Pictures:
    """Forty pictures of two classes that the publisher did not split, 12 by 16 pixels."""
    rng = np.random.default_rng(0)
    shape = (12, 16, 3) if channels == 3 else (12, 16)
    pixels = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(40)]

    def load(index: int) -> np.ndarray:
        if broken and index == 3:
            raise UserError(BROKEN)
        return pixels[index]

    items = [Item(f"{index:02d}", index % 2, "") for index in range(40)]
    return Pictures(("ants", "bees"), items, load=load, skipped=("x.txt: no picture",))


def _pack(folder: Path, pictures: Pictures, *, channels: int = 3, **params: Any) -> Store:
    folder.mkdir()
    packing.pack(folder, pictures, dataset="tiny", channels=channels, params=AugmentParams(px=PX, **params))
    return Store(folder)


def test_every_picture_is_in_one_split_at_the_packed_size(tmp_path: Path) -> None:
    store = _pack(tmp_path / "store", _pictures())
    assert store.counts() == {"train": 29, "val": 3, "test": 8}
    assert len({row.key for row in store.rows}) == 40
    assert {min(row.height, row.width) for row in store.rows} == {PX}
    assert store.meta.skipped == ("x.txt: no picture",)
    store.verify()


def test_an_unreadable_picture_stops_it_with_its_name_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        _pack(tmp_path / "store", _pictures(broken=True))
    assert str(error.value) == f"{BROKEN}; remove it, or set augment.skip_unreadable: true"


def test_an_unreadable_picture_is_left_out_and_listed_when_that_is_asked_for(tmp_path: Path) -> None:
    store = _pack(tmp_path / "store", _pictures(broken=True), skip_unreadable=True)
    assert len(store) == 39
    assert "03" not in {row.key for row in store.rows}
    assert store.meta.skipped == ("x.txt: no picture", BROKEN)


def test_copies_are_of_training_pictures_alone_seeded_and_all_different(tmp_path: Path) -> None:
    chosen = {"copies": 2, "transforms": {"gaussian_noise": {"p": 1.0}}}
    store = _pack(tmp_path / "store", _pictures(), **chosen)
    assert store.counts() == {"train": 3 * 29, "val": 3, "test": 8}
    copies = [index for index, row in enumerate(store.rows) if row.copy]
    assert {store.rows[index].split for index in copies} == {"train"}
    assert len({store[index].tobytes() for index in range(len(store))}) == len(store)
    again = _pack(tmp_path / "again", _pictures(), **chosen)
    assert again.meta.sha256 == store.meta.sha256
    other = _pack(tmp_path / "other", _pictures(), **chosen, seed=1)
    assert {other[i].tobytes() for i, row in enumerate(other.rows) if row.copy}.isdisjoint(
        store[index].tobytes() for index in copies
    )


def test_a_copy_keeps_the_class_of_its_picture(tmp_path: Path) -> None:
    store = _pack(tmp_path / "store", _pictures(), copies=1, transforms={"horizontal_flip": {"p": 1.0}})
    for index in np.flatnonzero([row.copy for row in store.rows]):
        original, copy = store.rows[index - 1], store.rows[index]
        assert (copy.key, copy.label, copy.copy) == (original.key, original.label, 1)
        assert np.array_equal(store[index], store[index - 1][:, ::-1])


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_stays_one_channel_where_every_picture_is_grey(tmp_path: Path, channels: int) -> None:
    store = _pack(tmp_path / "store", _pictures(channels=1), channels=channels)
    assert store[0].shape == (8, 11, channels)
    assert np.array_equal(store[0][..., 0], store[0][..., -1])


CHAIN = {"rotate": {}, "gaussian_blur": {"p": 1.0}, "shift": {}, "gaussian_noise": {}}
"""Two transforms that go through albumentations, and two that do not."""


@pytest.mark.parametrize(
    ("num", "ahead", "together", "large"), [(1, 1, 8, 2**20), (2, 1, 1, 2**20), (4, 3, 2, 2**20), (2, 2, 1, 500)]
)
def test_the_number_of_processes_and_the_size_of_tasks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int, ahead: int, together: int, large: int
) -> None:
    chosen = {"copies": 3, "transforms": CHAIN, "skip_unreadable": True}
    whole = _pack(tmp_path / "whole", _pictures(broken=True), **chosen)
    monkeypatch.setattr(helpers, "cores", lambda: num)
    monkeypatch.setattr(helpers, "AHEAD", ahead)
    monkeypatch.setattr(packing, "TOGETHER", together)
    monkeypatch.setattr(packing, "LARGE", large)  # 500 bytes: a picture's copies are made in two tasks or three
    again = _pack(tmp_path / "again", _pictures(broken=True), **chosen)
    assert again.meta.sha256 == whole.meta.sha256
    assert again.meta.skipped == whole.meta.skipped
    assert [row.copy for row in again.rows if row.split == "train"] == [0, 1, 2, 3] * (again.counts()["train"] // 4)


def test_tasks_have_all_pictures_of_the_splits_once_and_are_neither_tiny_nor_huge() -> None:
    split_of = ["train", "", *["val"] * 700, "train"]
    tasks = list(packing._tasks(split_of, copies=2, each=100))
    assert [sum(len(part.versions) for part in task) for task in tasks] == [256, 256, 194]
    made = [(part.item, version) for task in tasks for part in task for version in part.versions]
    assert made == [(0, 0), (0, 1), (0, 2), *((index, 0) for index in range(2, 702)), (702, 0), (702, 1), (702, 2)]
    large = list(packing._tasks(["train"], copies=4, each=packing.LARGE // 2))
    assert large == [[(0, range(2))], [(0, range(2, 4))], [(0, range(4, 5))]]


def test_groups_stay_on_one_side_and_are_noted_with_their_pictures_and_copies(tmp_path: Path) -> None:
    pictures = _pictures()
    items = [item._replace(group=f"animal {index // 4}") for index, item in enumerate(pictures.items)]
    chosen = {"copies": 1, "transforms": {"horizontal_flip": {"p": 1.0}}}
    store = _pack(tmp_path / "store", replace(pictures, items=items), **chosen)
    assert {row.key: row.group for row in store.rows} == {item.key: item.group for item in items}
    for group in {row.group for row in store.rows}:
        assert len({row.split for row in store.rows if row.group == group}) == 1
    assert store.counts() == {"train": 2 * 28, "val": 4, "test": 8}
