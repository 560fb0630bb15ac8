"""What a from-scratch net needs beside its layers to speak timm's interface, so that its file shows the net alone."""

from typing import Any

from torch import Tensor, nn

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


def check_stem(stem: str, *, name: str) -> None:
    """Refuses a stem that there is not.

    Raises:
        UserError: With the ones that there are.
    """
    if stem not in ("default", "cifar"):
        raise UserError(f"scratch/{name} has no stem {stem!r}; set model.stem to default or cifar")


def refuse_small(x: Tensor, *, min_px: int, name: str) -> None:
    """Refuses pictures [B, C, H, W] with a side below `min_px`.

    Raises:
        UserError: With the side to set.
    """
    px = min(x.shape[-2:])
    if px < min_px:
        raise UserError(
            f"scratch/{name} takes pictures of {min_px} px or more, got {px}; raise augment.px and train.px to {min_px}"
        )


def like(old: nn.Linear, *, num_classes: int) -> nn.Linear:
    """A new linear layer of `num_classes` outputs on the device and in the type of an old one, with torch's own
    initialisation."""
    return nn.Linear(
        old.in_features, num_classes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )
