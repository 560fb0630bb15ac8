"""The figures of one evaluation, from the logits over the test split.

torchmetrics counts the confusion matrix, and every ratio is taken from it in double precision, so that 909 right of
1000 is written 0.909 and not its nearest single-precision number. A share of nothing (the recall of a class with no
test picture, the precision of one never predicted) is 0 and comes with a note. The macro means leave out the classes
that are neither actual nor predicted. Both are what scikit-learn gives for `average="macro", zero_division=0`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassConfusionMatrix

from pipeline.errors import UserError
from pipeline.files import fresh_file

TOP_K = 5
CHUNK = 4096
"""Pictures sorted at once: their order is as many 64-bit integers as there are logits."""
NAMED = 5
"""Classes that a note names before it says how many more there are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """The figures of one model on one test split of `pictures` pictures and C classes."""

    pictures: int
    """Test pictures."""
    top1: float
    """Share of pictures whose highest logit is the right class's."""
    top5: float
    """Share of pictures whose right class is among the five highest logits; 1 with five classes or fewer."""
    top1_error: float
    """1 - top1."""
    top5_error: float
    """1 - top5."""
    loss: float
    """Mean cross-entropy, in nats, without label smoothing."""
    top1_low: float
    """Lower end of the bootstrap percentile interval on top1."""
    top1_high: float
    """Upper end of that interval."""
    confidence: float
    """Coverage of that interval."""
    macro_f1: float
    """Mean F1 over the classes that are actual or predicted at least once; so are the next two."""
    macro_precision: float
    """Mean precision."""
    macro_recall: float
    """Mean recall."""
    per_class: pd.DataFrame
    """A row per class, in order: class, support (test pictures), precision, recall, f1."""
    confusion: npt.NDArray[np.int64]
    """[C, C] pictures: rows actual, columns predicted."""
    notes: tuple[str, ...]
    """What a reader has to know to read the figures rightly, a sentence or two each."""


def evaluate(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    classes: Sequence[str],
    bootstrap: int,
    confidence: float,
    seed: int,
) -> Evaluation:
    """Judges logits against the right classes.

    Args:
        logits: [N, C] float32, on the processor.
        targets: [N] int64, each an index into `classes`.
        classes: the C class names, at least two.
        bootstrap: resamples behind the interval on top-1.
        confidence: coverage of that interval, between 0 and 1.
        seed: of the resamples.

    Raises:
        UserError: the logits are not finite (counted as they are, a NaN would pass for the first class).
    """
    pictures = len(targets)
    assert pictures > 0
    assert logits.shape == (pictures, len(classes))
    _check_finite(logits)
    confusion = _confusion(logits, targets, classes=len(classes))
    right = int(confusion.trace())
    top5_right = pictures if len(classes) <= TOP_K else _right_in_top_k(logits, targets)
    low, high = _interval(right, pictures, resamples=bootstrap, confidence=confidence, seed=seed)
    per_class = _per_class(confusion, classes)
    seen = per_class[(confusion.sum(axis=0) > 0) | (confusion.sum(axis=1) > 0)]
    return Evaluation(
        pictures=pictures,
        top1=right / pictures,
        top5=top5_right / pictures,
        top1_error=(pictures - right) / pictures,
        top5_error=(pictures - top5_right) / pictures,
        loss=cross_entropy(logits, targets, reduction="none").double().mean().item(),
        top1_low=low,
        top1_high=high,
        confidence=confidence,
        macro_f1=float(seen["f1"].mean()),
        macro_precision=float(seen["precision"].mean()),
        macro_recall=float(seen["recall"].mean()),
        per_class=per_class,
        confusion=confusion,
        notes=_notes(confusion, classes),
    )


def flat(evaluation: Evaluation) -> dict[str, float]:
    """The figures by the names they have in metrics.json and in MLflow."""
    return {
        "test/top1": evaluation.top1,
        "test/top5": evaluation.top5,
        "test/top1_error": evaluation.top1_error,
        "test/top5_error": evaluation.top5_error,
        "test/loss": evaluation.loss,
        "test/top1_low": evaluation.top1_low,
        "test/top1_high": evaluation.top1_high,
        "test/macro_f1": evaluation.macro_f1,
        "test/macro_precision": evaluation.macro_precision,
        "test/macro_recall": evaluation.macro_recall,
        "test/pictures": float(evaluation.pictures),
    }


def predictions(
    keys: Sequence[str], targets: torch.Tensor, logits: torch.Tensor, classes: Sequence[str]
) -> pd.DataFrame:
    """A row per test picture, for whoever wants to look at single mistakes.

    Args:
        keys: the N pictures' names.
        targets: [N] int64, each an index into `classes`.
        logits: [N, C] float32.
        classes: the C class names.

    Returns:
        key, actual and predicted (class names), correct (bool), confidence (the predicted class's probability,
        float32), then a column `p_<class>` per class with its probability (float32; a row sums to 1).
    """
    assert len(keys) == len(targets) == len(logits)
    predicted = logits.argmax(dim=1)
    probabilities = logits.softmax(dim=1)
    names = np.array(classes, dtype=object)
    facts = pd.DataFrame(
        {
            "key": list(keys),
            "actual": names[targets.numpy()],
            "predicted": names[predicted.numpy()],
            "correct": (predicted == targets).numpy(),
            "confidence": probabilities.gather(1, predicted[:, None])[:, 0].numpy(),
        }
    )
    columns = pd.DataFrame(probabilities.numpy(), columns=[f"p_{name}" for name in classes])
    return pd.concat([facts, columns], axis=1)


def confusion_rows(targets: torch.Tensor, predicted: torch.Tensor, classes: Sequence[str]) -> pd.DataFrame:
    """A row per picture with the class names `actual` and `predicted`, as DVC's confusion template counts them.

    Both arguments are [N] int64, each an index into `classes`.
    """
    names = np.array(classes, dtype=object)
    return pd.DataFrame({"actual": names[targets.numpy()], "predicted": names[predicted.numpy()]})


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Writes a table without its index, whole or not at all."""
    with fresh_file(path) as beside:
        frame.to_parquet(beside, index=False)


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Writes a table without its index, whole or not at all."""
    with fresh_file(path) as beside:
        frame.to_csv(beside, index=False)


def _check_finite(logits: torch.Tensor) -> None:
    bad = int((~logits.isfinite()).any(dim=1).sum())
    if bad:
        raise UserError(
            f"the model gives non-finite logits for {bad} of {len(logits)} pictures; "
            "train it again with a lower train.phases.*.lr, or with train.precision 32-true"
        )


def _confusion(logits: torch.Tensor, targets: torch.Tensor, *, classes: int) -> npt.NDArray[np.int64]:
    counts: torch.Tensor = MulticlassConfusionMatrix(num_classes=classes)(logits.argmax(dim=1), targets)
    array: npt.NDArray[np.int64] = counts.numpy()
    return array


def _right_in_top_k(logits: torch.Tensor, targets: torch.Tensor) -> int:
    """Pictures whose right class is among the TOP_K highest logits.

    The sort is stable, so equal logits are ranked by class, as argmax ranks them. torchmetrics' `top_k` takes them in
    any order, and gives a net whose logits are all equal a top-5 accuracy below its top-1.
    """
    right = 0
    for start in range(0, len(logits), CHUNK):
        highest = logits[start : start + CHUNK].argsort(dim=1, descending=True, stable=True)[:, :TOP_K]
        right += int((highest == targets[start : start + CHUNK, None]).sum())
    return right


def _interval(right: int, pictures: int, *, resamples: int, confidence: float, seed: int) -> tuple[float, float]:
    """The bootstrap percentile interval on a share (Efron and Tibshirani 1993, chapter 13).

    To draw `pictures` outcomes with replacement and count the right ones is one draw from a binomial distribution, so
    this is the bootstrap itself and no approximation to it.
    """
    draws = np.random.default_rng(seed).binomial(pictures, right / pictures, size=resamples) / pictures
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _per_class(confusion: npt.NDArray[np.int64], classes: Sequence[str]) -> pd.DataFrame:
    right, actual, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return pd.DataFrame(
        {
            "class": list(classes),
            "support": actual,
            "precision": _share(right, predicted),
            "recall": _share(right, actual),
            "f1": _share(2 * right, predicted + actual),
        }
    )


def _share(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """part / whole, and 0 where the whole is nothing."""
    share: npt.NDArray[np.float64] = np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
    return share


def _notes(confusion: npt.NDArray[np.int64], classes: Sequence[str]) -> tuple[str, ...]:
    pictures, right = int(confusion.sum()), int(confusion.trace())
    absent = [name for name, count in zip(classes, confusion.sum(axis=1), strict=True) if count == 0]
    unused = [name for name, count in zip(classes, confusion.sum(axis=0), strict=True) if count == 0]
    notes = []
    if len(classes) <= TOP_K:
        notes.append(f"With {len(classes)} classes top-5 accuracy is 1 by definition: five guesses cover them all.")
    if right in (0, pictures):
        notes.append(
            f"All {pictures} test pictures are {'right' if right else 'wrong'}, and a bootstrap of equal outcomes has "
            "no width: read the interval as too narrow."
        )
    if absent:
        notes.append(f"No test picture of {_listed(absent)}: recall is given as 0, and nothing is known about it.")
    if unused:
        notes.append(f"Never predicted: {_listed(unused)}. Precision is given as 0.")
    return tuple(notes)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
