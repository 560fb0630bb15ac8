"""EfficientNets. Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural networks", 2019.

They showed that depth, width and the side of the pictures are best scaled together. B0 was searched for; from there
one number phi makes the family: depth grows as 1.2^phi, width as 1.1^phi and the side as 1.15^phi, so that the work
doubles with each step of phi (1.2 * 1.1^2 * 1.15^2 is near 2). `STAGES` is B0, `SCALES` what the paper's code makes of
phi = 0 .. 7. `efficientnet_b0` at 3 x 224 x 224 and 1000 classes:

                                                 output      parameters   multiply-adds
    features.0  conv 3x3/2                32 x 112 x 112            928      10,838,016
    features.1  MBConv1 3x3,   1 block    16 x 112 x 112          1,448      10,035,712
    features.2  MBConv6 3x3/2, 2 blocks   24 x  56 x  56         16,714      54,945,216
    features.3  MBConv6 5x5/2, 2 blocks   40 x  28 x  28         46,640      37,939,584
    features.4  MBConv6 3x3/2, 3 blocks   80 x  14 x  14        242,930      43,555,200
    features.5  MBConv6 5x5,   3 blocks  112 x  14 x  14        543,148      86,102,400
    features.6  MBConv6 5x5/2, 4 blocks  192 x   7 x   7      2,026,348      91,528,224
    features.7  MBConv6 3x3,   1 block   320 x   7 x   7        717,232      29,520,000
    features.8  conv 1x1                1280 x   7 x   7        412,160      20,070,400
    mean, classifier                    1000                  1,281,000       1,280,000
                                                              5,288,548     385,814,752

The family, with the paper's own figures on ImageNet's validation split:

           px   blocks   features   parameters     multiply-adds   top-1    top-5
    B0    224       16       1280    5,288,548       385,814,752   77.1 %   93.3 %
    B1    240       23       1280    7,794,184       686,802,832   79.1 %   94.4 %
    B2    260       23       1408    9,109,994       993,561,872   80.1 %   94.9 %
    B3    300       26       1536   12,233,232     1,827,141,392   81.6 %   95.7 %
    B4    380       32       1792   19,341,616     4,393,771,024   82.9 %   96.4 %
    B5    456       39       2048   30,389,784    10,266,384,752   83.6 %   96.7 %
    B6    528       45       2304   43,040,704    19,067,593,536   84.0 %   96.8 %
    B7    600       55       2560   66,347,960    37,745,884,192   84.3 %   97.0 %

What differs from the paper's code, as in torchvision, whose weights fit: maps are padded alike on all sides (TensorFlow
pads what is left over at the right and below, and timm's `tf_` nets do as it), and B0 .. B4 have torch's batch norm
(eps 1e-5, momentum 0.1) in place of eps 1e-3 and momentum 0.01. Weights of timm's nets of the same names fit too,
with a small error in B5 .. B7, where timm keeps eps 1e-5; those of its `tf_` nets have the same names and shapes, but
are for the other padding and eps, and give nonsense here.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 32
"""Five strides take 32 pixels to one. A choice: less can be computed, but the last maps would be all border."""
DROP_PATH_RATE = 0.2
"""Stochastic depth, as the paper's code sets it for every size (section 5.2: survival probability 0.8)."""


class Stage(NamedTuple):
    """A row of the paper's table 1: blocks in sequence, of which the first strides and changes the width."""

    expand: int
    """Width within a block, as a multiple of its input's."""
    kernel: int
    stride: int
    out_chans: int
    num_blocks: int


class Scale(NamedTuple):
    """One size of the family."""

    width: float
    """Multiplies channels; they are rounded to a multiple of 8."""
    depth: float
    """Multiplies the number of blocks, rounded up."""
    px: int
    """Side of the pictures."""
    bn_eps: float = 1e-5
    """Added to a batch norm's variance; the value that torchvision's weights were trained with."""
    bn_momentum: float = 0.1
    """Share of a batch in a batch norm's running statistics."""


STAGES = (
    Stage(expand=1, kernel=3, stride=1, out_chans=16, num_blocks=1),
    Stage(expand=6, kernel=3, stride=2, out_chans=24, num_blocks=2),
    Stage(expand=6, kernel=5, stride=2, out_chans=40, num_blocks=2),
    Stage(expand=6, kernel=3, stride=2, out_chans=80, num_blocks=3),
    Stage(expand=6, kernel=5, stride=1, out_chans=112, num_blocks=3),
    Stage(expand=6, kernel=5, stride=2, out_chans=192, num_blocks=4),
    Stage(expand=6, kernel=3, stride=1, out_chans=320, num_blocks=1),
)
"""B0; every other size is this table, scaled."""
STEM_CHANS, HEAD_CHANS = 32, 1280
SCALES = {
    "b0": Scale(width=1.0, depth=1.0, px=224),
    "b1": Scale(width=1.0, depth=1.1, px=240),
    "b2": Scale(width=1.1, depth=1.2, px=260),
    "b3": Scale(width=1.2, depth=1.4, px=300),
    "b4": Scale(width=1.4, depth=1.8, px=380),
    "b5": Scale(width=1.6, depth=2.2, px=456, bn_eps=1e-3, bn_momentum=0.01),
    "b6": Scale(width=1.8, depth=2.6, px=528, bn_eps=1e-3, bn_momentum=0.01),
    "b7": Scale(width=2.0, depth=3.1, px=600, bn_eps=1e-3, bn_momentum=0.01),
}


def efficientnet_b0(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.2, drop_path_rate: float = DROP_PATH_RATE
) -> nn.Module:
    """B0 with random weights.

    Args:
        num_classes: Width of the logits.
        in_chans: Channels of the pictures.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth: the probability of leaving a block's residual out grows with the block's
            number, from 0 at the first towards this.
    """
    return EfficientNet(
        "b0", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )


def efficientnet_b1(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.2, drop_path_rate: float = DROP_PATH_RATE
) -> nn.Module:
    """B1 with random weights; see `efficientnet_b0`."""
    return EfficientNet(
        "b1", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )


def efficientnet_b2(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.3, drop_path_rate: float = DROP_PATH_RATE
) -> nn.Module:
    """B2 with random weights; see `efficientnet_b0`."""
    return EfficientNet(
        "b2", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )


def efficientnet_b3(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.3, drop_path_rate: float = DROP_PATH_RATE
) -> nn.Module:
    """B3 with random weights; see `efficientnet_b0`."""
    return EfficientNet(
        "b3", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )


def efficientnet_b4(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.4, drop_path_rate: float = DROP_PATH_RATE
) -> nn.Module:
    """B4 with random weights; see `efficientnet_b0`."""
    return EfficientNet(
        "b4", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )


def efficientnet_b5(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.4, drop_path_rate: float = DROP_PATH_RATE
) -> nn.Module:
    """B5 with random weights; see `efficientnet_b0`."""
    return EfficientNet(
        "b5", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )


def efficientnet_b6(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5, drop_path_rate: float = DROP_PATH_RATE
) -> nn.Module:
    """B6 with random weights; see `efficientnet_b0`."""
    return EfficientNet(
        "b6", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )


def efficientnet_b7(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5, drop_path_rate: float = DROP_PATH_RATE
) -> nn.Module:
    """B7 with random weights; see `efficientnet_b0`."""
    return EfficientNet(
        "b7", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )


TIMM_NAMES = (
    # the blocks of the first stage do not widen
    (r"^(blocks\.0\.\d+)\.conv_dw\.", r"\1.block.0.0."),
    (r"^(blocks\.0\.\d+)\.bn1\.", r"\1.block.0.1."),
    (r"^(blocks\.0\.\d+)\.se\.conv_reduce\.", r"\1.block.1.fc1."),
    (r"^(blocks\.0\.\d+)\.se\.conv_expand\.", r"\1.block.1.fc2."),
    (r"^(blocks\.0\.\d+)\.conv_pw\.", r"\1.block.2.0."),
    (r"^(blocks\.0\.\d+)\.bn2\.", r"\1.block.2.1."),
    (r"^(blocks\.\d\.\d+)\.conv_pw\.", r"\1.block.0.0."),
    (r"^(blocks\.\d\.\d+)\.bn1\.", r"\1.block.0.1."),
    (r"^(blocks\.\d\.\d+)\.conv_dw\.", r"\1.block.1.0."),
    (r"^(blocks\.\d\.\d+)\.bn2\.", r"\1.block.1.1."),
    (r"^(blocks\.\d\.\d+)\.se\.conv_reduce\.", r"\1.block.2.fc1."),
    (r"^(blocks\.\d\.\d+)\.se\.conv_expand\.", r"\1.block.2.fc2."),
    (r"^(blocks\.\d\.\d+)\.conv_pwl\.", r"\1.block.3.0."),
    (r"^(blocks\.\d\.\d+)\.bn3\.", r"\1.block.3.1."),
    *((rf"^blocks\.{stage}\.", f"features.{stage + 1}.") for stage in range(len(STAGES))),
    (r"^conv_stem\.", "features.0.0."),
    (r"^bn1\.", "features.0.1."),
    (r"^conv_head\.", "features.8.0."),
    (r"^bn2\.", "features.8.1."),
    (r"^classifier\.(weight|bias)$", r"classifier.1.\1"),
)
"""Patterns that turn the names of timm's efficientnet_b0 .. b7 into ours, which are torchvision's."""


class Conv(nn.Sequential):
    """A convolution that keeps the size (but for its stride), batch norm, and SiLU where asked for."""

    def __init__(
        self,
        in_chans: int,
        *,
        out_chans: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        scale: Scale,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_chans, out_chans, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_chans, eps=scale.bn_eps, momentum=scale.bn_momentum),
            nn.SiLU() if act else nn.Identity(),
        )


class SqueezeExcite(nn.Module):
    """Weighs each channel by what the whole map shows (Hu et al. 2017): [B, C, H, W] to [B, C, H, W]."""

    def __init__(self, chans: int, *, squeezed_chans: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(chans, squeezed_chans, 1)
        self.act = nn.SiLU()
        self.fc2 = nn.Conv2d(squeezed_chans, chans, 1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bc11 = x_bchw.mean(dim=(2, 3), keepdim=True)
        return x_bchw * torch.sigmoid(self.fc2(self.act(self.fc1(x_bc11))))


class StochasticDepth(nn.Module):
    """In training, leaves a picture's residual out with probability `p`, and scales the others by 1 / (1 - p).

    Huang et al., "Deep networks with stochastic depth", 2016. [B, C, H, W] to [B, C, H, W].
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        assert 0 <= p < 1
        self.p = p

    def forward(self, x_bchw: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x_bchw
        kept_b111 = torch.rand(len(x_bchw), 1, 1, 1, device=x_bchw.device) >= self.p
        return x_bchw * kept_b111.to(x_bchw.dtype) / (1 - self.p)


class MBConv(nn.Module):
    """An inverted bottleneck (Sandler et al. 2018): [B, in_chans, H, W] to [B, out_chans, H/stride, W/stride].

    Widen with 1x1, look around with one kernel a channel (depthwise), weigh the channels, narrow with 1x1 and no
    activation. The shortcut joins the narrow ends, where the input has the output's shape.
    """

    def __init__(self, in_chans: int, *, stage: Stage, scale: Scale, drop_path: float) -> None:
        super().__init__()
        chans = in_chans * stage.expand
        widen = [Conv(in_chans, out_chans=chans, kernel=1, scale=scale)] if stage.expand > 1 else []
        self.block = nn.Sequential(
            *widen,
            Conv(chans, out_chans=chans, kernel=stage.kernel, stride=stage.stride, groups=chans, scale=scale),
            # a quarter of the block's input, not of the wide map that it stands on
            SqueezeExcite(chans, squeezed_chans=max(1, in_chans // 4)),
            Conv(chans, out_chans=stage.out_chans, kernel=1, act=False, scale=scale),
        )
        self.has_shortcut = stage.stride == 1 and in_chans == stage.out_chans
        self.stochastic_depth = StochasticDepth(drop_path if self.has_shortcut else 0.0)

    def forward(self, x_bchw: Tensor) -> Tensor:
        residual_bchw: Tensor = self.block(x_bchw)
        return x_bchw + self.stochastic_depth(residual_bchw) if self.has_shortcut else residual_bchw


class EfficientNet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 32, to logits [B, num_classes].

    Initialised as the paper's code does: kernels normal with variance 2 / fan_out, where a depthwise kernel's fan_out
    is its own taps (torchvision counts those of all channels, and so starts far smaller); the classifier uniform
    within +-1 / sqrt(num_classes); biases zero; batch norms with weight 1 and bias 0.
    """

    reference_renames = TIMM_NAMES

    def __init__(self, size: str, *, num_classes: int, in_chans: int, drop_rate: float, drop_path_rate: float) -> None:
        super().__init__()
        scale = SCALES[size]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = _width(HEAD_CHANS, scale=scale)
        self.pretrained_cfg = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=scale.px,
            min_px=MIN_PX,
            first_conv="features.0.0",
            classifier="classifier.1",
        )
        # the stages before a stride; the last two share the size of features.8
        self.feature_info = [
            interface.level(
                f"features.{number}", num_chs=_width(STAGES[number - 1].out_chans, scale=scale), reduction=reduction
            )
            for number, reduction in ((1, 2), (2, 4), (3, 8), (5, 16))
        ]
        self.feature_info.append(interface.level("features.8", num_chs=self.num_features, reduction=32))
        self._name = f"efficientnet_{size}"
        stem_chans = _width(STEM_CHANS, scale=scale)
        last_chans = _width(STAGES[-1].out_chans, scale=scale)
        self.features = nn.Sequential(
            Conv(in_chans, out_chans=stem_chans, kernel=3, stride=2, scale=scale),
            *_stages(stem_chans, scale=scale, drop_path_rate=drop_path_rate),
            Conv(last_chans, out_chans=self.num_features, kernel=1, scale=scale),
        )
        self.classifier = nn.Sequential(nn.Dropout(drop_rate), nn.Linear(self.head_hidden_size, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[:, 0].numel() // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        _init_classifier(self.get_classifier())

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to [B, num_features, ceil(H/32), ceil(W/32)]."""
        interface.refuse_small(x, min_px=MIN_PX, name=self._name)
        features: Tensor = self.features(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, h, w] to logits [B, num_classes], or to the pooled [B, num_features]."""
        x_bc = x.mean(dim=(2, 3))
        return x_bc if pre_logits else self.classifier(x_bc)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        classifier = self.classifier[1]
        assert isinstance(classifier, nn.Linear)
        return classifier

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.classifier[1] = interface.like(self.get_classifier(), num_classes=num_classes)
        _init_classifier(self.get_classifier())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^features\.([1-7])" if coarse else r"^features\.([1-7])\.(\d+)"
        return {"stem": r"^features\.0", "blocks": blocks, "head": r"^features\.8"}


def _width(chans: int, *, scale: Scale) -> int:
    """Scaled channels, rounded to the nearest multiple of 8 that is not more than a tenth below."""
    exact = chans * scale.width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def _stages(in_chans: int, *, scale: Scale, drop_path_rate: float) -> list[nn.Sequential]:
    """The scaled table's blocks; the probability of leaving one out grows linearly from 0 at the first."""
    depths = [math.ceil(stage.num_blocks * scale.depth) for stage in STAGES]
    stages = []
    for number, (stage, depth) in enumerate(zip(STAGES, depths, strict=True)):
        first = stage._replace(out_chans=_width(stage.out_chans, scale=scale))
        blocks = []
        for index in range(depth):
            drop_path = drop_path_rate * (sum(depths[:number]) + index) / sum(depths)
            row = first if index == 0 else first._replace(stride=1)
            blocks.append(MBConv(in_chans, stage=row, scale=scale, drop_path=drop_path))
            in_chans = first.out_chans
        stages.append(nn.Sequential(*blocks))
    return stages


def _init_classifier(classifier: nn.Linear) -> None:
    bound = 1 / math.sqrt(classifier.out_features)
    nn.init.uniform_(classifier.weight, -bound, bound)
    nn.init.zeros_(classifier.bias)
