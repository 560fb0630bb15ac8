"""Averages of weights: against the formulas, bit by bit where nothing moves, and resumed."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.averaging import Average

KINDS: list[Literal["ema", "swa"]] = ["ema", "swa"]


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def move(net: nn.Module, seed: int) -> None:
    """A step of training: what learns moves, and so do the norms in training mode."""
    generator = torch.Generator().manual_seed(seed)
    net(torch.randn(4, 3, 4, 4, generator=generator))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def bits(net: nn.Module) -> dict[str, bytes]:
    """Tells even 0.0 from -0.0."""
    return {key: value.contiguous().numpy().tobytes() for key, value in net.state_dict().items()}


def test_ema_is_the_formula_with_its_warm_up() -> None:
    net = tiny()
    average = Average(net, kind="ema", decay=0.3)
    expected = {key: value.double() for key, value in state(net).items()}
    for step, decay in enumerate([0.1, 2 / 11, 0.25, 0.3, 0.3]):
        move(net, step)
        average.update(net)
        expected = {key: decay * value + (1 - decay) * net.state_dict()[key] for key, value in expected.items()}
        for key, value in average.net.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value, expected[key].float())
            else:
                assert torch.equal(value, net.state_dict()[key])
    assert average.count == 5


def test_swa_is_the_mean_of_the_updates_and_the_first_replaces_what_was_there() -> None:
    net = tiny()
    average = Average(net, kind="swa", decay=0.9)
    taken: list[dict[str, Tensor]] = []
    for step in range(5):
        move(net, step)
        average.update(net)
        taken.append(state(net))
        if step == 0:
            assert bits(average.net) == bits(net)
    for key, value in average.net.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([one[key] for one in taken]).mean(0))
        else:
            assert torch.equal(value, taken[-1][key])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_stays_the_same_bit_by_bit(kind: Literal["ema", "swa"]) -> None:
    net = tiny()
    with torch.no_grad():
        net[0].weight[0] = -0.0
        net[1].running_mean[0] = -0.0
    net[:2].requires_grad_(False).eval()
    before = bits(net)
    average = Average(net, kind=kind, decay=0.99)
    for step in range(20):
        move(net, step)
        average.update(net)
    frozen = [key for key in before if not key.startswith("3.")]
    assert {key: bits(average.net)[key] for key in frozen} == {key: before[key] for key in frozen}
    assert not torch.equal(average.net[3].weight, net[3].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_values_stay_equal_and_infinite_ones_too(kind: Literal["ema", "swa"]) -> None:
    net = tiny()
    net.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    average = Average(net, kind=kind, decay=0.7)
    before = bits(net)
    for _ in range(20):
        average.update(net)
    assert bits(average.net) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_average_goes_on_to_the_same_bits(kind: Literal["ema", "swa"]) -> None:
    net = tiny()
    average = Average(net, kind=kind, decay=0.5)
    for step in range(3):
        move(net, step)
        average.update(net)
    resumed = Average(tiny(), kind=kind, decay=0.5)
    resumed.load_state_dict(state(average))
    for step in range(3, 6):
        move(net, step)
        average.update(net)
        resumed.update(net)
    assert bits(resumed) == bits(average)
    assert resumed.count == 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_net_is_left_alone_and_the_average_never_learns(kind: Literal["ema", "swa"]) -> None:
    net = tiny()
    before = bits(net)
    average = Average(net, kind=kind, decay=0.5)
    average.update(net)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert net.training
    assert not {id(p) for p in net.parameters()} & {id(p) for p in average.parameters()}
    nn.ModuleList([average]).train()  # as a module does that has it as a part
    assert not any(module.training for module in average.net.modules())
    average.net(torch.randn(2, 3, 4, 4))
    assert bits(net) == before == bits(average.net)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_weights_stay_shared_and_are_averaged_once(kind: Literal["ema", "swa"]) -> None:
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    average = Average(net, kind=kind, decay=0.5)
    start = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.add_(1)
    average.update(net)
    found: Any = average.net
    assert found[0].weight is found[1].weight
    share = 0.9 if kind == "ema" else 1.0
    torch.testing.assert_close(found[0].weight, start + share, check_stride=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_format_changes_no_bit_and_is_kept(kind: Literal["ema", "swa"]) -> None:
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = tiny()
        average = Average(net.to(memory_format=memory_format), kind=kind, decay=0.5)
        for seed in range(3):
            with torch.no_grad():
                for parameter in net.parameters():
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                    parameter.add_(noise)
            average.update(net)
        assert average.net[0].weight.is_contiguous(memory_format=memory_format)
        found.append(bits(average.net))
    assert found[0] == found[1]
