"""From pictures as published to the packed store: split, decode, shrink, copy.

Decoding and copying run on threads: what takes time in them (PIL's decoders, OpenCV's filters) lets go of the
interpreter's lock, and threads need neither starting time nor pictures sent to and fro. The thread that writes takes a
part in the work whenever what comes next is not ready, so that there are as many threads as cores: one more, and they
would stand in each other's way. What is written is the same, bit by bit, whatever their number.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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

AHEAD = 4
"""Tasks begun ahead of the writer, for each thread: bounds the memory that a large dataset takes."""
TOGETHER = 20
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
        with _helpers((num := cores()) - 1) as begin:
            tasks = _tasks(makers, begin, split_of, copies=params.copies)
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

    def copy(self, index: int, decoded: "_Task", copies: range) -> Made:
        # Tasks begin in order: the one that is waited for has begun, and waits for nobody.
        made = decoded.result()
        if isinstance(made, UserError):
            return []  # said once, by the picture itself
        if not hasattr(self._own, "augment"):
            # each thread its own, for albumentations keeps what it draws in the transform
            self._own.augment = Augmenter(self._params.transforms, px=self._params.px, square=False)
        ((_, whole),) = made
        keys = draws.keys(self._params.seed, np.array(copies), np.full(len(copies), index))
        return list(zip(copies, self._own.augment(np.repeat(whole[None], len(copies), axis=0), keys=keys), strict=True))


class _Task:
    """Work that the first thread to come to it does."""

    def __init__(self, work: Callable[[], Made]) -> None:
        self._work = work
        self._free, self._done = threading.Lock(), threading.Event()
        self._made: Made = []
        self._error: BaseException | None = None

    def run(self) -> bool:
        """Does the work, unless another thread does it or has done it; whether it did."""
        if not self._free.acquire(blocking=False):
            return False
        try:
            self._made = self._work()
        except BaseException as error:  # for whoever asks for the result
            self._error = error
        self._done.set()
        return True

    @property
    def ready(self) -> bool:
        return self._done.is_set()

    def result(self) -> Made:
        """What it made, as soon as it has; raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._made


def _tasks(
    makers: _Makers, begin: Callable[[_Task], None], split_of: Sequence[str], *, copies: int
) -> Iterator[tuple[int, _Task]]:
    """Each picture that is in a split, by its index, followed by its copies if it is for training."""
    for index, split in enumerate(split_of):
        if not split:
            continue
        begin(decoded := _Task(partial(makers.decode, index)))
        yield index, decoded
        for first in range(1, copies + 1, TOGETHER) if split == "train" else ():
            some = range(first, min(first + TOGETHER, copies + 1))
            begin(copied := _Task(partial(makers.copy, index, decoded, some)))
            yield index, copied


def _in_order(tasks: Iterator[tuple[int, _Task]], *, ahead: int) -> Iterator[tuple[int, Made]]:
    """What the tasks give, in their order, while so many of them are begun ahead; this thread helps with them."""
    waiting = deque(islice(tasks, ahead))
    while waiting:
        index, next_one = waiting[0]
        while not next_one.ready and any(task.run() for _, task in waiting):
            pass
        waiting.popleft()
        yield index, next_one.result()
        waiting.extend(islice(tasks, 1))


@contextmanager
def _helpers(num: int) -> Iterator[Callable[[_Task], None]]:
    """Has tasks run by so many threads beside this one, while OpenCV has none of its own.

    What has not begun at an error never does.
    """
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    pool = ThreadPoolExecutor(max(1, num))

    def begin(task: _Task) -> None:
        if num:
            pool.submit(task.run)

    try:
        yield begin
    finally:
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(before)
