"""Gradient norms by layer: the ones that the optimiser uses, once an epoch."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.training.gradients import COLUMNS, GradientNorms


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_norms_are_of_kernels_by_depth_at_each_epoch_s_first_step() -> None:
    made = net()
    made(torch.ones(2, 1, 4, 4)).square().sum().backward()
    module, callback = SimpleNamespace(net=made), GradientNorms(first_epoch=5)
    for epoch in range(2):
        trainer = cast(Any, SimpleNamespace(current_epoch=epoch))
        callback.on_train_epoch_start(trainer, module)
        for _ in range(3):
            callback.on_before_optimizer_step(trainer, module, None)
    assert [(row["epoch"], row["depth"], row["layer"]) for row in callback.rows] == [
        (6, 0, "0"),
        (6, 1, "3"),
        (7, 0, "0"),
        (7, 1, "3"),
    ]
    for row, layer in zip(callback.rows, (made[0], made[3]), strict=False):
        assert set(row) == set(COLUMNS)
        weight = cast(Any, layer).weight
        assert row["norm"] == pytest.approx(weight.grad.square().sum().sqrt().item())
        assert row["weight_norm"] == pytest.approx(weight.detach().square().sum().sqrt().item())


def test_frozen_layers_have_no_norm() -> None:
    made = net()
    made[0].requires_grad_(False)
    made(torch.ones(2, 1, 4, 4)).sum().backward()
    callback = GradientNorms(first_epoch=0)
    callback.on_before_optimizer_step(cast(Any, SimpleNamespace(current_epoch=0)), SimpleNamespace(net=made), None)
    assert [row["layer"] for row in callback.rows] == ["3"]
