"""Gradients in bf16 on a processor, by those ways of oneDNN's that are fast.

oneDNN has kernels of its own for depthwise convolutions, but in bf16 none for the weights' gradient of a 5 x 5 one and
none for the input's gradient at stride 2: they run as grouped convolutions at a small share of the speed. And the
gradient of a mean over a map has no memory behind it (strides of 0), so everything below it runs number by number.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

TILE = 3
"""Side of the largest kernel that oneDNN has a fast gradient of the weights for."""
_TILED = 5
"""Side of the kernels that are put together of tiles; for 7, nine of them are no faster."""
_convolution_backward = torch.ops.aten.convolution_backward.default


def quick(device: torch.device, *, precision: str, compiled: bool) -> AbstractContextManager[Any]:
    """A forward pass within it has quick gradients, wherever else they would be slow.

    What is compiled is left alone.
    """
    if device.type == "cpu" and precision == "bf16-mixed" and not compiled:
        return _Quick()
    return nullcontext()


class _Quick(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Collection[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.conv2d:
            return _conv2d(*args, **(kwargs or {}))
        if func in (Tensor.mean, F.adaptive_avg_pool2d) and args and _is_map(args[0]):
            args = (_Laid.apply(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    depthwise = 1 < groups == len(weight) == input.shape[1]
    steps, edges, gaps = map(_one, (stride, padding, dilation))
    side = _one(weight.shape[2:])
    slow = (side == _TILED and steps in (1, 2)) or (side == TILE and steps == 2)
    if depthwise and slow and edges is not None and gaps == 1 and _is_map(input) and torch.is_autocast_enabled("cpu"):
        # Rounded as autocast would.
        return _Depthwise.apply(input.bfloat16(), weight.bfloat16(), bias, steps, edges)  # type: ignore[no-any-return]
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _one(sides: Any) -> int | None:
    """The number that holds for height and width alike; None where they differ or are named."""
    if isinstance(sides, str):
        return None
    if isinstance(sides, int):
        return sides
    return int(sides[0]) if len(set(sides)) == 1 else None


def _is_map(x: Tensor) -> bool:
    """Whether this is [B, C, H, W], channels last, on the way to something that learns."""
    return (
        x.dim() == 4
        and x.requires_grad
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


class _Laid(torch.autograd.Function):
    """The same tensor, whose gradient lies in memory as it does."""

    @staticmethod
    def forward(ctx: Any, x_bchw: Tensor) -> Tensor:  # noqa: ARG004, torch's signature
        return x_bchw.view_as(x_bchw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient.contiguous(memory_format=torch.channels_last)


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution of bf16 maps [B, C, H, W] with a kernel [C, 1, 3, 3] or [C, 1, 5, 5]."""

    @staticmethod
    def forward(
        ctx: Any, x_bchw: Tensor, weight_c1kk: Tensor, bias_c: Tensor | None, stride: int, padding: int
    ) -> Tensor:
        ctx.save_for_backward(x_bchw, weight_c1kk)
        ctx.stride, ctx.padding, ctx.bias_type = stride, padding, None if bias_c is None else bias_c.dtype
        bias_c = None if bias_c is None else bias_c.bfloat16()
        return F.conv2d(x_bchw, weight_c1kk, bias_c, stride, padding, groups=len(weight_c1kk))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_bchw, weight_c1kk = ctx.saved_tensors
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return (
            _of_input(gradient, x_bchw, weight_c1kk, ctx.stride, ctx.padding) if of_input else None,
            _of_weight(gradient, x_bchw, weight_c1kk, ctx.stride, ctx.padding) if of_weight else None,
            gradient.sum((0, 2, 3), dtype=ctx.bias_type) if of_bias else None,
            None,
            None,
        )


def _of_input(gradient: Tensor, x_bchw: Tensor, weight_c1kk: Tensor, stride: int, padding: int) -> Tensor:
    """At a stride, as that of the same convolution without one, most of whose outputs count for nothing."""
    if stride > 1:
        cut = weight_c1kk.shape[2] - 1 - 2 * padding
        size = (*gradient.shape[:2], x_bchw.shape[2] - cut, x_bchw.shape[3] - cut)
        spread = torch.empty(size, dtype=gradient.dtype, memory_format=torch.channels_last).zero_()
        spread[:, :, ::stride, ::stride] = gradient
        gradient = spread
    return _gradient(gradient, x_bchw, weight_c1kk, stride=1, padding=padding, of_input=True)


def _of_weight(gradient: Tensor, x_bchw: Tensor, weight_c1kk: Tensor, stride: int, padding: int) -> Tensor:
    """Of a larger kernel, corner by corner, each a 3 x 3 kernel that sees the map from another place."""
    beyond = weight_c1kk.shape[2] - TILE
    if not beyond:
        return _gradient(gradient, x_bchw, weight_c1kk, stride=stride, padding=padding, of_input=False)
    x_bchw = F.pad(x_bchw, (padding,) * 4)
    corner_c133 = weight_c1kk[:, :, :TILE, :TILE].contiguous()  # for its size
    found = torch.empty_like(weight_c1kk)
    for top in (0, beyond):
        for left in (0, beyond):
            # Moving the gradient by an output moves the kernel by a stride.
            edges = [edge // stride for edge in (left, beyond - left, top, beyond - top)]
            moved = F.pad(gradient, edges)
            found[:, :, top : top + TILE, left : left + TILE] = _gradient(
                moved, x_bchw, corner_c133, stride=stride, padding=0, of_input=False
            )
    return found


def _gradient(gradient: Tensor, x_bchw: Tensor, weight: Tensor, *, stride: int, padding: int, of_input: bool) -> Tensor:
    found = _convolution_backward(
        gradient,
        x_bchw,
        weight,
        None,
        [stride] * 2,
        [padding] * 2,
        [1, 1],
        False,
        [0, 0],
        len(weight),
        [of_input, not of_input, False],
    )
    result: Tensor = found[0] if of_input else found[1]
    return result
