"""Quick gradients must be the gradients: against fp32 of the same numbers, and bit for bit where nothing was slow."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import config
from pipeline.training import backward, schedule
from pipeline.training.classifier import Classifier

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ROUNDED = 2**-7
"""Of the largest entry: what rounding to bf16's eight bits, and once more for a sum, may make wrong."""
CHANNELS = 24


def _gradients(net: nn.Module, x: Tensor, grad: Tensor | None = None, *, bf16: bool, quick: bool) -> dict[str, Tensor]:
    """By parameter's name, beside that of the input and the output itself; of `grad` into the output."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    net.zero_grad()
    way = backward.quick(CPU, precision="bf16-mixed" if quick else "32-true", compiled=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), way:
        y = net(x)
    y.backward(torch.ones_like(y) if grad is None else grad.to(y.dtype))
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **found}


def _rounded(*shape: int, seed: int) -> Tensor:
    """Normal numbers that bf16 holds exactly, channels last."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw).bfloat16().float().contiguous(memory_format=torch.channels_last)


def _convolution(**settings: Any) -> nn.Conv2d:
    convolution = nn.Conv2d(CHANNELS, CHANNELS, **{"groups": CHANNELS, **settings}).to(
        memory_format=torch.channels_last  # type: ignore[call-overload]
    )
    for seed, parameter in enumerate(convolution.parameters()):
        draw = torch.Generator().manual_seed(seed)
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw).bfloat16())
    return convolution


def _takes_over(net: nn.Module, x: Tensor) -> bool:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), backward.quick(CPU, precision="bf16-mixed", compiled=False):
        return "Depthwise" in str(net(x).grad_fn)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize(("side", "stride"), [(5, 1), (5, 2), (3, 2)])
@pytest.mark.parametrize("px", [(7, 7), (8, 11), (14, 9)])
def test_a_depthwise_convolution_has_the_gradients_of_fp32(
    side: int, stride: int, padding: int, px: tuple[int, int]
) -> None:
    convolution = _convolution(kernel_size=side, stride=stride, padding=padding, bias=padding == 1)
    x = _rounded(3, CHANNELS, *px, seed=1)
    assert _takes_over(convolution, x)
    grad = _rounded(*convolution(x).shape, seed=2)
    exact = _gradients(convolution, x, grad, bf16=False, quick=False)
    found = _gradients(convolution, x, grad, bf16=True, quick=True)
    plain = _gradients(convolution, x, grad, bf16=True, quick=False)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        allowed = ROUNDED * value.abs().max()
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # Without oneDNN's, torch's own convolution sums in bf16, too: the plain way is as far from fp32.
            allowed = torch.maximum(allowed, (plain[name] - value).abs().max())
        assert (found[name] - value).abs().max() <= allowed, name
    assert torch.equal(found["output"], plain["output"])


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 5, "dilation": 2},
        {"kernel_size": 5, "padding": "same"},
        {"kernel_size": 5, "stride": (1, 2)},
        {"kernel_size": 5, "stride": 3},
        {"kernel_size": (5, 3)},
        {"kernel_size": 7, "padding": 3},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 5, "groups": 12},
        {"kernel_size": 5, "groups": 1},
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(settings: dict[str, Any]) -> None:
    convolution, x = _convolution(**settings), _rounded(2, CHANNELS, 14, 14, seed=3)
    assert not _takes_over(convolution, x)
    found, plain = (_gradients(convolution, x, bf16=True, quick=quick) for quick in (True, False))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_net_that_is_not_channels_last_is_left_alone() -> None:
    assert not _takes_over(_convolution(kernel_size=5), _rounded(2, CHANNELS, 14, 14, seed=3).contiguous())


def test_a_convolution_outside_autocast_stays_in_fp32() -> None:
    convolution, x = _convolution(kernel_size=5), _rounded(2, CHANNELS, 14, 14, seed=3).requires_grad_()
    with backward.quick(CPU, precision="bf16-mixed", compiled=False):
        assert torch.equal(convolution(x), F.conv2d(x, convolution.weight, convolution.bias, groups=CHANNELS))


def test_arguments_may_be_named() -> None:
    convolution, x = _convolution(kernel_size=5), _rounded(2, CHANNELS, 14, 14, seed=3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), backward.quick(CPU, precision="bf16-mixed", compiled=False):
        y = F.conv2d(input=x, weight=convolution.weight, bias=convolution.bias, groups=CHANNELS)
        assert torch.equal(y, convolution(x))
        assert torch.equal(F.adaptive_avg_pool2d(input=y, output_size=1), F.adaptive_avg_pool2d(y, 1))


@pytest.mark.parametrize("pool", ["mean", "adaptive"])
def test_the_gradient_of_a_mean_lies_as_the_map_does(pool: str) -> None:
    strides: list[tuple[int, ...]] = []
    x = _rounded(2, CHANNELS, 7, 7, seed=4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), backward.quick(CPU, precision="bf16-mixed", compiled=False):
        maps = F.relu(x)
        maps.register_hook(lambda gradient: strides.append(gradient.stride()))
        mean = maps.mean((2, 3)) if pool == "mean" else F.adaptive_avg_pool2d(maps, 1).flatten(1)
    mean.sum().backward()  # type: ignore[no-untyped-call]
    assert strides == [x.stride()]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (x > 0).float() / 49)


def test_a_mean_over_a_map_is_that_of_torch_for_any_dims_and_words() -> None:
    x = _rounded(2, CHANNELS, 7, 7, seed=5).requires_grad_()
    with backward.quick(CPU, precision="bf16-mixed", compiled=False):
        found = [x.mean(), x.mean(1), x.mean(dim=(2, 3), keepdim=True), torch.mean(input=x, dim=3)]
    for one, expected in zip(found, [x.mean(), x.mean(1), x.mean((2, 3), keepdim=True), x.mean(3)], strict=True):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_a_whole_net_says_the_same_and_learns_the_same(name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3).to(memory_format=torch.channels_last)
    net.eval()  # batch norms would make much of the last bits
    x = _rounded(2, 3, 64, 64, seed=6)
    exact, plain, found = (
        _gradients(net, x, bf16=bf16, quick=quick) for bf16, quick in ((False, False), (True, False), (True, True))
    )
    assert torch.equal(found["output"], plain["output"])
    assert found.keys() == exact.keys()
    wrong = {
        name: [float((each[name] - value).norm() / value.norm().clamp(min=1e-12)) for each in (found, plain)]
        for name, value in exact.items()
    }
    # As close to fp32 as the slow way is.
    assert all(quick <= 1.5 * slow + ROUNDED for quick, slow in wrong.values()), wrong


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"precision": "bf16-mixed"}, True),
        ({"precision": "32-true"}, False),
        ({"precision": "bf16-mixed", "channels_last": False}, False),
        ({"precision": "bf16-mixed", "compile": True}, False),
    ],
    ids=str,
)
def test_a_training_step_takes_the_quick_way_in_bf16_alone(changed: dict[str, Any], *, expected: bool) -> None:
    overrides = {"phases": {"all": {"trainable": "all", "epochs": 1, "lr": 0.01}}, "transforms": {}, **changed}
    params = config.load(ROOT / "params.yaml", overrides={f"train.{k}": v for k, v in overrides.items()}).train
    net = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    (phase,) = schedule.plan(params, net, px=64, random_start=False)
    module = Classifier(net, phase=phase, params=params, pictures=2, num_classes=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    net._compiled_call_impl = None  # what would be compiled is not at issue here
    batch = (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with torch.autocast("cpu", torch.bfloat16, enabled=params.precision == "bf16-mixed"):
        whole, _, _ = module.losses(module.net, batch)
    assert _has("Depthwise", whole) == expected


def _has(name: str, value: Tensor) -> bool:
    """Whether an operation of that name stands behind a value."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if name in node.name():
            return True
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    return False
