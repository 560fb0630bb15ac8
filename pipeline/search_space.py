"""What a sweep may vary: a YAML file of dotted parameters, each with a range or with choices.

train.lr: {low: 1.0e-4, high: 3.0e-2, log: true}
train.label_smoothing: {low: 0.0, high: 0.2, step: 0.05}
train.batch_size: {choices: [32, 64, 128]}
"""

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from pipeline import config, experiment
from pipeline.errors import UserError, nearest
from pipeline.parameters import Config, Params, PhaseParams, operational

if TYPE_CHECKING:
    import optuna

SPACE = Path("experiments/tune/space.yaml")
REFUSED = {
    "data": "it would change the pictures that trials are compared on; use `dvc exp run -S`",
    "augment": "each trial would have to pack the pictures anew; use `dvc exp run -S`",
    "evaluate": "trials are not judged on the test split",
    "tracking": "it changes no result",
    "train.seed": "the best seed is luck; leave it out",
    "train.monitor": "it is what trials are judged by",
    "train.fast_dev_run": "its figures mean nothing",
    **dict.fromkeys(
        ("model.pretrained", "model.weights", "model.in_chans", "model.stem"),
        "each trial would have to fetch its first weights anew; use `dvc exp run -S`",
    ),
}
"""Parameters, or sections, that trials have in common, each with the reason."""
Number = StrictInt | StrictFloat


class Range(Params):
    """Numbers from `low` to `high`, both included; whole ones where all of them are."""

    low: Number
    high: Number
    log: bool = False
    """Drawn evenly over the orders of magnitude."""
    step: Number = 0
    """Distance between two neighbouring values; 0 for 1 where they are whole, for any number where they are not."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"an empty range: low {self.low} is not below high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, got {self.low}")
        if self.log and self.step:
            raise ValueError("log and step do not go together; leave one out")
        if self.step < 0:
            raise ValueError(f"step {self.step}: it must be above 0")
        low, high, step = (Decimal(str(value)) for value in (self.low, self.high, self.step))
        if step and (high - low) % step:
            raise ValueError(f"from low {self.low} to high {self.high} is no whole number of steps of {self.step}")
        return self


class Choices(Params):
    """One of several values."""

    choices: tuple[StrictBool | StrictInt | StrictFloat | StrictStr, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _differ(self) -> "Choices":
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("choices: one stands there twice")
        return self


def _kind(given: Any) -> str:
    return "choices" if isinstance(given, dict) and "choices" in given else "range"


Distribution = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")],
    Discriminator(_kind),
]
_SPACE = TypeAdapter(Annotated[dict[str, Distribution], Field(min_length=1)])


def read(path: Path, *, given: Config) -> dict[str, Range | Choices]:
    """A space, in which each parameter may take each of its ends beside what is given for the others.

    Raises:
        UserError: one line with the file, what is wrong in it and the nearest right name.
    """
    try:
        space = _SPACE.validate_python(YAML(typ="safe").load(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it says what the sweep may vary, as {SPACE} does") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    for name, distribution in space.items():
        if mistake := _mistake(name, space, given=given):
            raise UserError(f"{path}: {name}: {mistake}")
        for end in ends(distribution):
            try:
                wanted = config.load(overrides={name: end})
                experiment.check_names(wanted)
                experiment.check_net(wanted)
            except UserError as error:
                told = str(error)
                raise UserError(f"{path}: {told if told.startswith(name) else f'{name} {end}: {told}'}") from None
    return space


def ends(distribution: Range | Choices) -> tuple[bool | int | float | str, ...]:
    """The values that are tried before a sweep begins: both ends of a range, or all choices."""
    return distribution.choices if isinstance(distribution, Choices) else (distribution.low, distribution.high)


def suggest(distribution: Range | Choices, trial: "optuna.Trial", name: str) -> bool | int | float | str:
    """A trial's value."""
    if isinstance(distribution, Choices):
        chosen = trial.suggest_categorical(name, distribution.choices)
        assert chosen is not None
        return chosen
    low, high, step, log = distribution.low, distribution.high, distribution.step, distribution.log
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int):
        return trial.suggest_int(name, low, high, step=step or 1, log=log)
    return trial.suggest_float(name, low, high, step=step or None, log=log)


def _mistake(name: str, space: Mapping[str, Range | Choices], *, given: Config) -> str:
    """Why a parameter is not to be varied; empty where it is."""
    section, _, rest = name.partition(".")
    for part in (section, ".".join(name.split(".")[:2])):
        if part in REFUSED:
            return f"not to be varied: {REFUSED[part]}"
    if name in operational():
        return "not to be varied: it changes no result"
    if above := next((other for other in space if name.startswith(f"{other}.")), ""):
        return f"it is a part of {above}, which varies, too; leave one out"
    phases = given.train.phases
    if section != "train" or rest not in PhaseParams.model_fields or isinstance(phases, str):
        return ""
    if "train.phases" not in space and all(getattr(phase, rest) != "auto" for phase in phases.values()):
        return f"it changes nothing, since every phase has its own; vary train.phases.{list(phases)[-1]}.{rest}"
    return ""


def _explain(error: ValidationError) -> str:
    """The first mistake in a file, with the place where it stands."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    keys = [str(part) for part in first["loc"]]
    # pydantic puts the kind of distribution after the parameter, and the types that a value may have after its key.
    place = ": ".join([*keys[:1], *keys[2:3]])
    if first["type"] == "extra_forbidden":
        kind = Choices if keys[1] == "choices" else Range
        return f"{place}: no such key{nearest(keys[2], kind.model_fields)}"
    if first["type"] == "missing":
        return f"{place}: missing; give low and high, or choices"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{place}: expected a range such as {{low: 0, high: 1}}, or choices, got {first['input']!r}"
    if not keys:
        return "expected parameters, each with its range or choices"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if first["type"] == "value_error" else f"{place}: {message}, got {first['input']!r}"
