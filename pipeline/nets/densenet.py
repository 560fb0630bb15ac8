"""DenseNets. Huang, Liu, van der Maaten and Weinberger, "Densely connected convolutional networks", 2016.

What they added: a layer reads the maps of all layers before it in its block, joined channel by channel, in place of
their sum. What one layer has found need not be carried along by the others, so layers can be narrow (32 channels each
in `densenet121`), and a net needs few parameters. Between the blocks a transition halves channels and side.
`densenet121` at 3 x 224 x 224 and 1000 classes:

                                    output          parameters   multiply-adds
    conv0         7x7 /2, BN, ReLU   64 x 112 x 112      9,536     118,013,952
    pool0         3x3 /2             64 x  56 x  56
    denseblock1   6 layers          256 x  56 x  56    335,040   1,040,449,536
    transition1                     128 x  28 x  28     33,280     102,760,448
    denseblock2   12 layers         512 x  28 x  28    919,680     712,900,608
    transition2                     256 x  14 x  14    132,096     102,760,448
    denseblock3   24 layers        1024 x  14 x  14  2,837,760     549,126,144
    transition3                     512 x   7 x   7    526,336     102,760,448
    denseblock4   16 layers        1024 x   7 x   7  2,158,080     104,366,080
    norm5         BN, ReLU         1024 x   7 x   7      2,048
    average, classifier            1000              1,025,000       1,024,000
                                                     7,978,856   2,834,161,664

`densenet_bc100_k12`, for CIFAR, at 3 x 32 x 32 and 10 classes:

    conv0         3x3                24 x  32 x  32        648         663,552
    denseblock1   16 layers         216 x  32 x  32    175,680     174,587,904
    transition1                     108 x  16 x  16     23,760      23,887,872
    denseblock2   16 layers         300 x  16 x  16    242,880      60,162,048
    transition2                     150 x   8 x   8     45,600      11,520,000
    denseblock3   16 layers         342 x   8 x   8    276,480      17,104,896
    norm5         BN, ReLU          342 x   8 x   8        684
    average, classifier              10                  3,430           3,420
                                                       769,162     287,929,692

The others at their sizes, with the paper's top-1 error on ImageNet's validation split, one crop of 224 px:

                   parameters   multiply-adds   error
    densenet121     7,978,856   2,834,161,664   25.02 %
    densenet169    14,149,480   3,359,843,328   23.80 %
    densenet201    20,013,928   4,291,365,888   22.58 %
    densenet161    28,681,000   7,727,907,072   22.86 % (of torchvision's weights)

and 4.51 % on CIFAR-10's test split, with shifts and flips, for `densenet_bc100_k12`.

Joining maps anew in every layer makes the values kept for the backward pass grow with the square of a block's depth.
`recompute` is the remedy of Pleiss, Chen, Huang, Li, van der Maaten and Weinberger, "Memory-efficient implementation of
DenseNets", 2017: keep the maps themselves, and join, normalise and activate them a second time in the backward pass.

Nothing differs from the paper but the dropout of 0.2 in every layer, which it has on CIFAR-10 without augmentation
alone. Names are torchvision's.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.nets import interface

MIN_PX = 29
"""With ImageNet's stem: the last map is then 1 x 1; one pixel less and the last transition has nothing to average."""
CIFAR_STEM_MIN_PX = {4: 8, 3: 4}
"""With CIFAR's stem, by the number of dense blocks: the last map is then 1 x 1."""
BOTTLENECK = 4
"""A layer's 1x1 convolution gives this many times the growth rate."""


def densenet121(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default", recompute: bool = False
) -> nn.Module:
    """121 layers for ImageNet, growth rate 32, with random weights.

    Args:
        num_classes: Width of the logits.
        in_chans: Channels of the pictures.
        drop_rate: Dropout before `classifier`, probability; the paper has none on ImageNet.
        stem: "default", or "cifar" for a 3x3 first convolution and no max pool, which keeps the size of small pictures.
        recompute: In the backward pass compute joined maps and their activations again in place of keeping them: less
            memory, more time, equal results.

    Raises:
        UserError: There is no such stem.
    """
    return DenseNet(
        "densenet121", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem, recompute=recompute
    )


def densenet161(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default", recompute: bool = False
) -> nn.Module:
    """161 layers for ImageNet, growth rate 48; arguments as of `densenet121`."""
    return DenseNet(
        "densenet161", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem, recompute=recompute
    )


def densenet169(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default", recompute: bool = False
) -> nn.Module:
    """169 layers for ImageNet, growth rate 32; arguments as of `densenet121`."""
    return DenseNet(
        "densenet169", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem, recompute=recompute
    )


def densenet201(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, stem: str = "default", recompute: bool = False
) -> nn.Module:
    """201 layers for ImageNet, growth rate 32; arguments as of `densenet121`."""
    return DenseNet(
        "densenet201", num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, stem=stem, recompute=recompute
    )


def densenet_bc100_k12(
    *, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, recompute: bool = False
) -> nn.Module:
    """The 100 layers for CIFAR, growth rate 12; arguments as of `densenet121`."""
    return DenseNet(
        "densenet_bc100_k12",
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        stem="cifar",
        recompute=recompute,
    )


class DenseLayer(nn.Module):
    """All maps so far, [B, c, H, W] with `in_chans` channels together, to a new one, [B, growth, H, W].

    BN, ReLU, 1x1 to four times the growth, so that the 3x3 after it costs the same however many maps came before.
    """

    def __init__(self, in_chans: int, *, growth: int, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm1 = nn.BatchNorm2d(in_chans)
        self.conv1 = nn.Conv2d(in_chans, BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            x_bchw = checkpoint(
                self.bottleneck, *maps, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts
            )
        else:
            x_bchw = self.bottleneck(*maps)
        out_bkhw: Tensor = self.conv2(F.relu(self.norm2(x_bchw)))
        return out_bkhw

    def bottleneck(self, *maps: Tensor) -> Tensor:
        """The part whose values grow with the square of the depth if every layer keeps them for its backward pass."""
        x_bchw: Tensor = self.conv1(F.relu(self.norm1(torch.cat(maps, dim=1))))
        return x_bchw

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around the first run of `bottleneck` and around the one in the backward pass."""
        return nullcontext(), self._spare_statistics()

    @contextmanager
    def _spare_statistics(self) -> Iterator[None]:
        """Copies in place of the running statistics: these have counted the batch already, and must not count it twice.

        In training mode a batch norm normalises by the batch, in eval mode it changes nothing: the values are the same.
        """
        statistics = dict(self.norm1.named_buffers())
        try:
            for name, tensor in statistics.items():
                setattr(self.norm1, name, tensor.clone())
            yield
        finally:
            for name, tensor in statistics.items():
                setattr(self.norm1, name, tensor)


class DenseBlock(nn.ModuleDict):
    """`num_layers` layers, each of which reads the input and the maps of all layers before it: [B, in_chans, H, W] to
    [B, in_chans + num_layers * growth, H, W]."""

    def __init__(self, in_chans: int, *, num_layers: int, growth: int, recompute: bool) -> None:
        super().__init__()
        for number in range(num_layers):
            layer = DenseLayer(in_chans + number * growth, growth=growth, recompute=recompute)
            self[f"denselayer{number + 1}"] = layer

    def forward(self, x_bchw: Tensor) -> Tensor:
        maps = [x_bchw]
        for layer in self.values():
            maps.append(layer(maps))
        return torch.cat(maps, dim=1)


class Transition(nn.Module):
    """Half the channels and half the side: [B, C, H, W] to [B, C // 2, H // 2, W // 2]. Without it the concatenated
    channels would only ever grow; the halving is the C (compression) of DenseNet-BC."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_chans)
        self.conv = nn.Conv2d(in_chans, in_chans // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x_bchw: Tensor) -> Tensor:
        half_bchw: Tensor = self.pool(self.conv(F.relu(self.norm(x_bchw))))
        return half_bchw


class Plan(NamedTuple):
    """A column of the paper's table 1."""

    growth: int
    """Channels that a layer adds; k in the paper. The stem gives twice as many."""
    num_layers: tuple[int, ...]
    """In each dense block."""


_PLANS = {
    "densenet121": Plan(32, (6, 12, 24, 16)),
    "densenet161": Plan(48, (6, 12, 36, 24)),
    "densenet169": Plan(32, (6, 12, 32, 32)),
    "densenet201": Plan(32, (6, 12, 48, 32)),
    "densenet_bc100_k12": Plan(12, (16, 16, 16)),
}


class DenseNet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 29 (8 with the CIFAR stem, 4 with three blocks), to logits [B,
    num_classes].

    Initialised as by He et al., "Delving deep into rectifiers", 2015, which the paper follows: convolutions normal,
    with variance 2 / fan_out; batch norms with weight 1 and bias 0; `classifier` uniform within +-1 / sqrt(fan_in) and
    bias 0.
    """

    reference_renames = ((r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),)
    """From torchvision's files of before 2018, with names such as denselayer1.norm.1.weight."""

    def __init__(
        self, name: str, *, num_classes: int, in_chans: int, drop_rate: float, stem: str, recompute: bool
    ) -> None:
        super().__init__()
        interface.check_stem(stem, name=name)
        growth, num_layers = _PLANS[name]
        keep_size, cifar_net = stem == "cifar", len(num_layers) == 3
        self.name = name
        self.min_px = CIFAR_STEM_MIN_PX[len(num_layers)] if keep_size else MIN_PX
        self.features = _stem(in_chans, chans=2 * growth, keep_size=keep_size, activates=not cifar_net)
        chans = 2 * growth
        self.feature_info = [] if keep_size else [interface.level("features.relu0", num_chs=chans, reduction=2)]
        reduction = 1 if keep_size else 4
        for number, num in enumerate(num_layers, start=1):
            block = DenseBlock(chans, num_layers=num, growth=growth, recompute=recompute)
            self.features.add_module(f"denseblock{number}", block)
            chans += num * growth
            end = "features.relu5" if number == len(num_layers) else f"features.denseblock{number}"
            self.feature_info.append(interface.level(end, num_chs=chans, reduction=reduction))
            reduction *= 2
            if number < len(num_layers):
                self.features.add_module(f"transition{number}", Transition(chans))
                chans //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(chans))
        self.features.add_module("relu5", nn.ReLU())
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = chans
        self.head_drop = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(chans, num_classes)
        self.pretrained_cfg = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=32 if keep_size else 224,
            min_px=self.min_px,
            first_conv="features.conv0",
            classifier="classifier",
            mean=interface.CIFAR_MEAN if cifar_net else interface.IMAGENET_MEAN,
            std=interface.CIFAR_STD if cifar_net else interface.IMAGENET_STD,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to the last activation, [B, num_features, h, w]: a 32nd of the side, an 8th with the
        CIFAR stem, a quarter with three blocks; rounded down by the transitions."""
        interface.refuse_small(x, min_px=self.min_px, name=self.name, cifar_stem=self.min_px == MIN_PX)
        features_bchw: Tensor = self.features(x)
        return features_bchw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, h, w] to logits [B, num_classes], or to the average over h and w, [B, num_features]."""
        x_bc = x.mean((2, 3))
        return x_bc if pre_logits else self.classifier(self.head_drop(x_bc))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.classifier = interface.like(self.classifier, num_classes=num_classes)
        nn.init.zeros_(self.classifier.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        # 99999 is timm's sign for the group before: what follows a block belongs to its last layer
        block = r"^features\.denseblock(\d+)" if coarse else r"^features\.denseblock(\d+)\.denselayer(\d+)"
        after = [(r"^features\.transition(\d+)", (99999,)), (r"^features\.norm5", (99999,))]
        return {"stem": r"^features\.(?:conv|norm)0", "blocks": [(block, None), *after]}


def _stem(in_chans: int, *, chans: int, keep_size: bool, activates: bool) -> nn.Sequential:
    """The paper's net for CIFAR leaves the activation to the first layer."""
    if not keep_size:
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(in_chans, chans, 7, stride=2, padding=3, bias=False),
            norm0=nn.BatchNorm2d(chans),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, stride=2, padding=1),
        )
        return nn.Sequential(layers)
    layers = OrderedDict(conv0=nn.Conv2d(in_chans, chans, 3, padding=1, bias=False))
    if activates:
        layers |= {"norm0": nn.BatchNorm2d(chans), "relu0": nn.ReLU()}
    return nn.Sequential(layers)
