"""CNN-F, CNN-M and CNN-S. Chatfield, Simonyan, Vedaldi and Zisserman, "Return of the devil in the details", 2014.

Three nets of eight layers, trained by the same recipe to compare nets and not recipes: F is fast, with AlexNet's
stride of 4; M is medium, with ZFNet's smaller steps; S is slow, with fewer strides and so larger maps. From F to M,
smaller first steps and wider layers win three points of top-5 error for twice the work; from M to S, larger maps win
half a point for nearly twice again.

Table 1 of the paper, at 3 x 224 x 224 and 1000 classes; a convolution is followed by ReLU, `n` by local response
normalisation, `/2` by a pool that shrinks the map by 2:

             vgg_f                           vgg_m                           vgg_s
    conv1     64 11x11 stride 4   n /2        96 7x7 stride 2        n /2     96 7x7 stride 2   n /3
              64 x  54 x  54                  96 x 109 x 109                  96 x 109 x 109
    conv2    256 5x5 pad 2        n /2       256 5x5 stride 2 pad 1  n /2    256 5x5 pad 1        /2
             256 x  27 x  27                 256 x  26 x  26                 256 x  35 x  35
    conv3    256 3x3 pad 1                   512 3x3 pad 1                   512 3x3 pad 1
    conv4    256 3x3 pad 1                   512 3x3 pad 1                   512 3x3 pad 1
    conv5    256 3x3 pad 1          /2       512 3x3 pad 1             /2    512 3x3 pad 1        /3
             256 x  13 x  13                 512 x  13 x  13                 512 x  18 x  18
    pool5    256 x   6 x   6                 512 x   6 x   6                 512 x   6 x   6
    full6    4096 dropout                    4096 dropout                    4096 dropout
    full7    4096 dropout                    4096 dropout                    4096 dropout
    full8    1000                            1000                            1000

                       parameters                       multiply-adds
               vgg_f         vgg_m, vgg_s        vgg_f           vgg_m           vgg_s
    conv1         23,296         14,208     67,744,512     167,664,672     167,664,672
    conv2        409,856        614,656    298,598,400     415,334,400     752,640,000
    conv3        590,080      1,180,160     99,680,256     199,360,512     382,205,952
    conv4        590,080      2,359,808     99,680,256     398,721,024     764,411,904
    conv5        590,080      2,359,808     99,680,256     398,721,024     764,411,904
    full6     37,752,832     75,501,568     37,748,736      75,497,472      75,497,472
    full7     16,781,312     16,781,312     16,777,216      16,777,216      16,777,216
    full8      4,097,000      4,097,000      4,096,000       4,096,000       4,096,000
              60,834,536    102,908,520    724,005,632   1,676,172,320   2,927,705,120

What the table leaves open: a pool by 2 has windows of 3x3 in F and M, as AlexNet's, and of 2x2 in S; a pool by 3 has
3x3; all take the window that hangs over the edge, which gives 6 x 6 before full6. The normalisation is AlexNet's.
The weights that the authors published for S were trained without the padding in conv2 (maps of 33, 17 and 6 px).
What is ours: pictures of another size are averaged to 6 x 6 before full6 (at 224 px that changes nothing).

The paper's top-5 errors on ImageNet 2012's validation split, averaged over ten crops: F 16.7 %, M 13.7 %, S 13.1 %.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets import interface


def vgg_f(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """The fast net with random weights; `drop_rate` is dropout after both hidden linear layers."""
    features = nn.Sequential(
        nn.Conv2d(in_chans, 64, 11, stride=4),
        nn.ReLU(),
        _response_norm(),
        _pool(3, stride=2),
        nn.Conv2d(64, 256, 5, padding=2),
        nn.ReLU(),
        _response_norm(),
        _pool(3, stride=2),
        *_three_convolutions(in_chans=256, out_chans=256),
        _pool(3, stride=2),
    )
    return ChatfieldNet(name="vgg_f", min_px=39, features=features, num_classes=num_classes, drop_rate=drop_rate)


def vgg_m(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """The medium net with random weights; `drop_rate` is dropout after both hidden linear layers."""
    features = nn.Sequential(
        nn.Conv2d(in_chans, 96, 7, stride=2),
        nn.ReLU(),
        _response_norm(),
        _pool(3, stride=2),
        nn.Conv2d(96, 256, 5, stride=2, padding=1),
        nn.ReLU(),
        _response_norm(),
        _pool(3, stride=2),
        *_three_convolutions(in_chans=256, out_chans=512),
        _pool(3, stride=2),
    )
    return ChatfieldNet(name="vgg_m", min_px=41, features=features, num_classes=num_classes, drop_rate=drop_rate)


def vgg_s(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """The slow net with random weights; `drop_rate` is dropout after both hidden linear layers."""
    features = nn.Sequential(
        nn.Conv2d(in_chans, 96, 7, stride=2),
        nn.ReLU(),
        _response_norm(),
        _pool(3, stride=3),
        nn.Conv2d(96, 256, 5, padding=1),
        nn.ReLU(),
        _pool(2, stride=2),
        *_three_convolutions(in_chans=256, out_chans=512),
        _pool(3, stride=3),
    )
    return ChatfieldNet(name="vgg_s", min_px=19, features=features, num_classes=num_classes, drop_rate=drop_rate)


class ChatfieldNet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least `min_px`, to logits [B, num_classes].

    Weights begin normal with a standard deviation of 0.01, biases at 0. The paper says a variance of 10^-2 and that it
    follows AlexNet's recipe, which is a standard deviation of 10^-2; with the other reading the values grow several
    times over in each layer.
    """

    def __init__(self, *, name: str, min_px: int, features: nn.Sequential, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        convolutions = [layer for layer in features if isinstance(layer, nn.Conv2d)]
        self.name = name
        self.min_px = min_px
        self.num_classes = num_classes
        self.num_features = convolutions[-1].out_channels
        self.head_hidden_size = 4096
        self.pretrained_cfg: dict[str, Any] = interface.config(
            in_chans=convolutions[0].in_channels,
            num_classes=num_classes,
            px=224,
            min_px=min_px,
            first_conv="features.0",
            classifier="full8",
        )
        self.features = features
        self.feature_info = interface.levels_of_sequence(features, name="features")
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.full6 = nn.Linear(self.num_features * 6 * 6, 4096)
        self.full6_drop = nn.Dropout(drop_rate)
        self.full7 = nn.Linear(4096, self.head_hidden_size)
        self.head_drop = nn.Dropout(drop_rate)
        self.full8 = nn.Linear(self.head_hidden_size, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _init(module)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to the last pool's [B, num_features, h, w], 6 x 6 at 224 px."""
        interface.refuse_small(x, min_px=self.min_px, name=self.name)
        x_bchw: Tensor = self.features(x)
        return x_bchw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, h, w] to logits [B, num_classes], or to full7's [B, 4096] after its ReLU.

        In training mode the 4096 have already met full6's dropout.
        """
        x_bd = self.avgpool(x).flatten(1)
        x_b4096 = self.full6_drop(F.relu(self.full6(x_bd)))
        x_b4096 = F.relu(self.full7(x_b4096))
        return x_b4096 if pre_logits else self.full8(self.head_drop(x_b4096))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.full8

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.full8 = interface.like(self.full8, num_classes=num_classes)
        _init(self.full8)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^features\.0\.",
            "blocks": r"^features" if coarse else r"^features\.(\d+)",
            "hidden": r"^full[67]" if coarse else r"^full([67])",
        }


def _three_convolutions(*, in_chans: int, out_chans: int) -> list[nn.Module]:
    """conv3, conv4 and conv5, which keep the size of the map."""
    return [
        nn.Conv2d(in_chans, out_chans, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(out_chans, out_chans, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(out_chans, out_chans, 3, padding=1),
        nn.ReLU(),
    ]


def _pool(size: int, *, stride: int) -> nn.MaxPool2d:
    return nn.MaxPool2d(size, stride=stride, ceil_mode=True)


def _response_norm() -> nn.LocalResponseNorm:
    """AlexNet's; its alpha of 1e-4 is of a sum over five channels, and torch takes their mean."""
    return nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)


def _init(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
