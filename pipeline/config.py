"""The only reader of params.yaml: typed, frozen, range-checked parameters.

Every knob is a field with its meaning and unit in the docstring under it. A mistake in the file raises `UserError` with
the file, the line, what is wrong and the nearest right name. A field marked `Operational` changes how a run is
carried out (devices, workers) but not its result, so it is no `params` of a DVC stage.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError

from pipeline import paths
from pipeline.data.transforms import check as check_transforms
from pipeline.errors import UserError, ValueAtError, nearest
from pipeline.files import fresh_file


class Marker(NamedTuple):
    """Marks a field whose value changes no result."""

    operational: bool


Operational = Marker(operational=True)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Transforms = dict[str, dict[str, Any]]


class Params(BaseModel):
    """What every section has in common: frozen, no unknown keys, docstrings as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataParams(Params):
    """Which pictures."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Dataset, by its name in pipeline/data/catalog.py; `image_folder` takes the folder of `path`."""
    path: str = "data/pictures"
    """The folder that `image_folder` reads: train/ val/ test/ of class folders, or class folders alone."""


class AugmentParams(Params):
    """The split, the packing, and offline augmentation."""

    px: int = Field(64, ge=8, le=1024)
    """Shorter side of a packed picture, in pixels."""
    train_size: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    """Training pictures, a stratified subset (validation's not counted), or all."""
    val_fraction: float = Field(0.1, gt=0, lt=0.9)
    """Validation pictures carved from the published train split: this share of it, or of `train_size`."""
    test_fraction: float = Field(0.2, gt=0, lt=0.9)
    """Test pictures carved first, where the publisher split nothing: this share of all."""
    seed: Seed = 0
    """Seed of the split and of the offline copies."""
    copies: int = Field(0, ge=0, le=100)
    """Offline-augmented copies packed per training picture; 0 for none."""
    transforms: Transforms = {}
    """What makes an offline copy: transforms by name, in order, each with its arguments."""
    skip_unreadable: bool = False
    """Leave out pictures that cannot be decoded in full (they are listed) in place of stopping."""

    _transforms = field_validator("transforms")(check_transforms)

    @model_validator(mode="after")
    def _copies_differ(self) -> "AugmentParams":
        if self.copies and not self.transforms:
            raise ValueAtError("copies need an entry in augment.transforms, or they repeat the pictures", "copies")
        return self


class ModelParams(Params):
    """Which net, and what it starts from."""

    name: Name
    """A timm net, or scratch/NAME for one of pipeline/nets (list them: make models)."""
    pretrained: StrictBool | Literal["auto"] = "auto"
    """true: pretrained weights or an error; false: random; auto: pretrained if any source has them, else random."""
    weights: str = str(paths.NO_WEIGHTS)
    """A file of weights for this net (.safetensors or .pth); the placeholder models/no-weights means none."""
    in_chans: Literal[1, 3] = 3
    """Channels that the net sees; grey pictures are repeated, colour ones turned to luma."""
    drop_rate: Literal["auto"] | Annotated[float, Field(ge=0, lt=1)] = "auto"
    """Dropout before the classifier, as a probability; auto for the net's own, 0 for none."""
    drop_path_rate: Literal["auto"] | Annotated[float, Field(ge=0, lt=1)] = "auto"
    """Stochastic depth, as the last block's probability, in nets that have it; auto for the net's own, 0 for none."""
    stem: Literal["default", "cifar"] = "default"
    """First layers: the net's own, or cifar for a 3x3 one that keeps small pictures whole, in nets that have it."""
    recompute: bool = False
    """Compute cheap layers again in the backward pass, to save memory, in the DenseNets written here."""


class PhaseParams(Params):
    """One phase of the schedule."""

    epochs: int = Field(ge=1)
    """Passes over the training pictures."""
    trainable: Annotated[str, Field(pattern=r"^(head|all|last:[1-9][0-9]*)$")]
    """What learns: head, last:N (the head and the last N blocks), or all."""
    lr: float = Field(gt=0, le=100)
    """Peak learning rate."""
    scheduler: Literal["constant", "cosine", "onecycle"] = "onecycle"
    """How the learning rate moves over the phase's steps."""


class TrainParams(Params):
    """The schedule and how it is carried out."""

    seed: Seed = 0
    """Seed of the head's initial weights, the order of pictures, augmentation and dropout."""
    px: Literal["auto"] | Annotated[int, Field(ge=8, le=1024)] = "auto"
    """Side of the square that the net sees, in pixels: at most augment.px, which `auto` takes."""
    batch_size: int = Field(64, ge=1)
    """Pictures per optimiser step, over all devices together."""
    phases: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], PhaseParams] = Field(min_length=1)
    """Phases by name, in order. Each starts from the best weights of the one before."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of kernels; biases and norms have none."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over the classes."""
    transforms: Transforms = {}
    """Online augmentation: transforms by name, in order, each with its arguments."""
    monitor: Literal["val/loss", "val/top1"] = "val/loss"
    """What picks the best epoch and stops early."""
    patience: int = Field(0, ge=0)
    """Epochs without a better `monitor` before a phase ends early; 0 for never."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Lightning's precision."""
    channels_last: bool = True
    """Memory format NHWC: faster convolutions on most processors."""
    fast_dev_run: bool = False
    """One batch of everything, to see that it runs. The figures then mean nothing, and say so."""
    gradient_norms: bool = False
    """Note each layer's gradient norm once an epoch, in models/NET/train/gradients.csv."""
    accelerator: Annotated[Literal["auto", "cpu", "gpu", "mps"], Operational] = "auto"
    """Lightning's accelerator."""
    devices: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], Operational] = 1
    """Devices per node."""
    num_nodes: Annotated[int, Field(ge=1), Operational] = 1
    """Machines."""
    strategy: Annotated[Literal["auto", "ddp"], Operational] = "auto"
    """Lightning's strategy; more than one device takes ddp."""
    workers: Annotated[int, Field(ge=0, le=64), Operational] = 0
    """Data-loading processes; 0 loads in the training process."""

    _transforms = field_validator("transforms")(check_transforms)


class EvaluateParams(Params):
    """How the test split is judged."""

    batch_size: int = Field(256, ge=1)
    """Pictures per forward pass."""
    bootstrap: int = Field(1000, ge=100, le=100_000)
    """Resamples behind the interval on top-1 accuracy."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Coverage of that interval."""
    seed: Seed = 0
    """Seed of the resamples."""


class TrackingParams(Params):
    """MLflow. The store is MLFLOW_TRACKING_URI if set, else a sqlite file in the repository."""

    experiment: Annotated[str, Field(min_length=1), Operational] = "thaw"
    """MLflow experiment that runs are filed under."""
    log_model: Annotated[bool, Operational] = True
    """Log the model itself, with signature and input example."""
    system_metrics: Annotated[bool, Operational] = True
    """Log processor, memory and disk use during training."""


class Config(Params):
    """The whole of params.yaml."""

    data: DataParams
    augment: AugmentParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    tracking: TrackingParams

    @model_validator(mode="after")
    def _px_fits(self) -> "Config":
        if self.train.px != "auto" and self.train.px > self.augment.px:
            raise ValueAtError(
                f"{self.train.px} is larger than augment.px, {self.augment.px}; raise that", "train", "px"
            )
        return self

    @property
    def px(self) -> int:
        """Side of the square that the net sees, in pixels."""
        return self.augment.px if self.train.px == "auto" else self.train.px


def load(path: Path = paths.PARAMS, *, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks params.yaml; `overrides` maps dotted keys to values set on top of the file.

    Raises:
        UserError: one line with file, line number, mistake and the nearest right name.
    """
    try:
        with path.open(encoding="utf-8") as file:
            document = YAML().load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the repository's top folder") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    if not isinstance(document, CommentedMap):
        raise UserError(f"{path}: expected the sections {', '.join(Config.model_fields)}")
    for key, value in (overrides or {}).items():
        _override(document, key, value)
    try:
        return Config.model_validate(_plain(document))
    except ValidationError as error:
        raise UserError(_explain(error, document, path, overridden=tuple(overrides or ()))) from None


def write(path: Path = paths.PARAMS, *, overrides: Mapping[str, Any]) -> None:
    """Sets dotted keys in params.yaml, which keeps its comments; a mapping replaces what stood there."""
    document = YAML().load(path.read_text(encoding="utf-8"))
    for key, value in overrides.items():
        _override(document, key, value)
    with fresh_file(path) as beside, beside.open("w", encoding="utf-8") as file:
        YAML().dump(document, file)


def where(parameter: str, path: Path = paths.PARAMS) -> str:
    """A parameter's place for an error's line: file, line and dotted name."""
    with path.open(encoding="utf-8") as file:
        line = _line(YAML().load(file), parameter.split("."))
    return f"{path}:{line}: {parameter}" if line else f"{path}: {parameter}"


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Overrides from words such as `train.batch_size=64`; values are read as YAML.

    Raises:
        UserError: a word has no `=`, or its value is not YAML.
    """
    overrides = {}
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word}: expected section.key=value, such as train.batch_size=64")
        try:
            overrides[key] = YAML(typ="safe").load(value)
        except MarkedYAMLError as error:
            raise UserError(f"{word}: not valid YAML: {error.problem}") from None
    return overrides


def flat(params: Params) -> dict[str, Any]:
    """Every parameter by its dotted name."""
    return _flatten(params.model_dump())


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
        )
    return leaves


def _override(document: CommentedMap, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = document
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"{dotted}: no such parameter; {parent} is a single value")
    node[last] = value


def _plain(node: Any) -> Any:
    """ruamel's tree as built-in types; pydantic's strict unions do not know its float and string classes."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _explain(error: ValidationError, document: CommentedMap, path: Path, *, overridden: tuple[str, ...]) -> str:
    """The first mistake of a failed validation as one line."""
    # A misspelt key is also a missing one: the misspelling is what to mend.
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    location = _location(first)
    keys = _document_path(document, location)
    line = _line(document, keys)
    dotted = ".".join(keys)
    where = f"{path}:{line}: " if line else f"{path}: "
    if any(f"{key}.".startswith(f"{dotted}.") or f"{dotted}.".startswith(f"{key}.") for key in overridden):
        where = ""  # what was said on the command line stands in no file
    if first["type"] == "extra_forbidden":
        return f"{where}{dotted}: no such parameter{nearest(keys[-1], _fields_at(keys[:-1]))}"
    if first["type"] == "missing":
        return f"{where}{'.'.join(location)}: missing"
    problems = [e for e in error.errors() if _document_path(document, _location(e)) == keys]
    message = " or ".join(dict.fromkeys(_message(problem, dotted) for problem in problems))
    return f"{where}{dotted}: {message}" if dotted else f"{where}{message}"


def _location(problem: Any) -> list[str]:
    cause = problem.get("ctx", {}).get("error")
    return [str(part) for part in (*problem["loc"], *getattr(cause, "at", ()))]


def _message(problem: Any, dotted: str) -> str:
    if problem["type"] == "literal_error":
        choices = problem["ctx"]["expected"]
        names = [choice.strip("'") for choice in choices.replace(" or ", ", ").split(", ")]
        hint = nearest(str(problem["input"]), names) if "did you mean" in nearest(str(problem["input"]), names) else ""
        return f"{problem['input']!r} is not {choices}{hint}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "string_pattern_mismatch" and dotted.endswith("trainable"):
        hint = nearest(str(problem["input"]), ["head", "all", "last:1"])
        return f"{problem['input']!r} is not head, last:N or all{hint}"
    return f"{problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"


def _document_path(document: CommentedMap, location: list[str]) -> list[str]:
    """The part of an error's location that stands in the file (pydantic appends the branches of a union)."""
    keys: list[str] = []
    node: Any = document
    for part in location:
        if not isinstance(node, dict) or part not in node:
            break
        keys.append(part)
        node = node[part]
    return keys


def _line(document: CommentedMap, keys: list[str]) -> int | None:
    node: Any = document
    line = None
    for key in keys:
        if not isinstance(node, CommentedMap) or key not in node:
            break
        if key in (node.lc.data or {}):
            line = node.lc.key(key)[0] + 1
        node = node[key]
    return line


def _fields_at(keys: list[str]) -> list[str]:
    """Names of the parameters that may stand under a path, for the nearest-name hint."""
    if not keys:
        return list(Config.model_fields)
    if keys[:2] == ["train", "phases"]:
        return list(PhaseParams.model_fields)
    section = Config.model_fields[keys[0]].annotation
    assert section is not None
    return list(section.model_fields)
