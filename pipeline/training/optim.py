"""Optimisers and learning-rate schedules, new for each phase."""

from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler


def optimizer(net: nn.Module, *, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """An optimiser of the parameters that learn; weight decay is for kernels, not for biases and norms."""
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=lr)


def scheduler(
    optimizer: torch.optim.Optimizer, *, name: str, lr: float, total_steps: int
) -> lr_scheduler.LRScheduler | None:
    """A schedule over a phase's `total_steps` optimiser steps; None for a constant rate.

    onecycle: Smith and Topin 2017, warm-up over the first 30% of the steps. cosine: Loshchilov and Hutter 2016, no
    restarts.
    """
    if name == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=max(2, total_steps))
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)
    return None
