"""MobileNet v1. Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision applications",
2017.

What it brought: a convolution does two things at once, it looks around and it mixes channels. Done one after the other,
a 3x3 filter a channel (depthwise) and then a 1x1 convolution (pointwise), they cost 1/9 + 1/out_chans of the whole,
for a percent of accuracy. And a width multiplier, which thins every layer alike, to choose between cost and accuracy.

`mobilenet_v1` at 3 x 224 x 224 and 1000 classes; each convolution is followed by batch norm and ReLU6:

                                               output         parameters   multiply-adds
    conv_stem  3x3, stride 2                    32 x 112 x 112       928      10,838,016
    blocks.0   1 block                          64 x 112 x 112     2,528      29,302,784
    blocks.1   2 blocks, the first stride 2    128 x  56 x  56    27,200      82,489,344
    blocks.2   2 blocks, the first stride 2    256 x  28 x  28   103,552      79,779,840
    blocks.3   6 blocks, the first stride 2    512 x  14 x  14 1,478,912     287,558,656
    blocks.4   2 blocks, the first stride 2   1024 x   7 x   7 1,593,856      77,747,712
    pool, classifier                          1000             1,025,000       1,024,000
                                                               4,231,976     568,740,352

                       width   parameters   multiply-adds   top-1 accuracy
    mobilenet_v1       1.00     4,231,976     568,740,352   70.6 %
    mobilenet_v1_075   0.75     2,585,560     325,400,448   68.4 %
    mobilenet_v1_050   0.50     1,331,592     149,497,088   63.7 %
    mobilenet_v1_025   0.25       470,072      41,030,272   50.6 %

The accuracies are the paper's, on ImageNet 2012's validation split.

What differs from the paper: ReLU6, min(max(x, 0), 6), in place of ReLU, as in the authors' code and in timm, whose
weights load as they are; the cap keeps values in range where they are stored in few bits. Pictures of any size are
averaged before the classifier.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 32
"""The five strides' product: below it a pixel of the last map would stand for more than the whole picture."""
_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
"""Channels at width 1, number of blocks, and stride of the first block, of each stage."""


def mobilenet_v1(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """MobileNet of width 1 with random weights; `drop_rate` is dropout before the classifier (the paper has none)."""
    return MobileNetV1(width=1.0, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def mobilenet_v1_075(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """MobileNet of width 0.75 with random weights; `drop_rate` as in mobilenet_v1."""
    return MobileNetV1(width=0.75, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def mobilenet_v1_050(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """MobileNet of width 0.5 with random weights; `drop_rate` as in mobilenet_v1."""
    return MobileNetV1(width=0.5, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def mobilenet_v1_025(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """MobileNet of width 0.25 with random weights; `drop_rate` as in mobilenet_v1."""
    return MobileNetV1(width=0.25, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


class SeparableBlock(nn.Module):
    """A 3x3 filter a channel, then a 1x1 convolution, each with batch norm and ReLU6.

    [B, in_chans, H, W] to [B, out_chans, ceil(H/stride), ceil(W/stride)].
    """

    def __init__(self, *, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(in_chans, in_chans, 3, stride=stride, padding=1, groups=in_chans, bias=False)
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.conv_pw = nn.Conv2d(in_chans, out_chans, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = F.relu6(self.bn1(self.conv_dw(x_bchw)))
        return F.relu6(self.bn2(self.conv_pw(x_bchw)))


class MobileNetV1(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 32, to logits [B, num_classes].

    The paper says nothing of the first weights. Convolutions are initialised as by He et al., "Delving deep into
    rectifiers", 2015: normal, with variance 2 / fan_out, where a depthwise filter's fan_out is its own 9 weights; batch
    norms with weight 1 and bias 0; the classifier as nn.Linear does, uniform within +-1 / sqrt(in_features).
    """

    def __init__(self, *, width: float, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        stem_chans = _scaled(32, width=width)
        self.name = f"mobilenet_v1_{round(100 * width):03d}" if width < 1 else "mobilenet_v1"
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = _scaled(1024, width=width)
        self.pretrained_cfg: dict[str, Any] = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=224,
            min_px=MIN_PX,
            first_conv="conv_stem",
            classifier="classifier",
            # to -1..1, as the authors' code and timm's weights have it
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
        self.feature_info = [
            interface.level(f"blocks.{number}", num_chs=_scaled(full_width, width=width), reduction=2 ** (number + 1))
            for number, (full_width, _, _) in enumerate(_STAGES)
        ]
        self.conv_stem = nn.Conv2d(in_chans, stem_chans, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_chans)
        stages = []
        chans = stem_chans
        for full_width, num_blocks, stride in _STAGES:
            out_chans = _scaled(full_width, width=width)
            stages.append(_stage(in_chans=chans, out_chans=out_chans, stride=stride, num_blocks=num_blocks))
            chans = out_chans
        self.blocks = nn.Sequential(*stages)
        self.head_drop = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(self.head_hidden_size, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # torch's own fan_out leaves groups out of account: in a depthwise layer it is too large by the channels
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to [B, num_features, ceil(H/32), ceil(W/32)]."""
        interface.refuse_small(x, min_px=MIN_PX, name=self.name)
        x_bchw = F.relu6(self.bn1(self.conv_stem(x)))
        features_bchw: Tensor = self.blocks(x_bchw)
        return features_bchw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, h, w] to logits [B, num_classes], or to the averaged [B, num_features]."""
        x_bc = x.mean((2, 3))
        return x_bc if pre_logits else self.classifier(self.head_drop(x_bc))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.classifier = interface.like(self.classifier, num_classes=num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv_stem|^bn1", "blocks": r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"}


def _scaled(chans: int, *, width: float) -> int:
    """Channels of a thinner net; at the paper's widths always a whole number of eights, which vector units like."""
    scaled = int(chans * width)
    assert scaled % 8 == 0
    return scaled


def _stage(*, in_chans: int, out_chans: int, stride: int, num_blocks: int) -> nn.Sequential:
    """`num_blocks` blocks, of which the first widens and strides."""
    first = SeparableBlock(in_chans=in_chans, out_chans=out_chans, stride=stride)
    rest = (SeparableBlock(in_chans=out_chans, out_chans=out_chans, stride=1) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *rest)
