"""Folds for cross-validation: stratified, seeded, and whole groups where there are groups."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.data.store import Row
from pipeline.errors import UserError

DIVIDED = ("train", "val")
"""Splits whose pictures are divided; what is in no fold keeps its split."""


def assign(labels: Sequence[int], groups: Sequence[str], *, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """The fold of each picture, 0 to `folds` - 1: every class in proportion, as near as whole groups come.

    Without groups these are scikit-learn's StratifiedKFold, else its StratifiedGroupKFold, both shuffled.

    Args:
        labels: class number of each picture.
        groups: group of each picture; "" for a group of its own.
        folds: at least 2.
        seed: of the shuffle.

    Raises:
        UserError: a class has fewer pictures, or fewer groups, than there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    grouped = any(groups)
    label_of = np.asarray(labels)
    # A picture's number is no name of a group: the two are told apart by their first part.
    names = np.array([f"group {group}" if group else f"picture {i}" for i, group in enumerate(groups)])
    for number in np.unique(label_of):
        count = len(np.unique(names[label_of == number]))
        if count < folds:
            what = f"group{'s'[: count != 1]} of pictures" if grouped else f"picture{'s'[: count != 1]}"
            raise UserError(
                f"class number {number} has {count} {what} for {folds} folds, and each needs one; add some, "
                "or use fewer folds"
            )
    splitter = (StratifiedGroupKFold if grouped else StratifiedKFold)(folds, shuffle=True, random_state=seed)
    fold_of = np.full(len(label_of), -1, dtype=np.int64)
    for fold, (_, inside) in enumerate(splitter.split(label_of, label_of, names if grouped else None)):
        fold_of[inside] = fold
    return fold_of


def divide(rows: Sequence[Row], *, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """The fold of each row of a store, 1 to `folds`; 0 for offline copies and for rows of other splits than DIVIDED.

    Raises:
        UserError: as `assign`.
    """
    divided = [index for index, row in enumerate(rows) if row.split in DIVIDED and not row.copy]
    fold_of = np.zeros(len(rows), dtype=np.int64)
    fold_of[divided] = 1 + assign(
        [rows[index].label for index in divided], [rows[index].group for index in divided], folds=folds, seed=seed
    )
    return fold_of


def splits(rows: Sequence[Row], fold_of: npt.NDArray[np.int64], *, fold: int) -> tuple[str, ...]:
    """The split of each row while `fold` is held out: it is validation, and the other folds are training.

    Offline copies go with their picture into training, and with it out of training: "" then, for left out.
    """
    held_out = {row.key for row, mine in zip(rows, fold_of == fold, strict=True) if mine}
    found = []
    for row in rows:
        if row.split not in DIVIDED:
            found.append(row.split)
        elif row.key not in held_out:
            found.append("train")
        else:
            found.append("" if row.copy else "val")
    return tuple(found)
