"""What learns when: the phases, and how a net is frozen and thawed for one of them.

What is trainable follows from the phase alone, never from what an earlier phase did, so the same phase of a resumed
run and of an uninterrupted one agree.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from timm.models import group_parameters
from torch import nn

from pipeline.errors import UserError, nearest
from pipeline.parameters import PhaseParams, TrainParams

_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of the schedule; each is a `fit` of its own, with a new optimiser and scheduler."""

    name: str
    trainable: str
    """As `parameters.PhaseParams` has it."""
    epochs: int
    steps: int
    """Optimiser steps after which it ends; 0 for after its epochs."""
    lr: float | Literal["find"]
    scheduler: str
    warmup: float | Literal["auto"]
    layer_decay: float
    optimizer: str
    weight_decay: float
    clip: float
    patience: int
    batch_size: int
    accumulate: int
    px: int
    """Side that pictures are resized to, in pixels."""
    strength: float
    views: int
    """Augmented versions of a picture; 0 for a fresh one every epoch."""

    def epochs_of(self, pictures: int) -> int:
        """Epochs that it takes at most, for so many training pictures."""
        return -(-self.steps // self.steps_an_epoch(pictures)) if self.steps else self.epochs

    def steps_an_epoch(self, pictures: int) -> int:
        """Optimiser steps of a whole epoch."""
        return -(-pictures // self.batch_size)

    def total_steps(self, pictures: int) -> int:
        """Optimiser steps of the phase, unless it ends early."""
        return self.steps or self.epochs * self.steps_an_epoch(pictures)


def plan(train: TrainParams, net: nn.Module, *, px: int, random_start: bool) -> list[Phase]:
    """The phases in order. A net that starts from random weights has nothing worth freezing: all of it learns.

    Args:
        px: side of the square that the net sees, in pixels, in phases that say none.
    """
    asked = ready_made(train.phases, net) if isinstance(train.phases, str) else train.phases
    planned = [_phase(name, train.phase(phase), px=px) for name, phase in asked.items()]
    if random_start:
        planned = [replace(phase, trainable="all") for phase in planned]
    if train.fast_dev_run:
        planned = [replace(phase, epochs=1, steps=0) for phase in planned]
    return planned


def ready_made(name: str, net: nn.Module) -> dict[str, PhaseParams]:
    """The phases of a schedule by name; what they leave to `train` is left to it.

    linear_probe: the head alone. freeze_then_finetune: an epoch of the head, then all. gradual_unfreezing: an epoch of
    the head, one more stage of blocks each epoch, then all (Howard and Ruder, "Universal Language Model Fine-tuning",
    2018). discriminative: freeze_then_finetune with a smaller rate for each block below (the same paper).
    full_finetune: all at once. from_scratch: all, on a cosine after a warm-up. bitfit: head and biases (Ben Zaken et
    al. 2021).
    """
    head, everything = PhaseParams(trainable="head", epochs=1), PhaseParams(trainable="all")
    if name == "gradual_unfreezing":
        middle = {f"last_{n}": PhaseParams(trainable=f"last:{n}", epochs=1) for n in _stages(net)}
        return {"head": head, **middle, "all": everything}
    schedules: dict[str, dict[str, PhaseParams]] = {
        "linear_probe": {"head": PhaseParams(trainable="head")},
        "freeze_then_finetune": {"frozen": head, "finetune": everything},
        "discriminative": {"frozen": head, "finetune": PhaseParams(trainable="all", layer_decay=0.75)},
        "full_finetune": {"all": everything},
        "from_scratch": {"all": PhaseParams(trainable="all", scheduler="cosine", warmup=0.05)},
        "bitfit": {"biases": PhaseParams(trainable="head+params:*.bias")},
    }
    return schedules[name]


def thaw(net: nn.Module, trainable: str) -> list[str]:
    """Makes exactly the parameters that `trainable` names learn; gives back their names.

    Args:
        net: a net that speaks timm's interface (`get_classifier`, `group_matcher`).
        trainable: "head" (the classifier), "last:N" (the head and the last N groups of layers), "from:MODULE" (the
            groups from that module's on, and the head), "params:NAME" (those parameters), "all", or several joined by
            "+". MODULE and NAME may have the wildcards * ? [].

    Raises:
        UserError: the net has fewer groups than N, no such module or parameter, or no classifier.
    """
    chosen = {name for part in trainable.split("+") for name in _names(net, part)}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in chosen)
        parameter.grad = None
    return [name for name, _ in net.named_parameters() if name in chosen]


def set_mode(net: nn.Module, *, adapt_bn: bool = False) -> None:
    """Training mode for what learns, evaluation mode for every module that is frozen as a whole.

    In evaluation mode a frozen batch norm uses its stored statistics and leaves them alone, and a frozen dropout or
    stochastic depth does nothing. Modules without parameters follow the module that they stand in. With `adapt_bn` the
    frozen batch norms alone are in training mode: their weights stay, their statistics follow the pictures.
    """
    learns = [parameter.requires_grad for parameter in net.parameters()]
    if learns and not any(learns):
        net.eval()
        for module in net.modules():
            if adapt_bn and isinstance(module, _BatchNorm):
                module.train()
        return
    net.training = True
    for child in net.children():
        set_mode(child, adapt_bn=adapt_bn)


def fixed(net: nn.Module) -> frozenset[str]:
    """Names of the weights and buffers that training leaves as they are, in the mode that `set_mode` has left."""
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    moving = {prefix for prefix, module in net.named_modules() if module.training}
    buffers = {name for name, _ in net.named_buffers() if name.rpartition(".")[0] in moving}
    return frozenset(net.state_dict()) - learning - buffers


def _phase(name: str, asked: PhaseParams, *, px: int) -> Phase:
    values = asked.model_dump() | {"px": px if asked.px == "auto" else asked.px}
    return Phase(name=name, **values)


def _names(net: Any, part: str) -> list[str]:
    kind, _, argument = part.partition(":")
    if kind == "all":
        return [name for name, _ in net.named_parameters()]
    if kind == "params":
        return _matching(part, argument, [name for name, _ in net.named_parameters()], "parameter")
    head = _head_names(net)
    if kind == "head":
        return head
    body = _groups(net, head=head, coarse=False)
    wanted = _from(net, part, argument, body) if kind == "from" else int(argument)
    if wanted > len(body):
        raise UserError(f"trainable {part}: this net has {len(body)} groups of layers below its head; use all")
    return [*head, *(name for group in body[len(body) - wanted :] for name in group)]


def _from(net: nn.Module, part: str, pattern: str, body: list[list[str]]) -> int:
    """How many groups there are from the first that holds a weight of a module of that name."""
    modules = [name for name, module in net.named_modules() if name and any(True for _ in module.parameters())]
    prefixes = tuple(f"{name}." for name in _matching(part, pattern, modules, "module with weights"))
    for number, group in enumerate(body):
        if any(name.startswith(prefixes) for name in group):
            return len(body) - number
    return 0  # it stands in the head


def _matching(part: str, pattern: str, names: list[str], what: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise UserError(f"trainable {part}: this net has no such {what}{nearest(pattern, names)}")
    return found


def _stages(net: nn.Module) -> list[int]:
    """For each stage of blocks below the head, the uppermost first, the N of `last:N` that thaws down to it.

    The lowest is left out: with it everything learns.
    """
    head = _head_names(net)
    fine = _groups(net, head=head, coarse=False)
    stage_of = {name: stage for stage, names in enumerate(_groups(net, head=head, coarse=True)) for name in names}
    highest = [max(stage_of[name] for name in group) for group in fine]
    counts = {sum(top >= stage for top in highest) for stage in set(highest)}
    return sorted(counts - {len(fine)})


def _groups(net: Any, *, head: list[str], coarse: bool) -> list[list[str]]:
    """Parameter names of each group of layers below the head, the input's side first."""
    groups = group_parameters(net, net.group_matcher(coarse=coarse))
    left_out = set(head)
    return [kept for _, names in sorted(groups.items()) if (kept := [name for name in names if name not in left_out])]


def _head_names(net: Any) -> list[str]:
    classifier = net.get_classifier()
    heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    parts = {id(parameter) for head in heads for parameter in head.parameters()}
    names = [name for name, parameter in net.named_parameters() if id(parameter) in parts]
    if not names:
        raise UserError("trainable head: this net has no classifier with weights; use all")
    return names
