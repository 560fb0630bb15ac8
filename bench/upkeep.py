"""What checkpoints and tracking take of a training.

    python bench/upkeep.py [--net scratch/lenet5 tf_efficientnet_lite0] [--pairs 5]

The train stage as a user runs it, from random weights over all layers, with its usual checkpoints (every 100 steps and
at each epoch's end) and an MLflow store in a file. Counted are the seconds in which a checkpoint is written and put on
disk, in which metric points are taken down, and the processor time of the threads that send them to MLflow and that log
the machine's own use (MLflow's system metrics); divided by the seconds of all epochs. A cost, at most 0.03. The nets
are LeNet-5 on all of Fashion-MNIST at 32 px, whose epochs are short, and tf_efficientnet_lite0 on 12,000 of its
pictures at 64 px. On two cores 6 minutes, 16 where there is no bf16.
"""

import argparse
from typing import Any

from common import ROOT, Bench, Comparison, Target, parser, rounds, run
from project import PYTHON, Project, chosen

CASES: dict[str, dict[str, Any]] = {
    "scratch/lenet5": {"augment.px": 32, "augment.train_size": "all", "model.in_chans": 1},
    "tf_efficientnet_lite0": {"augment.px": 64, "augment.train_size": 12000},
}
COST = Target(at_most=0.03)
EPOCHS = 1


def main() -> None:
    """Measures each net."""
    made = parser(__doc__, settings=True)
    made.add_argument("--net", nargs="+", choices=CASES, default=list(CASES), help="those to measure")
    asked = made.parse_args()
    bench = Bench("upkeep", asked)
    bench.settings = {"epochs": EPOCHS}
    for net in asked.net[:1] if asked.quick else asked.net:
        _measure(bench, net, asked)
    bench.write()


def _measure(bench: Bench, net: str, asked: argparse.Namespace) -> None:
    smaller = (
        {"data.name": "digits", "augment.px": 32, "augment.train_size": "all", "model.in_chans": 1}
        if asked.quick
        else CASES[net]
    )
    project = Project({"model.name": net, "model.pretrained": False, **smaller})
    settings = {
        "train.phases": {"all": {"trainable": "all", "epochs": EPOCHS}},
        "tracking.log_model": False,
        **chosen(asked),
    }
    project.warm()

    def watched() -> dict[str, float]:
        project.begin_anew(settings)
        found: dict[str, float] = run([PYTHON, ROOT / "bench/watched.py"], folder=project.folder).told
        return found

    found = rounds({"Thaw": watched}, number=asked.pairs)["Thaw"]
    kinds = ("checkpoints", "logged", "sent", "system")
    parts = {kind: sorted(one[kind] / one["fit"] for one in found)[len(found) // 2] for kind in kinds}
    bench.comparisons.append(
        Comparison(
            name=f"checkpoints and tracking, {net} at {project.config.px} px, {project.sizes['train']:,} pictures",
            ratio_of="their seconds / those of the epochs (a cost)",
            ratios=[sum(one[kind] for kind in kinds) / one["fit"] for one in found],
            target=COST,
            notes=", ".join(f"{kind} {share:.2%}" for kind, share in parts.items()),
            sides={kind: [one[kind] for one in found] for kind in (*kinds, "fit")},
        )
    )


if __name__ == "__main__":
    main()
