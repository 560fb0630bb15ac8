"""Throughput of training against its limit, for six nets.

    python bench/throughput.py [--net NAME ...] [--pairs 5]

The limit is a bare training step (forward, loss, backward, AdamW) over and over on one batch held in memory, in the
same precision and memory format: no data, no metrics, no checkpoints. Thaw trains all layers from random weights on
packed drawn photographs at 64 px with crops and flips; its rate is that of the epochs after the first, with the
validation of a few pictures in them. On two cores 10 minutes.
"""

import argparse
from typing import Any

from common import Bench, Comparison, parser, ratios, rounds, worker
from project import PYTHON, Project, chosen, drawn

NETS = (
    "tf_efficientnet_lite0",
    "resnet18",
    "mobilenetv3_large_100",
    "densenet121",
    "convnext_atto",
    "scratch/resnet20",
)
PX, BATCH, EPOCHS, CLASSES = 64, 64, 3, 2
TRAIN, VAL = 640, 16
"""Pictures; 2% of the first are validated on."""


def main() -> None:
    """Measures every net."""
    made = parser(__doc__, settings=True)
    made.add_argument("--net", nargs="+", default=[])
    asked = made.parse_args()
    bench = Bench("throughput", asked)
    bench.settings = {"px": PX, "batch": BATCH, "pictures": TRAIN, "epochs": EPOCHS}
    for net in asked.net or (["scratch/resnet20"] if asked.quick else NETS):
        _measure(bench, net, asked)
    bench.write()


def _measure(bench: Bench, net: str, asked: argparse.Namespace) -> None:
    train, val = (128, 16) if asked.quick else (TRAIN, VAL)
    packing = {"augment.px": 72, "augment.train_size": "all", "augment.val_fraction": 0.02}
    project = Project({"model.name": net, "model.pretrained": False, **packing}, pictures=drawn(train=train, val=val))
    settings = {
        "train.px": PX,
        "train.batch_size": BATCH,
        "train.lr": 1e-4,
        "train.phases": {"all": {"trainable": "all", "epochs": 2 if asked.quick else EPOCHS}},
        "train.transforms": {"random_crop": {}, "horizontal_flip": {}},
        "tracking.log_model": False,
        **chosen(asked),
    }
    seen = project.sizes["train"]
    spec = {
        "mode": "step",
        "keep_memory": True,
        "net": net,
        "classes": CLASSES,
        "in_chans": 3,
        "px": PX,
        "batch": BATCH,
        "warm": 1 if asked.quick else 3,
        "steps": 2 if asked.quick else 15,
        "channels_last": settings.get("train.channels_last", True),
        "bf16": settings.get("train.precision") == "bf16-mixed",
        "compile": False,
    }

    def thaw() -> float:
        return seen / project.train(settings).later

    def limit() -> float:
        told: dict[str, Any] = worker("bare.py", spec, python=PYTHON).told
        return float(told["rate"])

    found = rounds({f"{net}: Thaw": thaw, f"{net}: bare step": limit}, number=asked.pairs)
    ours, bare = found.values()
    bench.comparisons.append(
        Comparison(
            name=f"training rate against a bare step in memory, {net} at {PX} px",
            ratio_of="Thaw's rate / bare step's",
            ratios=ratios(ours, bare),
            sides={"Thaw, pictures/s": ours, "bare step, pictures/s": bare},
        )
    )


if __name__ == "__main__":
    main()
