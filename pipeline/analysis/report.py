"""The Markdown report of one model: what was trained, on what, how well it does, and what each figure means."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.analysis.metrics import Evaluation
from pipeline.files import fresh_file
from pipeline.training.record import PhaseRecord

LISTED = 50
"""Classes up to which the report has a line for each; of more, the worst are listed."""
PAIRS = 5
"""Confused pairs that are listed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """All that the report says."""

    model: str
    """The net's name."""
    random_start: bool
    """Whether training started from random weights."""
    started_from: str
    """The pretrained weights (source, version, hash); with a random start, why: an unfinished sentence."""
    fast_dev_run: bool
    """Whether one batch of everything was run, to see that it runs."""
    dataset: str
    pictures: Mapping[str, int]
    """Pictures by split, in the order to be shown."""
    data_hash: str
    """Fingerprint of the prepared pictures."""
    monitor: str
    """The figure that picked the best epochs, such as val/loss."""
    phases: Sequence[PhaseRecord]
    evaluation: Evaluation
    run_id: str
    """The MLflow run."""
    curves: str = "curves.png"
    """The learning curves, relative to the report."""
    confusion: str = "confusion.png"
    """The confusion matrix, relative to the report."""


def write(path: Path, *, facts: Facts) -> None:
    """Writes the report, whole or not at all."""
    sections = [
        _warnings(facts),
        [f"# `{facts.model}` on `{facts.dataset}`"],
        _training(facts),
        _figures(facts.evaluation),
        _classes(facts.evaluation),
        _pairs(facts.evaluation),
        [f"![Confusion matrix: each row shows where one class's pictures went]({facts.confusion})"],
        _run(facts),
    ]
    with fresh_file(path) as beside:
        beside.write_text("\n\n".join(part for section in sections for part in section) + "\n", encoding="utf-8")


def _warnings(facts: Facts) -> list[str]:
    warnings = []
    if facts.random_start:
        warnings.append(
            f"**Started from RANDOM weights: {_text(facts.started_from)}.** "
            "All that the net knows it learned from the pictures below."
        )
    if facts.fast_dev_run:
        warnings.append(
            "**The figures mean NOTHING: `train.fast_dev_run` ran one batch of everything, to see that it runs.**"
        )
    return [f"> {warning}" for warning in warnings]


def _training(facts: Facts) -> list[str]:
    start = "random weights" if facts.random_start else _text(facts.started_from)
    splits = ", ".join(f"{count:,} {_text(name)}" for name, count in facts.pictures.items())
    return [
        "## What was trained",
        f"- Net: `{facts.model}`, started from {start}.\n"
        f"- Data: `{facts.dataset}`, {splits} pictures, fingerprint `{facts.data_hash}` (the same fingerprint "
        "means the same pictures in the same splits).",
        _table(
            ["phase", "trainable", "epochs run", "best epoch", "learning rate"],
            [
                [_text(phase.name), f"`{phase.trainable}`", str(phase.epochs), str(phase.best_epoch), f"{phase.lr:g}"]
                for phase in facts.phases
            ],
            left=2,
        ),
        f"Each phase starts from the weights of the best epoch before it, by `{facts.monitor}`; the last phase's best "
        "are the ones tested here. The learning rate is the phase's peak, and epochs count on across phases.",
        f"![Learning curves: loss and top-1 accuracy by epoch]({facts.curves})",
    ]


def _figures(evaluation: Evaluation) -> list[str]:
    percent = f"{100 * evaluation.confidence:g}%"
    interval = f"{percent} interval {evaluation.top1_low:.3f} to {evaluation.top1_high:.3f}"
    guess = np.log(len(evaluation.per_class))
    rows = [
        (
            "**top-1 accuracy**",
            f"**{evaluation.top1:.3f}** ({interval})",
            "share of pictures whose first guess is right",
        ),
        ("top-1 error", f"{evaluation.top1_error:.3f}", "share whose first guess is wrong"),
        ("top-5 accuracy", f"{evaluation.top5:.3f}", "share whose right class is among the first five guesses"),
        ("top-5 error", f"{evaluation.top5_error:.3f}", "share whose right class is not among them"),
        ("loss", f"{evaluation.loss:.3f}", f"cross-entropy: 0 when sure and right, {guess:.3f} for an even guess"),
        (
            "macro precision",
            f"{evaluation.macro_precision:.3f}",
            "mean of the classes' precisions, each counting alike",
        ),
        ("macro recall", f"{evaluation.macro_recall:.3f}", "mean of the classes' recalls, each counting alike"),
        ("macro F1", f"{evaluation.macro_f1:.3f}", "mean of the classes' F1: low if any class does badly"),
    ]
    notes = "\n".join(f"- {_text(note)}" for note in evaluation.notes)
    return [
        "## How well it does",
        _table(["figure", "value", "what it means"], rows, left=3),
        f"The interval is by bootstrap over {evaluation.pictures:,} test pictures. It covers the chance in which "
        "pictures were tested, not the chance in training: another training seed may fall outside it.",
        *([f"Notes:\n\n{notes}"] if notes else []),
    ]


def _classes(evaluation: Evaluation) -> list[str]:
    frame = evaluation.per_class
    shown = frame if len(frame) <= LISTED else frame.sort_values("f1", kind="stable").head(LISTED)
    which = "" if len(frame) <= LISTED else f" Of {len(frame):,} classes, the {LISTED} with the lowest F1 are shown."
    rows = [
        [_text(name), f"{support:,}", f"{precision:.3f}", f"{recall:.3f}", f"{f1:.3f}"]
        for name, support, precision, recall, f1 in shown.itertuples(index=False)
    ]
    return [
        "## Class by class",
        "Precision: of the pictures predicted as a class, the share that are of it. Recall: of a class's pictures, the "
        f"share predicted as it. F1: their harmonic mean, low if either is low.{which}",
        _table(["class", "test pictures", "precision", "recall", "F1"], rows, left=1),
    ]


def _pairs(evaluation: Evaluation) -> list[str]:
    mistakes = evaluation.confusion.copy()
    np.fill_diagonal(mistakes, 0)
    names, support = evaluation.per_class["class"], evaluation.per_class["support"]
    order = np.argsort(-mistakes, axis=None, kind="stable")[:PAIRS]
    rows = []
    for actual, predicted in zip(*np.unravel_index(order, mistakes.shape), strict=True):
        count = mistakes[actual, predicted]
        if count:
            share = f"{100 * count / support[actual]:.1f}%"
            rows.append([_text(names[actual]), _text(names[predicted]), f"{count:,}", share])
    if not rows:
        return ["## What it confuses", "Nothing: every test picture is right."]
    return [
        "## What it confuses",
        "The commonest mistakes; the share is of the actual class's test pictures.",
        _table(["actual", "taken for", "pictures", "share"], rows, left=2),
    ]


def _run(facts: Facts) -> list[str]:
    return [
        "## The run",
        f"MLflow run `{facts.run_id}` holds parameters, curves and files: `make ui` opens MLflow, to compare it with "
        "others.",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A Markdown table whose first `left` columns are text and whose others are numbers, set to the right."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def _text(name: str) -> str:
    """A name as it is, whatever it holds: class names are the user's folders."""
    return re.sub(r"([\\`*_<|\[\]$~])", r"\\\1", name)
