"""Small nets that differ in one thing each, to see what that thing is worth.

One skeleton, for pictures of 28 to 64 px: a 3x3 convolution to 16 channels, three stages of two blocks with 32, 64 and
128 channels, 2x2 max pooling between them, global average pooling and a linear layer. Only the block is exchanged.
Parameters and multiply-adds at 3 x 32 x 32 and 10 classes:

    net                        block                                              parameters   multiply-adds
    ablation_conv              3x3, BN, ReLU                                         292,954      42,910,976
    ablation_conv_no_bn        3x3, ReLU                                             292,490      42,910,976
    ablation_separable         3x3 depthwise, BN, ReLU, 1x1, BN, ReLU                 38,602       5,936,384
    ablation_stack_3x3         three 3x3, each BN, ReLU: sees 7 x 7 pixels         1,068,890     156,157,184
    ablation_kernel_7x7        one 7x7, BN, ReLU: sees 7 x 7 pixels                1,583,194     231,654,656
    ablation_inception         1x1; 1x1 to 3x3; 1x1 to 5x5; pool to 1x1               53,890       7,914,752
    ablation_inception_naive   1x1; 3x3; 5x5; pool to 1x1                            292,954      42,910,976
    ablation_inception_aux     ablation_inception with an auxiliary classifier        54,540       7,914,752
    ablation_residual          two 3x3 beside a shortcut                             691,674     101,106,944
    ablation_residual_se       the same with squeeze and excitation                  697,526     101,112,320

Convolutions are initialised as by He et al., "Delving deep into rectifiers", 2015: normal, variance 2 / fan_out, where
a depthwise kernel's fan_out is its own 9 weights.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 8
WIDTHS = (32, 64, 128)
STEM = 16

Block = Callable[[int, int], nn.Module]
"""From in_chans and out_chans to a module: [B, in_chans, H, W] to [B, out_chans, H, W]."""


def ablation_conv(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """A 3x3 convolution a block, with batch norm (Ioffe and Szegedy 2015)."""
    return Ablation(_conv, name="ablation_conv", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def ablation_conv_no_bn(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """`ablation_conv` with biases in place of batch norms, in the stem too."""
    return Ablation(
        _conv_no_bn,
        name="ablation_conv_no_bn",
        norm=False,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
    )


def ablation_separable(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """`ablation_conv` with each convolution split in a depthwise and a pointwise one (Howard et al. 2017)."""
    return Ablation(
        _separable, name="ablation_separable", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate
    )


def ablation_stack_3x3(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """Three 3x3 convolutions a block (Simonyan and Zisserman 2014, section 2.3): 27 C^2 weights."""
    return Ablation(
        _stack_3x3, name="ablation_stack_3x3", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate
    )


def ablation_kernel_7x7(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """One 7x7 convolution a block, with the receptive field of `ablation_stack_3x3`: 49 C^2 weights."""
    return Ablation(
        partial(_conv, kernel=7),
        name="ablation_kernel_7x7",
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
    )


def ablation_inception(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """Inception modules with 1x1 bottlenecks before the 3x3 and 5x5 (Szegedy et al. 2014, figure 2b)."""
    return Ablation(
        Inception, name="ablation_inception", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate
    )


def ablation_inception_naive(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """The same modules without the bottlenecks (figure 2a, but with the pool's projection, which fixes the width)."""
    naive = partial(Inception, bottleneck=False)
    return Ablation(
        naive, name="ablation_inception_naive", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate
    )


def ablation_inception_aux(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """`ablation_inception` with an auxiliary classifier after the second stage, in training only."""
    return Ablation(
        Inception,
        name="ablation_inception_aux",
        auxiliary=True,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
    )


def ablation_residual(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """Basic residual blocks (He et al. 2015)."""
    return Ablation(Residual, name="ablation_residual", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def ablation_residual_se(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """`ablation_residual` with squeeze and excitation, reduction 16, on each residual (Hu et al. 2017)."""
    se = partial(Residual, squeeze=True)
    return Ablation(se, name="ablation_residual_se", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


class Ablation(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 8, to logits [B, num_classes].

    Args:
        block: What the net is made of.
        name: Of the net, for the refusal of a small picture.
        num_classes: Width of the logits.
        in_chans: Channels of the pictures.
        drop_rate: Dropout before the classifier.
        norm: Whether the stem has a batch norm.
        auxiliary: Whether the second stage has a linear classifier of its own, which learns along.
    """

    auxiliary_weight = 0.3

    def __init__(
        self,
        block: Block,
        *,
        name: str,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        norm: bool = True,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = WIDTHS[-1]
        self.pretrained_cfg: dict[str, Any] = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=32,
            min_px=MIN_PX,
            first_conv="stem.0",
            classifier="fc",
            mean=interface.CIFAR_MEAN,
            std=interface.CIFAR_STD,
            auxiliary_classifiers=("auxiliary",) if auxiliary else (),
        )
        self.feature_info = [
            interface.level(f"stage{number}", num_chs=width, reduction=2 ** (number - 1))
            for number, width in enumerate(WIDTHS, start=1)
        ]
        self.stem = (_conv if norm else _conv_no_bn)(in_chans, STEM)
        first, second, third = WIDTHS
        self.stage1 = nn.Sequential(block(STEM, first), block(first, first))
        self.stage2 = nn.Sequential(block(first, second), block(second, second))
        if auxiliary:
            self.auxiliary = nn.Linear(second, num_classes)
        self.stage3 = nn.Sequential(block(second, third), block(third, third))
        self.pool = nn.MaxPool2d(2)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # torch's own fan_out leaves groups out of account
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to [B, 128, H // 4, W // 4]."""
        features: Tensor = self.stage3(self.pool(self._middle(x)))
        return features

    def _middle(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to the second stage's [B, 64, H // 2, W // 2]."""
        interface.refuse_small(x, min_px=MIN_PX, name=self.name)
        middle: Tensor = self.stage2(self.pool(self.stage1(self.stem(x))))
        return middle

    def auxiliary_heads(self) -> list[nn.Module]:
        """The auxiliary classifier, or none."""
        return [self.auxiliary] if self.pretrained_cfg["auxiliary_classifiers"] else []

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits and auxiliary logits, each [B, num_classes], for the loss in training."""
        middle = self._middle(x)
        extra = tuple(head(middle.mean((2, 3))) for head in self.auxiliary_heads())
        return self.forward_head(self.stage3(self.pool(middle))), *extra

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 128, h, w] to logits [B, num_classes], or to the pooled [B, 128]."""
        x_b128 = x.mean((2, 3))
        if pre_logits:
            return x_b128
        logits: Tensor = self.fc(self.head_drop(x_b128))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = interface.like(self.fc, num_classes=num_classes)
        if self.auxiliary_heads():
            self.auxiliary = interface.like(self.auxiliary, num_classes=num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stages = r"^stage(\d)" if coarse else r"^stage(\d)\.(\d)"
        last_of_second = (2,) if coarse else (2, 1)
        return {"stem": r"^stem", "blocks": [(stages, None), (r"^auxiliary", last_of_second)]}


class Inception(nn.Module):
    """Four branches side by side, a quarter of out_chans each: 1x1, 3x3, 5x5, and a 3x3 max pool with a 1x1.

    With `bottleneck`, a 1x1 convolution first narrows what the 3x3 sees to out_chans / 8 and what the 5x5 sees to
    out_chans / 16.
    """

    def __init__(self, in_chans: int, out_chans: int, *, bottleneck: bool = True) -> None:
        super().__init__()
        branch = out_chans // 4
        self.branch1 = _conv(in_chans, branch, kernel=1)
        self.branch2 = _narrowed(in_chans, branch, kernel=3, via=out_chans // 8 if bottleneck else 0)
        self.branch3 = _narrowed(in_chans, branch, kernel=5, via=out_chans // 16 if bottleneck else 0)
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(in_chans, branch, kernel=1))

    def forward(self, x_bchw: Tensor) -> Tensor:
        return torch.cat([self.branch1(x_bchw), self.branch2(x_bchw), self.branch3(x_bchw), self.branch4(x_bchw)], 1)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is the identity, or a 1x1 convolution where the width changes."""

    def __init__(self, in_chans: int, out_chans: int, *, squeeze: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.se = SqueezeExcite(out_chans) if squeeze else nn.Identity()
        same = in_chans == out_chans
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_chans, out_chans, 1, bias=False)

    def forward(self, x_bchw: Tensor) -> Tensor:
        residual_bchw = F.relu(self.bn1(self.conv1(x_bchw)))
        residual_bchw = self.se(self.bn2(self.conv2(residual_bchw)))
        return F.relu(residual_bchw + self.shortcut(x_bchw))


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in 0..1 that sees the mean of all channels: [B, C, H, W] to the same."""

    def __init__(self, chans: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(chans, chans // reduction, 1)
        self.excite = nn.Conv2d(chans // reduction, chans, 1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        gate_bc11: Tensor = self.excite(F.relu(self.squeeze(x_bchw.mean((2, 3), keepdim=True))))
        return x_bchw * gate_bc11.sigmoid()


def _conv(in_chans: int, out_chans: int, *, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_chans),
        nn.ReLU(),
    )


def _conv_no_bn(in_chans: int, out_chans: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chans, out_chans, 3, padding=1), nn.ReLU())


def _separable(in_chans: int, out_chans: int) -> nn.Sequential:
    depthwise = _conv(in_chans, in_chans, groups=in_chans)
    return nn.Sequential(depthwise, _conv(in_chans, out_chans, kernel=1))


def _stack_3x3(in_chans: int, out_chans: int) -> nn.Sequential:
    return nn.Sequential(_conv(in_chans, out_chans), _conv(out_chans, out_chans), _conv(out_chans, out_chans))


def _narrowed(in_chans: int, out_chans: int, *, kernel: int, via: int) -> nn.Sequential:
    """A convolution, after a 1x1 to `via` channels unless that is 0."""
    if not via:
        return _conv(in_chans, out_chans, kernel=kernel)
    return nn.Sequential(_conv(in_chans, via, kernel=1), _conv(via, out_chans, kernel=kernel))
