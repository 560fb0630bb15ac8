"""Where a net can be cut: below, what is frozen and gives the same for a picture every time; above, what learns.

The net is traced into its graph of operations (torch.fx). What depends on the picture, on nothing that learns and on
nothing random lies below the cut; the tensors that cross it are all that the rest needs, so they can be kept in place
of the picture. Dropout, stochastic depth and batch norms that follow the pictures stay above.
"""

import inspect
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

_BatchNorm = nn.modules.batchnorm._BatchNorm
_RANDOM = ("bernoulli", "dropout", "rand", "randint", "randn", "randperm", "multinomial", "normal_", "uniform_")
"""How the names of operations begin that draw random numbers."""
TRIED = (2, 3)
"""Pictures in the batches that a cut is tried on: two sizes tell a batch's axis from the others."""
_UNTRACEABLE = (
    fx.proxy.TraceError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a net's own code raises where it is given what stands in for a tensor."""
WORTH = 500
"""Floating-point operations behind each number that crosses, below which reading it would cost as much."""


class CannotCutError(Exception):
    """A net whose frozen part cannot be told apart; the message says why."""


class Crossing(NamedTuple):
    """A tensor that crosses the cut."""

    name: str
    """Of the operation that gives it, within the net."""
    shape: tuple[int, ...]
    """For one picture: without the batch's axis."""


@dataclass(frozen=True)
class Traced:
    """A net's operations, with the tensors that they make from constants."""

    graph: fx.Graph
    constants: dict[str, Tensor]

    def on(self, net: nn.Module, graph: fx.Graph) -> fx.GraphModule:
        """A part of the graph that runs the modules of a net."""
        place = next(net.parameters()).device
        for name, constant in self.constants.items():
            setattr(net, name, constant.to(place))
        try:
            return fx.GraphModule(net, graph)
        finally:
            for name in self.constants:
                delattr(net, name)


@dataclass(frozen=True)
class Cut:
    """A net in two parts, for one phase: what learns must not change, the weights may.

    The parts run the modules of the net, or those of a deep copy of it.
    """

    crossings: tuple[Crossing, ...]
    code: str
    """The frozen part's operations and modules, as text."""
    _below: fx.Graph
    _above: dict[bool, tuple[Traced, fx.Graph]]
    """By whether the net is in training mode."""
    _made: "WeakKeyDictionary[nn.Module, dict[bool, fx.GraphModule]]" = field(default_factory=WeakKeyDictionary)

    def below(self, net: nn.Module) -> fx.GraphModule:
        """The frozen part: from normalised pictures [B, C, H, W] to the tensors that cross, each [B, ...]."""
        return self._above[True][0].on(net, self._below)

    def logits(self, net: nn.Module, crossing: Sequence[Tensor], *, compiled: bool = False) -> Tensor:
        """The rest, in the net's mode: from the tensors that cross to logits [B, classes]."""
        if net not in self._made:
            self._made[net] = {mode: traced.on(net, graph) for mode, (traced, graph) in self._above.items()}
            for part in self._made[net].values() if compiled else ():
                part.compile()
        found: Tensor = self._made[net][net.training](*crossing)
        return found


def find(net: nn.Module, *, in_chans: int, px: int) -> Cut:
    """Cuts a net as high as it can be.

    Args:
        net: in a phase's training mode (`schedule.set_mode`), with the phase's parameters learning. Its weights,
            buffers and modes stay as they are. It may be on the meta device.
        px: side of the pictures, in pixels.

    Raises:
        CannotCutError: too little lies below what learns, or the net cannot be traced.
    """
    modes = {name: module.training for name, module in net.named_modules()}
    try:
        learning = _trace(net)
        boundary = _boundary(learning.graph, net)
        net.eval()
        judging = _trace(net)
    finally:
        for name, module in net.named_modules():
            module.training = modes[name]
    twins = _twins(learning.graph, judging.graph, boundary)
    values, flops = _values(learning.on(net, _lower(learning.graph, boundary)), net, in_chans=in_chans, px=px)
    shapes = {number: value for number, value in enumerate(values) if isinstance(value, tuple)}
    if flops < WORTH * sum(map(prod, shapes.values())):
        raise CannotCutError("its frozen layers are too little work")
    below = _lower(learning.graph, [boundary[number] for number in shapes])
    above = {
        mode: (traced, _upper(traced.graph, nodes, values))
        for mode, traced, nodes in ((True, learning, boundary), (False, judging, twins))
    }
    crossings = tuple(Crossing(boundary[number].name, shape) for number, shape in shapes.items())
    return Cut(crossings, "\n".join([_source(below), *_described(net, below)]), below, above)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))  # type: ignore[no-untyped-call]
        self._whole = tuple(get_notrace_modules())  # type: ignore[no-untyped-call]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        by_itself = isinstance(m, self._whole) or (not any(m.children()) and not _settled(m))
        return by_itself or super().is_leaf_module(m, module_qualified_name)


def _trace(net: nn.Module) -> Traced:
    before = set(vars(net))
    try:
        # What a net takes beside pictures, such as a mask, is left at its default.
        arguments = list(inspect.signature(net.forward).parameters.values())[1:]
        given = {a.name: a.default for a in arguments if a.default is not a.empty}
        graph = _Tracer().trace(net, concrete_args=given)
    except _UNTRACEABLE as error:
        raise CannotCutError(f"it cannot be traced ({_first_line(error)})") from None
    finally:
        # The tracer hangs them onto the net, which must stay as it was.
        constants = {name: vars(net).pop(name) for name in set(vars(net)) - before}
    return Traced(graph, constants)


def _boundary(graph: fx.Graph, net: nn.Module) -> list[fx.Node]:
    """What crosses: frozen work on the picture that is used above the cut, in the order of the graph."""
    frozen: set[fx.Node] = set()  # depends on the picture and on nothing that learns or is random
    steady: set[fx.Node] = set()  # depends on no picture, and on nothing that learns or is random
    for node in graph.nodes:
        inputs = node.all_input_nodes
        of_picture = node.op == "placeholder" or any(i in frozen for i in inputs)
        if node.op != "output" and all(i in frozen or i in steady for i in inputs) and _still(node, net, of_picture):
            (frozen if of_picture else steady).add(node)
    (output,) = (node for node in graph.nodes if node.op == "output")
    above = _ancestors([output]) - frozen
    crossing = [node for node in graph.nodes if node in frozen and any(user in above for user in node.users)]
    if any(user is output for node in crossing for user in node.users):
        raise CannotCutError("nothing in it learns")
    if any(node.op == "placeholder" for node in crossing) or not _works(frozen, net):
        raise CannotCutError("its first layers learn")
    return crossing


def _works(frozen: set[fx.Node], net: nn.Module) -> bool:
    """Whether there are weights in what is frozen."""
    return any(
        (node.op == "call_module" and any(True for _ in net.get_submodule(str(node.target)).parameters()))
        or any(i.op == "get_attr" for i in node.all_input_nodes)
        for node in frozen
    )


def _still(node: fx.Node, net: nn.Module, of_picture: bool) -> bool:
    """Whether an operation by itself gives the same for the same input throughout the phase, picture by picture."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(net.get_submodule(owner), name, None)  # None: a constant of the graph
        return not (isinstance(value, nn.Parameter) and value.requires_grad)
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        return not any(p.requires_grad for p in module.parameters()) and all(map(_settled, module.modules()))
    if node.op in ("call_function", "call_method"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name == "scaled_dot_product_attention":
            return node.kwargs.get("dropout_p", 0) in (0, 0.0)
        if name == "batch_norm" and of_picture:
            return node.kwargs.get("training") is False
        return not name.startswith(_RANDOM) and "dropout" not in name
    return True


def _settled(module: nn.Module) -> bool:
    if not module.training:
        return True
    rates = [getattr(module, name, 0) for name in ("p", "drop_prob", "prob")]
    return not isinstance(module, _BatchNorm) and all(rate == 0 for rate in rates if isinstance(rate, (int, float)))


def _lower(graph: fx.Graph, boundary: Sequence[fx.Node]) -> fx.Graph:
    below, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    needed = _ancestors(boundary)
    for node in graph.nodes:
        if node in needed:
            copies[node] = below.node_copy(node, copies.__getitem__)
    below.output(tuple(copies[node] for node in boundary))
    return below


def _upper(graph: fx.Graph, boundary: Sequence[fx.Node], values: "Sequence[Value]") -> fx.Graph:
    above = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    tensors = [node for node, value in zip(boundary, values, strict=True) if isinstance(value, tuple)]
    for number, node in enumerate(tensors):
        copies[node] = above.placeholder(f"crossing_{number}")
    pictures = above.call_method("size", (copies[tensors[0]], 0))
    for node, value in zip(boundary, values, strict=True):
        if isinstance(value, PerPicture):
            copies[node] = above.call_function(operator.mul, (pictures, value.times))
        elif not isinstance(value, tuple):
            copies[node] = value
    (output,) = (node for node in graph.nodes if node.op == "output")
    needed = _ancestors([output], until=set(boundary))
    for node in graph.nodes:
        if node in needed and node not in copies:
            assert node.op != "placeholder"  # it would cross
            copies[node] = above.node_copy(node, copies.__getitem__)
    return above


def _ancestors(nodes: Sequence[fx.Node], *, until: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The nodes and all that they follow from, but not what those in `until` follow from."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in until else node.all_input_nodes
    return found


def _twins(learning: fx.Graph, judging: fx.Graph, boundary: Sequence[fx.Node]) -> list[fx.Node]:
    """The same operations in the graph of evaluation mode."""
    by_name = {node.name: node for node in judging.nodes}
    twins = [by_name[node.name] for node in boundary if node.name in by_name]
    if len(twins) < len(boundary) or _source(_lower(learning, boundary)) != _source(_lower(judging, twins)):
        raise CannotCutError("its frozen layers do something else in training than in evaluation")
    return twins


def _source(graph: fx.Graph) -> str:
    return str(graph.python_code("self").src)


def _described(net: nn.Module, graph: fx.Graph) -> list[str]:
    return [f"{n.target}: {net.get_submodule(str(n.target))}" for n in graph.nodes if n.op == "call_module"]


@dataclass(frozen=True)
class PerPicture:
    """A number that grows with the batch."""

    times: int


Value = tuple[int, ...] | PerPicture | int | float | None
"""What crosses, as found by trying: a tensor's shape for one picture, or a number."""


def _values(below: fx.GraphModule, net: nn.Module, *, in_chans: int, px: int) -> tuple[list[Value], float]:
    """What crosses, and the floating-point operations behind it, for one picture."""
    place = next(net.parameters()).device
    few, more = (torch.zeros(size, in_chans, px, px, device=place) for size in TRIED)
    try:
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                small = below(few)
            large = below(more)
    except _UNTRACEABLE as error:
        raise CannotCutError(f"its frozen layers do not run by themselves ({_first_line(error)})") from None
    return [_value(one, other) for one, other in zip(small, large, strict=True)], counter.get_total_flops() / len(few)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _value(small: Any, large: Any) -> Value:
    """Of the same crossing, tried with two sizes of batch."""
    if isinstance(small, Tensor):
        if not small.is_floating_point():
            raise CannotCutError("its frozen layers give more than floating-point numbers")
        if (small.shape[:1], large.shape[:1]) != ((TRIED[0],), (TRIED[1],)) or small.shape[1:] != large.shape[1:]:
            raise CannotCutError("its frozen layers do not keep pictures apart")
        return tuple(small.shape[1:])
    if not isinstance(small, (int, float)):
        raise CannotCutError(f"its frozen layers give a {type(small).__name__}")
    if small == large:
        return small
    times = small // TRIED[0]
    if (times * TRIED[0], times * TRIED[1]) != (small, large):
        raise CannotCutError("its frozen layers give numbers that change with the batch")
    return PerPicture(int(times))
