"""Every path under data/ and models/, anchored at the repository.

`dvc exp run --temp` works in a copy of the repository: what must survive it (the tracking store, partial downloads,
checkpoints in progress) is anchored at DVC_ROOT, which still names the real one; what DVC tracks is relative to
the folder that the stage runs in.
"""

import os
from pathlib import Path

PARAMS = Path("params.yaml")
METRICS = Path("models/metrics.json")
CURVES = Path("models/curves.csv")
CONFUSION = Path("models/confusion.csv")
NO_WEIGHTS = Path("models/no-weights")
"""The committed placeholder that `model.weights` names when no file of weights is given."""

WARM = Path("data/weights")
"""For copies of trained models that a training of the same net starts from; git-ignored, outside every out."""


def root() -> Path:
    """The repository: where the tracking store and everything that outlives a stage lies."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def raw(dataset: str) -> Path:
    """download's out: the dataset as published."""
    return Path("data/raw") / dataset


def prepared(dataset: str) -> Path:
    """augment's out: manifest, packed pictures, preview."""
    return Path("data/prepared") / dataset


def pretrained(model: str) -> Path:
    """The out of weights: the state to start from and where it came from."""
    return Path("models/pretrained") / model


def trained(model: str) -> Path:
    """train's out: weights, checkpoints, curves, the run's id."""
    return Path("models") / model / "train"


def evaluated(model: str) -> Path:
    """evaluate's out: predictions, per-class figures, plots, report."""
    return Path("models") / model / "evaluate"


def cache() -> Path:
    """Partial downloads and package-manager state; git-ignored, outside every out, safe to delete."""
    return root() / "data" / "cache"


def features() -> Path:
    """What frozen layers give for pictures; shared by all runs, bounded by train.cache_gb, safe to delete."""
    return cache() / "features"


def progress(model: str) -> Path:
    """Checkpoints of a training in progress and its lock; git-ignored and outside every out."""
    return root() / "models" / "progress" / model
