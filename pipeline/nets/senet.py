"""SENets. Hu, Shen, Albanie, Sun and Wu, "Squeeze-and-excitation networks", 2017.

What they added: a way for a block to weigh its channels by what is in the whole picture. Beside any block, two small
layers read the average of each channel ("squeeze") and give a factor for each ("excitation"), by which the block's
output is multiplied before the shortcut is added. It costs a tenth more parameters and next to no multiply-adds, and
fits every kind of block: here it is a module that wraps one. `se_resnet50` at 3 x 224 x 224 and 1000 classes:

                                output           parameters   multiply-adds
    layer0   7x7 /2, BN, ReLU     64 x 112 x 112      9,536     118,013,952
    pool0    3x3 /2               64 x  56 x  56
    layer1   3 blocks            256 x  56 x  56    241,200     667,967,488
    layer2   4 blocks, /2        512 x  28 x  28  1,352,832     950,665,216
    layer3   6 blocks, /2       1024 x  14 x  14  7,891,328   1,388,052,480
    layer4   3 blocks, /2       2048 x   7 x   7 16,544,128     733,741,056
    average, last_linear        1000              2,049,000       2,048,000
                                                 28,088,024   3,860,488,192

`senet154`, made for ILSVRC 2017, is a ResNeXt of 64 branches with the first 1x1 of a block halved, three 3x3 for a
stem, 3x3 shortcuts where a stage strides, and dropout:

    layer0   3 x 3x3 /2         128 x 112 x 112     112,832   1,408,942,080
    pool0    3x3 /2             128 x  56 x  56
    layer1   3 blocks           256 x  56 x  56     354,864   1,019,600,896
    layer2   8 blocks, /2       512 x  28 x  28   4,695,296   3,609,722,880
    layer3   36 blocks, /2     1024 x  14 x  14  68,677,888  12,650,676,224
    layer4   3 blocks, /2      2048 x   7 x   7  39,199,104   1,997,373,440
    average, last_linear       1000               2,049,000       2,048,000
                                                115,088,984  20,688,363,520

Nothing differs from the authors' Caffe nets, whose published weights timm keeps as legacy_seresnet50 and
legacy_senet154: hence the stride in the first 1x1 of a ResNet's block, and a max pool that does not pad.

The paper's figures, top-1 error on ImageNet's validation split, a crop of 224 px: SE-ResNet-50 23.29 % (ResNet-50:
24.80 %), SENet-154 18.68 %.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 32
"""With ImageNet's stem, which takes 32 pixels to one. A choice: less can be computed, but a map of single pixels says
little, and the cifar stem is for small pictures."""
CIFAR_MIN_PX = 8
"""With CIFAR's stem: the last map is then 1 x 1."""
REDUCTION = 16
"""How many times narrower than the map the waist of the excitation is; the paper's choice among 2 to 32."""


def se_resnet50(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default") -> nn.Module:
    """ResNet-50 with squeeze-and-excitation in every block, with random weights.

    Args:
        num_classes: Width of the logits.
        in_chans: Channels of the pictures.
        drop_rate: Dropout before `last_linear`, probability; the paper has none in this net.
        stem: "default", or "cifar" for a 3x3 first convolution and no max pool, which keeps the size of small pictures.

    Raises:
        UserError: There is no such stem.
    """
    interface.check_stem(stem, name="se_resnet50")
    return SENet(
        "se_resnet50", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, keep_size=stem == "cifar"
    )


def senet154(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.2) -> nn.Module:
    """154 layers, from the entry that won ILSVRC 2017; `drop_rate` is dropout before `last_linear`."""
    return SENet("senet154", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, keep_size=False)


class SqueezeExcite(nn.Module):
    """Any block whose output is a map, with every channel of that map scaled by a factor between 0 and 1.

    Squeeze: the average of each channel over the whole map, which no convolution of 3x3 sees. Excitation: two layers
    with a narrow waist turn these averages into a factor a channel. [B, ...] to what `block` gives, [B, chans, h, w].
    The layers are 1x1 convolutions on a map of one pixel, which is the same as linear ones.
    """

    def __init__(self, block: nn.Module, *, chans: int) -> None:
        super().__init__()
        self.block = block
        self.fc1 = nn.Conv2d(chans, chans // REDUCTION, 1)
        self.fc2 = nn.Conv2d(chans // REDUCTION, chans, 1)

    def forward(self, x: Tensor) -> Tensor:
        x_bchw: Tensor = self.block(x)
        x_bc11 = x_bchw.mean((2, 3), keepdim=True)
        scale_bc11: Tensor = self.fc2(F.relu(self.fc1(x_bc11))).sigmoid()
        return x_bchw * scale_bc11


class Residual(nn.Module):
    """What a branch adds to a shortcut, through ReLU; `downsample` brings the input to the shape of the branch."""

    def __init__(self, branch: nn.Module, *, downsample: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.downsample = downsample

    def forward(self, x_bchw: Tensor) -> Tensor:
        return F.relu(self.branch(x_bchw) + self.downsample(x_bchw))


def _resnet_branch(in_chans: int, *, out_chans: int, stride: int) -> nn.Sequential:
    """ResNet's bottleneck, which strides in its first 1x1, as in the ResNet paper."""
    width = out_chans // 4
    return _conv_bn(
        nn.Conv2d(in_chans, width, 1, stride=stride, bias=False),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.Conv2d(width, out_chans, 1, bias=False),
    )


def _senet_branch(in_chans: int, *, out_chans: int, stride: int) -> nn.Sequential:
    """ResNeXt's bottleneck of 64 groups, but the first 1x1 gives half the channels of the 3x3, to save work."""
    return _conv_bn(
        nn.Conv2d(in_chans, out_chans // 2, 1, bias=False),
        nn.Conv2d(out_chans // 2, out_chans, 3, stride=stride, padding=1, groups=64, bias=False),
        nn.Conv2d(out_chans, out_chans, 1, bias=False),
    )


def _conv_bn(*convs: nn.Conv2d, last_relu: bool = False) -> nn.Sequential:
    """Convolutions, each with a batch norm, and ReLU between; conv1, bn1, relu1, conv2 and so on."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, conv in enumerate(convs, start=1):
        layers[f"conv{number}"] = conv
        layers[f"bn{number}"] = nn.BatchNorm2d(conv.out_channels)
        if last_relu or number < len(convs):
            layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(layers)


class Plan(NamedTuple):
    """What tells the nets apart."""

    branch: Callable[..., nn.Sequential]
    num_blocks: tuple[int, ...]
    """In each stage; the first gives 256 channels, each further one twice those of the one before."""
    shortcut_side: int
    """Kernel of the shortcuts that stride. 3 loses no pixels; 1 skips three of four."""
    deep_stem: bool
    """Three 3x3 convolutions in place of one 7x7."""


_PLANS = {
    "se_resnet50": Plan(_resnet_branch, (3, 4, 6, 3), shortcut_side=1, deep_stem=False),
    "senet154": Plan(_senet_branch, (3, 8, 36, 3), shortcut_side=3, deep_stem=True),
}


class SENet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 32 (8 with the CIFAR stem), to logits [B, num_classes].

    Initialised as by He et al., "Delving deep into rectifiers", 2015, which the paper follows: convolutions normal,
    with variance 2 / fan_out, counted over all groups as torch does, and bias 0; batch norms with weight 1 and bias 0;
    `last_linear` uniform within +-1 / sqrt(2048), bias 0. Every factor of an excitation is thus about a half at first.
    """

    reference_renames = (
        (r"^(layer[1-4]\.\d+)\.((?:conv|bn)\d)\.", r"\1.branch.block.\2."),
        (r"\.se_module\.", ".branch."),
    )
    """From timm's legacy_seresnet50 and legacy_senet154, in which nothing wraps anything."""

    def __init__(self, name: str, *, num_classes: int, in_chans: int, drop_rate: float, keep_size: bool) -> None:
        super().__init__()
        plan = _PLANS[name]
        self.name = name
        self.min_px = CIFAR_MIN_PX if keep_size else MIN_PX
        self.layer0 = _stem(in_chans, deep=plan.deep_stem, keep_size=keep_size)
        # as in Caffe: no padding, but a last window that hangs over the edge
        self.pool0 = nn.Identity() if keep_size else nn.MaxPool2d(3, stride=2, ceil_mode=True)
        stem_chans = 128 if plan.deep_stem else 64
        first = 1 if keep_size else 4
        self.feature_info = [
            *([] if keep_size else [interface.level("layer0", num_chs=stem_chans, reduction=2)]),
            interface.level("layer1", num_chs=256, reduction=first),
            interface.level("layer2", num_chs=512, reduction=2 * first),
            interface.level("layer3", num_chs=1024, reduction=4 * first),
            interface.level("layer4", num_chs=2048, reduction=8 * first),
        ]
        self.layer1 = _stage(plan, in_chans=stem_chans, out_chans=256, stride=1, num_blocks=plan.num_blocks[0])
        self.layer2 = _stage(plan, in_chans=256, out_chans=512, stride=2, num_blocks=plan.num_blocks[1])
        self.layer3 = _stage(plan, in_chans=512, out_chans=1024, stride=2, num_blocks=plan.num_blocks[2])
        self.layer4 = _stage(plan, in_chans=1024, out_chans=2048, stride=2, num_blocks=plan.num_blocks[3])
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 2048
        self.head_drop = nn.Dropout(drop_rate)
        self.last_linear = nn.Linear(2048, num_classes)
        self.pretrained_cfg = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=32 if keep_size else 224,
            min_px=self.min_px,
            first_conv="layer0.conv1",
            classifier="last_linear",
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.last_linear.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to [B, 2048, h, w]: a 32nd of the side, rounded up; an 8th with the CIFAR stem."""
        other_stem = self.name == "se_resnet50" and self.min_px == MIN_PX
        interface.refuse_small(x, min_px=self.min_px, name=self.name, cifar_stem=other_stem)
        x_bchw: Tensor = self.pool0(self.layer0(x))
        x_b2048hw: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x_bchw))))
        return x_b2048hw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 2048, h, w] to logits [B, num_classes], or to the average over h and w, [B, 2048]."""
        x_b2048 = x.mean((2, 3))
        return x_b2048 if pre_logits else self.last_linear(self.head_drop(x_b2048))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.last_linear

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.last_linear = interface.like(self.last_linear, num_classes=num_classes)
        nn.init.zeros_(self.last_linear.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^layer0", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _stem(in_chans: int, *, deep: bool, keep_size: bool) -> nn.Sequential:
    if keep_size:
        return _conv_bn(nn.Conv2d(in_chans, 64, 3, padding=1, bias=False), last_relu=True)
    if not deep:
        return _conv_bn(nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False), last_relu=True)
    return _conv_bn(
        nn.Conv2d(in_chans, 64, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.Conv2d(64, 128, 3, padding=1, bias=False),
        last_relu=True,
    )


def _stage(plan: Plan, *, in_chans: int, out_chans: int, stride: int, num_blocks: int) -> nn.Sequential:
    """`num_blocks` blocks, of which the first widens and strides."""
    side = 1 if stride == 1 else plan.shortcut_side
    projection = nn.Conv2d(in_chans, out_chans, side, stride=stride, padding=side // 2, bias=False)
    downsample = nn.Sequential(projection, nn.BatchNorm2d(out_chans))
    branch = plan.branch(in_chans, out_chans=out_chans, stride=stride)
    blocks = nn.Sequential(Residual(SqueezeExcite(branch, chans=out_chans), downsample=downsample))
    for _ in range(num_blocks - 1):
        branch = plan.branch(out_chans, out_chans=out_chans, stride=1)
        blocks.append(Residual(SqueezeExcite(branch, chans=out_chans), downsample=nn.Identity()))
    return blocks
