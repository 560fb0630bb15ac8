"""Weights as files: what training starts from, and the trained model together with what a picture needs before it.

A model file is safetensors (tensors only, nothing that runs) whose header carries the `ModelCard` as JSON.
Importing this module, or reading a card, does not load torch.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from pipeline import nets
from pipeline.errors import UserError
from pipeline.files import fresh_file

if TYPE_CHECKING:
    from torch import Tensor, nn

Start = Literal["random", "pretrained", "file"]
"""What training starts from: new weights, weights of a public source, or a file of the user's."""

_CARD_KEY = "thaw"
_WRAPPERS = ("state_dict_ema", "state_dict", "model")
"""Keys under which checkpoints keep the state; averaged weights first, as timm does."""
_COUNTER = "num_batches_tracked"
"""A batch norm's count of batches: only a norm with cumulative averages reads it, and many files lack it."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What must travel with trained weights so that a picture is treated as it was in training."""

    name: str
    """The net, as nets.build takes it."""
    in_chans: int
    """Channels that the net sees."""
    stem: str
    """First layers, as nets.build takes it."""
    classes: tuple[str, ...]
    """Class names in the order of the logits."""
    px: int
    """Side of the square that the net sees, in pixels."""
    pack_px: int
    """Shorter side of the picture before the centre crop, in pixels."""
    mean: tuple[float, ...]
    """Subtracted from pictures in 0..1, one value a channel."""
    std: tuple[float, ...]
    """Divided by, one value a channel."""
    start: Start
    """What training started from."""
    start_source: str
    """Where that came from, for people."""
    fast_dev_run: bool
    """Whether this is a trial of one batch, which says nothing of the net."""


def save_state(path: Path, state: "Mapping[str, Tensor]", *, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors as safetensors, whole or not at all."""
    import torch
    from safetensors.torch import save_file

    # safetensors takes neither other memory formats nor tensors that share memory
    copies = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    with fresh_file(path) as beside:
        beside.touch()
        usual = beside.stat().st_mode
        save_file(copies, beside, metadata=metadata)
        beside.chmod(usual)  # safetensors lets nobody else read its files


def save_model(path: Path, net: "nn.Module", card: ModelCard) -> None:
    """Writes a trained net and its card as one file, whole or not at all."""
    save_state(path, net.state_dict(), metadata={_CARD_KEY: json.dumps(asdict(card))})


def load_model(path: Path) -> "tuple[nn.Module, ModelCard]":
    """The net of a model file, in eval mode on the CPU, and its card.

    Raises:
        UserError: There is no such file, or it is not a Thaw model, or it does not fit the net that its card names.
    """
    card = read_card(path)
    state = read_state(path)
    net = nets.build(card.name, num_classes=len(card.classes), in_chans=card.in_chans, stem=card.stem)
    if misfit := _misfit(net, state):
        raise UserError(f"{path}: does not fit {card.name}; {misfit}")
    net.load_state_dict(state, strict=True)
    return net.eval(), card


def read_card(path: Path) -> ModelCard:
    """The card of a model file, from its header alone; loads no torch.

    Raises:
        UserError: There is no such file, or it is not a Thaw model.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; train it first: make train MODEL=NAME")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        values = json.loads(metadata[_CARD_KEY])
    except (SafetensorError, KeyError, json.JSONDecodeError):
        raise UserError(f"{path}: not a Thaw model; take the .safetensors that train wrote") from None
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(ModelCard)}:
        raise UserError(f"{path}: the model's card is not of this version; train it again: make train MODEL=NAME")
    arguments: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return ModelCard(**arguments)


def read_classes(path: Path) -> tuple[str, ...]:
    """What the logits of a file's net stand for, in order; nothing where the file is no model of Thaw's."""
    try:
        return read_card(path).classes
    except UserError:
        return ()


def read_state(path: Path) -> "dict[str, Tensor]":
    """The tensors of a .safetensors, .pth, .pt or .bin file, on the CPU, by name.

    A checkpoint's wrapping (`state_dict_ema`, `state_dict`, `model`) and a `module.` before every name are taken off.

    Raises:
        UserError: There is no such file, it cannot be read without running code, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return _read_pickle(path)
    raise UserError(f"{path}: weights are .safetensors, .pth, .pt or .bin files")


def load_pretrained(net: "nn.Module", state: "Mapping[str, Tensor]", *, other_classes: bool = False) -> None:
    """Loads weights into a net that may have other classes, or one channel in place of three.

    Where the classifier has another shape, or there is none, or it is for `other_classes`, the net's own is set to
    zero: every class is then equally likely at first, and no random head sends noise into pretrained layers
    (Kolesnikov et al. 2019). The kernels of the first convolution are summed over the colours for a one-channel net.
    Auxiliary classifiers may be missing; all else must match. A net of ours takes files of its reference in
    torchvision or timm, whose names it knows. Works alike for timm's nets and our own.

    Raises:
        UserError: The first names that are missing, unexpected, or of another shape.
    """
    config: Any = net.pretrained_cfg
    own = net.state_dict()
    fitted = renamed_for(net, state)
    names = (*_as_names(config.get("classifier")), *config.get("auxiliary_classifiers", ()))
    classifiers = tuple(f"{name}." for name in names)
    for classifier in classifiers:
        keys = [key for key in own if key.startswith(classifier)]
        if other_classes or any(key in fitted and fitted[key].shape != own[key].shape for key in keys):
            fitted = {key: tensor for key, tensor in fitted.items() if not key.startswith(classifier)}
    for name in _as_names(config.get("first_conv")):
        key = f"{name}.weight"
        if key in own and key in fitted:
            fitted[key] = _sum_colours(fitted[key], like=own[key])
    if misfit := _misfit(net, fitted, may_miss=(*classifiers, *_absent_heads(net, fitted))):
        raise UserError(f"the weights do not fit the net; {misfit}")
    fitted |= {key: own[key].zero_() for key in own if key.startswith(classifiers) and key not in fitted}
    net.load_state_dict(fitted, strict=False)


def _read_safetensors(path: Path) -> "dict[str, Tensor]":
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None


def _read_pickle(path: Path) -> "dict[str, Tensor]":
    from pickle import UnpicklingError

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise UserError(f"{path}: not a file of plain tensors (it may run code); save net.state_dict() alone") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {(str(error) or 'it is empty').splitlines()[0]}") from None
    if isinstance(state, dict):
        state = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds no state by name; save net.state_dict()")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {key!r} is no tensor; save net.state_dict() alone")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def renamed_for(net: "nn.Module", state: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """A state under the net's own names, where it stands under those of a reference that the net knows."""
    own = net.state_dict()
    pairs: tuple[tuple[str, str], ...] = getattr(net, "reference_renames", ())
    renamed = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in () if key in own else pairs:
            name = re.sub(pattern, replacement, name)
        if name in own and own[name].ndim == 2 and tensor.ndim == 4 and tensor[0].numel() == own[name].shape[1]:
            tensor = tensor.flatten(1)  # a linear layer written as a convolution over the whole map
        renamed[name] = tensor
    return renamed


def _absent_heads(net: Any, state: "Mapping[str, Tensor]") -> tuple[str, ...]:
    """Auxiliary heads that a state lacks as a whole, as files for inference do; the net keeps its own random ones."""
    heads = {id(head) for head in net.auxiliary_heads()} if hasattr(net, "auxiliary_heads") else set()
    prefixes = (f"{name}." for name, module in net.named_modules() if id(module) in heads)
    return tuple(prefix for prefix in prefixes if not any(key.startswith(prefix) for key in state))


def _sum_colours(weight: "Tensor", *, like: "Tensor") -> "Tensor":
    from timm.models._manipulate import adapt_input_conv

    if weight.ndim == 4 and weight.shape[1] == 3 * like.shape[1]:
        return adapt_input_conv(1, weight)
    return weight


def _misfit(net: "nn.Module", state: "Mapping[str, Tensor]", *, may_miss: tuple[str, ...] = ()) -> str:
    """The first name of each kind in which a state differs from the net's, or nothing."""
    own = net.state_dict()
    kinds = {
        "missing": [
            key for key in own if key not in state and not key.startswith(may_miss) and not key.endswith(_COUNTER)
        ],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} in place of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    return "; ".join(
        f"{kind}: {keys[0]}" + (f" and {len(keys) - 1} more" if keys[1:] else "")
        for kind, keys in kinds.items()
        if keys
    )


def _as_names(value: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
