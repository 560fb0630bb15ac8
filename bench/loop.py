"""Fine-tuning all of a net from JPEGs: Thaw against the plain PyTorch loop, or with --peers against others.

    python bench/loop.py [--px 64 128 224] [--pairs 5] [--pictures FOLDER] [--peers]

tf_efficientnet_lite0, random resized crops and flips, three epochs over a folder of photographs (drawn ones where none
are given). The time is that of an epoch after the first, validation included; what Thaw does once (packing) and what a
start costs are outside. Targets against the plain loop (peers/plain.py): 1.5 at 64 and 128 px, 2 at 224 px. The peers
are Hugging Face's Trainer, timm's loop and fastai, each in its documented way (bench/peers/). On two cores 10 minutes;
with --peers, at 128 px alone unless --px says otherwise, 12.
"""

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from common import (
    PEERS_PYTHON,
    Bench,
    Comparison,
    Target,
    later,
    parser,
    peers_missing,
    positive,
    ratios,
    refuse,
    rounds,
    worker,
)
from project import PYTHON, Project, chosen, pictures_or_drawn

NET = "tf_efficientnet_lite0"
PLAIN = "the plain PyTorch loop"
PEERS = {
    "Hugging Face's Trainer": ("hf_trainer.py", "transformers"),
    "timm's loop": ("timm_loop.py", "timm"),
    "fastai": ("fastai_learner.py", "fastai"),
}
MODULES = [module for _, module in PEERS.values()]
BATCH, LR, WORKERS, EPOCHS = 32, 1e-3, 2, 3
PACKED = 8 / 7
"""Side of a packed picture by that which the net sees: room for crops."""
SMALL, LARGE = Target(at_least=1.5), Target(at_least=2)
LARGE_PX = 224


def main() -> None:
    """Measures every size."""
    made = parser(__doc__, pictures=True, peers=True, settings=True)
    made.add_argument("--px", nargs="+", type=positive, default=[])
    asked = made.parse_args()
    sizes = asked.px or ([32] if asked.quick else [128] if asked.peers else [64, 128, 224])
    pictures, real = pictures_or_drawn(asked.pictures, **({"train": 48, "val": 16} if asked.quick else {}))
    bench = Bench("loop", asked)
    bench.settings = {"net": NET, "batch": BATCH, "epochs": EPOCHS, "workers": WORKERS, "photographs": real}
    for px in sizes:
        _measure(bench, pictures, asked, px=px)
    bench.write()


def _measure(bench: Bench, pictures: Any, asked: argparse.Namespace, *, px: int) -> None:
    project = Project(
        {"model.name": NET, "augment.px": round(px * PACKED), "augment.train_size": "all"}, pictures=pictures
    )
    epochs = 2 if asked.quick else EPOCHS
    settings = {
        "train.px": px,
        "train.batch_size": BATCH,
        "train.lr": LR,
        "train.phases": {"finetune": {"trainable": "all", "epochs": epochs}},
        "train.transforms": {"random_resized_crop": {"scale": [0.08, 1.0]}, "horizontal_flip": {"p": 0.5}},
        "tracking.log_model": False,
        **project.fast(px=px),
        **chosen(asked),
    }
    spec = {
        "folder": str(project.shared()),
        "net": NET,
        "weights": project.weights(),
        "px": px,
        "batch": BATCH,
        "epochs": epochs,
        "lr": LR,
        "workers": WORKERS,
        "frozen": False,
        "judge": False,
    }
    turns: dict[str, Callable[[], float]] = {"Thaw": lambda: project.train(settings).later}
    for name, (file, python) in others(bench, peers=MODULES if asked.peers else ()).items():
        turns[name] = lambda file=file, python=python: later(worker(file, spec, python=python).told)
    found = rounds(turns, number=asked.pairs)
    ours = found.pop("Thaw")
    for name, theirs in found.items():
        target = (LARGE if px >= LARGE_PX else SMALL) if name == PLAIN else None
        bench.comparisons.append(
            Comparison(
                name=f"fine-tuning from JPEGs against {name}, {NET} at {px} px",
                ratio_of="their epoch / Thaw's",
                ratios=ratios(theirs, ours),
                target=target,
                sides={"Thaw, s": ours, f"{name}, s": theirs},
            )
        )


def others(bench: Bench, *, peers: Collection[str]) -> dict[str, tuple[str, Path | str]]:
    """Whom Thaw is compared with: each one's file in bench/peers/, and its interpreter.

    Args:
        peers: modules of theirs, of MODULES; none for the plain loop.
    """
    if not peers:
        return {PLAIN: ("plain.py", PYTHON)}
    found: dict[str, tuple[str, Path | str]] = {}
    for name, (file, module) in PEERS.items():
        if module not in peers:
            continue
        if why := peers_missing(module):
            bench.lacks(name, why)
        else:
            found[name] = (file, PEERS_PYTHON)
    if not found:
        refuse("none of the peers can be run; `make bench-peers` makes their environment")
    return found


if __name__ == "__main__":
    main()
