"""Convolutions and pools as geometry: kernel, stride, padding, and the size of the output that follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

Size = tuple[int, ...]
_SLIDING = {"convolution", "avg_pool2d", "max_pool2d_with_indices"}


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution or pool: (height, width) of everything."""

    kernel: Size
    stride: Size
    padding: Size | str
    dilation: Size
    groups: int = 1
    ceil_mode: bool = False
    transposed: bool = False
    output_padding: Size = (0, 0)

    def predict(self, size: Sequence[int]) -> Size:
        """Output (height, width) for an input's, by the formula of PyTorch's documentation.

        floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1; with ceil_mode it is rounded up, unless the
        last window would then begin in the padding of the far side.
        """
        return tuple(self._predict(size[axis], axis) for axis in range(2))

    def _predict(self, size: int, axis: int) -> int:
        stride, reach = self.stride[axis], self.dilation[axis] * (self.kernel[axis] - 1) + 1
        if isinstance(self.padding, str):
            near, both = 0, reach - 1 if self.padding == "same" else 0
        else:
            near, both = self.padding[axis], 2 * self.padding[axis]
        if self.transposed:
            return (size - 1) * stride - both + reach + self.output_padding[axis]
        steps = size + both - reach
        if not self.ceil_mode:
            return steps // stride + 1
        out = -(-steps // stride) + 1
        return out - 1 if (out - 1) * stride >= size + near else out


def _pair(value: Any) -> Size:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def of_module(module: nn.Module) -> Window | None:
    """The geometry that a layer declares."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return Window(
            _pair(module.kernel_size),
            _pair(module.stride),
            module.padding if isinstance(module.padding, str) else _pair(module.padding),
            _pair(module.dilation),
            module.groups,
            transposed=isinstance(module, nn.ConvTranspose2d),
            output_padding=_pair(module.output_padding),
        )
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        dilation = module.dilation if isinstance(module, nn.MaxPool2d) else 1
        return Window(
            _pair(module.kernel_size),
            _pair(module.stride),
            _pair(module.padding),
            _pair(dilation),
            ceil_mode=module.ceil_mode,
        )
    return None


def of_operation(operation: str, args: tuple[Any, ...]) -> Window | None:
    """The geometry that a function is called with, in ATen's order of arguments."""
    if operation not in _SLIDING or args[0].ndim != 4:
        return None
    if operation == "convolution":
        _, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
        shape = _pair(weight.shape[2:])
        return Window(
            shape, _pair(stride), _pair(padding), _pair(dilation), groups, False, transposed, _pair(output_padding)
        )
    kernel, stride, padding, *rest = (*args[1:], *(None,) * 6)[:6]
    dilation, ceil_mode = rest[:2] if operation.startswith("max") else (1, rest[0])
    return Window(
        _pair(kernel),
        _pair(stride or kernel),
        _pair(padding or 0),
        _pair(dilation or 1),
        ceil_mode=bool(ceil_mode),
    )
