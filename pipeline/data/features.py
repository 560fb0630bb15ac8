"""What a net's frozen layers give for each picture, kept on disk: computed once, by whichever run asks first.

A cache is a folder of `paths.features()` that is named by the hash of all that its numbers follow from. It holds a
file of plain numbers for each tensor, a row a picture, and `sums`, a checksum (XXH3) of each row that is there. Files
are as long as all rows would need, but take the disk's space only for those that are there. A row whose numbers are not
those that were noted, whatever befell them, is made again.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import Dataset
from xxhash import xxh3_64

from pipeline.errors import UserError
from pipeline.files import fresh_file, make_folder, sync

SUMS, FACTS = "sums", "facts.json"
NOTED_S = 20.0
"""Seconds of work between two notes of what is there: what a kill costs at most."""

CachedBatch = tuple[tuple[Tensor, ...], Tensor]
"""The tensors that cross the cut [B, ...], in the precision in which they are kept, and labels int64 [B]."""


class FeatureCache:
    """Tensors by the number of their row.

    Args:
        base: the folder of all caches.
        facts: all that the numbers follow from.
        shapes: of each tensor, for one picture.
        dtype: as kept on disk: torch.float32 or torch.bfloat16.
        rows: how many there can be.
        channels_last: keep and give [B, C, H, W] in the memory format NHWC.
    """

    def __init__(
        self,
        base: Path,
        *,
        facts: Mapping[str, str],
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        rows: int,
        channels_last: bool,
    ) -> None:
        self._base, self._given, self._shapes, self._dtype = base, dict(facts), tuple(shapes), dtype
        self._rows, self._channels_last = rows, channels_last
        layout = {"dtype": str(dtype), "shapes": str(self._shapes), "channels_last": str(channels_last)}
        self._facts = {**facts, **layout, "rows": str(rows)}
        self.folder = base / hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:32]
        self._files: list[Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A map of the files would be pickled as a copy of every number.
        again = partial(
            FeatureCache,
            facts=self._given,
            shapes=self._shapes,
            dtype=self._dtype,
            rows=self._rows,
            channels_last=self._channels_last,
        )
        return again, (self._base,)

    @property
    def row_bytes(self) -> int:
        """On disk."""
        return sum(prod(shape) for shape in self._shapes) * self._dtype.itemsize

    def fill(
        self,
        wanted: np.ndarray,
        make: Callable[[np.ndarray], Iterable[tuple[np.ndarray, Sequence[Tensor]]]],
        *,
        limit: float,
    ) -> int:
        """Makes the rows that are not there yet, and gives back how many those were.

        One process at a time does so; what it had made when it was killed is there. The caches that were used longest
        ago make room, but for those that are being filled: two that are filled at once may pass the limit together,
        until the next is.

        Args:
            make: gives the tensors of rows, some rows at a time.
            limit: bytes of all caches together, which `wanted` alone does not exceed.
        """
        make_folder(self._base)
        with _owned(self._base), FileLock(self._lock(self.folder)):
            sums = self._sums()
            missing = wanted[self._absent(wanted, sums)]
            kept = np.union1d(np.flatnonzero(sums), wanted)
            if sums.any() and len(kept) * self.row_bytes > limit:  # with rows that others wanted
                shutil.rmtree(self.folder)
                sums[:], missing, kept = 0, wanted, wanted
            _make_room(self._base, limit - len(kept) * self.row_bytes, keep=self.folder)
            if len(missing):
                _check_disk(self._base, len(missing) * self.row_bytes)
                self._fill(missing, make, sums)
            os.utime(self.folder / FACTS)
            self._files = self._mapped(shared=False)  # now, while nobody takes it away
        return len(missing)

    def read(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        """The tensors of some rows, each [len(rows), ...] of the cache's dtype; the rows must be there."""
        if self._files is None:
            self._files = self._mapped(shared=False)
        numbers = torch.from_numpy(rows)
        return tuple(
            self._shaped(file.index_select(0, numbers), shape)
            for file, shape in zip(self._files, self._shapes, strict=True)
        )

    def _fill(
        self,
        missing: np.ndarray,
        make: Callable[[np.ndarray], Iterable[tuple[np.ndarray, Sequence[Tensor]]]],
        sums: np.ndarray,
    ) -> None:
        self.folder.mkdir(exist_ok=True)
        files = self._mapped(shared=True)
        noted = time.monotonic()
        for rows, tensors in make(missing):
            for file, tensor in zip(files, tensors, strict=True):
                file[torch.from_numpy(rows)] = self._flat(tensor).to("cpu", self._dtype)
            sums[rows] = _summed(files, rows)
            if time.monotonic() - noted > NOTED_S:
                self._note(sums)
                noted = time.monotonic()
        self._note(sums)

    def _note(self, sums: np.ndarray) -> None:
        """The numbers first: a row that is said to be there should be so after a power cut, too."""
        for number in range(len(self._shapes)):
            sync(self._path(number))
        with fresh_file(self.folder / FACTS) as path:
            path.write_text(json.dumps(self._facts, indent=2, sort_keys=True), encoding="utf-8")
        with fresh_file(self.folder / SUMS) as path:
            sums.tofile(path)

    def _sums(self) -> np.ndarray:
        """The checksum of each row, uint64; 0 where it is not there, as none is where a file is not whole."""
        sizes = {SUMS: self._rows * np.dtype(np.uint64).itemsize}
        for number, shape in enumerate(self._shapes):
            sizes[self._path(number).name] = self._rows * prod(shape) * self._dtype.itemsize
        files = {self.folder / name: size for name, size in sizes.items()}
        if (self.folder / FACTS).exists() and all(f.exists() and f.stat().st_size == size for f, size in files.items()):
            return np.fromfile(self.folder / SUMS, dtype=np.uint64)
        return np.zeros(self._rows, dtype=np.uint64)

    def _absent(self, rows: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Of each row, whether its numbers are not there as they were noted."""
        absent: np.ndarray = sums[rows] == 0
        noted = rows[~absent]
        if len(noted):
            absent[~absent] = _summed(self._mapped(shared=False), noted) != sums[noted]
        return absent

    def _mapped(self, *, shared: bool) -> list[Tensor]:
        return [
            torch.from_file(
                str(self._path(number)), shared=shared, size=self._rows * prod(shape), dtype=self._dtype
            ).view(self._rows, prod(shape))
            for number, shape in enumerate(self._shapes)
        ]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.bin"

    def _flat(self, tensor: Tensor) -> Tensor:
        whole = tensor.permute(0, 2, 3, 1) if self._channels_last and tensor.ndim == 4 else tensor
        return whole.reshape(len(tensor), -1)

    def _shaped(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self._channels_last and len(shape) == 3:
            channels, height, width = shape
            return flat.view(-1, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(-1, *shape)

    @staticmethod
    def _lock(folder: Path) -> Path:
        return folder.with_suffix(".lock")


class CachedPictures(Dataset[CachedBatch]):
    """Whole batches by their list of (epoch, index), as `datamodule.Pictures`, but what the frozen layers give of them.

    Args:
        labels: of every picture, int64.
        views: versions of each picture, which epochs take by turns; row (version * pictures + index) is a picture's.
    """

    def __init__(self, cache: FeatureCache, labels: np.ndarray, *, views: int) -> None:
        self._cache, self._labels, self._views = cache, labels, views

    def __getitem__(self, batch: Sequence[tuple[int, int]]) -> CachedBatch:
        pairs = np.asarray(batch, dtype=np.int64)
        rows = (pairs[:, 0] % self._views) * len(self._labels) + pairs[:, 1]
        return self._cache.read(rows), torch.from_numpy(self._labels[pairs[:, 1]])


@contextmanager
def _owned(base: Path) -> Iterator[None]:
    """Tells a user of caches that another user made."""
    try:
        yield
    except PermissionError as error:
        place = error.filename or base
        raise UserError(f"{place} belongs to another user: change its permissions, or remove {base}") from None


def _summed(files: Sequence[Tensor], rows: np.ndarray) -> np.ndarray:
    """A checksum of each of some rows, over all files, uint64 and never 0."""
    plain = [file.view(torch.uint8).numpy() for file in files]
    found = np.empty(len(rows), dtype=np.uint64)
    for place, row in enumerate(rows):
        digest = xxh3_64()
        for file in plain:
            digest.update(file[row])
        found[place] = digest.intdigest() or 1
    return found


def _make_room(base: Path, limit: float, *, keep: Path) -> None:
    """Removes the caches used longest ago until the others take no more than `limit` bytes."""
    with FileLock(base / "room.lock"):
        found = [folder for folder in base.iterdir() if folder.is_dir() and folder != keep]
        used = {folder: (_last_used(folder), _size(folder)) for folder in found}
        total = sum(size for _, size in used.values())
        for folder, (_, size) in sorted(used.items(), key=lambda item: item[1][0]):
            if total <= limit:
                break
            with _unless_busy(folder) as free:
                if free:
                    # A process that reads it has it mapped, and reads on.
                    shutil.rmtree(folder, ignore_errors=True)
                    total -= size


@contextmanager
def _unless_busy(folder: Path) -> Iterator[bool]:
    """Whether nobody fills it, and nobody will begin to in the block."""
    try:
        with FileLock(FeatureCache._lock(folder), timeout=0):
            yield True
    except Timeout:
        yield False


def _last_used(folder: Path) -> float:
    try:
        return (folder / FACTS).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    with suppress(FileNotFoundError):  # a folder whose owner makes it anew
        for file in folder.iterdir():
            with suppress(FileNotFoundError):  # one that was written beside, and is renamed by now
                total += file.stat().st_blocks * 512
    return total


def _check_disk(base: Path, needed: int) -> None:
    """Refuses what the disk has no room for: a full one ends the process where it writes to a map, without a word."""
    free = shutil.disk_usage(base).free
    if needed > free:
        raise UserError(
            f"{base}: what frozen layers give takes {needed / 1e9:.1f} GB, and this disk has {free / 1e9:.1f} GB left; "
            "free some, or set train.cache=none",
            parameter="train.cache",
        )
