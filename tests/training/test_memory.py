"""The largest batch: what is tried, what is counted, and what the user is told."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline import config, nets
from pipeline.errors import UserError
from pipeline.training import memory

PARAMS = Path(__file__).parents[2] / "params.yaml"


def _device(holds: int, tried: list[int]) -> Callable[[int], None]:
    def step(size: int) -> None:
        tried.append(size)
        if size > holds:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return step


@pytest.mark.parametrize(
    ("holds", "largest"), [(100, 96), (64, 64), (63, 56), (8, 8), (7, 4), (3, 2), (2, 2), (1, 0), (10**6, 65536)]
)
def test_a_device_gets_the_largest_round_batch_that_it_holds(holds: int, largest: int) -> None:
    tried: list[int] = []
    assert memory.on_cuda(_device(holds, tried)) == largest
    assert max(tried) <= memory.LIMIT
    assert len(tried) <= 40


def test_batches_are_doubled_and_then_the_gap_is_halved() -> None:
    tried: list[int] = []
    assert memory.on_cuda(_device(11, tried)) == 8
    assert tried == [2, 4, 8, 16, 12, 10, 11]


def test_no_batch_above_the_limit_is_tried() -> None:
    tried: list[int] = []
    assert memory.on_cuda(_device(10**6, tried), limit=100) == 96
    assert max(tried) == 100


def test_the_cache_is_emptied_after_each_try(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(tried[-1]))
    memory.on_cuda(_device(20, tried))
    assert emptied == tried


def test_another_error_than_memory_is_not_taken_for_it() -> None:
    def step(size: int) -> None:
        raise RuntimeError(f"a bug at {size}")

    with pytest.raises(RuntimeError, match="a bug at 2"):
        memory.on_cuda(step)


@pytest.mark.parametrize(("available", "largest"), [(12_000, 48), (3_000, 4), (2_100, 0), (100, 0), (10**12, 65536)])
def test_a_processor_gets_what_fits_into_a_safe_share_of_its_memory(available: int, largest: int) -> None:
    assert memory.on_cpu(lambda size: 1000 + 100 * size, available=available) == largest


def test_what_the_backward_pass_needs_is_counted_once_and_weights_not_at_all() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh())
    pictures = torch.zeros(5, 4)
    # Into the first layer 4 numbers a picture, out of the ReLU and into the second 8, out of the tanh 2: 4 bytes each.
    assert memory.bytes_kept(lambda: net(pictures).sum(), net) == 5 * (4 + 8 + 2) * 4


def test_nothing_is_counted_of_what_is_not_kept() -> None:
    net = nn.Linear(4, 8)
    net.weight.requires_grad_(False)
    assert memory.bytes_kept(lambda: net(torch.zeros(5, 4)).sum(), net) == 0


def _training(name: str = "scratch/lenet5", *, precision: str = "32-true") -> memory.Training:
    torch.manual_seed(0)
    return memory.Training(
        nets.build(name, num_classes=10, in_chans=1),
        device=torch.device("cpu"),
        in_chans=1,
        px=32,
        precision=precision,
        channels_last=True,
        optimizer="adamw",
        averaged=True,
    )


def test_what_is_kept_grows_in_a_line_with_the_batch_and_is_less_in_half_precision() -> None:
    training = _training("scratch/resnet20")
    two, four, twelve = (training.kept(size) for size in (2, 4, 12))
    assert twelve - four == pytest.approx(4 * (four - two), rel=0.01)
    half = _training("scratch/resnet20", precision="bf16-mixed")
    assert half.kept(12) - half.kept(4) < 0.7 * (twelve - four)


def test_gradients_and_the_optimisers_state_are_there_after_a_step() -> None:
    training = _training()
    training.step(2)
    parameters = list(training.net.parameters())
    assert all(parameter.grad is not None for parameter in parameters)
    held = sum(value.numel() for state in training._optimizer.state.values() for value in state.values())
    assert held == 2 * sum(parameter.numel() for parameter in parameters) + len(parameters)  # and a count of steps


def test_auxiliary_classifiers_count_where_they_learn() -> None:
    torch.manual_seed(0)
    assert _training("scratch/ablation_inception_aux").kept(4) > _training("scratch/ablation_inception").kept(4)


def test_a_batch_that_fits_is_told_how_far_it_could_go() -> None:
    line = memory.verdict("train", batch_size=64, accumulate=1, devices=1, largest=100)
    assert line == "train.batch_size 64 fits; up to 100 would"
    line = memory.verdict("train", batch_size=64, accumulate=4, devices=2, largest=16)
    assert line == "train.batch_size 64 fits; up to 128 would, and train.accumulate=2 would do"


def test_a_batch_that_does_not_fit_is_told_in_how_many_equal_parts_it_would() -> None:
    line = memory.verdict("train", batch_size=64, accumulate=1, devices=1, largest=24)
    assert line == "train.batch_size 64 does not fit; set train.accumulate=4"  # three parts would not be equal
    line = memory.verdict("train.phases.finetune", batch_size=256, accumulate=2, devices=2, largest=32)
    assert line == "train.phases.finetune.batch_size 256 does not fit; set train.phases.finetune.accumulate=4"
    line = memory.verdict("train", batch_size=65, accumulate=1, devices=2, largest=8)
    assert line == "train.batch_size 65 does not fit; set train.batch_size=16"
    line = memory.verdict("train", batch_size=64, accumulate=1, devices=1, largest=0)
    assert line == "train.batch_size 64 does not fit, nor does any other; lower train.px, or take a smaller net"


LENET = {"model.name": "scratch/lenet5", "augment.px": 32, "train.accelerator": "cpu", "train.batch_size": 64}


def _run(monkeypatch: pytest.MonkeyPatch, folder: Path, *, free: int, **settings: object) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    memory.run(config.load(PARAMS, overrides=LENET | settings))


def test_the_command_says_what_fits_and_what_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(monkeypatch, tmp_path, free=10**9)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "scratch/lenet5 at 32 px, 32-true, all weights learning, in 50% of the 1.0 GB that are free: "
    )
    largest = int(first.split(": ")[1].split()[0])
    assert second == f"train.batch_size 64 fits; up to {largest} would"
    _run(monkeypatch, tmp_path, free=10**6)
    first, second = capsys.readouterr().out.splitlines()
    assert second.startswith("train.batch_size 64 does not fit; set train.accumulate=")
    parts, largest = int(second.rpartition("=")[2]), int(first.split(": ")[1].split()[0])
    assert 64 / parts <= largest < 64


def test_a_phase_of_its_own_batch_has_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = {"frozen": {"trainable": "head"}, "finetune": {"trainable": "all", "batch_size": 32, "px": 64}}
    settings = {"augment.px": 64, "train.px": 32, "train.phases": phases, "model.name": "scratch/resnet20"}
    _run(monkeypatch, tmp_path, free=10**9, **settings)
    first, *lines = capsys.readouterr().out.splitlines()
    assert " at 64 px, " in first
    assert [line.split(" fits")[0] for line in lines] == [
        "train.batch_size 64",
        "train.phases.finetune.batch_size 32",
    ]


def test_a_wrong_net_or_side_is_told_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such net"):
        _run(monkeypatch, tmp_path, free=10**9, **{"model.name": "scratch/lenet6"})
    with pytest.raises(UserError, match=r"raise augment\.px"):
        _run(monkeypatch, tmp_path, free=10**9, **{"augment.px": 16})
    with pytest.raises(UserError, match="no such optimiser"):
        _run(monkeypatch, tmp_path, free=10**9, **{"train.optimizer": "adanw2"})
