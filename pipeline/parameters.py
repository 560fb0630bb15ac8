"""Every parameter: typed, frozen, range-checked, its meaning and unit in the docstring under it.

A field marked `Operational` changes how a run is carried out (devices, workers) but not its result, so it is no
`params` of a DVC stage. `config` reads them from params.yaml.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator

from pipeline import paths
from pipeline.data.transforms import check as check_transforms
from pipeline.errors import ValueAtError


class Marker(NamedTuple):
    """Marks a field whose value changes no result."""

    operational: bool


Operational = Marker(operational=True)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Transforms = dict[str, dict[str, Any]]
Auto = Literal["auto"]
Rate = Annotated[float, Field(gt=0, le=100)]
Decay = Annotated[float, Field(gt=0, le=1)]
Scheduler = Literal["constant", "cosine", "step", "onecycle", "plateau"]
Optimizer = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
PhaseName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
ScheduleName = Literal[
    "linear_probe",
    "freeze_then_finetune",
    "gradual_unfreezing",
    "discriminative",
    "full_finetune",
    "from_scratch",
    "bitfit",
]
_PART = r"(?:head|all|last:[1-9][0-9]*|(?:from|params):[^\s+]+)"
TRAINABLE = rf"^{_PART}(?:\+{_PART})*$"


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
    """A file of weights for this net (.safetensors or .pth), such as a model trained by Thaw (of this very net: a copy
    of it, outside models/NET/); the placeholder models/no-weights means none."""
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
    """One phase of the schedule. What says `auto` is as the parameter of that name under `train`."""

    trainable: Annotated[str, Field(pattern=TRAINABLE)]
    """What learns: head, last:N (the head and the last N blocks), from:MODULE (from that module on), params:NAME, or
    all; MODULE and NAME may have wildcards, and several are joined by +, such as head+params:*.bias."""
    epochs: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Passes over the training pictures."""
    steps: int = Field(default=0, ge=0)
    """Optimiser steps in place of `epochs`; 0 for epochs."""
    lr: Auto | Literal["find"] | Rate = "auto"
    """Peak learning rate, or find to look for one before the phase."""
    scheduler: Auto | Scheduler = "auto"
    """How the learning rate moves over the phase's steps."""
    warmup: Auto | Annotated[float, Field(ge=0, lt=1)] = "auto"
    """Share of the phase's steps over which the learning rate climbs."""
    layer_decay: Auto | Decay = "auto"
    """Each block's learning rate, as a share of that of the block above it."""
    optimizer: Auto | Optimizer = "auto"
    """Optimiser, by timm's name."""
    weight_decay: Auto | Annotated[float, Field(ge=0)] = "auto"
    """Weight decay of kernels; biases and norms have none."""
    clip: Auto | Annotated[float, Field(ge=0)] = "auto"
    """Largest norm of the whole gradient; 0 for no limit."""
    patience: Auto | Annotated[int, Field(ge=0)] = "auto"
    """Epochs without a better `monitor` before the phase ends early; 0 for never."""
    batch_size: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Pictures per optimiser step, over all devices together."""
    accumulate: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Parts that a batch is computed in."""
    px: Auto | Annotated[int, Field(ge=8, le=1024)] = "auto"
    """Side that pictures are resized to in this phase, in pixels: small ones first is progressive resizing."""
    strength: float = Field(default=1.0, ge=0, le=1)
    """Of online augmentation: the probability of each transform is multiplied by this."""
    views: Auto | Annotated[int, Field(ge=0, le=1000)] = "auto"
    """Augmented versions of each picture that epochs take by turns; 0 for a fresh one every epoch."""

    @model_validator(mode="after")
    def _one_length(self) -> "PhaseParams":
        if self.steps and self.epochs != "auto":
            raise ValueAtError(f"{self.steps} steps and {self.epochs} epochs cannot both be; leave one out", "steps")
        return self


class TrainParams(Params):
    """The schedule and how it is carried out."""

    seed: Seed = 0
    """Seed of the head's initial weights, the order of pictures, augmentation and dropout."""
    px: Auto | Annotated[int, Field(ge=8, le=1024)] = "auto"
    """Side of the square that the net sees, in pixels: at most augment.px, which `auto` takes."""
    batch_size: int = Field(64, ge=1)
    """Pictures per optimiser step, over all devices together."""
    accumulate: int = Field(1, ge=1)
    """Parts that a batch is computed in, where memory does not hold it whole; it is one step all the same."""
    phases: Annotated[dict[PhaseName, PhaseParams], Field(min_length=1)] | ScheduleName
    """Phases by name, in order, each from the best weights of the one before; or the name of a ready-made schedule."""
    epochs: int = Field(3, ge=1)
    """Passes over the training pictures, in phases that say none."""
    lr: Literal["find"] | Rate = 3e-3
    """Peak learning rate, in phases that say none; find looks for one before each phase."""
    scheduler: Scheduler = "onecycle"
    """How the learning rate moves over a phase's steps."""
    warmup: Auto | Annotated[float, Field(ge=0, lt=1)] = "auto"
    """Share of a phase's steps over which the learning rate climbs; auto is 0.3 for onecycle and 0 for the others."""
    layer_decay: Decay = 1.0
    """Each block's learning rate, as a share of that of the block above it; 1 for the same everywhere."""
    optimizer: Optimizer = "adamw"
    """Optimiser, by timm's name, such as adamw, sgd (with Nesterov momentum 0.9), lamb, lion or adan."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of kernels; biases and norms have none."""
    clip: float = Field(0.0, ge=0)
    """Largest norm of the whole gradient, to which longer ones are cut; 0 for no limit."""
    frozen_bn: Literal["freeze", "adapt"] = "freeze"
    """Frozen batch norms keep their statistics, or adapt them to the pictures."""
    loss: Literal["cross_entropy", "bce", "focal"] = "cross_entropy"
    """Cross-entropy, binary cross-entropy of each class by itself, or focal loss."""
    focal_gamma: float = Field(2.0, ge=0, le=10)
    """How far the focal loss turns away from what is easy; 0 is cross-entropy."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over the classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a class counts in the loss by the inverse of its share of the training pictures."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """balanced: each epoch draws as many pictures, every class as often; one comes again when its class has run out."""
    l1: float = Field(0.0, ge=0)
    """L1 penalty on the kernels that learn: this times the sum of their absolute values."""
    activity: float = Field(0.0, ge=0)
    """Activity penalty: this times the mean square of what reaches the classifier."""
    mixup: float = Field(0.0, ge=0)
    """Mixup's alpha: pictures and targets are blended in pairs; 0 for none."""
    cutmix: float = Field(0.0, ge=0)
    """CutMix's alpha: a part of each picture comes from another; 0 for none. With mixup, either by turns."""
    average: Literal["none", "ema", "swa"] = "none"
    """Weights that are judged and kept: the last, their exponential moving average, or their average over epochs."""
    ema_decay: float = Field(0.999, gt=0, lt=1)
    """Share of the moving average that a step keeps."""
    swa_start: float = Field(0.5, ge=0, lt=1)
    """Share of a phase's steps after which the average over epochs begins: of the weights at the end of each epoch,
    and of the phase's last step."""
    teacher: str = str(paths.NO_WEIGHTS)
    """A model trained by Thaw to distil from (a model.safetensors); the placeholder models/no-weights means none."""
    distill_weight: float = Field(0.5, gt=0, le=1)
    """Share of the loss that is the distance to the teacher."""
    distill_temperature: float = Field(2.0, gt=0, le=100)
    """Divides both nets' logits before they are compared."""
    transforms: Transforms = {}
    """Online augmentation: transforms by name, in order, each with its arguments."""
    views: int = Field(0, ge=0, le=1000)
    """Augmented versions of each picture that epochs take by turns, so that frozen layers see each once; 0 for a fresh
    one every epoch."""
    cache: Literal["none", "fp32", "bf16"] = "fp32"
    """What frozen layers give for a picture that comes again is computed once and kept, in this precision; none: no."""
    cache_gb: Annotated[float, Field(gt=0), Operational] = 20.0
    """Disk space of what is kept so, of all runs together, in GB (10^9 bytes); what was used longest ago makes room."""
    monitor: Literal["val/loss", "val/top1"] = "val/loss"
    """What picks the best epoch and stops early; val/loss is the plain cross-entropy, whatever `loss` is."""
    patience: int = Field(0, ge=0)
    """Epochs without a better `monitor` before a phase ends early; 0 for never."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Lightning's precision."""
    channels_last: bool = True
    """Memory format NHWC: faster convolutions on most processors."""
    compile: bool = False
    """Compile the net with torch.compile: slower to start, faster to run on many machines."""
    fast_dev_run: bool = False
    """One batch of everything, to see that it runs. The figures then mean nothing, and say so."""
    gradient_norms: bool = False
    """Note each layer's gradient norm once an epoch, in models/NET/train/gradients.csv."""
    auto_tune: bool = False
    """Choose precision, channels_last, compile and workers by a short trial, and keep to the choice in later runs."""
    profile: Annotated[bool, Operational] = False
    """Trace a few steps of each phase, as models/NET/train/trace_PHASE.json.gz."""
    checkpoint_every: Annotated[int, Field(ge=1), Operational] = 100
    """Optimiser steps between two checkpoints; an epoch's end makes one as well. One process makes none within 5 s of
    the last, but for a phase's end and a stop's signal."""
    accelerator: Annotated[Literal["auto", "cpu", "gpu", "mps"], Operational] = "auto"
    """Lightning's accelerator."""
    devices: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], Operational] = 1
    """Devices per node."""
    num_nodes: Annotated[int, Field(ge=1), Operational] = 1
    """Machines."""
    strategy: Annotated[Literal["auto", "ddp", "fsdp"], Operational] = "auto"
    """Lightning's strategy; more than one device takes ddp."""
    sync_bn: bool = False
    """Batch norms over the pictures of all GPUs together, where there are several."""
    workers: Annotated[Auto | Annotated[int, Field(ge=0, le=64)], Operational] = "auto"
    """Data-loading processes; 0 loads in the training process, auto starts some where batches are slow to make."""

    _transforms = field_validator("transforms")(check_transforms)

    def named_phases(self) -> dict[str, PhaseParams]:
        """The phases that are written out; none where a ready-made schedule is named."""
        return {} if isinstance(self.phases, str) else self.phases

    def phase(self, phase: PhaseParams) -> PhaseParams:
        """A phase in which `auto` is replaced by what is said here (which may be `auto` in its turn)."""
        said = {name: getattr(self, name) for name, value in phase if value == "auto"}
        return phase.model_copy(update=said)


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
        for name, phase in self.train.named_phases().items():
            if phase.px != "auto" and phase.px > self.augment.px:
                raise ValueAtError(
                    f"{phase.px} is larger than augment.px, {self.augment.px}; raise that",
                    "train",
                    "phases",
                    name,
                    "px",
                )
        return self

    @model_validator(mode="after")
    def _trial_fits(self) -> "Config":
        if self.train.auto_tune and (self.train.devices != 1 or self.train.num_nodes != 1):
            raise ValueAtError(
                "tries one process; use it with train.devices 1 and train.num_nodes 1, or set what it found by hand",
                "train",
                "auto_tune",
            )
        return self

    @property
    def px(self) -> int:
        """Side of the square that the net sees, in pixels."""
        return self.augment.px if self.train.px == "auto" else self.train.px


def operational() -> frozenset[str]:
    """Dotted names of the parameters that change no result."""
    return frozenset(
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Params)
        for name, knob in field.annotation.model_fields.items()
        if Operational in knob.metadata
    )
