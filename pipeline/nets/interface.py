"""What a from-scratch net needs beside its layers to speak timm's interface, so that its file shows the net alone."""

from typing import Any

from torch import Tensor, fx, nn

from pipeline.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Per channel, of ImageNet's pictures in 0..1; what the published weights were trained with."""
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.5,) * 3, (0.25,) * 3
"""Near those of small natural pictures."""


def config(
    *,
    in_chans: int,
    num_classes: int,
    px: int,
    min_px: int,
    first_conv: str,
    classifier: str,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    auxiliary_classifiers: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A net's `pretrained_cfg`, with timm's keys.

    Args:
        in_chans: Channels of the pictures; one channel takes the mean over the colours of `mean` and `std`.
        num_classes: Width of the logits.
        px: Side of the pictures of the paper.
        min_px: The smallest side that the net takes.
        first_conv: Name of the first convolution.
        classifier: Name of the last linear layer.
        mean: Of pictures in 0..1, a value a channel.
        std: Of pictures in 0..1, a value a channel.
        auxiliary_classifiers: Names of further layers as wide as the classifier.
    """
    if len(mean) != in_chans:
        mean, std = (sum(mean) / len(mean),) * in_chans, (sum(std) / len(std),) * in_chans
    return {
        "input_size": (in_chans, px, px),
        "min_input_size": (in_chans, min_px, min_px),
        "mean": mean,
        "std": std,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "first_conv": first_conv,
        "classifier": classifier,
        "auxiliary_classifiers": auxiliary_classifiers,
        "num_classes": num_classes,
    }


def level(module: str, *, num_chs: int, reduction: int, entering: bool = False) -> dict[str, Any]:
    """An entry of a net's `feature_info`, with timm's keys.

    Args:
        module: Name of the module that gives the last map of this resolution.
        num_chs: Channels of that map.
        reduction: Product of the strides up to it: pixels of the picture from one of its pixels to the next.
        entering: Whether the map is what enters the module, in place of what it gives.
    """
    found: dict[str, Any] = {"num_chs": num_chs, "reduction": reduction, "module": module}
    return found | {"hook_type": "forward_pre"} if entering else found


def levels_of_sequence(layers: nn.Sequential, *, name: str) -> list[dict[str, Any]]:
    """The `feature_info` of a net that is one sequence of layers: a level ends before each layer that strides, the last
    with the sequence.

    Args:
        layers: The sequence; its convolutions and max pools may stride.
        name: Of the sequence within the net.
    """
    found: list[dict[str, Any]] = []
    chans, reduction = 0, 1
    for index, layer in enumerate(layers):
        stride = getattr(layer, "stride", 1)
        stride = stride[0] if isinstance(stride, tuple) else stride
        if stride > 1 and index > 0:
            found.append(level(f"{name}.{index - 1}", num_chs=chans, reduction=reduction))
        reduction *= stride
        chans = layer.out_channels if isinstance(layer, nn.Conv2d) else chans
    return [*found, level(f"{name}.{len(layers) - 1}", num_chs=chans, reduction=reduction)]


def check_stem(stem: str, *, name: str) -> None:
    """Refuses a stem that there is not.

    Raises:
        UserError: With the ones that there are.
    """
    if stem not in ("default", "cifar"):
        raise UserError(f"scratch/{name} has no stem {stem!r}; set model.stem to default or cifar")


# A net that is traced into its graph has no size yet: the check becomes one of its operations.
fx.wrap("refuse_small")


def refuse_small(x: Tensor, *, min_px: int, name: str, cifar_stem: bool = False) -> None:
    """Refuses pictures [B, C, H, W] with a side below `min_px`.

    Raises:
        UserError: With the side to set, and the stem where `cifar_stem` says that another would help.
    """
    px = min(x.shape[-2:])
    if px < min_px:
        raise UserError(
            f"scratch/{name} takes pictures of {min_px} px or more, got {px}; raise augment.px and train.px to {min_px}"
            f"{', or set model.stem=cifar' if cifar_stem else ''}"
        )


def like(old: nn.Linear, *, num_classes: int) -> nn.Linear:
    """A new linear layer of `num_classes` outputs on the device and in the type of an old one, with torch's own
    initialisation."""
    return nn.Linear(
        old.in_features, num_classes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )
