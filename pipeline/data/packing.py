"""From pictures as published to the packed store: split, decode, shrink, copy.

Decoding and copying run on threads: what takes time in them (PIL's decoders, OpenCV's filters) lets go of the
interpreter's lock, and threads need neither starting time nor pictures sent to and fro. What is written is the same,
bit by bit, whatever their number.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.data import draws, splits, store
from pipeline.data.catalog import Item, Pictures
from pipeline.data.decode import shrink
from pipeline.data.pixels import to_channels
from pipeline.data.store import Row
from pipeline.data.transforms import Augmenter
from pipeline.errors import UserError
from pipeline.machine import cores
from pipeline.parameters import AugmentParams

AHEAD = 8
"""Tasks begun ahead of the writer, for each thread: bounds the memory that a large dataset takes."""
TOGETHER = 8
"""Copies of a picture that are one task."""

Made = list[tuple[int, np.ndarray]] | UserError
"""Versions of a picture, each with its number: 0 for itself, k for its k-th copy."""


def pack(folder: Path, pictures: Pictures, *, dataset: str, channels: int, params: AugmentParams) -> None:
    """Splits, decodes and packs a dataset into `folder`.

    Raises:
        UserError: a picture cannot be decoded (and `augment.skip_unreadable` is off), or a split cannot be made.
    """
    split_of = splits.assign(
        [item.label for item in pictures.items],
        [item.split for item in pictures.items],
        groups=[item.group for item in pictures.items],
        train_size=params.train_size,
        val_fraction=params.val_fraction,
        test_fraction=params.test_fraction,
        seed=params.seed,
    )
    skipped = list(pictures.skipped)

    def rows() -> Iterator[tuple[Row, np.ndarray]]:
        makers = _Makers(pictures, channels=channels, params=params)
        with _threads(num := cores()) as pool:
            tasks = _tasks(makers, pool, split_of, copies=params.copies)
            for index, made in _in_order(tasks, ahead=AHEAD * num):
                if isinstance(made, UserError):
                    if not params.skip_unreadable:
                        raise UserError(f"{made}; remove it, or set augment.skip_unreadable: true")
                    skipped.append(str(made))
                    continue
                for copy, picture in made:
                    yield _row(pictures.items[index], split_of[index], copy, picture), picture

    store.write(
        folder,
        rows(),
        dataset=dataset,
        classes=pictures.classes,
        px=params.px,
        channels=channels,
        skipped=skipped,
    )


def _row(item: Item, split: str, copy: int, picture: np.ndarray) -> Row:
    return Row(item.key, split, item.label, copy, picture.shape[0], picture.shape[1], item.group)


class _Makers:
    """What the threads do."""

    def __init__(self, pictures: Pictures, *, channels: int, params: AugmentParams) -> None:
        self._pictures, self._channels, self._params = pictures, channels, params
        self._own = threading.local()

    def decode(self, index: int) -> Made:
        try:
            picture = shrink(self._pictures.load(index), self._params.px)
        except UserError as error:
            return error
        return [(0, to_channels(picture if picture.ndim == 3 else picture[:, :, None], self._channels))]

    def copy(self, index: int, decoded: "Future[Made]", copies: range) -> Made:
        # Tasks begin in order: the one that is waited for has begun, and waits for nobody.
        made = decoded.result()
        if isinstance(made, UserError):
            return []  # said once, by the picture itself
        if not hasattr(self._own, "augment"):
            # each thread its own, for albumentations keeps what it draws in the transform
            self._own.augment = Augmenter(self._params.transforms, px=self._params.px, square=False)
        ((_, whole),) = made
        keys = draws.keys(self._params.seed, np.array(copies), np.full(len(copies), index))
        return list(zip(copies, self._own.augment([whole] * len(copies), keys=keys), strict=True))


def _tasks(
    makers: _Makers, pool: ThreadPoolExecutor, split_of: Sequence[str], *, copies: int
) -> Iterator[tuple[int, "Future[Made]"]]:
    """Each picture that is in a split, by its index, followed by its copies if it is for training."""
    for index, split in enumerate(split_of):
        if not split:
            continue
        decoded = pool.submit(makers.decode, index)
        yield index, decoded
        for first in range(1, copies + 1, TOGETHER) if split == "train" else ():
            some = range(first, min(first + TOGETHER, copies + 1))
            yield index, pool.submit(makers.copy, index, decoded, some)


def _in_order(tasks: Iterator[tuple[int, "Future[Made]"]], *, ahead: int) -> Iterator[tuple[int, Made]]:
    """What the tasks give, in their order, while so many of them are begun ahead."""
    waiting = deque(islice(tasks, ahead))
    while waiting:
        index, task = waiting.popleft()
        yield index, task.result()
        waiting.extend(islice(tasks, 1))


@contextmanager
def _threads(num: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads, and OpenCV with none of its own beside them; what has not begun at an error never does."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    pool = ThreadPoolExecutor(num)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(before)
