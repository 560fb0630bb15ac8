"""What learns when: the phases, and how a net is frozen and thawed for one of them.

What is trainable follows from the phase alone, never from what an earlier phase did, so the same phase of a resumed
run and of an uninterrupted one agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from timm.models import group_parameters
from torch import nn

from pipeline.config import PhaseParams
from pipeline.errors import UserError


@dataclass(frozen=True)
class Phase:
    """One phase of the schedule; each is a `fit` of its own, with a new optimiser and scheduler."""

    name: str
    epochs: int
    trainable: str
    """head, last:N or all."""
    lr: float
    scheduler: str


def plan(phases: Mapping[str, PhaseParams], *, random_start: bool, fast_dev_run: bool) -> list[Phase]:
    """The phases in order. A net that starts from random weights has nothing worth freezing: all of it learns."""
    planned = [Phase(name, p.epochs, p.trainable, p.lr, p.scheduler) for name, p in phases.items()]
    if random_start:
        planned = [replace(phase, trainable="all") for phase in planned]
    if fast_dev_run:
        planned = [replace(phase, epochs=1) for phase in planned]
    return planned


def thaw(net: nn.Module, trainable: str) -> list[str]:
    """Makes exactly the parameters that `trainable` names learn; gives back their names.

    Args:
        net: a net that speaks timm's interface (`get_classifier`, `group_matcher`).
        trainable: "head" (the classifier), "last:N" (the head and the last N groups of layers) or "all".

    Raises:
        UserError: the net has fewer groups than N, or no classifier.
    """
    chosen = set(_names(net, trainable))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in chosen)
        parameter.grad = None
    return [name for name, _ in net.named_parameters() if name in chosen]


def set_mode(net: nn.Module) -> None:
    """Training mode for what learns, evaluation mode for every module that is frozen as a whole.

    In evaluation mode a frozen batch norm uses its stored statistics and leaves them alone, and a frozen dropout or
    stochastic depth does nothing. Modules without parameters follow the module that they stand in.
    """
    learns = [parameter.requires_grad for parameter in net.parameters()]
    if learns and not any(learns):
        net.eval()
        return
    net.training = True
    for child in net.children():
        set_mode(child)


def _names(net: Any, trainable: str) -> list[str]:
    everything = [name for name, _ in net.named_parameters()]
    if trainable == "all":
        return everything
    head = _head_names(net)
    if trainable == "head":
        return head
    wanted = int(trainable.removeprefix("last:"))
    groups = group_parameters(net, net.group_matcher(coarse=False))
    body = [kept for _, names in sorted(groups.items()) if (kept := [name for name in names if name not in set(head)])]
    if wanted > len(body):
        raise UserError(f"trainable last:{wanted}: this net has {len(body)} groups of layers below its head; use all")
    return [*head, *(name for group in body[-wanted:] for name in group)]


def _head_names(net: Any) -> list[str]:
    classifier = net.get_classifier()
    heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    parts = {id(parameter) for head in heads for parameter in head.parameters()}
    names = [name for name, parameter in net.named_parameters() if id(parameter) in parts]
    if not names:
        raise UserError("trainable head: this net has no classifier with weights; use all")
    return names
