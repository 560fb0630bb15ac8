"""Network in network. Lin, Chen and Yan, "Network in network", 2013.

Two ideas that stayed. A convolution is a linear model of its patch; following it by 1x1 convolutions slides a small
perceptron over the picture instead (an `mlpconv`), which mixes the channels of each pixel. And global average pooling
in place of AlexNet's linear layers: a map a class, averaged, has no weights to learn the training pictures by heart,
and takes pictures of any size. GoogLeNet took both.

The net for CIFAR-10, at 3 x 32 x 32 and 10 classes; ReLU follows every convolution:

                                  output         parameters   multiply-adds
    mlpconv1  5x5                 192 x 32 x 32      14,592      14,745,600
              1x1                 160 x 32 x 32      30,880      31,457,280
              1x1                  96 x 32 x 32      15,456      15,728,640
    pool      3x3, stride 2        96 x 16 x 16
    dropout
    mlpconv2  5x5                 192 x 16 x 16     460,992     117,964,800
              1x1                 192 x 16 x 16      37,056       9,437,184
              1x1                 192 x 16 x 16      37,056       9,437,184
    pool      3x3, stride 2       192 x  8 x  8
    dropout
    mlpconv3  3x3                 192 x  8 x  8     331,968      21,233,664
              1x1                 192 x  8 x  8      37,056       2,359,296
    average                       192
    classifier                     10                 1,930           1,920
                                                    966,986     222,365,568

What differs from the paper: its last layer is one more 1x1 convolution with ReLU, whose maps are averaged. An average
and a linear map of the channels can change places, so here the average comes first and the last 1x1 convolution is a
linear layer of the same weights, at 1/64 of the work; its ReLU, which would keep logits from going below zero and
forbid the exchange, is left off. Both pools take the maximum, as the paper says; the authors' own configuration, from
which the widths come, averages in the second. The pictures' whitening (ZCA) is left to whoever prepares them.

The paper's figures on CIFAR-10's test split: 10.41 % error, 8.81 % with shifted and mirrored pictures.
"""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 4
"""The last map is then 1 x 1."""
BETWEEN = 0.5
"""Dropout after the first two pools, the paper's probability."""


def nin(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """The net for CIFAR with random weights; `drop_rate` is dropout before the classifier, where the paper has none."""
    return NIN(num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


class NIN(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 4, to logits [B, num_classes].

    The paper sets the first weights by hand and does not print them. Here they are those of He et al., "Delving deep
    into rectifiers", 2015: normal, with variance 2 / fan_in, so that eight layers of ReLU keep the scale; biases 0. The
    classifier is nn.Linear's own: uniform within +-1 / sqrt(192).
    """

    def __init__(self, *, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 192
        self.head_hidden_size = 192
        self.pretrained_cfg: dict[str, Any] = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=32,
            min_px=MIN_PX,
            first_conv="mlpconv1.0",
            classifier="classifier",
            # near those of natural pictures; the paper normalises the contrast of each and whitens them
            mean=interface.CIFAR_MEAN,
            std=interface.CIFAR_STD,
        )
        self.feature_info = [
            interface.level("mlpconv1", num_chs=96, reduction=1),
            interface.level("mlpconv2", num_chs=192, reduction=2),
            interface.level("mlpconv3", num_chs=192, reduction=4),
        ]
        self.mlpconv1 = _mlpconv(in_chans=in_chans, size=5, widths=(192, 160, 96))
        self.mlpconv2 = _mlpconv(in_chans=96, size=5, widths=(192, 192, 192))
        self.mlpconv3 = _mlpconv(in_chans=192, size=3, widths=(192, 192))
        # over the edge, so that 32 px become 16 and then 8
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.drop = nn.Dropout(BETWEEN)
        self.head_drop = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(self.head_hidden_size, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to [B, 192, ceil(H/4), ceil(W/4)] for H and W that are multiples of 4."""
        interface.refuse_small(x, min_px=MIN_PX, name="nin")
        x_b96hw = self.drop(self.pool(self.mlpconv1(x)))
        x_b192hw = self.drop(self.pool(self.mlpconv2(x_b96hw)))
        features_b192hw: Tensor = self.mlpconv3(x_b192hw)
        return features_b192hw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 192, h, w] to logits [B, num_classes], or to the averaged [B, 192]."""
        x_b192 = x.mean((2, 3))
        return x_b192 if pre_logits else self.classifier(self.head_drop(x_b192))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.classifier = interface.like(self.classifier, num_classes=num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^mlpconv1" if coarse else r"^mlpconv1\.0",
            "blocks": r"^mlpconv(\d)" if coarse else r"^mlpconv(\d)\.(\d)",
        }


def _mlpconv(*, in_chans: int, size: int, widths: tuple[int, ...]) -> nn.Sequential:
    """A convolution of `size` x `size` that keeps the size of the map, then 1x1 convolutions, each with ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(in_chans, widths[0], size, padding=size // 2), nn.ReLU()]
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 1), nn.ReLU()]
    return nn.Sequential(*layers)
