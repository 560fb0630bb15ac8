"""The packed store gives back what was packed, and notices damage."""

import pickle
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
