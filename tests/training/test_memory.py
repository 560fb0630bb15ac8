"""The largest batch is found without running out of memory where that would end the process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import config
from pipeline.training import memory

ROOT = Path(__file__).parents[2]


def _full_above(most: int, tried: list[int]) -> Callable[[int], torch.Tensor]:
    def step(size: int) -> torch.Tensor:
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros((), requires_grad=True)

    return step


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 64, 100, 1000])
def test_on_a_gpu_the_largest_that_runs_is_found_to_a_sixteenth(most: int) -> None:
    tried: list[int] = []
    found = memory.on_cuda(_full_above(most, tried), limit=4096)
    assert most * 15 / 16 - 1 < found <= most
    assert len(tried) < 30


def test_on_a_gpu_the_limit_is_enough() -> None:
    assert memory.on_cuda(_full_above(10**9, []), limit=256) == 256


def test_on_a_processor_twice_the_memory_holds_twice_the_batch() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 1))

    def step(size: int) -> torch.Tensor:
        loss: torch.Tensor = net(torch.ones(size, 1000)).sum()
        return loss

    weights = sum(p.numel() * 4 for p in net.parameters())
    once, twice = (memory.on_cpu(net, step, available=5 * weights + n * 100_000_000) for n in (1, 2))
    assert once % 8 == twice % 8 == 0
    assert twice == pytest.approx(2 * once, rel=0.1)
    # kept of a picture: the input and the hidden layer, twice 4 kB, and as much again for the backward pass
    assert once == pytest.approx(0.8 * 100_000_000 / 16_000, rel=0.15)
    assert memory.on_cpu(net, step, available=weights) == 0


def test_what_is_kept_twice_is_counted_once() -> None:
    def step(size: int) -> torch.Tensor:
        x = torch.ones(size, 100, requires_grad=True)
        return (x * x).sum() + (x * x).sum()

    assert memory._kept(step, 10) == 10 * 100 * 4


@pytest.mark.parametrize(
    ("largest", "settings", "said"),
    [
        (500, {}, "a batch of 500 pictures fits, so train.batch_size 64 does"),
        (20, {}, "a batch of 20 pictures fits; for train.batch_size 64 set train.accumulate=4"),
        (16, {"train.accumulate": 4}, "a batch of 16 pictures fits, so train.batch_size 64 in 4 parts does"),
        (0, {}, "not even one picture fits; lower train.px"),
    ],
)
def test_the_answer_is_what_to_set(largest: int, settings: dict[str, int], said: str) -> None:
    assert memory._advice(largest, config.load(ROOT / "params.yaml", overrides=settings)).startswith(said)


def test_the_command_names_net_size_and_device(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = {"model.name": "scratch/lenet5", "augment.px": 32, "train.accelerator": "cpu"}
    memory.run(config.load(ROOT / "params.yaml", overrides=overrides))
    assert capsys.readouterr().out.startswith("scratch/lenet5 at 32 px, 32-true, on cpu: ")
