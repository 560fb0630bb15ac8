"""The nets, by name: timm's, and under `scratch/` the classic ones written out in this folder, one file a family.

`build` is the only door. To add a net, write its file here and name it in `_FAMILIES`; a timm net needs no code.
Importing this module, or listing `scratch_names`, loads neither torch nor timm.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pipeline.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

Rate = float | Literal["auto"]
DEFAULT_STEM = "default"
_PREFIX = "scratch/"
_LEFT_ALONE = {"drop_rate": "auto", "drop_path_rate": "auto", "stem": DEFAULT_STEM, "recompute": False}
"""Arguments of `build` that a net need not have, with the value that leaves a net as it is."""
_FAMILIES = {
    "lenet": "lenet5",
    "alexnet": "alexnet alexnet_two_tower",
    "zfnet": "zfnet",
    "nin": "nin",
    "cnn_fms": "vgg_f vgg_m vgg_s",
    "vgg": "vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn",
    "googlenet": "googlenet googlenet_paper",
    "unet": "unet_encoder",
    "resnet": "resnet18 resnet34 resnet50 resnet101 resnet152 plain18 plain34 "
    "resnet20 resnet32 resnet44 resnet56 resnet110 plain20 plain32 plain44 plain56 plain110",
    "preact_resnet": "preact_resnet18 preact_resnet50 preact_resnet110 preact_resnet164",
    "densenet": "densenet121 densenet161 densenet169 densenet201 densenet_bc100_k12",
    "resnext": "resnext50_32x4d resnext101_32x8d resnext29_8x64d",
    "mobilenet": "mobilenet_v1 mobilenet_v1_075 mobilenet_v1_050 mobilenet_v1_025",
    "senet": "se_resnet50 senet154",
    "efficientnet": "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 "
    "efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7",
    "ablation": "ablation_conv ablation_conv_no_bn ablation_separable ablation_stack_3x3 ablation_kernel_7x7 "
    "ablation_inception ablation_inception_naive ablation_inception_aux ablation_residual ablation_residual_se",
}
"""Each file of this folder, in the order of the papers, with its nets. A net is a function of its name there: it takes
num_classes, in_chans and drop_rate, keyword-only, and whichever of drop_path_rate, stem and recompute the family has.
"""
_REGISTERED = re.compile(r"^@register_model\s+def (\w+)\(", re.MULTILINE)
"""How timm's source names a net."""
_SCRATCH = {name: family for family, members in _FAMILIES.items() for name in members.split()}


class Net(Protocol):
    """The part of timm's interface that every net of `_SCRATCH` speaks, so that no caller asks where a net is from.

    Freezing, layer-wise learning rates, feature caching, explanation and export are written once against it.
    """

    num_classes: int
    num_features: int
    """Channels of the feature map."""
    head_hidden_size: int
    """Width of forward_head(pre_logits=True): what the classifier reads."""
    pretrained_cfg: dict[str, Any]
    """input_size and min_input_size (C, H, W), mean and std (one a channel, of pictures in 0..1), interpolation,
    crop_pct, first_conv and classifier (names of modules), num_classes."""
    feature_info: list[dict[str, Any]]
    """The last map at each resolution, input side first, with timm's keys: num_chs, reduction (product of the strides
    so far) and module (the name of what gives it, or with hook_type "forward_pre" of what it enters)."""

    def forward_features(self, x: "Tensor") -> "Tensor":
        """Pictures [B, C, H, W] to the feature map [B, num_features, h, w]."""

    def forward_head(self, x: "Tensor", pre_logits: bool = False) -> "Tensor":
        """Feature map to logits [B, num_classes]; with pre_logits to [B, head_hidden_size], before dropout."""

    def forward(self, x: "Tensor") -> "Tensor":
        """forward_head(forward_features(x))."""

    def get_classifier(self) -> "nn.Module":
        """The last linear layer."""

    def reset_classifier(self, num_classes: int) -> None:
        """A new, random classifier; nothing else changes."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns for timm.models._manipulate.group_parameters, input side first; only the classifier matches none."""


class AuxiliaryNet(Protocol):
    """What a net with classifiers beside its last one has more, which learn along in training and cost nothing after.

    Its pretrained_cfg has `auxiliary_classifiers`: the names of their last linear layers.
    """

    auxiliary_weight: float
    """Share of each auxiliary loss in the whole."""

    def auxiliary_heads(self) -> "list[nn.Module]":
        """The modules that training alone uses, in the order of forward_with_auxiliary; may be none."""

    def forward_with_auxiliary(self, x: "Tensor") -> "tuple[Tensor, ...]":
        """Logits [B, num_classes], then those of each auxiliary head."""


class ReferencedNet(Protocol):
    """What a net has more whose reference in torchvision or timm names its weights otherwise."""

    reference_renames: tuple[tuple[str, str], ...]
    """Regular expressions and replacements, applied one after another, from the reference's names to the net's."""


def build(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    drop_rate: Rate = "auto",
    drop_path_rate: Rate = "auto",
    stem: str = DEFAULT_STEM,
    recompute: bool = False,
    features_only: bool = False,
) -> "nn.Module":
    """A net with random weights.

    Args:
        name: `scratch/NAME`, or timm's name with or without a tag of weights (`resnet50`, `resnet50.a1_in1k`).
        num_classes: Width of the logits.
        in_chans: Channels of the pictures.
        drop_rate: Dropout before the classifier, probability; "auto" for the net's own.
        drop_path_rate: Stochastic depth, probability at the last block; "auto" for the net's own.
        stem: "default", or "cifar" for a first layer that keeps the size of small pictures, in our nets that have it.
        recompute: Compute cheap layers again in the backward pass in place of keeping their outputs, in our DenseNets.
        features_only: Forward then gives a list of maps [B, channels, h, w] in place of logits, the finest first, and
            `feature_info.channels()` and `.reduction()` tell of each; num_classes is of no use. Our nets come as a
            `features.FeatureMaps`. A few of timm's, whose `output_fmt` is NHWC, have the channels last.

    Raises:
        UserError: There is no such net, or it does not take one of the arguments.
    """
    given = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate, "stem": stem, "recompute": recompute}
    optional: dict[str, Any] = {key: value for key, value in given.items() if value != _LEFT_ALONE[key]}
    check(name)
    construct: Callable[..., nn.Module]
    if is_scratch(name):
        bare = name.removeprefix(_PREFIX)
        construct = getattr(import_module(f"{__name__}.{_SCRATCH[bare]}"), bare)
    else:
        import timm

        construct = partial(timm.create_model, name, pretrained=False, features_only=features_only)
    net = _constructed(name, partial(construct, num_classes=num_classes, in_chans=in_chans), optional)
    if features_only and is_scratch(name):
        from pipeline.nets.features import FeatureMaps

        return FeatureMaps(net)
    return net


def _constructed(name: str, construct: "Callable[..., nn.Module]", optional: dict[str, Any]) -> "nn.Module":
    try:
        return construct(**optional)
    except TypeError as error:
        refused = next((key for key in optional if f"unexpected keyword argument '{key}'" in str(error)), "")
        if not refused:
            raise
    if optional[refused] != 0:  # a rate of 0 is what a net without it has anyway
        raise UserError(f"{name} takes no {refused}; set model.{refused}={str(_LEFT_ALONE[refused]).lower()}")
    return _constructed(name, construct, {key: value for key, value in optional.items() if key != refused})


def check(name: str) -> None:
    """Refuses a name that no net has; loads timm, and torch with it, for a name with a tag of weights alone.

    Raises:
        UserError: With the nearest names.
    """
    if is_scratch(name):
        return
    if ":" in name:
        raise UserError(f"{name}: nets are named as timm names them; for other weights give model.weights=FILE")
    known = _timm_names()
    if name in known:
        return
    architecture, _, tag = name.partition(".")
    if tag and architecture in known:
        import timm

        tagged = timm.list_models(architecture, include_tags=True)
        if name not in tagged:
            raise UserError(f"{name}: timm has no such weights for {architecture}{nearest(name, tagged)}")
        return
    raise _unknown(name, [*scratch_names(), *sorted(known)])


def is_scratch(name: str) -> bool:
    """Whether the net is one of this folder's; loads neither torch nor timm.

    Raises:
        UserError: The name begins with `scratch/`, but no such net is here.
    """
    if not name.startswith(_PREFIX):
        return False
    if name.removeprefix(_PREFIX) not in _SCRATCH:
        raise _unknown(name, scratch_names())
    return True


def scratch_names() -> list[str]:
    """The nets of this folder; loads neither torch nor timm."""
    return [_PREFIX + name for name in sorted(_SCRATCH)]


def names(pattern: str = "*") -> list[str]:
    """Every net whose name matches a shell pattern: this folder's first, then timm's."""
    import timm

    return fnmatch.filter([*scratch_names(), *timm.list_models()], pattern)


@cache
def _timm_names() -> frozenset[str]:
    """timm's nets, out of its source: importing it takes seconds."""
    spec = find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    files = (file for folder in spec.submodule_search_locations for file in Path(folder, "models").rglob("*.py"))
    return frozenset(name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8")))


def min_px(net: "nn.Module") -> int:
    """The smallest side of a picture that the net takes, in pixels; 1 where the net does not say."""
    config: Any = net.pretrained_cfg
    size = config.get("min_input_size")
    return max(size[1:]) if size else 1


def check_px(net: "nn.Module", px: int, *, name: str) -> None:
    """Refuses a side of pictures, in pixels, that the net does not take; the net must be on the CPU.

    Raises:
        UserError: With the side to set, where timm knows it.
    """
    import torch
    from timm.models._input import get_model_input_config

    expected = get_model_input_config(net)
    channels, side = expected["input_size"][:2]
    if expected["fixed_input_size"] and px != side:
        raise UserError(f"{name} takes pictures of {side} px only, got {px}; set augment.px={side} and train.px=auto")
    if px < min_px(net) and not is_scratch(name):  # ours refuse by themselves, with what else would help
        raise UserError(f"{name} takes pictures of {min_px(net)} px or more, got {px}; raise augment.px and train.px")
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, channels, px, px))
    except RuntimeError as error:  # timm does not know every net's smallest side; trying tells
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} does not take pictures of {px} px; raise augment.px and train.px ({reason})") from None
    finally:
        net.train(training)


def normalization(net: "nn.Module", *, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, one a channel, that the net expects of pictures in 0..1.

    A net of one channel whose weights come from three takes the mean over the three of each.
    """
    config: Any = net.pretrained_cfg
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if len(mean) == in_chans:
        return mean, std
    assert in_chans == 1
    return (sum(mean) / len(mean),), (sum(std) / len(std),)


def _unknown(name: str, known: list[str]) -> UserError:
    """Compares without `scratch/`, which would make every net of ours look alike."""
    full_names = {full.removeprefix(_PREFIX): full for full in known}
    close = difflib.get_close_matches(name.removeprefix(_PREFIX), full_names, n=3)
    hint = f"did you mean {' or '.join(full_names[bare] for bare in close)}?" if close else "list them: make models"
    return UserError(f"{name}: no such net; {hint}")
