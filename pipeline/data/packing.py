"""From pictures as published to the packed store: split, decode, shrink, copy."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.data import draws, splits, store
from pipeline.data.catalog import Item, Pictures
from pipeline.data.decode import shrink
from pipeline.data.pixels import to_channels
from pipeline.data.store import Row
from pipeline.data.transforms import Augmenter
from pipeline.errors import UserError
from pipeline.parameters import AugmentParams

WINDOW = 512
"""Pictures decoded ahead of the writer: bounds the memory that a large dataset takes."""


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
    augment = Augmenter(params.transforms, px=params.px, square=False) if params.copies else None

    def rows() -> Iterator[tuple[Row, np.ndarray]]:
        for index, picture in _decode_all(pictures, [i for i, split in enumerate(split_of) if split], params.px):
            if isinstance(picture, UserError):
                if not params.skip_unreadable:
                    raise UserError(f"{picture}; remove it, or set augment.skip_unreadable: true")
                skipped.append(str(picture))
                continue
            item, split = pictures.items[index], split_of[index]
            whole = to_channels(picture, channels)
            yield _row(item, split, 0, whole), whole
            if augment and split == "train":
                for copy in range(1, params.copies + 1):
                    (version,) = augment([whole], keys=draws.keys(params.seed, copy, np.array([index])))
                    yield _row(item, split, copy, version), version

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


def _decode_all(pictures: Pictures, wanted: list[int], px: int) -> Iterator[tuple[int, np.ndarray | UserError]]:
    """Decodes on every core (PIL lets go of the interpreter's lock), in order, a bounded window ahead."""

    def one(index: int) -> np.ndarray | UserError:
        try:
            picture = shrink(pictures.load(index), px)
        except UserError as error:
            return error
        return picture if picture.ndim == 3 else picture[:, :, None]

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(wanted), WINDOW):
            window = wanted[start : start + WINDOW]
            yield from zip(window, pool.map(one, window), strict=True)
