import gzip
import hashlib
import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import catalog
from pipeline.data.catalog import DATASETS, Item, Pictures
from pipeline.data.sources import File, Installed
from pipeline.errors import UserError


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def fetch(name: str, raw: Path, *, path: Path = Path("nowhere")) -> list[str]:
    lines: list[str] = []
    catalog.get(name).fetch(raw, path=path, state=raw.parent, log=lines.append)
    return lines


def paint(folder: Path, *names: str) -> Path:
    """Pictures of one colour each, that of their place in the list."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (number, 0, 0)).save(folder / name)
    return folder


def opened(folder: Path, raw: Path) -> Pictures:
    fetch("image_folder", raw, path=folder)
    return catalog.get("image_folder").open(raw)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no dataset 'fashion-mnist'; did you mean fashion_mnist"):
        catalog.get("fashion-mnist")


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_says_what_it_is(name: str) -> None:
    dataset = catalog.get(name)
    assert dataset.description
    assert dataset.licence
    assert len(dataset.classes) == (0 if name == "image_folder" else 10)
    assert len(set(dataset.classes)) == len(dataset.classes)


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def test_mnist_and_its_kin_are_opened(raw: Path) -> None:
    pixels = np.arange(5 * 28 * 28).astype(np.uint8).reshape(5, 28, 28)
    for prefix, part, labels in (("train", pixels[:3], [3, 0, 9]), ("t10k", pixels[3:], [1, 1])):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(part))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.array(labels, np.uint8)))
    for name in ("mnist", "fashion_mnist"):
        pictures = catalog.get(name).open(raw)
        assert pictures.classes == catalog.get(name).classes
        assert pictures.skipped == ()
        assert pictures.items == [
            Item("train/00000", 3, "train"),
            Item("train/00001", 0, "train"),
            Item("train/00002", 9, "train"),
            Item("test/00000", 1, "test"),
            Item("test/00001", 1, "test"),
        ]
        for index in range(5):
            np.testing.assert_array_equal(pictures.load(index), pixels[index])
        assert pictures.load(0).flags.writeable


@pytest.mark.parametrize(("labels", "message"), [([1, 2], "2 labels for 3 pictures"), ([1, 2, 10], "run to 10 where")])
def test_labels_that_do_not_fit_are_refused(raw: Path, labels: list[int], message: str) -> None:
    (raw / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 28, 28), np.uint8)))
    (raw / "train-labels-idx1-ubyte").write_bytes(idx(np.array(labels, np.uint8)))
    with pytest.raises(UserError, match=message):
        catalog.get("mnist").open(raw)


def test_published_files_are_kept_decompressed_whoever_compressed_them(tmp_path: Path, raw: Path) -> None:
    content = b"pixels" * 100
    file = File("a.gz", kept="a", content=f"sha256:{hashlib.sha256(content).hexdigest()}")
    for level in (1, 9):
        mirror = tmp_path / str(level)
        mirror.mkdir()
        (mirror / "a.gz").write_bytes(gzip.compress(content, level))
        published = catalog._Published("x", files=(file,), sources=(Installed("pkg", mirror),))
        published(raw, path=tmp_path, state=tmp_path, log=print)
        assert (raw / "a").read_bytes() == content
        (raw / "a").unlink()


def test_digits_are_the_same_bytes_each_time_and_fill_the_grey_range(raw: Path) -> None:
    fetch("digits", raw)
    first = (raw / "digits.npz").read_bytes()
    fetch("digits", raw)
    assert (raw / "digits.npz").read_bytes() == first
    pictures = catalog.get("digits").open(raw)
    assert len(pictures.items) == 1797
    assert pictures.items[1796] == Item("01796", 8, "")
    np.testing.assert_array_equal(pictures.load(0)[0], [0, 0, 80, 207, 143, 16, 0, 0])  # published: 0 0 5 13 9 1 0 0
    assert max(pictures.load(index).max() for index in range(50)) == 255


def test_damaged_digits_are_refused(raw: Path) -> None:
    for data in (b"", b"PK\3\4 nonsense"):
        (raw / "digits.npz").write_bytes(data)
        with pytest.raises(UserError, match=r"digits\.npz: .*; delete"):
            catalog.get("digits").open(raw)


def test_a_flat_folder_is_not_split(tmp_path: Path, raw: Path) -> None:
    pictures = opened(paint(tmp_path / "p", "bees/2.png", "ants/deep/1.PNG", "ants/3.jpg"), raw)
    assert pictures.classes == ("ants", "bees")
    assert pictures.items == [Item("ants/3.jpg", 0, ""), Item("ants/deep/1.PNG", 0, ""), Item("bees/2.png", 1, "")]
    np.testing.assert_array_equal(pictures.load(2), np.zeros((4, 6, 3), np.uint8))


def test_all_three_splits_are_kept(tmp_path: Path, raw: Path) -> None:
    names = [f"{split}/{label}/1.png" for split in ("train", "val", "test") for label in "ab"]
    pictures = opened(paint(tmp_path / "p", *names), raw)
    assert Counter(item.split for item in pictures.items) == {"train": 2, "val": 2, "test": 2}
    assert {item.key: item.split for item in pictures.items} == {name: name.split("/")[0] for name in names}


def test_val_beside_train_alone_is_the_test_split(tmp_path: Path, raw: Path) -> None:
    folder = paint(tmp_path / "p", "train/a/1.png", "train/b/1.png", "val/b/1.png")
    (folder / "test").mkdir()
    assert opened(folder, raw).items[-1] == Item("val/b/1.png", 1, "test")


def test_a_class_may_be_called_train(tmp_path: Path, raw: Path) -> None:
    pictures = opened(paint(tmp_path / "p", "train/1.png", "plane/1.png"), raw)
    assert pictures.items == [Item("plane/1.png", 0, ""), Item("train/1.png", 1, "")]


def test_what_is_no_picture_is_left_out_loudly(tmp_path: Path, raw: Path) -> None:
    folder = paint(tmp_path / "p", "a/1.png", "b/1.png", "b/2.gif", "loose.png", ".hidden/1.png", "a/.2.png")
    for name in ("README.txt", "a/notes.txt", "b/new\nline.png"):
        (folder / name).write_bytes(b"")
    (folder / "a" / "broken.png").symlink_to("nothing.png")
    (folder / "a" / "round").symlink_to(folder)
    (line,) = fetch("image_folder", raw, path=folder)
    pictures = catalog.get("image_folder").open(raw)
    assert [item.key for item in pictures.items] == ["a/1.png", "b/1.png"]
    assert [line.split(": ")[0] for line in pictures.skipped] == [
        "'b/new\\nline.png'",
        "a/broken.png",
        "a/notes.txt",
        "a/round",
        "b/2.gif",
        "loose.png",
    ]
    assert line.startswith("SKIPPED 6 of 8 files: ")
    assert line.endswith(" and 1 more")
    assert "b/2.gif: not of a picture format that is read" in line
    files = sorted(path.relative_to(raw).as_posix() for path in raw.rglob("*") if path.is_file())
    assert files == ["a/1.png", "b/1.png", "skipped.txt"]


def test_links_are_copied_as_what_they_lead_to(tmp_path: Path, raw: Path) -> None:
    elsewhere = paint(tmp_path / "elsewhere", "1.png", "2.png")
    folder = tmp_path / "p"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.png").symlink_to(elsewhere / "1.png")
    (folder / "b").symlink_to(elsewhere)
    assert [item.key for item in opened(folder, raw).items] == ["a/1.png", "b/1.png", "b/2.png"]
    assert not any(path.is_symlink() for path in raw.rglob("*"))
    assert (raw / "a" / "1.png").read_bytes() == (elsewhere / "1.png").read_bytes()


def test_the_copy_leaves_the_users_folder_alone_and_can_be_deleted(tmp_path: Path, raw: Path) -> None:
    folder = paint(tmp_path / "p", "a/1.png", "b/1.png")
    (folder / "a" / "1.png").chmod(0o444)
    opened(folder, raw)
    assert os.access(raw / "a" / "1.png", os.W_OK)
    assert sorted(path.name for path in folder.rglob("*")) == ["1.png", "1.png", "a", "b"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"p: no class folders; put a folder of pictures per class there or set data\.path"),
        (["loose.png"], "p: no class folders"),
        (["a/1.png"], "p: one class only, a"),
        (["train/a/1.png"], "p/train: one class only, a"),
        (["a/1.png", "b/1.gif"], "p/b: no pictures"),
        (["train/a/1.gif", "train/b/1.gif", "val/a/1.png"], "p/train/a: no pictures"),
        (
            ["train/ants/1.png", "train/bees/1.png", "test/ant/1.png"],
            "p/test/ant: no such class in train/; did you mean ants",
        ),
        (
            ["train/a/1.png", "train/b/1.png", "vall/a/1.png"],
            "p/vall: stands beside train/ but is no split; did you mean val",
        ),
        (["val/a/1.png", "val/b/1.png"], "p: has val/ of class folders but no train/"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, raw: Path, names: list[str], message: str) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "README.txt").write_text("put class folders here")
    with pytest.raises(UserError, match=message) as caught:
        fetch("image_folder", raw, path=paint(folder, *names))
    assert "\n" not in str(caught.value)
    assert not list(raw.iterdir())


def test_a_missing_folder_and_one_around_the_copy_are_refused(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(UserError, match=r"none: no such folder; put class folders there or set data\.path"):
        fetch("image_folder", raw, path=tmp_path / "none")
    with pytest.raises(UserError, match="holds the pipeline's own data"):
        fetch("image_folder", raw, path=tmp_path)


def grouped(folder: Path, table: str) -> Path:
    paint(folder, "ants/1.png", "ants/2.png", "bees/3.png", "bees/4.gif")
    (folder / "groups.csv").write_text(table, encoding="utf-8")
    return folder


def test_pictures_are_in_the_groups_that_the_table_says(tmp_path: Path, raw: Path) -> None:
    # As a spreadsheet writes it: a byte order mark, and rows in an order of its own; what is left out may stand there.
    table = "\ufefffile,group\r\nbees/3.png,\r\nants/2.png, patient 7 \r\nants/1.png,patient 7\r\nbees/4.gif,x\r\n"
    pictures = opened(grouped(tmp_path / "p", table), raw)
    assert {item.key: item.group for item in pictures.items} == {
        "ants/1.png": "patient 7",
        "ants/2.png": "patient 7",
        "bees/3.png": "",
    }
    assert (raw / "groups.csv").read_bytes() == table.encode()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "groups.csv:1: the header is ''; it must be file,group"),
        ("file;group\n", "groups.csv:1: the header is 'file;group'; it must be file,group"),
        ("file,group\nants/1.png\n", "groups.csv:2: 1 columns; it must be two, file,group"),
        (
            "file,group\nants/1.png,a\nbees/5.png,a\n",
            "groups.csv:3: bees/5.png: no such picture in {p}; did you mean bees/3.png or ants/2.png or ants/1.png?",
        ),
        (
            "file,group\nants/1.png,a\nants/2.png,a\nants/1.png,b\n",
            "groups.csv:4: ants/1.png stands there twice; keep one row",
        ),
        ("file,group\nants/2.png,a\n", "groups.csv: 2 pictures are not in it, the first ants/1.png; give each a row"),
    ],
)
def test_a_table_of_groups_that_does_not_fit_the_pictures_is_refused(
    tmp_path: Path, raw: Path, table: str, message: str
) -> None:
    folder = grouped(tmp_path / "p", table)
    with pytest.raises(UserError) as caught:
        fetch("image_folder", raw, path=folder)
    assert str(caught.value) == f"{folder}/{message.format(p=folder)}"
    assert not list(raw.iterdir())


def test_a_table_of_groups_in_another_encoding_is_refused(tmp_path: Path, raw: Path) -> None:
    folder = grouped(tmp_path / "p", "")
    (folder / "groups.csv").write_bytes("file,group\nants/1.png,Jörg\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"groups\.csv: cannot be read as a table in UTF-8: "):
        fetch("image_folder", raw, path=folder)
