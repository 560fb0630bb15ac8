"""fastai, as in its documented vision tutorial: ImageDataLoaders.from_folder, vision_learner, fit_one_cycle.

Pictures are resized (item_tfms=Resize) and not augmented, as in the tutorial's first example: the cheapest way. fastai
puts its own head onto timm's body and trains frozen batch norms, which is its default. What differs from the tutorial:
the body's weights come from a file, and so pretrained=False is followed by freeze() and normalisation, which
fastai does itself with pretrained=True; loader workers are those of the comparison.
"""

from pathlib import Path
from typing import Any

import torch
from fastai.vision.all import (
    Callback,
    ImageDataLoaders,
    Normalize,
    Resize,
    accuracy,
    vision_learner,
)

from shared import Clock, build, load, normalization, spec, test_top1


class Noting(Callback):
    """Tells the clock of each epoch's accuracy."""

    order = 90  # after the recorder, which has the epoch's values

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_epoch(self) -> None:
        self.clock.epoch(float(self.learn.recorder.values[-1][-1]))


def main() -> None:
    """Trains as the spec says."""
    asked = spec()
    torch.manual_seed(0)
    usual = build(asked.net, num_classes=2, weights="")
    loaders = ImageDataLoaders.from_folder(
        Path(asked.folder),
        train="train",
        valid="val",
        item_tfms=Resize(asked.px),
        batch_tfms=Normalize.from_stats(*normalization(usual)),
        bs=asked.batch,
        num_workers=asked.workers,
    )
    learner: Any = vision_learner(loaders, asked.net, metrics=accuracy, pretrained=False)
    load(learner.model[0].model, asked.weights)
    if asked.frozen:
        learner.freeze()
    else:
        learner.unfreeze()
    clock = Clock(stop_at=asked.stop_at)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(asked.epochs, asked.lr, cbs=Noting(clock))
    clock.end()
    clock.tell(test=test_top1(learner.model, usual, asked))


if __name__ == "__main__":
    main()
