"""Receptive fields, carried through every operation of a forward pass.

The receptive field of a value is the part of the picture that can change it. Through windows (convolutions and pools)
it grows by a rule (Araujo, Norris and Sim, "Computing receptive fields of convolutional neural networks", 2019):

    window_out = window_in + (kernel - 1) * dilation * jump_in        jump_out = jump_in * stride

where jump is the distance in the picture, in pixels, between two neighbouring values of the map. Where paths meet (a
sum, a concatenation), the widest counts.

Everything else follows from one question: does the operation add up along an axis of the picture? A mean over the map,
a linear layer on a flattened map and an attention over tokens do, and their results depend on the whole picture. A
linear layer on each token's channels does not. (What adds up within pieces of the map, such as attention in windows,
is not told from what adds up all of it.) So each tensor carries which of its axes hold rows (H) or columns (W)
of the picture, through every view and transposition. Statistics of a normalisation are left out, as is usual.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import Tensor

Sides = frozenset[str]
Axis = tuple[tuple[int, Sides], ...]
"""The parts that an axis was merged from, in order: size, and which of the picture's sides, H and W, each holds."""
Pair = tuple[Fraction, Fraction]
NONE: Axis = ()
_SIDES = ("H", "W")


@dataclass(frozen=True)
class Field:
    """What one value of a tensor depends on."""

    axes: tuple[Axis, ...]
    """What of the picture each axis of the tensor holds."""
    window: Pair | None
    """Height and width in px of what reaches it through windows alone; None where nothing does."""
    jump: Pair
    """Distance in px, down and across, between neighbouring values."""
    whole: bool
    """Whether some path to it adds up the whole picture."""


_DOWN_AND_ACROSS: tuple[Axis, Axis] = ((0, frozenset("H")),), ((0, frozenset("W")),)
PICTURES = Field((NONE, NONE, *_DOWN_AND_ACROSS), (Fraction(1),) * 2, (Fraction(1),) * 2, False)
"""The field of the pictures themselves, [B, C, H, W]."""


@dataclass(frozen=True)
class _Call:
    """One call of an ATen operation; `inputs` are the tensors among its arguments that come from the pictures."""

    args: Sequence[Any]
    out: Tensor
    find: Callable[[Tensor], Field | None]
    inputs: list[tuple[Tensor, Field]]

    @property
    def x(self) -> Tensor:
        tensor = self.args[0]
        assert isinstance(tensor, Tensor)
        return tensor

    def argument(self, index: int, default: Any = None) -> Any:
        return self.args[index] if len(self.args) > index else default

    @property
    def field(self) -> Field:
        """All inputs in one: the widest window, with axes matched from the last one, as in broadcasting."""
        fields = [field for _, field in self.inputs]
        through = [field for field in fields if field.window]
        ndim = max(len(field.axes) for field in fields)
        padded = [(NONE,) * (ndim - len(field.axes)) + field.axes for field in fields]
        return Field(
            tuple(_joined(axes) for axes in zip(*padded, strict=True)),
            _widest([field.window for field in through if field.window]) if through else None,
            _widest([field.jump for field in through or fields]),
            any(field.whole for field in fields),
        )


def follow(
    operation: str, args: Sequence[Any], *, tensors: list[Tensor], out: Tensor, find: Callable[[Tensor], Field | None]
) -> Field | None:
    """The field of an operation's output.

    Args:
        operation: ATen's name of it, such as `convolution`, without the underscore of in-place variants.
        args: Its arguments, in ATen's order.
        tensors: All tensors among them.
        out: Its (first) output.
        find: Gives the field of a tensor that comes from the pictures, None for any other.

    Returns:
        None where the output does not come from the pictures.
    """
    inputs = [(tensor, field) for tensor in tensors if (field := find(tensor)) is not None]
    if not inputs:
        return None
    call = _Call(args, out, find, inputs)
    field = _RULES.get(operation, _default)(call)
    if len(field.axes) != out.ndim:  # an operation not known here that changes the shape
        field = _default(_forgetful(call))
    return field


def _forgetful(call: _Call) -> _Call:
    """The same call, seen as one that forgets where rows and columns are."""
    return replace(call, inputs=[(t, replace(f, axes=(NONE,) * call.out.ndim)) for t, f in call.inputs])


def _held(axis: Axis) -> Sides:
    return frozenset[str]().union(*(sides for _, sides in axis))


def _joined(axes: Sequence[Axis]) -> Axis:
    """The axis of a result whose inputs have these, one for one."""
    telling = [axis for axis in axes if _held(axis)]
    sides = _held(sum(telling, NONE))
    return next((axis for axis in telling if _held(axis) == sides), ((0, sides),)) if sides else NONE


def _widest(pairs: list[Pair]) -> Pair:
    return max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)


def _default(call: _Call) -> Field:
    """Value by value, or side by side: additions, activations, concatenations."""
    return call.field


def _mixed(field: Field, *, dims: Sequence[int], shape: Sequence[int]) -> Field:
    """The field after adding up along `dims` of a tensor of that shape."""
    if any(_held(field.axes[dim]) and shape[dim] > 1 for dim in dims):
        return replace(field, window=None, whole=True)
    return field


def _slid(field: Field, *, dim: int, taps: int | Fraction, stride: int | Fraction) -> Field:
    """The field after a window of `taps` values (between the first and the last: taps - 1) slid along `dim`."""
    held = _held(field.axes[dim])
    if len(held) > 1:
        return replace(field, window=None, whole=True) if taps > 1 else field
    for index, side in enumerate(_SIDES):
        if side in held:
            jump, window = list(field.jump), list(field.window or ())
            if window:
                window[index] += (taps - 1) * jump[index]
            jump[index] *= stride
            field = replace(field, window=(window[0], window[1]) if window else None, jump=(jump[0], jump[1]))
    return field


def _each(value: Any, count: int) -> list[int]:
    """ATen gives `[2]` for `[2, 2]` at times."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _convolution(call: _Call) -> Field:
    """x, weight, bias, stride, padding, dilation, transposed, output_padding, groups."""
    x, weight, transposed = call.x, call.args[1], call.args[6]
    count = x.ndim - 2
    field = _mixed(call.field, dims=(1,), shape=x.shape)
    strides, dilations = _each(call.args[3], count), _each(call.args[5], count)
    for i, (kernel, stride, dilation) in enumerate(zip(weight.shape[2:], strides, dilations, strict=True)):
        reach = dilation * (kernel - 1) + 1
        if transposed:
            field = _slid(field, dim=2 + i, taps=-(-reach // stride), stride=Fraction(1, stride))
        else:
            field = _slid(field, dim=2 + i, taps=reach, stride=stride)
    return replace(field, axes=(field.axes[0], NONE, *field.axes[2:]))


def _pool(call: _Call) -> Field:
    """x, kernel, stride, padding, and for a maximum dilation; along the last axes."""
    count = 3 if call.x.ndim == 5 else min(2, call.x.ndim - 1)
    kernels = _each(call.args[1], count)
    strides = _each(call.argument(2) or kernels, count)
    dilation = call.argument(4, 1)
    dilations = _each(1 if isinstance(dilation, bool) else dilation, count)  # an average has ceil_mode there
    field = call.field
    for i, (kernel, stride, dilation) in enumerate(zip(kernels, strides, dilations, strict=True)):
        field = _slid(field, dim=call.x.ndim - count + i, taps=dilation * (kernel - 1) + 1, stride=stride)
    return field


def _adaptive_pool(call: _Call) -> Field:
    field = call.field
    for dim in range(2, call.x.ndim):
        size, wanted = call.x.shape[dim], call.out.shape[dim]
        if wanted == 1:
            field = _mixed(field, dims=(dim,), shape=call.x.shape)
        elif size != wanted:
            taps = max(-(-(i + 1) * size // wanted) - i * size // wanted for i in range(wanted))
            field = _slid(field, dim=dim, taps=taps, stride=Fraction(size, wanted))
    return field


def _upsample(call: _Call) -> Field:
    """Between two neighbours, taken of the nearest value too."""
    field = call.field
    for dim in range(2, call.x.ndim):
        field = _slid(field, dim=dim, taps=2, stride=Fraction(call.x.shape[dim], call.out.shape[dim]))
    return field


def _dims(call: _Call) -> list[int]:
    given = call.argument(1)
    wanted = range(call.x.ndim) if given is None or given == [] else _each(given, 1)
    return [dim % call.x.ndim for dim in wanted]


def _reduction(call: _Call) -> Field:
    dims = _dims(call)
    field = _mixed(call.field, dims=dims, shape=call.x.shape)
    if call.out.ndim == call.x.ndim:
        return replace(field, axes=tuple(NONE if i in dims else axes for i, axes in enumerate(field.axes)))
    return replace(field, axes=tuple(axes for i, axes in enumerate(field.axes) if i not in dims))


def _norm(call: _Call) -> Field:
    """x, order, dim: a reduction whose second argument is not the axes."""
    return _reduction(replace(call, args=[call.x, *call.args[2:]]))


def _softmax(call: _Call) -> Field:
    return _mixed(call.field, dims=_dims(call), shape=call.x.shape)


def _matmul(call: _Call) -> Field:
    """[.., n, k] times [.., k, m], the last two arguments that are matrices."""
    left, right = (tensor for tensor in call.args if isinstance(tensor, Tensor) and tensor.ndim == call.out.ndim)
    axes = [field.axes if (field := call.find(t)) else (NONE,) * t.ndim for t in (left, right)]
    flat = replace(call.field, axes=axes[0])
    flat = replace(_mixed(flat, dims=(left.ndim - 1,), shape=left.shape), axes=axes[1])
    mixed = _mixed(flat, dims=(right.ndim - 2,), shape=right.shape)
    batch = map(_joined, zip(axes[0][:-2], axes[1][:-2], strict=True))
    return replace(mixed, axes=(*batch, axes[0][-2], axes[1][-1]))


def _addmm(call: _Call) -> Field:
    return _matmul(replace(call, args=call.args[1:3]))


def _view(call: _Call) -> Field:
    """Merges and splits axes. What was merged keeps its parts, so that splitting it again finds rows and columns."""
    parts: list[tuple[int, Sides]] = []
    for size, axis in zip(call.x.shape, call.field.axes, strict=True):
        known = math.prod(part for part, _ in axis) == size
        parts += [part for part in (axis if known else ((size, _held(axis)),)) if part[0] != 1]
    parts.reverse()
    axes: list[Axis] = []
    for size in call.out.shape:
        axis, left = NONE, size
        while left > 1:
            part, sides = parts.pop()
            if left % part:  # the rest of this part is for the next axis
                taken = math.gcd(left, part)
                if taken == 1:  # shapes that do not nest: from here on each axis holds some of everything left
                    everything = _held((*axis, (part, sides), *parts))
                    axes += [((size, everything),) for size in call.out.shape[len(axes) :]]
                    return replace(call.field, axes=tuple(axes))
                parts.append((part // taken, sides))
                part = taken
            axis, left = (*axis, (part, sides)), left // part
        axes.append(axis)
    return replace(call.field, axes=tuple(axes))


def _permute(call: _Call) -> Field:
    return replace(call.field, axes=tuple(call.field.axes[dim] for dim in call.args[1]))


def _transpose(call: _Call) -> Field:
    """With no axes named it is that of a matrix."""
    axes = list(call.field.axes)
    first, second = call.args[1:3] if len(call.args) > 2 else (0, -1)
    axes[first], axes[second] = axes[second], axes[first]
    return replace(call.field, axes=tuple(axes))


def _take(call: _Call) -> Field:
    """select, unbind: one place along an axis, which goes."""
    axes = list(call.field.axes)
    del axes[call.argument(1, 0)]
    return replace(call.field, axes=tuple(axes))


def _squeeze(call: _Call) -> Field:
    dims = [dim for dim in _dims(call) if call.x.shape[dim] == 1]
    return replace(call.field, axes=tuple(axes for i, axes in enumerate(call.field.axes) if i not in dims))


def _unsqueeze(call: _Call) -> Field:
    """unsqueeze, stack: a new axis."""
    axes = list(call.field.axes)
    axes.insert(call.argument(1, 0) % call.out.ndim, NONE)
    return replace(call.field, axes=tuple(axes))


def _slice(call: _Call) -> Field:
    """x, dim, start, end, step: every step-th value."""
    return _slid(call.field, dim=call.argument(1, 0), taps=1, stride=call.argument(4, 1))


_RULES: dict[str, Callable[[_Call], Field]] = {
    "convolution": _convolution,
    **dict.fromkeys(["avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d"], _pool),
    **dict.fromkeys(["_adaptive_avg_pool2d", "adaptive_max_pool2d"], _adaptive_pool),
    **dict.fromkeys(["upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"], _upsample),
    **dict.fromkeys(["mean", "sum", "var", "var_mean", "std", "std_mean", "amax", "max", "logsumexp"], _reduction),
    "linalg_vector_norm": _norm,
    **dict.fromkeys(["_softmax", "_safe_softmax"], _softmax),
    **dict.fromkeys(["mm", "bmm"], _matmul),
    **dict.fromkeys(["addmm", "baddbmm"], _addmm),
    **dict.fromkeys(["view", "_unsafe_view", "_reshape_alias"], _view),
    "permute": _permute,
    **dict.fromkeys(["transpose", "t"], _transpose),
    **dict.fromkeys(["select", "unbind"], _take),
    "squeeze": _squeeze,
    **dict.fromkeys(["unsqueeze", "stack"], _unsqueeze),
    "slice": _slice,
}
"""ATen's operations that do more than combine value by value."""
