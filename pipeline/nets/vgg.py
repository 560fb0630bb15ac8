"""VGG. Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", 2014.

What it showed: depth pays, if layers are small. Two 3x3 convolutions see as much of the picture as one of 5x5, three
as much as one of 7x7, with fewer weights (27 C^2 against 49 C^2) and a ReLU after each. All convolutions are 3x3 and
keep the size of the map; all pools halve it; the channels double after each pool, up to 512.

`vgg16` (configuration D) at 3 x 224 x 224 and 1000 classes; a 2x2 pool ends each stage:

                             output          parameters    multiply-adds
    stage 1   2 convolutions   64 x 224 x 224     38,720    1,936,392,192
    stage 2   2 convolutions  128 x 112 x 112    221,440    2,774,532,096
    stage 3   3 convolutions  256 x  56 x  56  1,475,328    4,624,220,160
    stage 4   3 convolutions  512 x  28 x  28  5,899,776    4,624,220,160
    stage 5   3 convolutions  512 x  14 x  14  7,079,424    1,387,266,048
    pool                      512 x   7 x   7
    fc        ReLU, dropout  4096            102,764,544      102,760,448
    fc        ReLU, dropout  4096             16,781,312       16,777,216
    fc                       1000              4,097,000        4,096,000
                                             138,357,544   15,470,264,320

               convolutions a stage   parameters    with batch norm   top-1 error   top-5 error
    vgg11 (A)  1  1  2  2  2          132,863,336   132,868,840       29.6 %        10.4 %
    vgg13 (B)  2  2  2  2  2          133,047,848   133,053,736       28.7 %         9.9 %
    vgg16 (D)  2  2  3  3  3          138,357,544   138,365,992       27.0 %         8.8 %
    vgg19 (E)  2  2  4  4  4          143,667,240   143,678,248       27.3 %         9.0 %

The errors are the paper's on ImageNet 2012's validation split, one scale of 256 px in training and in testing.

What differs from the paper: the `_bn` nets normalise before each ReLU, which is younger than the paper and lets the
deep ones train from the start at a high rate. What is torchvision's, whose weights load as they are: pictures of
another size are averaged to 7 x 7 before the linear layers (at 224 px that changes nothing).
"""

from typing import Any

from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 32
"""The five pools then leave one pixel."""
_WIDTHS = (64, 128, 256, 512, 512)
"""Channels of each stage."""
_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions of each stage, by the number of layers with weights."""


def vgg11(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """Configuration A with random weights; `drop_rate` is dropout after both hidden linear layers."""
    return VGG(depth=11, batch_norm=False, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def vgg11_bn(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """Configuration A with batch norms and random weights; `drop_rate` as in vgg11."""
    return VGG(depth=11, batch_norm=True, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def vgg13(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """Configuration B with random weights; `drop_rate` as in vgg11."""
    return VGG(depth=13, batch_norm=False, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def vgg13_bn(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """Configuration B with batch norms and random weights; `drop_rate` as in vgg11."""
    return VGG(depth=13, batch_norm=True, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def vgg16(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """Configuration D with random weights; `drop_rate` as in vgg11."""
    return VGG(depth=16, batch_norm=False, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def vgg16_bn(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """Configuration D with batch norms and random weights; `drop_rate` as in vgg11."""
    return VGG(depth=16, batch_norm=True, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def vgg19(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """Configuration E with random weights; `drop_rate` as in vgg11."""
    return VGG(depth=19, batch_norm=False, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


def vgg19_bn(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """Configuration E with batch norms and random weights; `drop_rate` as in vgg11."""
    return VGG(depth=19, batch_norm=True, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


class VGG(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 32, to logits [B, num_classes].

    Initialised by Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010:
    uniform within +-sqrt(6 / (fan_in + fan_out)); biases 0. The paper's own runs drew from a normal distribution, which
    stalls in the deep nets, and so began them with the layers of a trained vgg11; its section 3.1 adds that Glorot's
    weights make this unnecessary.
    """

    reference_renames = (
        (r"^pre_logits\.fc1\.", "classifier.0."),
        (r"^pre_logits\.fc2\.", "classifier.3."),
        (r"^head\.fc\.", "classifier.6."),
    )
    """From timm's names, whose first two are convolutions over the whole map, to torchvision's, which are ours."""

    def __init__(self, *, depth: int, batch_norm: bool, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.name = f"vgg{depth}_bn" if batch_norm else f"vgg{depth}"
        self.num_classes = num_classes
        self.num_features = _WIDTHS[-1]
        self.head_hidden_size = 4096
        self.pretrained_cfg: dict[str, Any] = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=224,
            min_px=MIN_PX,
            first_conv="features.0",
            classifier="classifier.6",
        )
        self.features = _stages(in_chans=in_chans, depths=_DEPTHS[depth], batch_norm=batch_norm)
        self.feature_info = interface.levels_of_sequence(self.features, name="features")
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(self.num_features * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(drop_rate),
            nn.Linear(4096, self.head_hidden_size),
            nn.ReLU(),
            nn.Dropout(drop_rate),
            nn.Linear(self.head_hidden_size, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _init(module)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to the last pool's [B, 512, floor(H/32), floor(W/32)]."""
        interface.refuse_small(x, min_px=MIN_PX, name=self.name)
        x_b512hw: Tensor = self.features(x)
        return x_b512hw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 512, h, w] to logits [B, num_classes], or to the second hidden layer's [B, 4096] after its ReLU.

        In training mode the 4096 have already met the first hidden layer's dropout.
        """
        *hidden, head_drop, classifier = self.classifier
        x_bd = self.avgpool(x).flatten(1)
        for layer in hidden:
            x_bd = layer(x_bd)
        x_b4096: Tensor = x_bd
        return x_b4096 if pre_logits else classifier(head_drop(x_b4096))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier[6]

    def reset_classifier(self, num_classes: int) -> None:
        old = self.classifier[6]
        assert isinstance(old, nn.Linear)
        new = interface.like(old, num_classes=num_classes)
        _init(new)
        self.num_classes = num_classes
        self.classifier[6] = new

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """A convolution and its batch norm are one block; the first of all is the stem."""
        blocks = []
        stage = block = 0
        for index, layer in enumerate(self.features):
            stage += isinstance(layer, nn.MaxPool2d)
            block += isinstance(layer, nn.Conv2d)
            blocks.append((rf"^features\.{index}\.", (stage if coarse else block,)))
        return {
            "stem": r"^features\.[01]\." if self.name.endswith("_bn") else r"^features\.0\.",
            "blocks": blocks,
            "hidden": r"^classifier\.[03]\." if coarse else r"^classifier\.([03])\.",
        }


def _stages(*, in_chans: int, depths: tuple[int, ...], batch_norm: bool) -> nn.Sequential:
    """Five stages of 3x3 convolutions, each ended by a pool, in one sequence: so the names are the reference's."""
    layers: list[nn.Module] = []
    chans = in_chans
    for width, depth in zip(_WIDTHS, depths, strict=True):
        for _ in range(depth):
            layers.append(nn.Conv2d(chans, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
            chans = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _init(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
