"""The data path: batches for a small net, the wait for them, and offline augmentation.

    python bench/datapath.py [--part lenet usual wait offline] [--batch 256] [--pairs 5]

    lenet     LeNet-5 on Fashion-MNIST at 32 px with shift and flip, 54,000 pictures for training and 6,000 for
              validation. Against the bare loop on normalised tensors in memory, with nothing augmented
              (peers/bare.py): Thaw's rate at least 0.85 of it. An epoch after the first, validation included.
    usual     the same against the usual Lightning + torchvision + DataLoader loop with 2 workers
              (peers/lightning_usual.py): at least 2
    wait      tf_efficientnet_lite0 at 64 px, crops and flips, an epoch after the first: the share of it that the log
              says was spent waiting for data, and what Thaw's loader takes for a batch with nothing beside it by what
              a training step takes with its batch: costs, at most 0.03
    offline   copies a second that the augment stage packs (its time with 80 copies a picture less that with none), by
              what one process of albumentations makes on the same decoded pictures, times the cores: at least 0.9

On two cores: lenet 5 to 9 minutes, usual 6 to 16, wait 3, offline 2.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from common import Bench, Comparison, Target, cores, later, parser, positive, ratios, rounds, worker
from project import PYTHON, Project, chosen, drawn, published

PARTS = ("lenet", "usual", "wait", "offline")
LENET, LENET_PX, LR, WORKERS, EPOCHS = "scratch/lenet5", 32, 1e-3, 2, 3
NET, PX, WAITED = "tf_efficientnet_lite0", 64, 1280
COPIES, PACKED = 80, 128
OFFLINE = {"rotate": {"limit": 10}, "color_jitter": {}, "horizontal_flip": {}}
IN_MEMORY, KEEPING = "bare loop in memory", "bare loop in memory that keeps what is freed, as Thaw does"
USUAL = "usual Lightning loop"
BARE, TWICE, WAIT, RATE = Target(at_least=0.85), Target(at_least=2), Target(at_most=0.03), Target(at_least=0.9)


def main() -> None:
    """Measures the parts asked for."""
    made = parser(__doc__, settings=True)
    made.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--batch", type=positive, default=256, help="of LeNet-5's training; 256 unless said")
    asked = made.parse_args()
    bench = Bench("datapath", asked)
    bench.settings = {"batch": asked.batch, "epochs": EPOCHS}
    for parts, measure in (({"lenet", "usual"}, _lenet), ({"wait"}, _wait), ({"offline"}, _offline)):
        if parts & set(asked.part):
            measure(bench, asked)
    bench.write()


def _lenet(bench: Bench, asked: argparse.Namespace) -> None:
    size: dict[str, Any] = {"augment.train_size": 2000 if asked.quick else "all", "augment.val_fraction": 0.1}
    project = Project({"model.name": LENET, "model.in_chans": 1, "augment.px": LENET_PX, **size})
    epochs = 2 if asked.quick else EPOCHS
    settings = {
        "train.batch_size": asked.batch,
        "train.lr": LR,
        "train.phases": {"all": {"trainable": "all", "epochs": epochs}},
        "train.transforms": {"shift": {"limit": 0.1}, "horizontal_flip": {"p": 0.5}},
        "tracking.log_model": False,
        **chosen(asked),
    }
    spec = {
        "mode": "epochs",
        "prepared": str(project.folder / "data/prepared/fashion_mnist"),
        "net": LENET,
        "in_chans": 1,
        "px": LENET_PX,
        "batch": asked.batch,
        "epochs": epochs,
        "lr": LR,
        "workers": WORKERS,
        "channels_last": True,
        "bf16": False,
        "train": project.sizes["train"],
        "val": project.sizes["val"],
    }
    turns: dict[str, Callable[[], float]] = {"Thaw": lambda: project.train(settings).later}
    if "lenet" in asked.part:
        turns[IN_MEMORY] = lambda: later(worker("bare.py", spec, python=PYTHON).told)
        turns[KEEPING] = lambda: later(worker("bare.py", {**spec, "keep_memory": True}, python=PYTHON).told)
    if "usual" in asked.part:
        files = {"root": str(_torchvision_root(project))}
        turns[USUAL] = lambda: later(worker("lightning_usual.py", {**spec, **files}, python=PYTHON).told)
    found = rounds(turns, number=asked.pairs)
    ours = found.pop("Thaw")
    for name, theirs in found.items():
        bench.comparisons.append(
            Comparison(
                name=f"LeNet-5 on {spec['train']:,} pictures of Fashion-MNIST, shift and flip, against the {name}",
                ratio_of="their epoch / Thaw's",
                ratios=ratios(theirs, ours),
                target=TWICE if name == USUAL else BARE,
                sides={"Thaw, s": ours, f"{name}, s": theirs},
            )
        )


def _wait(bench: Bench, asked: argparse.Namespace) -> None:
    pictures = drawn(train=128 if asked.quick else WAITED, val=16)
    project = Project({"model.name": NET, "augment.px": 72, "augment.train_size": "all"}, pictures=pictures)
    settings = {
        "train.px": PX,
        "train.phases": {"all": {"trainable": "all", "epochs": 2}},
        "train.transforms": {"random_crop": {}, "horizontal_flip": {}},
        "tracking.log_model": False,
        **project.fast(px=PX),
        **chosen(asked),
    }
    steps = -(-project.sizes["train"] // project.config.train.batch_size)
    prepared = project.folder / "data/prepared/image_folder"
    spec = {"mode": "loader", "prepared": str(prepared), "project": str(project.folder)}
    found = rounds(
        {
            "epochs": lambda: project.train(settings),
            "a batch": lambda: float(worker("bare.py", spec, python=PYTHON).told["per_batch"]),
        },
        number=asked.pairs,
    )
    one_step = [run.later / steps for run in found["epochs"]]
    bench.comparisons += [
        Comparison(
            name=f"the wait for data, {NET} at {PX} px, crops and flips",
            ratio_of="data_wait in the log / the epoch (a cost)",
            ratios=[statistics.mean(run.waits[1:]) for run in found["epochs"]],
            target=WAIT,
        ),
        Comparison(
            name=f"the making of a batch, {NET} at {PX} px, crops and flips",
            ratio_of="a batch's time / a step's with it (a cost)",
            ratios=ratios(found["a batch"], one_step),
            target=WAIT,
            sides={"a batch, s": found["a batch"], "a step, s": one_step},
        ),
    ]


def _offline(bench: Bench, asked: argparse.Namespace) -> None:
    number, copies = (32, 2) if asked.quick else (244, COPIES)
    pictures = drawn(train=number, val=16)
    settings = {"model.name": LENET, "augment.px": PACKED, "augment.train_size": "all", "augment.transforms": OFFLINE}
    project = Project(settings, pictures=pictures)
    seen = project.sizes["train"]
    spec = {
        "mode": "albumentations",
        "prepared": str(project.folder / "data/prepared/image_folder"),
        "transforms": OFFLINE,
        "px": PACKED,
        "copies": copies,
    }

    pack = {"mode": "pack", "project": str(project.folder), "copies": copies}
    found = rounds(
        {
            "augment": lambda: seen * copies / float(worker("bare.py", pack, python=PYTHON).told["seconds"]),
            "albumentations": lambda: float(worker("bare.py", spec, python=PYTHON).told["rate"]),
        },
        number=asked.pairs,
    )
    limits = [rate * cores() for rate in found["albumentations"]]
    bench.comparisons.append(
        Comparison(
            name=f"offline augmentation at {PACKED} px on {cores()} cores",
            ratio_of="Thaw's copies/s / (one albumentations process's x cores)",
            ratios=ratios(found["augment"], limits),
            target=RATE,
            sides={"Thaw, copies/s": found["augment"], "albumentations, copies/s": found["albumentations"]},
        )
    )


def _torchvision_root(project: Project) -> Any:
    """Fashion-MNIST as torchvision's data set looks for it."""
    raw = project.folder / "torchvision/FashionMNIST/raw"
    if not raw.exists():
        raw.parent.mkdir(parents=True)
        raw.symlink_to(published("fashion_mnist"))
    return raw.parents[1]


if __name__ == "__main__":
    main()
