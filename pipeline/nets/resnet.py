"""ResNets. He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2015.

What they added: a shortcut around every two or three layers, so that these learn what to add to their input in place of
a whole new map. Doing nothing is then easy to learn, gradients have a short way back, and depth helps: a plain net of
34 layers is worse than one of 18 even on the pictures that it is trained on, a residual one is better. The `plain` nets
are here for that comparison: the same layers, no shortcuts.

For ImageNet (table 1): a 7x7 convolution, a max pool, four stages of blocks, a linear layer. 18 and 34 layers have
basic blocks of two 3x3 convolutions; 50, 101 and 152 have bottlenecks, which do their 3x3 on a quarter of the channels
so that depth stays cheap. `resnet50` at 3 x 224 x 224 and 1000 classes:

                                  output           parameters   multiply-adds
    conv1    7x7 /2, BN, ReLU       64 x 112 x 112      9,536     118,013,952
    maxpool  3x3 /2                 64 x  56 x  56
    layer1   3 bottlenecks         256 x  56 x  56    215,808     667,942,912
    layer2   4 bottlenecks, /2     512 x  28 x  28  1,219,584   1,027,604,480
    layer3   6 bottlenecks, /2    1024 x  14 x  14  7,098,368   1,464,336,384
    layer4   3 bottlenecks, /2    2048 x   7 x   7 14,964,736     809,238,528
    average, fc                   1000              2,049,000       2,048,000
                                                   25,557,032   4,089,184,256

For CIFAR (section 4.2): a 3x3 convolution, three stages of n basic blocks, a linear layer: 6n + 2 layers. `resnet20`
at 3 x 32 x 32 and 10 classes:

                              output         parameters   multiply-adds
    conv1   3x3, BN, ReLU     16 x 32 x 32          464         442,368
    layer1  3 blocks          16 x 32 x 32       14,016      14,155,776
    layer2  3 blocks, /2      32 x 16 x 16       51,072      12,976,128
    layer3  3 blocks, /2      64 x  8 x  8      203,520      12,976,128
    average, fc               10                    650             640
                                                269,722      40,551,040

The others, at the same sizes. The error is the paper's, top-1: on ImageNet's validation split with ten crops of each
picture; on CIFAR-10's test split, after 64,000 steps of 128 pictures.

                 parameters    multiply-adds   error                  parameters   multiply-adds   error
    resnet18     11,689,512    1,814,073,344   27.88 %    resnet20       269,722      40,551,040   8.75 %
    resnet34     21,797,672    3,663,761,408   24.52 %    resnet32       464,154      68,862,592   7.51 %
    resnet50     25,557,032    4,089,184,256   22.85 %    resnet44       658,586      97,174,144   7.17 %
    resnet101    44,549,160    7,801,405,440   21.75 %    resnet56       853,018     125,485,696   6.97 %
    resnet152    60,192,808   11,513,626,624   21.43 %    resnet110    1,727,962     252,887,680   6.43 %
    plain18      11,515,688    1,794,805,760   27.94 %    plain20 to plain110 as resnet20 to resnet110
    plain34      21,623,848    3,644,493,824   28.54 %

What differs from the paper: a bottleneck strides in its 3x3, as in torchvision, whose weights are the published ones;
the paper strides in the first 1x1, which skips three pixels of four. Where a shape changes, the shortcut is option B (a
1x1 convolution) in the nets for ImageNet, and option A (zeros as the new channels, no parameters) in those for CIFAR;
so it is in the paper, but its 18 layers have A.
"""

from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 32
"""With ImageNet's stem, which takes 32 pixels to one. A choice: less can be computed, but a map of single pixels says
little, and the cifar stem is for small pictures."""
CIFAR_MIN_PX = 8
"""With CIFAR's stem: the last map is then 2 x 2 after three stages, 1 x 1 after four."""

Option = Literal["A", "B", "plain"]
"""The shortcut where the shape changes: zeros as the new channels, a 1x1 convolution, or no shortcuts at all."""


def resnet18(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """18 layers with random weights.

    Args:
        num_classes: Width of the logits.
        in_chans: Channels of the pictures.
        drop_rate: Dropout before `fc`, probability; the paper has none.
        stem: "default", or "cifar" for a 3x3 first convolution and no max pool, which keeps the size of small pictures.

    Raises:
        UserError: There is no such stem.
    """
    return ResNet("resnet18", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def resnet34(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """34 layers; arguments as of `resnet18`."""
    return ResNet("resnet34", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def resnet50(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """50 layers, bottlenecks; arguments as of `resnet18`."""
    return ResNet("resnet50", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def resnet101(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """101 layers, bottlenecks; arguments as of `resnet18`."""
    return ResNet("resnet101", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def resnet152(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """152 layers, bottlenecks; arguments as of `resnet18`."""
    return ResNet("resnet152", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def plain18(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """`resnet18` without shortcuts."""
    return ResNet("plain18", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def plain34(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """`resnet34` without shortcuts."""
    return ResNet("plain34", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def resnet20(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """The 20 layers of section 4.2, with random weights; `drop_rate` is dropout before `fc` (the paper has none)."""
    return ResNet("resnet20", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


def resnet32(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """The 32 layers of section 4.2; arguments as of `resnet20`."""
    return ResNet("resnet32", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


def resnet44(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """The 44 layers of section 4.2; arguments as of `resnet20`."""
    return ResNet("resnet44", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


def resnet56(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """The 56 layers of section 4.2; arguments as of `resnet20`."""
    return ResNet("resnet56", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


def resnet110(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """The 110 layers of section 4.2; arguments as of `resnet20`."""
    return ResNet("resnet110", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


def plain20(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """`resnet20` without shortcuts."""
    return ResNet("plain20", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


def plain32(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """`resnet32` without shortcuts."""
    return ResNet("plain32", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


def plain44(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """`resnet44` without shortcuts."""
    return ResNet("plain44", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


def plain56(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """`resnet56` without shortcuts."""
    return ResNet("plain56", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


def plain110(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """`resnet110` without shortcuts."""
    return ResNet("plain110", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, in_chans, H, W] to [B, out_chans, ceil(H/stride), ceil(W/stride)]."""

    expansion = 1

    def __init__(self, *, in_chans: int, out_chans: int, stride: int, option: Option) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.downsample = _shortcut(in_chans=in_chans, out_chans=out_chans, stride=stride, option=option)

    def forward(self, x_bchw: Tensor) -> Tensor:
        residual_bchw = F.relu(self.bn1(self.conv1(x_bchw)))
        residual_bchw = self.bn2(self.conv2(residual_bchw))
        return F.relu(residual_bchw if self.downsample is None else residual_bchw + self.downsample(x_bchw))


class Bottleneck(nn.Module):
    """1x1 to a quarter of the channels, 3x3, 1x1 back: shapes as of `BasicBlock`, and about as many multiply-adds as
    one of a quarter of the channels."""

    expansion = 4

    def __init__(self, *, in_chans: int, out_chans: int, stride: int, option: Option) -> None:
        super().__init__()
        width = out_chans // self.expansion
        self.conv1 = nn.Conv2d(in_chans, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_chans, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chans)
        self.downsample = _shortcut(in_chans=in_chans, out_chans=out_chans, stride=stride, option=option)

    def forward(self, x_bchw: Tensor) -> Tensor:
        residual_bchw = F.relu(self.bn1(self.conv1(x_bchw)))
        residual_bchw = F.relu(self.bn2(self.conv2(residual_bchw)))
        residual_bchw = self.bn3(self.conv3(residual_bchw))
        return F.relu(residual_bchw if self.downsample is None else residual_bchw + self.downsample(x_bchw))


class ZeroPad(nn.Module):
    """Option A, which has no parameters: every stride-th pixel, the old channels first, then zeros as the new ones."""

    def __init__(self, *, stride: int, new_chans: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_chans = new_chans

    def forward(self, x_bchw: Tensor) -> Tensor:
        return F.pad(x_bchw[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_chans))


class Plan(NamedTuple):
    """A column of the paper's table 1."""

    block: type[BasicBlock] | type[Bottleneck]
    num_blocks: tuple[int, ...]
    """In each stage."""
    option: Option
    stem_chans: int = 64
    """The first stage has as many, times the block's expansion; each further one has twice those of the one before."""


_PLANS = {
    "resnet18": Plan(BasicBlock, (2, 2, 2, 2), "B"),
    "resnet34": Plan(BasicBlock, (3, 4, 6, 3), "B"),
    "resnet50": Plan(Bottleneck, (3, 4, 6, 3), "B"),
    "resnet101": Plan(Bottleneck, (3, 4, 23, 3), "B"),
    "resnet152": Plan(Bottleneck, (3, 8, 36, 3), "B"),
    "plain18": Plan(BasicBlock, (2, 2, 2, 2), "plain"),
    "plain34": Plan(BasicBlock, (3, 4, 6, 3), "plain"),
    **{f"resnet{6 * n + 2}": Plan(BasicBlock, (n, n, n), "A", stem_chans=16) for n in (3, 5, 7, 9, 18)},
    **{f"plain{6 * n + 2}": Plan(BasicBlock, (n, n, n), "plain", stem_chans=16) for n in (3, 5, 7, 9, 18)},
}


class ResNet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 32 (8 with the CIFAR stem), to logits [B, num_classes].

    Convolutions are initialised as by He et al., "Delving deep into rectifiers", 2015, for ReLU: normal, with
    variance 2 / fan_out; batch norms with weight 1 and bias 0; `fc` uniform within +-1 / sqrt(fan_in) and bias 0.
    """

    def __init__(self, name: str, *, num_classes: int, in_chans: int, drop_rate: float, stem: str) -> None:
        super().__init__()
        interface.check_stem(stem, name=name)
        plan = _PLANS[name]
        chans, keep_size, cifar_net = plan.stem_chans, stem == "cifar", len(plan.num_blocks) == 3
        self.name = name
        self.min_px = CIFAR_MIN_PX if keep_size else MIN_PX
        self.conv1 = (
            nn.Conv2d(in_chans, chans, 3, padding=1, bias=False)
            if keep_size
            else nn.Conv2d(in_chans, chans, 7, stride=2, padding=3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(chans)
        self.maxpool = nn.Identity() if keep_size else nn.MaxPool2d(3, stride=2, padding=1)
        stem_level = interface.level("maxpool", num_chs=chans, reduction=2, entering=True)
        self.feature_info = [] if keep_size else [stem_level]
        reduction = 1 if keep_size else 4
        out_chans = chans * plan.block.expansion
        for number, num_blocks in enumerate(plan.num_blocks, start=1):
            stage = _stage(plan, in_chans=chans, out_chans=out_chans, stride=min(number, 2), num_blocks=num_blocks)
            self.add_module(f"layer{number}", stage)
            self.feature_info.append(interface.level(f"layer{number}", num_chs=out_chans, reduction=reduction))
            chans, out_chans, reduction = out_chans, out_chans * 2, reduction * 2
        self.num_stages = len(plan.num_blocks)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = chans
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(chans, num_classes)
        self.pretrained_cfg = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=32 if keep_size else 224,
            min_px=self.min_px,
            first_conv="conv1",
            classifier="fc",
            mean=interface.CIFAR_MEAN if cifar_net else interface.IMAGENET_MEAN,
            std=interface.CIFAR_STD if cifar_net else interface.IMAGENET_STD,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to [B, num_features, h, w]: a 32nd of the side, an 8th with the CIFAR stem, a quarter in
        the nets for CIFAR; rounded up."""
        interface.refuse_small(x, min_px=self.min_px, name=self.name, cifar_stem=self.min_px == MIN_PX)
        x_bchw: Tensor = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for number in range(1, self.num_stages + 1):
            x_bchw = self.get_submodule(f"layer{number}")(x_bchw)
        return x_bchw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, h, w] to logits [B, num_classes], or to the average over h and w, [B, num_features]."""
        x_bc = x.mean((2, 3))
        return x_bc if pre_logits else self.fc(self.head_drop(x_bc))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = interface.like(self.fc, num_classes=num_classes)
        nn.init.zeros_(self.fc.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _stage(plan: Plan, *, in_chans: int, out_chans: int, stride: int, num_blocks: int) -> nn.Sequential:
    """`num_blocks` blocks, of which the first widens and strides."""
    first = plan.block(in_chans=in_chans, out_chans=out_chans, stride=stride, option=plan.option)
    rest = (
        plan.block(in_chans=out_chans, out_chans=out_chans, stride=1, option=plan.option) for _ in range(num_blocks - 1)
    )
    return nn.Sequential(first, *rest)


def _shortcut(*, in_chans: int, out_chans: int, stride: int, option: Option) -> nn.Module | None:
    """What brings a block's input to the shape of its output; None in a plain net."""
    if option == "plain":
        return None
    if stride == 1 and in_chans == out_chans:
        return nn.Identity()
    if option == "A":
        return ZeroPad(stride=stride, new_chans=out_chans - in_chans)
    return nn.Sequential(nn.Conv2d(in_chans, out_chans, 1, stride=stride, bias=False), nn.BatchNorm2d(out_chans))
