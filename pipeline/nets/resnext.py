"""ResNeXts. Xie, Girshick, Dollar, Tu and He, "Aggregated residual transformations for deep neural networks", 2016.

What they added: a third measure of a net beside depth and width, its cardinality. A block's layers split into many
narrow branches of the same shape, each transforms the map on its own, and their sum is added to the shortcut. At equal
multiply-adds many narrow branches beat one wide path, and their number is the only new thing to choose. `32x4d` means
32 branches of 4 channels. `resnext50_32x4d` at 3 x 224 x 224 and 1000 classes, which has ResNet-50's size:

                                output           parameters   multiply-adds
    conv1    7x7 /2, BN, ReLU     64 x 112 x 112      9,536     118,013,952
    maxpool  3x3 /2               64 x  56 x  56
    layer1   3 blocks            256 x  56 x  56    205,824     634,224,640
    layer2   4 blocks, /2        512 x  28 x  28  1,197,056   1,085,407,232
    layer3   6 blocks, /2       1024 x  14 x  14  7,022,592   1,525,350,400
    layer4   3 blocks, /2       2048 x   7 x   7 14,544,896     865,435,648
    average, fc                 1000              2,049,000       2,048,000
                                                 25,028,904   4,230,479,872

`resnext101_32x8d` (23 blocks in layer3) has 88,791,336 parameters and 16,414,015,488 multiply-adds.
`resnext29_8x64d` at 3 x 32 x 32 and 10 classes:

    conv1    3x3, BN, ReLU        64 x  32 x  32      1,856       1,769,472
    layer1   3 blocks            256 x  32 x  32  1,597,440   1,627,389,952
    layer2   3 blocks, /2        512 x  16 x  16  6,569,984   1,879,048,192
    layer3   3 blocks, /2       1024 x   8 x   8 26,247,168   1,879,048,192
    average, fc                   10                 10,250          10,240
                                                 34,426,698   5,387,266,048

Nothing differs from the paper; `resnext101_32x8d` is not in it, but is torchvision's, whose names all have here.

The paper's figures, top-1 error: ResNeXt-50 (32x4d) 22.2 % on ImageNet's validation split, a crop of 224 px (ResNet-50:
23.9 %); ResNeXt-29 (8x64d) 3.65 % on CIFAR-10's test split. torchvision's weights of 101 layers, 32x8d: 20.69 %.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 32
"""With ImageNet's stem, which takes 32 pixels to one. A choice: less can be computed, but a map of single pixels says
little, and the cifar stem is for small pictures."""
CIFAR_MIN_PX = 8
"""With CIFAR's stem: the last map is then 2 x 2 after three stages, 1 x 1 after four."""


def resnext50_32x4d(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """50 layers, 32 branches of 4 channels, with random weights.

    Args:
        num_classes: Width of the logits.
        in_chans: Channels of the pictures.
        drop_rate: Dropout before `fc`, probability; the paper has none.
        stem: "default", or "cifar" for a 3x3 first convolution and no max pool, which keeps the size of small pictures.

    Raises:
        UserError: There is no such stem.
    """
    return ResNeXt("resnext50_32x4d", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def resnext101_32x8d(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default"
) -> nn.Module:
    """101 layers, 32 branches of 8 channels; arguments as of `resnext50_32x4d`."""
    return ResNeXt("resnext101_32x8d", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def resnext29_8x64d(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """The 29 layers for CIFAR, 8 branches of 64 channels; `drop_rate` is dropout before `fc` (the paper has none)."""
    return ResNeXt("resnext29_8x64d", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar")


class Bottleneck(nn.Module):
    """`groups` branches of 1x1, 3x3 and 1x1, added up, beside a shortcut: [B, in_chans, H, W] to [B, out_chans,
    ceil(H/stride), ceil(W/stride)].

    The branches lie side by side, as in figure 3(c) of the paper: one 1x1 for the first layers of all of them, a 3x3 in
    groups that keeps them apart, and one 1x1 for the last layers, whose sum over its input channels is the sum over the
    branches. A branch has `group_chans` channels where the block gives 256, and in proportion elsewhere.
    """

    def __init__(self, *, in_chans: int, out_chans: int, stride: int, groups: int, group_chans: int) -> None:
        super().__init__()
        width = groups * group_chans * out_chans // 256
        self.conv1 = nn.Conv2d(in_chans, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_chans, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chans)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_chans != out_chans:
            projection = nn.Conv2d(in_chans, out_chans, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_chans))

    def forward(self, x_bchw: Tensor) -> Tensor:
        residual_bchw = F.relu(self.bn1(self.conv1(x_bchw)))
        residual_bchw = F.relu(self.bn2(self.conv2(residual_bchw)))
        residual_bchw = self.bn3(self.conv3(residual_bchw))
        return F.relu(residual_bchw + self.downsample(x_bchw))


class Plan(NamedTuple):
    """What tells the nets apart; the name of a net has groups x group_chans."""

    num_blocks: tuple[int, ...]
    """In each stage; the first gives 256 channels, each further one twice those of the one before."""
    groups: int
    group_chans: int


_PLANS = {
    "resnext50_32x4d": Plan((3, 4, 6, 3), groups=32, group_chans=4),
    "resnext101_32x8d": Plan((3, 4, 23, 3), groups=32, group_chans=8),
    "resnext29_8x64d": Plan((3, 3, 3), groups=8, group_chans=64),
}


class ResNeXt(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 32 (8 with the CIFAR stem), to logits [B, num_classes].

    Initialised as by He et al., "Delving deep into rectifiers", 2015: convolutions normal, with variance 2 / fan_out,
    counted over all groups as torch does; batch norms with weight 1 and bias 0; `fc` uniform within +-1 / sqrt(fan_in)
    and bias 0.
    """

    def __init__(self, name: str, *, num_classes: int, in_chans: int, drop_rate: float, stem: str) -> None:
        super().__init__()
        interface.check_stem(stem, name=name)
        plan = _PLANS[name]
        keep_size, cifar_net = stem == "cifar", len(plan.num_blocks) == 3
        self.name = name
        self.min_px = CIFAR_MIN_PX if keep_size else MIN_PX
        self.conv1 = (
            nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
            if keep_size
            else nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if keep_size else nn.MaxPool2d(3, stride=2, padding=1)
        stem_level = interface.level("maxpool", num_chs=64, reduction=2, entering=True)
        self.feature_info = [] if keep_size else [stem_level]
        chans, out_chans, reduction = 64, 256, 1 if keep_size else 4
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
        the net for CIFAR; rounded up."""
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
    blocks = nn.Sequential()
    for number in range(num_blocks):
        block = Bottleneck(
            in_chans=out_chans if number else in_chans,
            out_chans=out_chans,
            stride=1 if number else stride,
            groups=plan.groups,
            group_chans=plan.group_chans,
        )
        blocks.append(block)
    return blocks
