"""From pictures as published to the packed store: split, decode, shrink, copy.

Decoding and copying are shared out among the cores (`pipeline/data/helpers.py`); what is written is the same, bit by
bit, whatever their number.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.data import draws, splits, store
from pipeline.data.catalog import Item, Pictures
from pipeline.data.decode import shrink
from pipeline.data.helpers import in_order
from pipeline.data.pixels import to_channels
from pipeline.data.store import Row
from pipeline.data.transforms import Augmenter
from pipeline.errors import UserError
from pipeline.parameters import AugmentParams

TOGETHER, SMALL = 256, 4 * 2**20
"""Versions in a task, and their bytes, from which on no further picture joins it."""
LARGE = 32 * 2**20
"""Bytes of a picture's versions that are one task: what is beyond is another, which decodes the picture again."""


class Part(NamedTuple):
    """Versions of a picture: 0 is itself, k its k-th copy."""

    item: int
    versions: range


Task = list[Part]


class Made(NamedTuple):
    """What came of a part: its versions in their order, or why the picture cannot be decoded."""

    part: Part
    pictures: list[np.ndarray]
    error: UserError | None = None


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

    def rows() -> Generator[tuple[Row, np.ndarray], None, None]:
        each = params.px**2 * channels * 4 // 3  # bytes, of a picture of the usual proportions
        tasks = _tasks(split_of, copies=params.copies, each=each)
        make = partial(_made, _Maker(pictures, channels=channels, params=params))
        room = 2 * max(SMALL, min(LARGE, (1 + params.copies) * each))  # for long pictures too
        with closing(in_order(tasks, make, room=room)) as results:
            for part, made, error in chain.from_iterable(results):
                if error is not None:
                    if not params.skip_unreadable:
                        raise UserError(f"{error}; remove it, or set augment.skip_unreadable: true")
                    skipped.append(str(error))
                    continue
                for version, picture in zip(part.versions, made, strict=True):
                    yield _row(pictures.items[part.item], split_of[part.item], version, picture), picture

    with closing(rows()) as stream:  # at an error, helpers end here and now
        store.write(
            folder,
            stream,
            dataset=dataset,
            classes=pictures.classes,
            px=params.px,
            channels=channels,
            skipped=skipped,
        )


def _row(item: Item, split: str, copy: int, picture: np.ndarray) -> Row:
    return Row(item.key, split, item.label, copy, picture.shape[0], picture.shape[1], item.group)


def _tasks(split_of: Sequence[str], *, copies: int, each: int) -> Iterator[Task]:
    """Every picture that is in a split, with its copies if it is for training, in tasks of a size worth handing out.

    Args:
        each: bytes of a version.
    """
    task: Task = []
    held, enough, most = 0, min(TOGETHER, SMALL // each), max(1, LARGE // each)
    for index, split in enumerate(split_of):
        number = 0 if not split else 1 + copies if split == "train" else 1
        for first in range(0, number, most):
            task.append(Part(index, range(first, min(first + most, number))))
            held += len(task[-1].versions)
            if held >= enough:
                yield task
                task, held = [], 0
    if task:
        yield task


class _Maker:
    """Makes the versions of a picture."""

    def __init__(self, pictures: Pictures, *, channels: int, params: AugmentParams) -> None:
        self._pictures, self._channels, self._params = pictures, channels, params
        self._augment = Augmenter(params.transforms, px=params.px, square=False)
        if params.copies:
            self._augment.load()

    def __call__(self, part: Part) -> list[np.ndarray]:
        picture = shrink(self._pictures.load(part.item), self._params.px)
        whole = to_channels(picture if picture.ndim == 3 else picture[:, :, None], self._channels)
        first = [whole] if 0 in part.versions else []
        copies = np.array(part.versions[len(first) :], dtype=np.int64)
        if not len(copies):
            return first
        keys = draws.keys(self._params.seed, copies, np.full(len(copies), part.item))
        return [*first, *self._augment(np.repeat(whole[None], len(copies), axis=0), keys=keys)]


def _made(maker: _Maker, task: Task) -> list[Made]:
    made = []
    for part in task:
        try:
            made.append(Made(part, maker(part)))
        except UserError as error:
            if 0 in part.versions:  # said once
                made.append(Made(part, [], error))
    return made
