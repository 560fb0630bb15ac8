"""The weights stage: brings what training starts from to models/pretrained/NAME, so that training needs no network."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from pipeline import nets, paths
from pipeline.errors import UserError, blaming
from pipeline.files import fresh_folder
from pipeline.parameters import Config, ModelParams
from pipeline.training import pretrained, weights
from pipeline.training.pretrained import Origin

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "weights.safetensors"


def run(config: Config) -> None:
    """Writes weights.safetensors (none for a random start) and origin.json."""
    model = config.model
    if (standing := _standing(model)) is not None:
        _report(model, standing)
        return
    state, origin = _choose(model)
    with fresh_folder(paths.pretrained(model.name)) as folder:
        if state is not None:
            file = folder / WEIGHTS
            weights.save_state(file, state)
            origin = replace(origin, sha256=_digest(file))
        origin.write(folder)
    _report(model, origin)


def _standing(model: ModelParams) -> Origin | None:
    """The origin of a public source's weights that lie here whole already: they follow from the net's name alone.

    DVC takes the out away before it runs the stage, so `dvc repro -f weights` fetches anew all the same.
    """
    folder = paths.pretrained(model.name)
    file = folder / WEIGHTS
    wanted = model.pretrained is not False and Path(model.weights) == paths.NO_WEIGHTS
    if not wanted or model.stem != nets.DEFAULT_STEM or not file.exists():
        return None
    origin = Origin.read(folder)
    return origin if origin.start == "pretrained" and origin.sha256 == _digest(file) else None


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _choose(model: ModelParams) -> "tuple[dict[str, Tensor] | None, Origin]":
    """The state to start from, or none, by model.weights, then model.pretrained, then what the sources have."""
    with blaming("model.name"):
        scratch = nets.is_scratch(model.name)
    path = Path(model.weights)
    if path != paths.NO_WEIGHTS:
        if model.pretrained is False:
            raise UserError(
                f"model.pretrained is false, but model.weights is {path}: set it to {paths.NO_WEIGHTS},"
                " or model.pretrained to true"
            )
        return _from_file(model, path), Origin(start="file", source=str(path), classes=weights.read_classes(path))
    if model.pretrained is False:
        return None, Origin(start="random", source="model.pretrained is false")
    if scratch and (model.name not in pretrained.REFERENCES or model.stem != nets.DEFAULT_STEM):
        named = model.name if model.stem == nets.DEFAULT_STEM else f"{model.name} with stem {model.stem}"
        if model.pretrained is True:
            raise UserError(f"no source has weights for {named}; give model.weights=FILE, or model.pretrained=auto")
        return None, Origin(start="random", source=f"no source has weights for {named}")
    with blaming("model.name"):
        found, tried = pretrained.find(model.name)
    if found:
        return found.state, Origin(start="pretrained", source=found.source, tried=tried)
    if model.pretrained is True:
        raise UserError(
            f"no pretrained weights for {model.name}: {_reasons(tried, '; ')};"
            " give model.weights=FILE, or model.pretrained=auto to start from random weights"
        )
    return None, Origin(start="random", source="no source had weights", tried=tried)


def _from_file(model: ModelParams, path: Path) -> "dict[str, Tensor]":
    """Reads the user's file and tries it on, so that one of another net is refused here and not in training."""
    state = weights.read_state(path)
    net = nets.build(model.name, num_classes=2, in_chans=model.in_chans, stem=model.stem)
    try:
        weights.load_pretrained(net, state)
    except UserError as error:
        raise UserError(f"{path}, as weights of {model.name}: {error}") from None
    return state


def _report(model: ModelParams, origin: Origin) -> None:
    console = Console(stderr=True)
    if origin.start == "random" and origin.tried:
        text = (
            f"{model.name} starts from RANDOM weights; its results will be far below a pretrained net's.\n"
            f"{_reasons(origin.tried, chr(10))}\n"
            "Try the sources again: dvc repro -f weights. Or give model.weights=FILE."
        )
        console.print(Panel(Text(text), title="no pretrained weights", border_style="red"))
        return
    console.print(
        f"{model.name}: {origin.start} weights ({origin.source})", highlight=False, markup=False, soft_wrap=True
    )


def _reasons(tried: tuple[tuple[str, str], ...], separator: str) -> str:
    return separator.join(f"{source}: {reason}" for source, reason in tried)
