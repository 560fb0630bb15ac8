"""What a net is made of, layer by layer: sizes, parameters, multiply-adds, memory, receptive field.

Measured, not declared: one picture runs through the net, and every operation is seen as it happens, whoever calls it.
The picture and the net have shapes and no numbers (PyTorch's `meta` device), so a net of any size takes about a second.

Each operation belongs to the innermost layer that is running. Those that run in no layer (`F.relu`, `+`, `torch.cat`
between layers) make rows of their own, so that the totals miss nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline import nets
from pipeline.analysis import receptive, windows
from pipeline.analysis.windows import Size, Window
from pipeline.errors import UserError

OPENED = 0.6
"""A part of the net that alone holds more than this share is shown by what is inside it."""
_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.MultiheadAttention,
)
"""Layers even where they contain others, as timm's batch norm its activation. What contains none is a layer anyway."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(eq=False)
class Layer:
    """A row: one call of a layer, or of the operations that run between two layers."""

    name: str
    kind: str
    """The class, or the names of the operations."""
    is_function: bool
    """Whether the row is of operations outside layers."""
    window: Window | None = None
    input: Size = ()
    formula: Size | None = None
    """(height, width) that the formula gives; None for what has no window."""
    output: Size = ()
    """Without the axis of the batch."""
    parameters: int = 0
    """Each counted once, where it is first used."""
    macs: int = 0
    """Multiply-adds for one picture."""
    activation_bytes: int = 0
    """Of the output of a layer, or of all that functions make; float32, one picture; 0 for views and in place."""
    receptive_field: tuple[float, float] | None = None
    """Height and width in px, through windows alone; None where there is no such path."""
    sees_whole_picture: bool = False

    @property
    def agrees(self) -> bool | None:
        """Whether the formula gives the size that came out; None where there is no formula."""
        return None if self.formula is None else self.output[-2:] == self.formula


@dataclass(frozen=True)
class Outside:
    """Parameters that are in no row."""

    name: str
    parameters: int
    used: bool
    """Whether the forward pass reads them: it does `cls_token`, and in eval mode no auxiliary classifier."""


@dataclass(frozen=True)
class Share:
    """A part of a total."""

    name: str
    value: int
    share: float


@dataclass
class Anatomy:
    """A net, measured."""

    net: str
    px: int
    in_chans: int
    num_classes: int
    layers: list[Layer]
    outside: list[Outside]
    containers: frozenset[str]
    """Names of the parts that only contain others."""
    peak_bytes: int
    """Of activations alive at one time in inference, the picture included, float32, one picture."""

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.layers) + sum(part.parameters for part in self.outside)

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.layers)

    @property
    def activation_bytes(self) -> int:
        return sum(row.activation_bytes for row in self.layers)

    def shares(self, quantity: str, *, by: str) -> list[Share]:
        """Who has how much, the greatest first, those with none left out.

        Args:
            quantity: "parameters", "macs" or "activation_bytes".
            by: "block", a part of the net, or "kind", the class of a layer.
        """
        parts = [(row.name, row.kind, int(getattr(row, quantity))) for row in self.layers]
        if quantity == "parameters":
            for part in self.outside:
                kind = "outside layers" if part.used else "not used"
                parts.append((part.name.rpartition(".")[0], kind, part.parameters))
        total = sum(value for _, _, value in parts)
        if by == "kind":
            return _ranked([(kind, value) for _, kind, value in parts], total=total)
        blocks = _ranked([(name.partition(".")[0], value) for name, _, value in parts], total=total)
        opened = {block.name for block in blocks if block.share > OPENED and block.name in self.containers}
        return _ranked(
            [
                (".".join(name.split(".")[: 2 if name.split(".")[0] in opened else 1]), value)
                for name, _, value in parts
            ],
            total=total,
        )


def measure(name: str, *, px: int | None, in_chans: int, num_classes: int) -> Anatomy:
    """Builds a net and takes its measures.

    Args:
        name: As `nets.build` takes it.
        px: Side of the picture; None for the net's own.
        in_chans: Channels of the picture.
        num_classes: Width of the logits.

    Raises:
        UserError: There is no such net, or it does not take such pictures.
    """
    nets.check(name)
    try:
        with torch.device("meta"):
            return _measure(name, px=px, in_chans=in_chans, num_classes=num_classes)
    except (UserError, RuntimeError):  # a net may need numbers, so only a failure with numbers is one
        return _measure(name, px=px, in_chans=in_chans, num_classes=num_classes)


def own_px(net: nn.Module) -> int:
    """The side of the pictures that a net was made for."""
    config: Any = net.pretrained_cfg
    return int(config["input_size"][-1])


def _measure(name: str, *, px: int | None, in_chans: int, num_classes: int) -> Anatomy:
    net = nets.build(name, num_classes=num_classes, in_chans=in_chans).eval()
    px = px or own_px(net)
    nets.check_px(net, px, name=name)
    return dissect(net, torch.zeros(1, in_chans, px, px), name=name)


def dissect(net: nn.Module, picture_1chw: Tensor, *, name: str) -> Anatomy:
    """Takes the measures of a net in eval mode that is built already; `picture_1chw` is on its device."""
    recorder = _Recorder(net, picture_1chw)
    with torch.no_grad(), recorder.hooked(), _Operations(recorder.observe):
        logits = net(picture_1chw)
    return Anatomy(
        net=name,
        px=picture_1chw.shape[-1],
        in_chans=picture_1chw.shape[1],
        num_classes=logits.shape[-1],
        layers=recorder.layers,
        outside=recorder.outside(),
        containers=frozenset(key for key, module in net.named_modules() if isinstance(module, _CONTAINERS)),
        peak_bytes=recorder.peak_bytes,
    )


@dataclass
class _Call:
    """A module that is running."""

    name: str
    row: Layer | None
    """Its row, if it is a layer."""
    input: Size
    given: set[int]
    """The storages of its arguments."""
    num_operations: int = 0


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of every ATen operation: the operation, its arguments and what it gave."""

    def __init__(self, tell: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tell = tell

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._tell(func, args, kwargs or {}, result)
        return result


class _Recorder:
    """Is told when modules begin and end and, between them, of each ATen operation; makes the rows."""

    def __init__(self, net: nn.Module, picture: Tensor) -> None:
        self.net = net
        self.layers: list[Layer] = []
        self.peak_bytes = 0
        self._running: list[_Call] = []
        self._counted: set[int] = set()  # parameters, by id
        self._used: set[int] = set()
        # Keyed weakly: a tensor leaves as soon as the net lets go of it, and that tells the peak.
        self._fields: Any = WeakTensorKeyDictionary()
        self._fields[picture] = receptive.PICTURES

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While the net's modules report to this."""
        handles: list[Any] = []
        for name, module in self.net.named_modules():
            begin = partial(self._begin, name)
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(self._end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = list(module.parameters(recurse=False))
        row = None
        if isinstance(module, _LAYERS) or next(module.children(), None) is None:
            new = [parameter for parameter in own if id(parameter) not in self._counted]
            self._counted.update(map(id, new))
            row = Layer(name, type(module).__name__, is_function=False, parameters=sum(p.numel() for p in new))
            self.layers.append(row)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shape = tuple(tensors[0].shape[1:]) if tensors else ()
        self._running.append(_Call(name, row, shape, set(map(_storage, tensors))))

    def _end(self, module: nn.Module, _: tuple[Any, ...], out: Any) -> None:
        call = self._running.pop()
        if call.row is None:
            return
        idle = call.num_operations == 0 and call.row.parameters == 0
        if idle and not (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0):
            self.layers.remove(call.row)  # nn.Identity, and whatever else stands in for nothing
            return
        tensor = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        call.row.input = call.input
        self._finish(call.row, tensor)
        if next(module.children(), None) is None:  # of what it makes on the way nothing stays
            call.row.activation_bytes = 0 if _storage(tensor) in call.given else _bytes(tensor)
        call.row.window = windows.of_module(module)
        if call.row.window is not None:
            call.row.formula = call.row.window.predict(call.input[-2:])
        elif isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            wanted = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,) * 2
            call.row.formula = tuple(w or s for w, s in zip(wanted, call.input[-2:], strict=True))

    def _finish(self, row: Layer, out: Tensor) -> None:
        row.output = tuple(out.shape[1:])
        known = self._fields.get(out)
        if known is not None:
            row.sees_whole_picture = known.whole
            row.receptive_field = known.window and (float(known.window[0]), float(known.window[1]))

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Books an operation that comes from the picture; what is done to weights alone is left out."""
        outs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outs:
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        schema = func._schema.name.removeprefix("aten::")
        operation = schema.removesuffix("_")
        self._used.update(map(id, tensors))
        known = receptive.follow(operation, args, tensors=tensors, out=outs[0], find=self._fields.get)
        if known is None:
            return
        for out in outs:
            self._fields[out] = known
        for call in self._running:
            call.num_operations += 1
        is_new = _storage(outs[0]) not in {_storage(tensor) for tensor in tensors}
        is_in_place = schema != operation
        if is_new or is_in_place:  # else a view
            formula = flop_registry.get(func.overloadpacket)
            row = self._row(operation, args, outs[0])
            row.macs += formula(*args, **kwargs, out_val=result) // 2 if formula else 0
            # of further outputs (a pool's indices, a norm's statistics) inference has no use
            row.activation_bytes += _bytes(outs[0]) if is_new else 0
        alive = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in self._fields}
        self.peak_bytes = max(self.peak_bytes, sum(alive.values()))

    def _row(self, operation: str, args: tuple[Any, ...], out: Tensor) -> Layer:
        """The row that an operation belongs to; outside layers a new one, or that of the operation just before."""
        call = self._running[-1]
        if call.row is not None:
            return call.row
        kind = _PLAIN.get(operation, operation.strip("_"))
        last = self.layers[-1] if self.layers else None
        window = windows.of_operation(operation, args)
        if last is None or not last.is_function or last.name != call.name or window or last.window:
            last = Layer(call.name, kind, is_function=True, input=tuple(args[0].shape[1:]) if window else ())
            last.window = window
            last.formula = window.predict(args[0].shape[-2:]) if window else None
            self.layers.append(last)
        elif kind not in last.kind.split(", "):
            last.kind += f", {kind}"
        self._finish(last, out)
        return last

    def outside(self) -> list[Outside]:
        """Parameters that no layer that ran has."""
        return [
            Outside(name, parameter.numel(), id(parameter) in self._used)
            for name, parameter in self.net.named_parameters()
            if id(parameter) not in self._counted
        ]


_PLAIN = {
    "max_pool2d_with_indices": "max_pool2d",
    "constant_pad_nd": "pad",
    "_safe_softmax": "softmax",
    "clone": "copy",
}
"""What people call some of ATen's operations."""


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    """The same for all views of one piece of memory."""
    return int(tensor.untyped_storage()._cdata)


def _ranked(parts: list[tuple[str, int]], *, total: int) -> list[Share]:
    """Sums by name, the greatest first."""
    sums: dict[str, int] = {}
    for name, value in parts:
        sums[name] = sums.get(name, 0) + value
    return [
        Share(name, value, value / total) for name, value in sorted(sums.items(), key=lambda item: -item[1]) if value
    ]
