"""Weight decay stays off biases and norms, and the rate moves as the schedule says."""

import pytest
import torch
from torch import nn

from pipeline.training import optim


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_is_for_kernels(name: str) -> None:
    made = optim.optimizer(_net(), name=name, lr=0.1, weight_decay=0.05)
    decays = {p.ndim: group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert decays == {4: 0.05, 2: 0.05, 1: 0.0}


def test_only_what_learns_is_optimised() -> None:
    net = _net()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    made = optim.optimizer(net, name="adamw", lr=0.1, weight_decay=0.05)
    assert {p for group in made.param_groups for p in group["params"]} == set(net[3].parameters())


def _rates(name: str, steps: int) -> list[float]:
    made = optim.optimizer(_net(), name="adamw", lr=0.1, weight_decay=0.0)
    moves = optim.scheduler(made, name=name, lr=0.1, total_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        if moves:
            moves.step()
    return rates


def test_schedules() -> None:
    assert _rates("constant", 10) == [0.1] * 10
    cosine = _rates("cosine", 10)
    assert cosine[0] == 0.1
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[5] == pytest.approx(0.05)
    onecycle = _rates("onecycle", 100)
    assert max(onecycle) == pytest.approx(0.1)
    assert 25 <= onecycle.index(max(onecycle)) <= 32
    assert onecycle[-1] < 1e-5
    assert torch.isfinite(torch.tensor(_rates("onecycle", 1))).all()
