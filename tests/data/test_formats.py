import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.formats import read_cifar10, read_idx
from pipeline.errors import UserError

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def idx(values: np.ndarray, *, magic: bytes = b"\0\0\x08") -> bytes:
    return magic + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def pickled_by_python2(value: object) -> bytes:
    """The opcodes that CIFAR-10's pickles are made of: protocol 2, byte strings, numpy 1 arrays."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(pickled_by_python2, value)) + b"t"
        case list():
            return b"](" + b"".join(map(pickled_by_python2, value)) + b"e"
        case dict():
            return b"}(" + b"".join(pickled_by_python2(part) for pair in value.items() for part in pair) + b"u"
        case np.ndarray():
            ndarray = b"(cnumpy\nndarray\n" + pickled_by_python2((0,)) + pickled_by_python2(b"b") + b"t"
            kind = b"cnumpy\ndtype\n" + pickled_by_python2((b"u1", 0, 1)) + b"R"
            kind += pickled_by_python2((3, b"|", None, None, None, -1, -1, 0)) + b"b"
            state = b"(" + pickled_by_python2(1) + pickled_by_python2(value.shape) + kind
            state += pickled_by_python2(False) + pickled_by_python2(value.tobytes()) + b"t"
            return b"cnumpy.core.multiarray\n_reconstruct\n" + ndarray + b"R" + state + b"b"
    raise AssertionError(value)


def batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), 3072)
    return b"\x80\x02" + pickled_by_python2({b"batch_label": b"one", b"labels": labels, b"data": planes}) + b"."


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def batches(pixels: np.ndarray) -> dict[str, bytes]:
    return {
        name: batch(pixels[2 * number : 2 * number + 2], [number, 9 - number]) for number, name in enumerate(BATCHES)
    }


def test_idx_files_keep_shape_and_order(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "images").write_bytes(idx(values))
    np.testing.assert_array_equal(read_idx(tmp_path / "images", ndim=3), values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (idx(np.zeros((2, 3), np.uint8), magic=b"\0\0\x0d"), "not an IDX file of bytes in 2 dimensions"),
        (idx(np.zeros(6, np.uint8)), "not an IDX file of bytes in 2 dimensions"),
        (idx(np.zeros((2, 3), np.uint8))[:10], "not an IDX file of bytes in 2 dimensions"),
        (b"", "not an IDX file of bytes in 2 dimensions"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "holds 5 bytes where its header says 6"),
        (idx(np.zeros((2, 3), np.uint8)) + b"\0", "holds 7 bytes where its header says 6"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "labels").write_bytes(data)
    with pytest.raises(UserError, match=f"labels: {message}; delete"):
        read_idx(tmp_path / "labels", ndim=2)


def test_cifar10_is_read_as_published(tmp_path: Path, pixels: np.ndarray, batches: dict[str, bytes]) -> None:
    shuffled = {name: batches[name] for name in sorted(batches, reverse=True)} | {"batches.meta": b"not read"}
    found, labels, train = read_cifar10(archive(tmp_path / "c.tar.gz", shuffled))
    np.testing.assert_array_equal(found, pixels)
    assert labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 5, 4]
    assert train == 10


def test_a_pickle_may_name_nothing_but_arrays(tmp_path: Path, batches: dict[str, bytes]) -> None:
    class Run:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    batches["test_batch"] = pickle.dumps(Run(), protocol=2)
    with pytest.raises(UserError, match=r"c\.tar\.gz: posix\.mkdir is not part of an array; delete"):
        read_cifar10(archive(tmp_path / "c.tar.gz", batches))
    assert not (tmp_path / "ran").exists()


def test_a_batch_that_is_missing_short_or_a_link_is_refused(tmp_path: Path, batches: dict[str, bytes]) -> None:
    path = tmp_path / "c.tar.gz"
    with pytest.raises(UserError, match="has no cifar-10-batches-py/data_batch_3"):
        read_cifar10(archive(path, {name: data for name, data in batches.items() if name != "data_batch_3"}))
    with pytest.raises(UserError, match=r"data_batch_1 holds no 3072 bytes for each of its 1 labels"):
        read_cifar10(archive(path, batches | {"data_batch_1": batch(np.zeros((2, 32, 32, 3), np.uint8), [1])}))
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match="test_batch is a link or a device, not a file"):
        read_cifar10(path)


def test_a_truncated_or_missing_archive_is_refused(tmp_path: Path, batches: dict[str, bytes]) -> None:
    path = archive(tmp_path / "c.tar.gz", batches)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"c\.tar\.gz: .*; delete"):
        read_cifar10(path)
    with pytest.raises(UserError, match=r"none\.tar\.gz: .*No such file"):
        read_cifar10(tmp_path / "none.tar.gz")
