"""The packed store: every picture decoded and resized once, then read as plain bytes through a memory map.

A folder holds `pictures.bin` (uint8, height x width x channels, one picture after another), `manifest.csv` (a row per
picture, in that order) and `meta.json`. The hash in meta.json covers both files: DVC's cache does not notice a damaged
file by itself.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import UserError

PICTURES, MANIFEST, META = "pictures.bin", "manifest.csv", "meta.json"


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
    """Over manifest.csv and pictures.bin."""


class Store:
    """A packed store, read-only.

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
        with (folder / MANIFEST).open(encoding="utf-8", newline="") as file:
            self.rows = [
                Row(key, split, int(label), int(copy), int(height), int(width), group)
                for key, split, label, copy, height, width, group in islice(csv.reader(file), 1, None)
            ]
        if splits is not None:
            self.rows = [row._replace(split=split) for row, split in zip(self.rows, splits, strict=True)]
        self.labels = np.array([row.label for row in self.rows], dtype=np.int64)
        sizes = np.array([row.height * row.width * self.meta.channels for row in self.rows], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._bytes = np.memmap(folder / PICTURES, dtype=np.uint8, mode="r")
        if len(self._bytes) != self._offsets[-1]:
            raise UserError(f"{folder / PICTURES}: damaged (wrong length); run `dvc repro -f augment`")

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map would be pickled as a copy of every picture: a worker opens the file itself.
        return partial(Store, splits=self._splits), (self.folder,)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        """One picture, uint8 [H, W, C]: a view of the file."""
        row = self.rows[index]
        flat = self._bytes[self._offsets[index] : self._offsets[index + 1]]
        return flat.reshape(row.height, row.width, self.meta.channels)

    def indices(self, split: str) -> np.ndarray:
        """Numbers of the pictures of a split, offline copies included."""
        return np.array([i for i, row in enumerate(self.rows) if row.split == split], dtype=np.int64)

    def counts(self) -> dict[str, int]:
        """Pictures per split."""
        return {split: len(self.indices(split)) for split in ("train", "val", "test")}

    def verify(self) -> None:
        """Reads everything once and compares it with the hash.

        Raises:
            UserError: a bit has changed since the store was written.
        """
        if _digest(self.folder) != self.meta.sha256:
            raise UserError(f"{self.folder}: damaged (its hash has changed); run `dvc repro -f augment`")


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
    with (folder / PICTURES).open("wb") as blob, (folder / MANIFEST).open("w", encoding="utf-8", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(Row._fields)
        for row, picture in pictures:
            assert picture.shape == (row.height, row.width, channels), (row, picture.shape)
            blob.write(np.ascontiguousarray(picture).tobytes())
            writer.writerow(row)
    meta = Meta(dataset, classes, px, channels, tuple(skipped), _digest(folder))
    (folder / META).write_text(json.dumps(asdict(meta), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for name in (MANIFEST, PICTURES):
        with (folder / name).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
