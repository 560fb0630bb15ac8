"""Frozen epochs: Thaw keeps what the frozen layers gave; everyone else computes it again in each epoch.

    python bench/frozen.py [--part forward plain layers] [--pairs 5] [--pictures FOLDER] [--peers]

The head of tf_efficientnet_lite0 is trained at 224 px on a folder of photographs (drawn ones where none are given), in
one phase with strength 0, so that every epoch sees the same pictures.

    forward   5 and 50 frozen epochs of Thaw against one bare pass over the same packed pictures, a cost of at most 1.3:
              a plain pass (fp32, default memory format), and one in Thaw's own precision and memory format that keeps
              freed memory as Thaw does
    plain     5 epochs of the plain PyTorch loop (peers/plain.py), as in its tutorial and with its batch norms frozen as
              well, or, with --peers, of fastai's fit_one_cycle (peers/fastai_learner.py): their time by Thaw's, at
              least 8, at an accuracy within Thaw's 95% interval or below it
    layers    three epochs of last:2 without the cache, by the time with it: at least 1.8

Thaw is run as a user runs it, as the train stage in a process of its own. Its time is that of its phases, from the
moment that the net stands, the filling of the cache included; the whole stages, with imports and tracking, are compared
beside. Every run begins without a cache. On two cores: forward and layers together 9 minutes, plain 20, or fastai 10.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    PEERS_PYTHON,
    Bench,
    Comparison,
    Target,
    has_bf16,
    parser,
    peers_missing,
    ratios,
    refuse,
    rounds,
    worker,
)
from project import PYTHON, Project, Training, chosen, pictures_or_drawn

NET = "tf_efficientnet_lite0"
PARTS = ("forward", "plain", "layers")
PLAIN, FASTAI = "the plain PyTorch loop", "fastai's fit_one_cycle"
FROZEN_BN = "the plain PyTorch loop with its batch norms frozen"
FEW, MANY, LAYERED = 5, 50, 3
"""Epochs."""
BATCH, LR, WORKERS = 32, 3e-3, 2
COST, FASTER, LAYERS = Target(at_most=1.3), Target(at_least=8), Target(at_least=1.8)


def main() -> None:
    """Measures the parts asked for."""
    made = parser(__doc__, pictures=True, peers=True, settings=True)
    made.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    asked = made.parse_args()
    px, pack = (64, 72) if asked.quick else (224, 256)
    pictures, real = pictures_or_drawn(asked.pictures, **({"train": 48, "val": 16} if asked.quick else {}))
    project = Project({"model.name": NET, "augment.px": pack, "augment.train_size": "all"}, pictures=pictures)
    project.warm()
    bench = Bench("frozen", asked)
    bench.settings = {"net": NET, "px": px, "batch": BATCH, "pictures": project.sizes, "photographs": real}
    side = _Sides(project, asked, px=px)
    if not side.caches:
        bench.lacks("cache", "this tree has no train.cache, so frozen layers are computed again")
    for part, measure in (("forward", _forward), ("plain", _plain), ("layers", _layers)):
        if part in asked.part:
            measure(bench, side, asked)
    bench.write()


class _Sides:
    """What takes turns."""

    def __init__(self, project: Project, asked: argparse.Namespace, *, px: int) -> None:
        self.project, self.px = project, px
        self.caches = project.knows("cache")
        self.bf16 = has_bf16()
        self.what = f"{NET} at {px} px in {'bf16' if self.bf16 else 'fp32'}"
        """What is trained, and how: a machine without bf16 gets rows of its own."""
        self.test: dict[str, float] = {}
        self._settings: dict[str, Any] = {
            "train.px": px,
            "train.batch_size": BATCH,
            "train.lr": LR,
            "train.precision": "bf16-mixed" if self.bf16 else "32-true",
        }
        self._set = chosen(asked)

    def thaw(self, *, epochs: int, trainable: str = "head", cached: bool = True, judge: bool = False) -> Training:
        """One phase in which most is frozen."""
        settings = dict(self._settings)
        if self.caches:
            settings["train.cache"] = ("bf16" if self.bf16 else "fp32") if cached else "none"
        settings["train.phases"] = {"frozen": {"trainable": trainable, "epochs": epochs, "strength": 0}}
        done = self.project.train({**settings, **self._set})
        if judge and not self.test:
            self.test = self.project.judged()
        return done

    def forward(self, *, plain: bool) -> float:
        """Seconds of one bare pass, in fp32 and the default memory format, or as Thaw computes."""
        spec = {
            "mode": "forward",
            "prepared": str(self.project.folder / "data/prepared/image_folder"),
            "net": NET,
            "in_chans": 3,
            "px": self.px,
            "batch": 64,
            "channels_last": not plain,
            "bf16": self.bf16 and not plain,
            "keep_memory": not plain,
        }
        return float(worker("bare.py", spec).told["train"])

    def peer(self, file: str, python: Path | str, *, epochs: int, frozen_bn: bool) -> dict[str, Any]:
        """Another side's figures: `train` and `whole` seconds, and `test` accuracy."""
        spec = {
            "folder": str(self.project.shared()),
            "net": NET,
            "weights": self.project.weights(),
            "px": self.px,
            "batch": BATCH,
            "epochs": epochs,
            "lr": LR,
            "workers": WORKERS,
            "frozen": True,
            "frozen_bn": frozen_bn,
            "judge": True,
        }
        done = worker(file, spec, python=python)
        return {**done.told, "whole": done.line("END")[0]}


def _forward(bench: Bench, side: _Sides, asked: argparse.Namespace) -> None:
    counts = (2, 4) if asked.quick else (FEW, MANY)
    passes = {"a plain forward pass": True, "a forward pass with Thaw's settings": False}
    turns: dict[str, Callable[[], Any]] = {
        name: lambda plain=plain: side.forward(plain=plain) for name, plain in passes.items()
    }
    for count in counts:
        turns[f"{count} epochs"] = lambda count=count: side.thaw(epochs=count)
    found = rounds(turns, number=asked.pairs)
    for count in counts:
        phases = [run.phases for run in found[f"{count} epochs"]]
        for name in passes:
            bench.comparisons.append(
                Comparison(
                    name=f"{count} frozen epochs against {name}, {side.what}",
                    ratio_of="Thaw's phase / forward pass (a cost)",
                    ratios=ratios(phases, found[name]),
                    target=COST,
                    sides={"Thaw's phase, s": phases, "forward pass, s": found[name]},
                )
            )


def _plain(bench: Bench, side: _Sides, asked: argparse.Namespace) -> None:
    count = 2 if asked.quick else FEW
    turns: dict[str, Callable[[], Any]] = {"Thaw": lambda: side.thaw(epochs=count, judge=True)}
    for name, (file, python) in _others(peers=asked.peers).items():
        turns[name] = partial(side.peer, file, python, epochs=count, frozen_bn=name == FROZEN_BN)
    found = rounds(turns, number=asked.pairs)
    thaw = found.pop("Thaw")
    for name, runs in found.items():
        test = sorted(run["test"] for run in runs)[len(runs) // 2]
        same = test <= side.test["top1_high"]
        accuracy = (
            f"top-1 on {side.test['pictures']:.0f} test pictures: {side.test['top1']:.3f} "
            f"({side.test['top1_low']:.3f} to {side.test['top1_high']:.3f}), theirs {test:.3f}"
        )
        for what, ours, theirs, target in (
            ("training", [run.phases for run in thaw], [run["train"] for run in runs], FASTER),
            ("whole process", [run.stage for run in thaw], [run["whole"] for run in runs], None),
        ):
            bench.comparisons.append(
                Comparison(
                    name=f"{count} frozen epochs against {name}, {what}, {side.what}",
                    ratio_of="their time / Thaw's",
                    ratios=ratios(theirs, ours),
                    target=target,
                    holds=same,
                    notes=accuracy if target else "",
                    sides={"Thaw, s": ours, f"{name}, s": theirs},
                )
            )


def _others(*, peers: bool) -> dict[str, tuple[str, Path | str]]:
    if not peers:
        return {PLAIN: ("plain.py", PYTHON), FROZEN_BN: ("plain.py", PYTHON)}
    if why := peers_missing("fastai"):
        refuse(f"{FASTAI}: {why}")
    return {FASTAI: ("fastai_learner.py", PEERS_PYTHON)}


def _layers(bench: Bench, side: _Sides, asked: argparse.Namespace) -> None:
    if not side.caches:
        return
    count = 2 if asked.quick else LAYERED
    found = rounds(
        {
            "cached": lambda: side.thaw(epochs=count, trainable="last:2").phases,
            "not cached": lambda: side.thaw(epochs=count, trainable="last:2", cached=False).phases,
        },
        number=asked.pairs,
    )
    bench.comparisons.append(
        Comparison(
            name=f"{count} epochs of last:2, cache against none, {side.what}",
            ratio_of="time without / time with",
            ratios=ratios(found["not cached"], found["cached"]),
            target=LAYERS,
            sides={"cached, s": found["cached"], "not cached, s": found["not cached"]},
        )
    )


if __name__ == "__main__":
    main()
