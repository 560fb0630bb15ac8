"""ZFNet. Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2013.

What a paper about looking inside a net added: projecting the activations of AlexNet back to pixels showed that its
first layer had dead filters and nothing for middle frequencies, and that its stride of 4 aliased the second. So the
first layer takes smaller steps. Everything behind it is AlexNet's, in one tower:

                     AlexNet (two towers)     ZFNet
    conv1            11x11, stride 4          7x7, stride 2
    its map          55 x 55                  110 x 110
    its weights      96 x 363                 96 x 147
    conv2            5x5, 2 groups            5x5, stride 2
    normalisation    before the pools         after the pools
    conv3, 4, 5      3, 4, 5: 1, 2, 2 groups  no groups
    parameters       60,965,224               62,357,608
    multiply-adds    724,406,816              1,168,032,896
    top-1 error      40.7 %                   38.4 %
    top-5 error      18.2 %                   16.5 %

The first map is four times as large, and that is what the higher cost buys. At 3 x 224 x 224 and 1000 classes:

                                     output          parameters   multiply-adds
    conv1  7x7, stride 2, ReLU       96 x 110 x 110      14,208     170,755,200
    pool   3x3, stride 2, LRN        96 x  55 x  55
    conv2  5x5, stride 2, ReLU      256 x  26 x  26     614,656     415,334,400
    pool   3x3, stride 2, LRN       256 x  13 x  13
    conv3  3x3, ReLU                384 x  13 x  13     885,120     149,520,384
    conv4  3x3, ReLU                384 x  13 x  13   1,327,488     224,280,576
    conv5  3x3, ReLU                256 x  13 x  13     884,992     149,520,384
    pool   3x3, stride 2            256 x   6 x   6
    fc6    ReLU, dropout           4096              37,752,832      37,748,736
    fc7    ReLU, dropout           4096              16,781,312      16,777,216
    fc8                            1000               4,097,000       4,096,000
                                                     62,357,608   1,168,032,896

What the paper leaves open: padding, which is chosen here to give the sizes of its figure 3 (1 pixel in conv1, none in
conv2, and pools that also take the window that hangs over the edge); and its contrast normalisation across
maps, for which AlexNet's local response normalisation stands. What differs: the paper scales any filter back whose
root mean square exceeds 0.1, a step of training and not of the net. What is ours: pictures of another size are
averaged to 6 x 6 before fc6 (at 224 px that changes nothing).

The errors above are the papers', on ImageNet 2012's validation split, of one net averaged over ten crops.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 47
"""The last map is then 1 x 1."""


def zfnet(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """ZFNet with random weights; `drop_rate` is dropout after both hidden linear layers."""
    return ZFNet(num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


class ZFNet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 47, to logits [B, num_classes].

    Initialised as the paper says (section 3): weights of size 0.01, taken for the standard deviation of a normal
    distribution as in AlexNet; biases 0.
    """

    def __init__(self, *, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 256
        self.head_hidden_size = 4096
        self.pretrained_cfg: dict[str, Any] = interface.config(
            in_chans=in_chans, num_classes=num_classes, px=224, min_px=MIN_PX, first_conv="conv1", classifier="fc8"
        )
        self.feature_info = [
            interface.level("pool1", num_chs=96, reduction=2, entering=True),
            interface.level("conv2", num_chs=96, reduction=4, entering=True),
            interface.level("pool2", num_chs=256, reduction=8, entering=True),
            interface.level("pool5", num_chs=256, reduction=16, entering=True),
            interface.level("avgpool", num_chs=256, reduction=32, entering=True),
        ]
        self.conv1 = nn.Conv2d(in_chans, 96, 7, stride=2, padding=1)
        self.conv2 = nn.Conv2d(96, 256, 5, stride=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1)
        # over the edge, so that 110 px become 55 and 26 become 13
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.pool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.pool5 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        # the paper's alpha of 1e-4 is of a sum over five channels; torch takes their mean
        self.norm = nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc6_drop = nn.Dropout(drop_rate)
        self.fc7 = nn.Linear(4096, self.head_hidden_size)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc8 = nn.Linear(self.head_hidden_size, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _init(module)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to the last pool's [B, 256, h, w], 6 x 6 at 224 px."""
        interface.refuse_small(x, min_px=MIN_PX, name="zfnet")
        x_b96hw = self.norm(self.pool1(F.relu(self.conv1(x))))
        x_b256hw = self.norm(self.pool2(F.relu(self.conv2(x_b96hw))))
        x_b384hw = F.relu(self.conv4(F.relu(self.conv3(x_b256hw))))
        features_b256hw: Tensor = self.pool5(F.relu(self.conv5(x_b384hw)))
        return features_b256hw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 256, h, w] to logits [B, num_classes], or to fc7's [B, 4096] after its ReLU.

        In training mode the 4096 have already met fc6's dropout.
        """
        x_b9216 = self.avgpool(x).flatten(1)
        x_b4096 = self.fc6_drop(F.relu(self.fc6(x_b9216)))
        x_b4096 = F.relu(self.fc7(x_b4096))
        return x_b4096 if pre_logits else self.fc8(self.head_drop(x_b4096))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc8

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc8 = interface.like(self.fc8, num_classes=num_classes)
        _init(self.fc8)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^conv1",
            "blocks": r"^conv" if coarse else r"^conv(\d)",
            "hidden": r"^fc[67]" if coarse else r"^fc([67])",
        }


def _init(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
