"""The packed store: every picture decoded and resized once, then read as plain bytes through a memory map.

A folder holds `pictures.bin` (uint8, height x width x channels, one picture after another), `manifest.csv` (a row per
picture, in that order) and `meta.json`. The hash in meta.json covers both files: DVC's cache does not notice a damaged
file by itself.
"""

import csv
import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_128

from pipeline.data.pixels import Pixels
from pipeline.errors import UserError

PICTURES, MANIFEST, META = "pictures.bin", "manifest.csv", "meta.json"
SPLITS = ("train", "val", "test")
_LEFT_OUT = 255


class Row(NamedTuple):
    """One packed picture."""

    key: str
    """Name within the dataset, e.g. ants/0013035.jpg."""
    split: str
    """train, val or test."""
    label: int
    """Class number."""
    copy: int
    """0 for the picture itself, k for its k-th offline-augmented copy."""
    height: int
    width: int
    group: str = ""
    """Patient, animal or burst that it comes from; empty for a group of its own."""


@dataclass(frozen=True)
class Meta:
    """What a store is made of."""

    dataset: str
    classes: tuple[str, ...]
    px: int
    """Shorter side of every picture, pixels."""
    channels: int
    """1 for grey, 3 for RGB."""
    skipped: tuple[str, ...]
    """Files left out, each with its reason."""
    sha256: str
    """Over manifest.csv and the 128 bits of XXH3 over pictures.bin."""


class Store:
    """A packed store, read-only.

    What it keeps in memory of each picture is some 25 bytes of arrays; the pictures stay in the file, of which the
    system holds in memory what it has room for.

    Args:
        splits: of each row, in place of what the manifest says, for another division of the same pictures.

    Raises:
        UserError: the folder holds no whole store.
    """

    def __init__(self, folder: Path, *, splits: tuple[str, ...] | None = None) -> None:
        self.folder, self._splits = folder, splits
        try:
            facts = json.loads((folder / META).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder}: no packed pictures here; run `dvc repro augment` first") from None
        self.meta = Meta(**{**facts, "classes": tuple(facts["classes"]), "skipped": tuple(facts["skipped"])})
        self._split_of, self.labels, self._heights, self._widths = _columns(folder / MANIFEST)
        if splits is not None:
            assert len(splits) == len(self._split_of), (len(splits), len(self._split_of))
            self._split_of = _split_codes(splits)
        sizes = self._heights.astype(np.int64) * self._widths * self.meta.channels
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        # seen as a plain array: a memmap makes a Python object of its own kind of whatever is taken from it
        self._bytes = np.asarray(np.memmap(folder / PICTURES, dtype=np.uint8, mode="r"))
        if len(self._bytes) != self._offsets[-1]:
            raise UserError(f"{folder / PICTURES}: damaged (wrong length); run `dvc repro -f augment`")
        self._uniform_NHWC = self._of_one_shape()

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map would be pickled as a copy of every picture: a worker opens the file itself.
        return partial(Store, splits=self._splits), (self.folder,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        """One picture, uint8 [H, W, C]: a view of the file."""
        flat = self._bytes[self._offsets[index] : self._offsets[index + 1]]
        return flat.reshape(self._heights[index], self._widths[index], self.meta.channels)

    @cached_property
    def rows(self) -> list[Row]:
        """Everything that the manifest says, a row per picture: read when it is first asked for, and kept."""
        with (self.folder / MANIFEST).open(encoding="utf-8", newline="") as file:
            rows = [
                Row(key, split, int(label), int(copy), int(height), int(width), group)
                for key, split, label, copy, height, width, group in islice(csv.reader(file), 1, None)
            ]
        if self._splits is None:
            return rows
        return [row._replace(split=split) for row, split in zip(rows, self._splits, strict=True)]

    def gather(self, indices: np.ndarray) -> Pixels:
        """Pictures by their numbers, int64 [B]: copies where the store is of one shape, else views of the file."""
        if self._uniform_NHWC is not None:
            return self._uniform_NHWC.take(indices, axis=0)
        return [self[index] for index in indices.tolist()]

    def indices(self, split: str) -> np.ndarray:
        """Numbers of the pictures of a split, offline copies included."""
        return np.flatnonzero(self._split_of == SPLITS.index(split))

    def counts(self) -> dict[str, int]:
        """Pictures per split."""
        return {split: len(self.indices(split)) for split in SPLITS}

    def verify(self) -> None:
        """Reads everything once and compares it with the hash.

        Raises:
            UserError: a bit has changed since the store was written.
        """
        with (self.folder / PICTURES).open("rb") as file:
            pictures = hashlib.file_digest(file, xxh3_128).digest()
        if _together(self.folder / MANIFEST, pictures) != self.meta.sha256:
            raise UserError(f"{self.folder}: damaged (its hash has changed); run `dvc repro -f augment`")

    def _of_one_shape(self) -> np.ndarray | None:
        """All pictures as one view of the file, uint8 [N, H, W, C]; None where their shapes differ."""
        if not len(self) or np.ptp(self._heights) or np.ptp(self._widths):
            return None
        return self._bytes.reshape(len(self), self._heights[0], self._widths[0], self.meta.channels)


def _columns(manifest: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each row's split (uint8), label (int64), height and width (int32), without a Python object per row."""
    kinds: dict[tuple[str, ...], int] = {}
    codes = array("L")
    with manifest.open(encoding="utf-8", newline="") as file:
        for _, split, label, _, height, width, _ in islice(csv.reader(file), 1, None):
            codes.append(kinds.setdefault((split, label, height, width), len(kinds)))
    kind_of = np.array(codes, dtype=np.int64)
    splits, labels, heights, widths = zip(*kinds, strict=True) if kinds else ((), (), (), ())
    return (
        _split_codes(splits)[kind_of],
        np.array(labels, dtype=np.str_).astype(np.int64)[kind_of],
        np.array(heights, dtype=np.str_).astype(np.int32)[kind_of],
        np.array(widths, dtype=np.str_).astype(np.int32)[kind_of],
    )


def _split_codes(splits: Sequence[str]) -> np.ndarray:
    """Places in SPLITS, uint8; _LEFT_OUT for a row that is in none of them."""
    code = {split: number for number, split in enumerate(SPLITS)}
    return np.fromiter((code.get(split, _LEFT_OUT) for split in splits), dtype=np.uint8, count=len(splits))


def write(
    folder: Path,
    pictures: Iterable[tuple[Row, np.ndarray]],
    *,
    dataset: str,
    classes: tuple[str, ...],
    px: int,
    channels: int,
    skipped: Sequence[str],
) -> None:
    """Writes a store from a stream of rows and pictures (uint8 [H, W, C]); `folder` must exist and be private.

    `skipped` is read when the stream has ended, so the stream may add to it.
    """
    hashed = xxh3_128()  # while the bytes are at hand, and not from the file
    with (folder / PICTURES).open("wb") as blob, (folder / MANIFEST).open("w", encoding="utf-8", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(Row._fields)
        for row, picture in pictures:
            assert picture.shape == (row.height, row.width, channels), (row, picture.shape)
            pixels = np.ascontiguousarray(picture).data
            blob.write(pixels)
            hashed.update(pixels)
            writer.writerow(row)
    meta = Meta(dataset, classes, px, channels, tuple(skipped), _together(folder / MANIFEST, hashed.digest()))
    (folder / META).write_text(json.dumps(asdict(meta), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _together(manifest: Path, pictures: bytes) -> str:
    """SHA-256 over the manifest and the pictures' XXH3, a checksum that costs a twentieth of it: nobody forges them."""
    with manifest.open("rb") as file:
        return hashlib.sha256(hashlib.file_digest(file, "sha256").digest() + pictures).hexdigest()
