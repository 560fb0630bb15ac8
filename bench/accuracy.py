"""Time to a given validation accuracy, from the moment that the net stands.

    python bench/accuracy.py [--case photographs fashion_90 fashion_93] [--pairs 5] [--pictures FOLDER]
                             [--peers [--against fastai timm transformers]]

    photographs   0.94 on val/ of the folder given (needs --pictures: drawn pictures mean nothing), 224 px. All train
                  the head for at most 12 epochs at the same rate, Thaw on frozen layers that it caches and the same
                  pictures in every epoch, the others on what they compute again of random crops (of half the picture
                  and more) and flips, fastai without; batch norms stay as they were pretrained, but fastai's
    fashion_90    0.90 on 1,200 of 12,000 pictures of Fashion-MNIST, 64 px: Thaw's default schedule,
                  but that it fine-tunes at the others' learning rate
    fashion_93    0.93 on 6,000 of 60,000 of them

All start from the same weights of tf_efficientnet_lite0, see the same pictures and validate after each epoch. The time
is that of the first epoch's end at which the accuracy is reached, validation included; a side's turn ends there.
Another that does not reach it in the epochs given counts with the time of them all, and its row says that the ratio is
a lower bound; after two such rounds it is not tried again. The others are the plain PyTorch loop or, with --peers,
Hugging Face's Trainer, timm's loop and fastai. A round without --peers takes on two cores a minute or two for
photographs (the default case), 4 to 16 for fashion_90 (40 where there is no bf16), and 20 to 45 for fashion_93, of
which one round (--pairs 1) may have to do, with one of the peers at a time; --add then puts its rows beside those that
are there.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import Bench, Comparison, has_bf16, parser, ratios, rounds, worker
from loop import MODULES, others
from project import Project, both_ways, chosen

NET, BATCH, WORKERS = "tf_efficientnet_lite0", 32, 2
TRIES = 2
"""Rounds after which a side that has not reached the accuracy in any is not tried again."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One accuracy on one set of pictures."""

    accuracy: float
    px: int
    settings: dict[str, Any]
    """Thaw's, of the stages before train."""
    training: dict[str, Any]
    """Thaw's, of train."""
    frozen: bool
    """Whether the others train the head alone."""
    lr: float
    epochs: int
    """That the others have at most."""
    crops: tuple[float, float] | None = (0.5, 1.0)
    """Share of a picture that the others crop at random; None for all of it."""


_FASHION = {"train.phases.finetune.lr": 1e-3, "train.transforms": {"horizontal_flip": {"p": 0.5}}}
CASES = {
    "photographs": Case(
        accuracy=0.94,
        px=224,
        settings={"augment.px": 256, "augment.train_size": "all"},
        training={"train.phases": {"frozen": {"trainable": "head", "epochs": 12, "strength": 0}}},
        frozen=True,
        lr=3e-3,
        epochs=12,
    ),
    "fashion_90": Case(
        accuracy=0.90,
        px=64,
        settings={"data.name": "fashion_mnist", "augment.px": 64, "augment.train_size": 12000},
        training=_FASHION,
        frozen=False,
        lr=1e-3,
        epochs=6,
        crops=None,
    ),
    "fashion_93": Case(
        accuracy=0.93,
        px=64,
        settings={"data.name": "fashion_mnist", "augment.px": 64, "augment.train_size": "all"},
        training=_FASHION,
        frozen=False,
        lr=1e-3,
        epochs=4,
        crops=None,
    ),
}


def main() -> None:
    """Measures the cases asked for."""
    made = parser(__doc__, pictures=True, peers=True, settings=True)
    made.add_argument("--case", nargs="+", choices=CASES, default=[])
    made.add_argument("--against", nargs="+", choices=MODULES, default=[], help="with --peers: those to measure")
    asked = made.parse_args()
    if asked.against and not asked.peers:
        made.error("--against: it takes --peers as well")
    bench = Bench("accuracy", asked)
    bench.settings = {"net": NET, "batch": BATCH, "workers": WORKERS}
    for name in asked.case or ["fashion_90" if asked.quick else "photographs"]:
        if name == "photographs" and not any((asked.pictures / "train").glob("*/*")):
            bench.lacks(_subject(CASES[name].accuracy, name), f"{asked.pictures} has no train/ of class folders")
        else:
            _measure(bench, name, CASES[name], asked)
    bench.write()


def _measure(bench: Bench, name: str, case: Case, asked: argparse.Namespace) -> None:
    pictures = both_ways(asked.pictures) if name == "photographs" else None
    accuracy = 0.05 if asked.quick else case.accuracy
    smaller = {"augment.px": 32, "augment.train_size": 100} if asked.quick else {}
    project = Project({"model.name": NET, **case.settings, **smaller}, pictures=pictures)
    px = 32 if asked.quick else case.px
    settings = {"train.px": px, "train.batch_size": BATCH, "tracking.log_model": False, **case.training}
    settings["train.auto_tune"] = True
    if project.knows("cache"):
        settings["train.cache"] = "bf16" if has_bf16() else "fp32"
    settings |= chosen(asked)
    spec = {
        "folder": str(project.shared()),
        "net": NET,
        "weights": project.weights(),
        "px": px,
        "batch": BATCH,
        "epochs": 1 if asked.quick else case.epochs,
        "lr": case.lr,
        "workers": WORKERS,
        "frozen": case.frozen,
        "frozen_bn": case.frozen,
        "judge": False,
        "crops": case.crops,
        "stop_at": accuracy,
    }

    def thaw() -> Turn:
        done = project.train(settings, stop_at=accuracy)
        return turn(done.ends, done.accuracies, accuracy)

    def other(file: str, python: str | Path) -> Turn:
        told = worker(file, spec, python=python).told
        return turn(told["ends"], told["accuracies"], accuracy)

    turns: dict[str, Callable[[], Turn | None]] = {"Thaw": thaw}
    for who, (file, python) in others(bench, peers=(asked.against or MODULES) if asked.peers else ()).items():
        turns[who] = Patient(partial(other, file, python))
    _compare(bench, _subject(accuracy, name), rounds(turns, number=asked.pairs))


def _subject(accuracy: float, case: str) -> str:
    return f"time to a validation accuracy of {accuracy:g} on {case}"


@dataclass(frozen=True)
class Turn:
    """How long one side took in one round."""

    seconds: float
    """To the end of the first epoch with the accuracy; to the last one's end where none has it."""
    best: float
    """The highest validation accuracy seen."""
    epochs: int
    reached: bool


def turn(ends: Sequence[float], accuracies: Sequence[float], accuracy: float) -> Turn:
    """What the ends and the accuracies of a training's epochs say."""
    for epoch, (end, found) in enumerate(zip(ends, accuracies, strict=True), 1):
        if found >= accuracy:
            return Turn(end, found, epoch, reached=True)
    return Turn(ends[-1], max(accuracies), len(ends), reached=False)


class Patient:
    """One side's turn, which is not taken any more once it has missed the accuracy as often as it is tried."""

    def __init__(self, run: Callable[[], Turn]) -> None:
        self._run, self._missed = run, 0

    def __call__(self) -> Turn | None:
        if self._missed == TRIES:
            return None
        found = self._run()
        self._missed += not found.reached
        return found


def _compare(bench: Bench, what: str, found: dict[str, list[Turn | None]]) -> None:
    ours = [own for own in found.pop("Thaw") if own is not None]
    if late := [own for own in ours if not own.reached]:
        best = max(own.best for own in late)
        bench.lacks(what, f"Thaw did not reach it in {len(late)} of {len(ours)} rounds ({best:.3f} at best)")
        return
    for other, theirs in found.items():
        both = [(own, their) for own, their in zip(ours, theirs, strict=True) if their is not None]
        own_s, their_s = [own.seconds for own, _ in both], [their.seconds for _, their in both]
        bench.comparisons.append(
            Comparison(
                name=f"{what}, against {other}",
                ratio_of="their time / Thaw's",
                ratios=ratios(their_s, own_s),
                notes=_bound([their for _, their in both]),
                sides={"Thaw, s": own_s, f"{other}, s": their_s},
            )
        )


def _bound(theirs: Sequence[Turn]) -> str:
    """What a row has to say of the rounds in which the other side did not reach the accuracy."""
    late = [their for their in theirs if not their.reached]
    if not late:
        return ""
    when = "" if len(late) == len(theirs) else f" in {len(late)} of {len(theirs)} rounds"
    best, epochs = max(their.best for their in late), late[0].epochs
    return f"A lower bound: they did not reach it in {epochs} epochs{when} ({best:.3f} at best)"


if __name__ == "__main__":
    main()
