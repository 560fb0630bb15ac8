"""The packed store gives back what was packed, and notices damage."""

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import store
from pipeline.data.store import Row, Store
from pipeline.errors import UserError

SIZES = [(8, 8), (8, 12), (10, 8)]


def _pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in SIZES]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    rows = [
        Row('ants/a, "b".jpg', "train", 0, 0, *SIZES[0]),
        Row("bees/ü.jpg", "val", 1, 0, *SIZES[1], "patient 7, left"),
        Row("bees/2.jpg", "test", 1, 0, *SIZES[2]),
    ]
    store.write(
        tmp_path,
        zip(rows, _pictures(), strict=True),
        dataset="tiny",
        classes=("ants", "bees"),
        px=8,
        channels=3,
        skipped=["x.gif: not a picture"],
    )
    return tmp_path


def test_pictures_of_different_sizes_come_back_bit_by_bit(packed: Path) -> None:
    opened = Store(packed)
    assert len(opened) == 3
    for index, picture in enumerate(_pictures()):
        assert np.array_equal(opened[index], picture)
    assert opened.rows[0].key == 'ants/a, "b".jpg'
    assert [row.group for row in opened.rows] == ["", "patient 7, left", ""]
    assert (packed / store.MANIFEST).read_text().splitlines()[0] == "key,split,label,copy,height,width,group"
    assert opened.meta.classes == ("ants", "bees")
    assert opened.meta.skipped == ("x.gif: not a picture",)
    assert opened.counts() == {"train": 1, "val": 1, "test": 1}
    assert opened.indices("test").tolist() == [2]
    opened.verify()


def test_a_batch_is_a_copy_where_the_shapes_are_alike_else_views(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shapes in {"alike": [(8, 9)] * 4, "photographs": SIZES}.items():
        folder = tmp_path / name
        folder.mkdir()
        made = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
        rows = (Row(f"{i}", "train", 0, 0, *shape) for i, shape in enumerate(shapes))
        store.write(folder, zip(rows, made, strict=True), dataset="tiny", classes=("a",), px=8, channels=3, skipped=[])
        batch = Store(folder).gather(np.array([2, 0, 2]))
        assert isinstance(batch, np.ndarray) == (name == "alike")
        for index, picture in zip([2, 0, 2], batch, strict=True):
            assert np.array_equal(picture, made[index])


def test_a_store_keeps_no_object_per_picture(tmp_path: Path) -> None:
    """Some 25 bytes of arrays for each of 20,000 pictures; a row of the manifest as a tuple takes 300."""
    rows = ((Row(f"train/{i:06d}.jpg", "train", i % 10, 0, 1, 1), np.zeros((1, 1, 1), np.uint8)) for i in range(20_000))
    store.write(tmp_path, rows, dataset="tiny", classes=tuple("abcdefghij"), px=8, channels=1, skipped=[])
    Store(tmp_path)
    tracemalloc.start()
    opened = Store(tmp_path)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept / len(opened) < 40


def test_a_changed_bit_is_noticed(packed: Path) -> None:
    with (packed / store.PICTURES).open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match="hash has changed"):
        Store(packed).verify()


def test_a_cut_file_is_noticed_at_once(packed: Path) -> None:
    path = packed / store.PICTURES
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="wrong length"):
        Store(packed)


def test_a_missing_store_says_which_stage_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro augment"):
        Store(tmp_path / "nowhere")


def test_a_worker_gets_the_folder_and_not_the_pictures(packed: Path) -> None:
    opened = Store(packed)
    sent = pickle.dumps(opened)
    assert len(sent) < 500
    assert np.array_equal(pickle.loads(sent)[2], opened[2])
