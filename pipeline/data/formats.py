"""The file formats that published datasets come in, read into arrays and checked. Raw files are never trusted."""

import csv
import math
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError, nearest


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """An IDX file of bytes as uint8 of `ndim` dimensions (format: http://yann.lecun.com/exdb/mnist/).

    Raises:
        UserError: another magic number, number of dimensions, or length than the header says.
    """
    data = _read(path)
    if data[:4] != bytes((0, 0, 8, ndim)) or len(data) < 4 + 4 * ndim:
        raise damaged(path, f"not an IDX file of bytes in {ndim} dimensions")
    shape = [int(size) for size in np.frombuffer(data, ">u4", count=ndim, offset=4)]
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * ndim)
    if values.size != math.prod(shape):
        raise damaged(path, f"holds {values.size} bytes where its header says {math.prod(shape)}")
    return values.reshape(shape)


_CIFAR10_BATCHES = (
    *(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
    "cifar-10-batches-py/test_batch",
)


class _ArraysOnly(pickle.Unpickler):
    """Unpickling runs whatever the file names, so it may name what makes a numpy array and nothing else."""

    ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")
        return self.ALLOWED[module, name]


def read_cifar10(archive: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """CIFAR-10's `python version` archive: uint8 [N, 32, 32, 3], labels [N], and how many of them, first, are train's.

    Raises:
        UserError: not a whole archive, a batch missing or a link, or a pickle that names more than arrays.
    """
    batches = _cifar10_batches(archive)
    pixels, labels = [], []
    for name in _CIFAR10_BATCHES:
        if name not in batches:
            raise damaged(archive, f"has no {name}")
        data, numbers = batches[name].get(b"data"), np.asarray(batches[name].get(b"labels"))
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (numbers.size, 3072):
            raise damaged(archive, f"{name} holds no 3072 bytes for each of its {numbers.size} labels")
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(numbers)
    return np.concatenate(pixels), np.concatenate(labels), sum(map(len, labels[:-1]))


def _cifar10_batches(archive: Path) -> dict[str, dict[bytes, Any]]:
    """The archive's batches by name. Read in memory: nothing is unpacked, so no member can land anywhere."""
    batches = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.name in _CIFAR10_BATCHES:
                    batches[member.name] = _ArraysOnly(BytesIO(_content(tar, member)), encoding="bytes").load()
    except (tarfile.TarError, pickle.UnpicklingError, EOFError, zlib.error, OSError) as error:
        raise damaged(archive, str(error)) from None
    return batches


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member) if member.isfile() else None
    if content is None:
        raise tarfile.ReadError(f"{member.name} is a link or a device, not a file")
    return content.read()


def read_groups(path: Path, *, pictures: Sequence[str], skipped: Sequence[str]) -> dict[str, str]:
    """Each picture's group from a table `file,group`; an empty group is a group of its own.

    Args:
        pictures: the files that must be in it, with forward slashes, relative to its folder.
        skipped: files that were left out, each `path: reason`; they may be in it.

    Raises:
        UserError: another header, a row of other than two columns, a file twice, one that is no picture of the folder,
            or pictures that are missing.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a byte order mark
            reader = csv.reader(file)
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table in UTF-8: {error}") from None
    header = ",".join(lines[0][1]) if lines else ""
    if header != "file,group":
        raise UserError(f"{path}:1: the header is {header!r}; it must be file,group")
    known, group_of = set(pictures), dict[str, str]()
    for line, row in lines[1:]:
        if len(row) != 2:
            raise UserError(f"{path}:{line}: {len(row)} columns; it must be two, file,group")
        name, group = row[0], row[1].strip()
        if name in group_of:
            raise UserError(f"{path}:{line}: {name} stands there twice; keep one row")
        if name not in known and not any(reason.startswith(f"{name}: ") for reason in skipped):
            raise UserError(f"{path}:{line}: {name}: no such picture in {path.parent}{nearest(name, pictures)}")
        group_of[name] = group
    missing = [name for name in pictures if name not in group_of]
    if missing:
        raise UserError(f"{path}: {len(missing)} pictures are not in it, the first {missing[0]}; give each a row")
    return group_of


def check_labels(labels: np.ndarray, pixels: np.ndarray, *, classes: tuple[str, ...], path: Path) -> None:
    """Raises UserError unless every picture has the number of a class."""
    if labels.shape != pixels.shape[:1] or not len(labels):
        raise damaged(path, f"{labels.size} labels for {len(pixels)} pictures")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise damaged(path, f"labels run to {labels.max()} where there are {len(classes)} classes")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from None


def damaged(path: Path, reason: str) -> UserError:
    """What is said of a file in a fetched dataset that is not what was published."""
    return UserError(f"{path}: {reason}; delete {path.parent} and run the download stage again")
