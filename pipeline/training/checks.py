"""What a net does not take of a schedule, found before anything is begun, and without pictures."""

from collections.abc import Sequence

from torch import nn

from pipeline import nets
from pipeline.errors import blaming
from pipeline.parameters import Config
from pipeline.training import optim, schedule, tuning
from pipeline.training.schedule import Phase


def check(phases: Sequence[Phase], net: nn.Module, config: Config) -> None:
    """Refuses pictures that are too small, an optimiser that is not there, layers that the net has not.

    Raises:
        UserError: what is wrong, and of which parameter.
    """
    tuning.check(config.train)
    for phase in phases:
        with blaming("model.name"):
            nets.check_px(net, phase.px, name=config.model.name)
        with blaming("train.optimizer"):
            optim.check_optimizer(phase.optimizer)
        with blaming("train.phases"):
            schedule.thaw(net, phase.trainable)
