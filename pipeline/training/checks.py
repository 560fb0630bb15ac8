"""What a training refuses before anything is begun: what the net, the machine or the pictures do not take."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import nn

from pipeline import machine, nets
from pipeline.data.store import Store
from pipeline.errors import UserError, blaming
from pipeline.parameters import Config, TrainParams
from pipeline.training import optim, schedule, tuning
from pipeline.training.classifier import Classifier
from pipeline.training.fit import num_processes
from pipeline.training.schedule import Phase
from pipeline.training.weights import ModelCard

SINGLE = "Expected more than 1 value per channel when training"
"""What torch's batch norms say to a single picture whose map is one pixel large."""


def check_schedule(phases: Sequence[Phase], net: nn.Module, config: Config) -> None:
    """Refuses what can be known without pictures: too small a side, an optimiser or layers that are not there.

    Raises:
        UserError: with the parameter that is to blame.
    """
    for phase in phases:
        with blaming("model.name"):
            nets.check_px(net, phase.px, name=config.model.name)
        with blaming("train.optimizer"):
            optim.check_optimizer(phase.optimizer)
        with blaming("train.phases"):
            schedule.thaw(net, phase.trainable)


def check(config: Config, store: Store, net: nn.Module, card: ModelCard, phases: list[Phase]) -> int:
    """Refuses the first thing that is wrong; gives back how many processes train together.

    Raises:
        UserError: with the parameter that is to blame.
    """
    params = config.train
    check_schedule(phases, net, config)
    world = num_processes(params, phases[0])
    if params.sync_bn and world > 1 and machine.device(params.accelerator).type != "cuda":
        raise UserError(
            "batch norms meet on GPUs alone, and there is none to use; take false", parameter="train.sync_bn"
        )
    for phase in phases:
        _check_batch(phase, params, world=world)
    if (pictures := store.counts()["val"]) < world:
        message = f"{pictures} validation pictures for {world} processes are too few; raise it"
        raise UserError(message, parameter="augment.val_fraction")
    for phase in phases:
        alone = phase.batch_size == world * phase.accumulate and not (params.sync_bn and world > 1)
        if alone and not learns_from_one(net, phase, params, card):
            raise UserError(
                f"the batch norms of {card.name} learn from no single picture of {phase.px} px, and that is what "
                f"{_told(phase, world)} makes; use {2 * phase.batch_size} or more",
                parameter=_parameter(params, phase, "batch_size"),
            )
    return world


def learns_from_one(net: nn.Module, phase: Phase, params: TrainParams, card: ModelCard) -> bool:
    """Whether a net in a phase's training takes a batch of one picture; tried on a copy."""
    plain = params.model_copy(update={"compile": False, "average": "none", "activity": 0.0})
    with tuning.untouched_randomness():
        trial = Classifier(
            deepcopy(net),
            phase=phase,
            params=plain,
            pictures=1,
            num_classes=len(card.classes),
            mean=card.mean,
            std=card.std,
        )
        picture = torch.zeros(1, card.in_chans, card.px, card.px, dtype=torch.uint8)
        try:
            with torch.no_grad():
                trial.losses(trial.net, (picture, torch.zeros(1, dtype=torch.int64)))
        except ValueError as error:
            if str(error).startswith(SINGLE):
                return False
            raise
    return True


def _check_batch(phase: Phase, params: TrainParams, *, world: int) -> None:
    pieces = world * phase.accumulate
    if phase.batch_size % pieces:
        below, above = phase.batch_size // pieces * pieces, -(-phase.batch_size // pieces) * pieces
        # Where a phase has parts of its own and takes train's batch, it is the parts that are wrong.
        own = [
            key for key in ("batch_size", "accumulate") if _parameter(params, phase, key).startswith("train.phases.")
        ]
        raise UserError(
            f"{_told(phase, world)} does not divide; use a batch_size of {f'{below} or {above}' if below else above}",
            parameter=_parameter(params, phase, own[0] if own else "batch_size"),
        )


def _told(phase: Phase, world: int) -> str:
    shared = [f" in {world} processes"] if world > 1 else []
    shared += [f" in {phase.accumulate} parts"] if phase.accumulate > 1 else []
    return f"a batch of {phase.batch_size}{''.join(shared)}"


def _parameter(params: TrainParams, phase: Phase, key: str) -> str:
    """The dotted name of what set a phase's value: its own, or the one of `train`."""
    own = isinstance(params.phases, Mapping) and getattr(params.phases[phase.name], key) != "auto"
    return f"train.phases.{phase.name}.{key}" if own else f"train.{key}"
