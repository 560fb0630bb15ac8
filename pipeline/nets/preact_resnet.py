"""Pre-activation ResNets. He, Zhang, Ren and Sun, "Identity mappings in deep residual networks", 2016.

What they added: a path from the first layer to the last that nothing touches. A ResNet's block ends in a ReLU after
the addition; here batch norm and ReLU stand before each convolution instead ("pre-activation"), so a unit gives its
input plus something, and so does any stack of units: forward, a deep map is an early one plus a sum, and backward,
the gradient reaches every unit undimmed. Nets of a hundred layers train better for it, of a thousand at all. What is
left is to activate the last sum once, before the average.

Where a unit changes the shape, its shortcut is a 1x1 convolution that reads the activation, as in the authors' code.
`preact_resnet50` at 3 x 224 x 224 and 1000 classes, and `preact_resnet164` at 3 x 32 x 32 and 10 classes:

                                output           parameters   multiply-adds
    stem     7x7 /2               64 x 112 x 112      9,408     118,013,952
             max pool 3x3 /2      64 x  56 x  56
    stages.0 3 units             256 x  56 x  56    214,912     667,942,912
    stages.1 4 units, /2         512 x  28 x  28  1,218,048   1,027,604,480
    stages.2 6 units, /2        1024 x  14 x  14  7,095,296   1,464,336,384
    stages.3 3 units, /2        2048 x   7 x   7 14,958,592     809,238,528
    norm     BN, ReLU           2048 x   7 x   7      4,096
    average, head.fc            1000              2,049,000       2,048,000
                                                 25,549,352   4,089,184,256

    stem     3x3                  16 x  32 x  32        432         442,368
    stages.0 18 units             64 x  32 x  32     81,952      80,478,208
    stages.1 18 units, /2        128 x  16 x  16    326,272      83,361,792
    stages.2 18 units, /2        256 x   8 x   8  1,291,520      83,361,792
    norm     BN, ReLU            256 x   8 x   8        512
    average, head.fc              10                  2,570           2,560
                                                  1,703,258     247,646,720

`preact_resnet18` has 11,687,720 parameters and 1,814,073,344 multiply-adds, `preact_resnet110` 1,730,522 and
253,149,824.

What differs from the paper: a bottleneck strides in its 3x3, where the paper's code has it in the first 1x1. The paper
has neither the 18 nor the 50 layers: they are timm's resnetv2_18 and resnetv2_50 under timm's names. The paper's
nets let the first unit's shortcut, too, begin after its activation; in `preact_resnet18` it is the pooled stem, as in
timm. 110 layers have projections like the others, where ResNet-110 has zeros as the new channels.

The paper's figures, error on CIFAR-10's test split, median of five: 6.37 % with 110 layers (ResNet-110: 6.61 %), 5.46 %
with 164 (ResNet-164: 5.93 %).
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 32
"""With ImageNet's stem, which takes 32 pixels to one. A choice: less can be computed, but a map of single pixels says
little, and the cifar stem is for small pictures."""
CIFAR_MIN_PX = 8
"""With CIFAR's stem: the last map is then 2 x 2 after three stages, 1 x 1 after four."""


def preact_resnet18(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """18 layers for ImageNet, basic units, with random weights.

    Args:
        num_classes: Width of the logits.
        in_chans: Channels of the pictures.
        drop_rate: Dropout before `head.fc`, probability; the paper has none.
        stem: "default", or "cifar" for a 3x3 first convolution and no max pool, which keeps the size of small pictures.

    Raises:
        UserError: There is no such stem.
    """
    return PreActResNet("preact_resnet18", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def preact_resnet50(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """50 layers for ImageNet, bottlenecks; arguments as of `preact_resnet18`."""
    return PreActResNet("preact_resnet50", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem)


def preact_resnet110(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """110 layers for CIFAR, basic units; `drop_rate` is dropout before `head.fc` (the paper has none)."""
    return PreActResNet(
        "preact_resnet110", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar"
    )


def preact_resnet164(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """164 layers for CIFAR, bottlenecks; arguments as of `preact_resnet110`."""
    return PreActResNet(
        "preact_resnet164", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem="cifar"
    )


class BasicUnit(nn.Module):
    """BN, ReLU and a 3x3 convolution, twice, beside the shortcut: [B, in_chans, H, W] to [B, out_chans,
    ceil(H/stride), ceil(W/stride)]. Without a `downsample` the shortcut is the input itself."""

    expansion = 1

    def __init__(self, *, in_chans: int, out_chans: int, stride: int, starts: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_chans)
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.downsample = _downsample(in_chans=in_chans, out_chans=out_chans, stride=stride, starts=starts)

    def forward(self, x_bchw: Tensor) -> Tensor:
        active_bchw = F.relu(self.norm1(x_bchw))
        residual_bchw: Tensor = self.conv1(active_bchw)
        residual_bchw = self.conv2(F.relu(self.norm2(residual_bchw)))
        shortcut_bchw: Tensor = x_bchw if self.downsample is None else self.downsample(active_bchw)
        return shortcut_bchw + residual_bchw


class BottleneckUnit(nn.Module):
    """BN, ReLU and a convolution, three times: 1x1 to a quarter of the channels, 3x3, 1x1 back. Shapes and shortcut as
    of `BasicUnit`."""

    expansion = 4

    def __init__(self, *, in_chans: int, out_chans: int, stride: int, starts: bool) -> None:
        super().__init__()
        width = out_chans // self.expansion
        self.norm1 = nn.BatchNorm2d(in_chans)
        self.conv1 = nn.Conv2d(in_chans, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_chans, 1, bias=False)
        self.downsample = _downsample(in_chans=in_chans, out_chans=out_chans, stride=stride, starts=starts)

    def forward(self, x_bchw: Tensor) -> Tensor:
        active_bchw = F.relu(self.norm1(x_bchw))
        residual_bchw: Tensor = self.conv1(active_bchw)
        residual_bchw = self.conv2(F.relu(self.norm2(residual_bchw)))
        residual_bchw = self.conv3(F.relu(self.norm3(residual_bchw)))
        shortcut_bchw: Tensor = x_bchw if self.downsample is None else self.downsample(active_bchw)
        return shortcut_bchw + residual_bchw


class Plan(NamedTuple):
    """What tells the nets apart."""

    unit: type[BasicUnit] | type[BottleneckUnit]
    num_units: tuple[int, ...]
    """In each stage."""
    stem_chans: int = 64
    """The first stage has as many, times the unit's expansion; each further one has twice those of the one before."""
    activates_stem: bool = False
    """Whether the first unit's shortcut begins after its activation though the shape stays, as in the paper's nets."""


_PLANS = {
    "preact_resnet18": Plan(BasicUnit, (2, 2, 2, 2)),
    "preact_resnet50": Plan(BottleneckUnit, (3, 4, 6, 3)),
    "preact_resnet110": Plan(BasicUnit, (18, 18, 18), stem_chans=16, activates_stem=True),
    "preact_resnet164": Plan(BottleneckUnit, (18, 18, 18), stem_chans=16, activates_stem=True),
}


class PreActResNet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 32 (8 with the CIFAR stem), to logits [B, num_classes].

    Initialised as by He et al., "Delving deep into rectifiers", 2015: convolutions normal, with variance 2 / fan_out;
    batch norms with weight 1 and bias 0; `head.fc` uniform within +-1 / sqrt(fan_in) and bias 0.
    """

    def __init__(self, name: str, *, num_classes: int, in_chans: int, drop_rate: float, stem: str) -> None:
        super().__init__()
        interface.check_stem(stem, name=name)
        plan = _PLANS[name]
        chans, keep_size, cifar_net = plan.stem_chans, stem == "cifar", len(plan.num_units) == 3
        self.name = name
        self.min_px = CIFAR_MIN_PX if keep_size else MIN_PX
        self.stem = _stem(in_chans, chans=chans, keep_size=keep_size)
        self.stages = nn.Sequential()
        self.feature_info = [] if keep_size else [interface.level("stem.conv", num_chs=chans, reduction=2)]
        reduction = 1 if keep_size else 4
        out_chans = chans * plan.unit.expansion
        for number, num_units in enumerate(plan.num_units):
            units = _units(plan, in_chans=chans, out_chans=out_chans, num_units=num_units, is_first=number == 0)
            self.stages.append(nn.Sequential(OrderedDict(blocks=units)))
            end = "relu" if number == len(plan.num_units) - 1 else f"stages.{number}"
            self.feature_info.append(interface.level(end, num_chs=out_chans, reduction=reduction))
            chans, out_chans, reduction = out_chans, out_chans * 2, reduction * 2
        self.norm = nn.BatchNorm2d(chans)
        self.relu = nn.ReLU()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = chans
        self.head = Head(chans, num_classes=num_classes, drop_rate=drop_rate)
        self.pretrained_cfg = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=32 if keep_size else 224,
            min_px=self.min_px,
            first_conv="stem.conv",
            classifier="head.fc",
            mean=(0.5,) * 3,
            # the ImageNet nets: of timm's weights
            std=interface.CIFAR_STD if cifar_net else (0.5,) * 3,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to the last activation, [B, num_features, h, w]: a 32nd of the side, an 8th with the
        CIFAR stem, a quarter in the nets for CIFAR; rounded up."""
        interface.refuse_small(x, min_px=self.min_px, name=self.name, cifar_stem=self.min_px == MIN_PX)
        features_bchw: Tensor = self.relu(self.norm(self.stages(self.stem(x))))
        return features_bchw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, h, w] to logits [B, num_classes], or to the average over h and w, [B, num_features]."""
        x_bc = x.mean((2, 3))
        return x_bc if pre_logits else self.head(x_bc)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head.fc = interface.like(self.head.fc, num_classes=num_classes)
        nn.init.zeros_(self.head.fc.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        # 99999 is timm's sign for the group before: the last norm belongs to the last unit
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^norm", (99999,))]}


class Head(nn.Module):
    """[B, chans] to logits [B, num_classes]."""

    def __init__(self, chans: int, *, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(chans, num_classes)

    def forward(self, x_bc: Tensor) -> Tensor:
        logits_bn: Tensor = self.fc(self.drop(x_bc))
        return logits_bn


def _stem(in_chans: int, *, chans: int, keep_size: bool) -> nn.Sequential:
    """The first convolution has no activation of its own: the first unit begins with one."""
    if keep_size:
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(in_chans, chans, 3, padding=1, bias=False)))
    conv = nn.Conv2d(in_chans, chans, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, pool=nn.MaxPool2d(3, stride=2, padding=1)))


def _units(plan: Plan, *, in_chans: int, out_chans: int, num_units: int, is_first: bool) -> nn.Sequential:
    """A stage's units, of which the first widens and, but in the first stage, strides."""
    first = plan.unit(
        in_chans=in_chans,
        out_chans=out_chans,
        stride=1 if is_first else 2,
        starts=is_first and plan.activates_stem,
    )
    rest = (plan.unit(in_chans=out_chans, out_chans=out_chans, stride=1, starts=False) for _ in range(num_units - 1))
    return nn.Sequential(first, *rest)


def _downsample(*, in_chans: int, out_chans: int, stride: int, starts: bool) -> nn.Module | None:
    """The shortcut where it reads the activation: a projection where the shape changes, the activation itself where the
    unit starts the net. None where the shortcut is the input."""
    if stride != 1 or in_chans != out_chans:
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(in_chans, out_chans, 1, stride=stride, bias=False)))
    return nn.Identity() if starts else None
