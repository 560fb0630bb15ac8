"""Curves: what the number of pictures, of frozen epochs and of threads costs.

    python bench/scaling.py [--part pictures epochs threads] [--pairs 2]

tf_efficientnet_lite0, Thaw beside the plain PyTorch loop, on drawn photographs.

    pictures   an epoch of fine-tuning at 64 px, after the first, over 250 to 2,000 pictures
    epochs     1 to 50 frozen epochs at 128 px (the plain loop up to 5: it goes on in a straight line)
    threads    an epoch of fine-tuning at 128 px, after the first, with 1 thread and with 2

Points are medians over the rounds. They are drawn in docs/performance.md and no claim is made of them. On two cores 10
minutes.
"""

import argparse
import statistics
from typing import Any

from common import Bench, has_bf16, later, parser, rounds, worker
from project import PYTHON, Project, chosen, drawn

NET, BATCH, LR, WORKERS = "tf_efficientnet_lite0", 32, 1e-3, 2
PARTS = ("pictures", "epochs", "threads")
PICTURES, EPOCHS, PLAIN_EPOCHS, THREADS = (250, 500, 1000, 2000), (1, 5, 20, 50), (1, 5), (1, 2)
SMALL_PX, PX = 64, 128


class _Case:
    """One set of drawn pictures at one size, which both sides train on."""

    def __init__(self, asked: argparse.Namespace, *, pictures: int, px: int) -> None:
        packing = {"augment.px": round(px * 8 / 7), "augment.train_size": "all"}
        self._project = Project({"model.name": NET, **packing}, pictures=drawn(train=pictures, val=16))
        self._px, self._chosen = px, chosen(asked)

    def thaw(self, *, epochs: int, frozen: bool = False, threads: int = 0) -> dict[str, Any]:
        phase = {"trainable": "head" if frozen else "all", "epochs": epochs, "strength": 0.0 if frozen else 1.0}
        settings: dict[str, Any] = {
            "train.px": self._px,
            "train.batch_size": BATCH,
            "train.lr": LR,
            "train.phases": {"phase": phase},
            "train.transforms": {"random_resized_crop": {"scale": [0.08, 1.0]}, "horizontal_flip": {}},
            "tracking.log_model": False,
            **self._project.fast(px=self._px),
        }
        if frozen and self._project.knows("cache"):
            settings["train.cache"] = "bf16" if has_bf16() else "fp32"
        done = self._project.train({**settings, **self._chosen}, environment=_threads(threads))
        return {"train": done.phases, "ends": done.ends}

    def plain(self, *, epochs: int, frozen: bool = False, threads: int = 0) -> dict[str, Any]:
        spec = {
            "folder": str(self._project.shared()),
            "net": NET,
            "weights": self._project.weights(),
            "px": self._px,
            "batch": BATCH,
            "epochs": epochs,
            "lr": LR,
            "workers": WORKERS,
            "frozen": frozen,
            "judge": False,
        }
        return worker("plain.py", spec, python=PYTHON, environment=_threads(threads)).told


def main() -> None:
    """Measures the curves asked for."""
    made = parser(__doc__, pairs=2, settings=True)
    made.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    asked = made.parse_args()
    bench = Bench("scaling", asked)
    bench.settings = {"net": NET, "batch": BATCH}
    for part, measure in (("pictures", _pictures), ("epochs", _epochs), ("threads", _over_threads)):
        if part in asked.part:
            measure(bench, asked)
    bench.write()


def _pictures(bench: Bench, asked: argparse.Namespace) -> None:
    points: dict[str, dict[int, float]] = {"Thaw": {}, "plain PyTorch loop": {}}
    for number in (32, 48) if asked.quick else PICTURES:
        case = _Case(asked, pictures=number, px=SMALL_PX)
        found = rounds(
            {
                f"Thaw, {number} pictures": lambda case=case: later(case.thaw(epochs=2)),
                f"plain, {number} pictures": lambda case=case: later(case.plain(epochs=2)),
            },
            number=asked.pairs,
        )
        for name, values in zip(points, found.values(), strict=True):
            points[name][number] = statistics.median(values)
    _draw(bench, "pictures", points, x=f"pictures, {SMALL_PX} px", y="time of an epoch of fine-tuning")


def _epochs(bench: Bench, asked: argparse.Namespace) -> None:
    case = _Case(asked, pictures=32 if asked.quick else 250, px=SMALL_PX if asked.quick else PX)
    points: dict[str, dict[int, float]] = {"Thaw": {}, "plain PyTorch loop": {}}
    ours, theirs = ((1, 2), (1,)) if asked.quick else (EPOCHS, PLAIN_EPOCHS)
    turns = {("Thaw", count): lambda count=count: case.thaw(epochs=count, frozen=True)["train"] for count in ours}
    turns |= {
        ("plain PyTorch loop", count): lambda count=count: case.plain(epochs=count, frozen=True)["train"]
        for count in theirs
    }
    found = rounds({f"{name}, {count} epochs": turn for (name, count), turn in turns.items()}, number=asked.pairs)
    for (name, count), values in zip(turns, found.values(), strict=True):
        points[name][count] = statistics.median(values)
    _draw(bench, "epochs", points, x=f"frozen epochs, {PX} px", y="time of training")


def _over_threads(bench: Bench, asked: argparse.Namespace) -> None:
    case = _Case(asked, pictures=32 if asked.quick else 250, px=SMALL_PX if asked.quick else PX)
    points: dict[str, dict[int, float]] = {"Thaw": {}, "plain PyTorch loop": {}}
    for threads in THREADS:
        found = rounds(
            {
                f"Thaw, {threads} threads": lambda threads=threads: later(case.thaw(epochs=2, threads=threads)),
                f"plain, {threads} threads": lambda threads=threads: later(case.plain(epochs=2, threads=threads)),
            },
            number=asked.pairs,
        )
        for name, values in zip(points, found.values(), strict=True):
            points[name][threads] = statistics.median(values)
    _draw(bench, "threads", points, x="threads", y="time of an epoch of fine-tuning")


def _draw(bench: Bench, name: str, points: dict[str, dict[int, float]], *, x: str, y: str) -> None:
    rounded = {side: {key: float(f"{value:.4g}") for key, value in found.items()} for side, found in points.items()}
    bench.series[name] = {"x": x, "y": y, "points": rounded}
    for side, found in rounded.items():
        print(f"{name}, {side}: " + ", ".join(f"{key}: {value:.3g} s" for key, value in found.items()), flush=True)


def _threads(number: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(number)} if number else {}


if __name__ == "__main__":
    main()
