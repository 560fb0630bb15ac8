"""Throughput of training on a GPU: Thaw against a bare step, and against timm's loop in its published settings.

    python bench/gpu.py [--net NAME ...] [--pairs 5]

Nets of usual sizes at 224 px from random weights on drawn photographs, in bf16, channels-last and compiled on every
side. The bare step has its one batch in the GPU's memory. timm's loop is peers/timm_loop.py with train.py's --amp (in
bf16), --channels-last and --torchcompile, and as many loader workers. Rates are of the epochs after the first, which
compiles. Without a GPU it says so and ends with exit code 2.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable

from common import Bench, Comparison, Target, cores, later, parser, ratios, refuse, rounds, worker
from project import PYTHON, Project, chosen, drawn

NETS = ("resnet50", "convnext_tiny", "vit_base_patch16_224", "tf_efficientnet_lite0", "densenet121")
PX, PACKED, BATCH, EPOCHS, CLASSES = 224, 256, 128, 3, 2
PICTURES = 8192
STEP = Target(at_least=0.95)
ASKED = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def main() -> None:
    """Measures every net, where there is a GPU."""
    made = parser(__doc__, settings=True)
    made.add_argument("--net", nargs="+", default=list(NETS))
    asked = made.parse_args()
    device = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=True).stdout.strip()
    if not device:
        refuse("bench-gpu: torch sees no CUDA GPU on this machine; nothing was measured")
    bench = Bench("gpu", asked)
    bench.facts["gpu"] = device
    bench.settings = {"px": PX, "batch": BATCH, "precision": "bf16", "channels_last": True, "compile": True}
    for net in asked.net[:1] if asked.quick else asked.net:
        _measure(bench, net, asked)
    bench.write()


def _measure(bench: Bench, net: str, asked: argparse.Namespace) -> None:
    pictures = drawn(train=2 * BATCH if asked.quick else PICTURES, val=16)
    packing = {"augment.px": PACKED, "augment.train_size": "all", "augment.val_fraction": 0.02}
    project = Project({"model.name": net, "model.pretrained": False, **packing}, pictures=pictures)
    seen, workers = project.sizes["train"], cores()
    settings = {
        "train.px": PX,
        "train.batch_size": BATCH,
        "train.lr": 1e-4,
        "train.phases": {"all": {"trainable": "all", "epochs": EPOCHS}},
        "train.transforms": {"random_resized_crop": {"scale": [0.08, 1.0]}, "horizontal_flip": {}},
        "train.precision": "bf16-mixed",
        "train.channels_last": True,
        "train.compile": True,
        "train.accelerator": "gpu",
        "train.workers": workers,
        "tracking.log_model": False,
        **chosen(asked),
    }
    fast = {"channels_last": True, "bf16": True, "compile": True, "in_chans": 3, "px": PX, "batch": BATCH}
    step = {"mode": "step", "keep_memory": True, "net": net, "classes": CLASSES, "warm": 20, "steps": 100, **fast}
    loop = {"net": net, "weights": "", "px": PX, "batch": BATCH, "epochs": EPOCHS, "lr": 1e-4, "workers": workers}
    loop |= {"folder": str(project.shared()), "frozen": False, "judge": False, "fast": True}

    def thaw() -> float:
        return seen / project.train(settings).later

    turns: dict[str, Callable[[], float]] = {
        "Thaw": thaw,
        "a bare step in memory": lambda: float(worker("bare.py", step, python=PYTHON).told["rate"]),
        "timm's loop": lambda: seen / later(worker("timm_loop.py", loop, python=PYTHON).told),
    }
    found = rounds(turns, number=asked.pairs)
    ours = found.pop("Thaw")
    for name, theirs in found.items():
        bench.comparisons.append(
            Comparison(
                name=f"training rate against {name}, {net} at {PX} px, bf16",
                ratio_of="Thaw's rate / theirs",
                ratios=ratios(ours, theirs),
                target=STEP if "bare" in name else None,
                sides={"Thaw, pictures/s": ours, f"{name}, pictures/s": theirs},
            )
        )


if __name__ == "__main__":
    main()
