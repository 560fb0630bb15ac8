"""Optimisers and learning-rate schedules, new for each phase."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from timm.models import group_parameters
from timm.optim._optim_factory import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn
from torch.optim import lr_scheduler

from pipeline.errors import UserError, nearest

MOMENTUM = 0.9
"""Of optimisers that have one; in sgd it is Nesterov's."""
DROP = 0.1
"""What step and plateau multiply the learning rate by."""
MILESTONES = (0.5, 0.75)
"""Shares of the steps after which step drops the learning rate: He et al. 2015 drop it at 32k and 48k of 64k."""
PATIENCE = 2
"""Validations in a row without a better value after which plateau drops the learning rate."""
ONECYCLE_WARMUP = 0.3
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
"""Optimisers that have one kernel for all parameters, on the kinds of devices in `ON`."""
ON = {"cpu", "cuda"}


class Group(NamedTuple):
    """Parameters that share a learning rate and a weight decay."""

    names: tuple[str, ...]
    layer: int
    """Number of the net's `group_matcher(coarse=False)`, 0 for the input side; 0 too where all layers are alike."""
    scale: float
    """Learning rate, as a share of the head's."""
    weight_decay: float


def groups(net: nn.Module, *, weight_decay: float, layer_decay: float) -> list[Group]:
    """The parameters that learn; kernels (more than one axis) apart from biases and norms, which do not decay.

    With a `layer_decay` below 1 each layer has groups of its own, the input side first, and a learning rate of
    layer_decay ** (layers above it), the classifier being the top (Clark et al., "ELECTRA", 2020, after Howard and
    Ruder 2018). Layers that do not learn count as well: a layer's rate is the same whatever learns beside it.

    Args:
        net: speaks timm's interface (`get_classifier`, `group_matcher`) where `layer_decay` is below 1.
        layer_decay: above 0, at most 1.
    """
    learning = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    layers = [list(learning)] if layer_decay == 1 else _layers(net)
    found = []
    for number, names in enumerate(layers):
        scale = layer_decay ** (len(layers) - 1 - number)
        kernels = tuple(name for name in names if name in learning and learning[name].ndim > 1)
        others = tuple(name for name in names if name in learning and learning[name].ndim <= 1)
        found.append(Group(kernels, number, scale, weight_decay))
        found.append(Group(others, number, scale, 0.0))
    return [group for group in found if group.names]


def optimizer(
    net: nn.Module,
    *,
    name: str,
    lr: float | Sequence[float],
    weight_decay: float,
    layer_decay: float,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """A timm optimiser of the parameters that learn, in the groups of `groups`.

    timm sets `lr_scale`, which torch's optimisers ignore; here each group's scale is multiplied into its rate.

    Args:
        name: as `check_optimizer` takes it.
        lr: the head's learning rate; or each group's own, in their order, to which no scale is applied.
        fused: update all parameters in one kernel, where optimiser and device have one; the net must be on its device.
    """
    found = groups(net, weight_decay=weight_decay, layer_decay=layer_decay)
    rates = list(lr) if isinstance(lr, Sequence) else [lr * group.scale for group in found]
    parameters = dict(net.named_parameters())
    made: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in group.names], "lr": rate, "weight_decay": group.weight_decay}
        for group, rate in zip(found, rates, strict=True)
    ]
    devices = {parameters[name].device.type for group in found for name in group.names}
    one_kernel: dict[str, Any] = (
        {"fused": True} if fused and get_optimizer_info(name).opt_class in FUSED and devices <= ON else {}
    )
    # Groups that are made already are left as they are: timm sorts out biases and norms of a whole net only.
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        made, opt=name, lr=max(rates), momentum=MOMENTUM, **one_kernel
    )
    if devices == {"cpu"}:
        # Before each step torch's Adam asks whether it is part of a graph on an accelerator; where torch was built for
        # one that is not there, to find that out takes as long as the update of a head.
        optimizer._accelerator_graph_capture_health_check = lambda: None  # type: ignore[method-assign]
    return optimizer


def check_optimizer(name: str) -> None:
    """Refuses an optimiser that timm does not have, or that does not run here.

    Raises:
        UserError: With the nearest names, or with what it needs.
    """
    known = [str(other) for other in list_optimizers()]
    if name not in known:
        usable = [other for other in known if not _missing(other)]
        raise UserError(f"{name}: timm has no such optimiser{nearest(name, usable)}")
    if missing := _missing(name):
        raise UserError(f"{name}: this optimiser needs {missing}; take another, such as adamw, sgd or lamb")


class Rates(lr_scheduler.LRScheduler):
    """Learning rates in closed form, so that a resumed phase has the very ones of an uninterrupted one.

    Each group's rate is its own base rate times a factor that all share. constant: 1. cosine: half a cosine to 0, no
    restarts (Loshchilov and Hutter 2016). step: x 0.1 after 1/2 and 3/4 of the steps (He et al. 2015). plateau: x 0.1
    whenever 2 validations in a row were no better, as told to `judge`.

    Args:
        warm_steps: steps n over which the rates climb linearly from 1/(n+1) of the base rates, and after which the
            cosine begins; 0 for none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, name: str, total_steps: int, warm_steps: int) -> None:
        self._name, self._total_steps, self._warm_steps = name, total_steps, warm_steps
        self._best: float | None = None
        self._bad = 0
        self._drops = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        factor = self._factor()
        return [rate * factor for rate in self.base_lrs]

    def judge(self, value: float, *, mode: Literal["min", "max"]) -> None:
        """Tells what a validation found; where plateau drops the rates, the next step has the lower ones."""
        better = self._best is None or (value < self._best if mode == "min" else value > self._best)
        if better:
            self._best = value
        self._bad = 0 if better else self._bad + 1
        if self._name != "plateau" or self._bad < PATIENCE:
            return
        self._bad, self._drops = 0, self._drops + 1
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = self.get_lr()

    def _factor(self) -> float:
        step, warm = self.last_epoch, self._warm_steps  # torch counts whatever it steps by as epochs
        climbed = min(1.0, (step + 1) / (warm + 1))
        if self._name == "cosine":
            done = min(1.0, max(0, step - warm) / (self._total_steps - warm))
            return climbed * (1 + math.cos(math.pi * done)) / 2
        if self._name == "step":
            return climbed * DROP ** sum(step >= share * self._total_steps for share in MILESTONES)
        return climbed * DROP**self._drops


def scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    total_steps: int,
    warmup: float | Literal["auto"],
) -> lr_scheduler.LRScheduler | None:
    """A schedule that is stepped once an optimiser step; None for rates that never move.

    onecycle: torch's (Smith and Topin 2017), which cycles momentum as well, in optimisers that have one. For the others
    see `Rates`. The groups keep the ratio of their rates throughout.

    Args:
        name: constant, cosine, step, onecycle or plateau.
        total_steps: optimiser steps of the phase.
        warmup: share of them over which the rates climb; auto is 0.3 for onecycle and 0 for the others.
    """
    if name == "onecycle":
        return _one_cycle(optimizer, total_steps=max(2, total_steps), warmup=warmup)
    warm_steps = 0 if warmup == "auto" else int(warmup * total_steps)
    if name == "constant" and not warm_steps:
        return None
    return Rates(optimizer, name=name, total_steps=total_steps, warm_steps=warm_steps)


def _one_cycle(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup: float | Literal["auto"]
) -> lr_scheduler.OneCycleLR:
    share = ONECYCLE_WARMUP if warmup == "auto" else float(warmup)
    if share * total_steps == 1:
        share -= 1e-9  # torch divides by zero where the climb is one step exactly
    return lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=share,
        cycle_momentum=any(key in optimizer.defaults for key in ("momentum", "betas")),
    )


def _layers(net: Any) -> list[list[str]]:
    """Parameter names layer by layer, the input side first, the classifier last and by itself."""
    classifier = net.get_classifier()
    heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    parts = {id(parameter) for head in heads for parameter in head.parameters()}
    top = [name for name, parameter in net.named_parameters() if id(parameter) in parts]
    matched = group_parameters(net, net.group_matcher(coarse=False))
    body = [[name for name in names if name not in top] for _, names in sorted(matched.items())]
    return [*filter(None, body), top]


def _missing(name: str) -> str:
    """What an optimiser of timm's needs that is not here; nothing for one that runs."""
    info = get_optimizer_info(name)
    if info.second_order:
        return "second derivatives, which training does not compute"
    if name.startswith("kron"):
        return "" if find_spec("opt_einsum") else "the package opt_einsum"
    if not isinstance(info.opt_class, str):
        return ""
    package = info.opt_class.partition(".")[0]  # named, not imported: it runs on CUDA alone
    return "" if find_spec(package) and torch.cuda.is_available() else f"CUDA and the package {package}"
