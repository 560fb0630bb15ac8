"""AlexNet. Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural networks", 2012.

The net with which learned features overtook designed ones. What it brought together: ReLU, whose gradient does not
fade where a unit is strongly on (the paper trains six times faster than with tanh); dropout, without which the 58
million weights of the linear layers learn the training pictures by heart; pools whose windows overlap; local
response normalisation, by which strong maps damp their neighbours; and two GPUs, each with half of the channels.

`alexnet_two_tower`, the net of the paper, at 3 x 224 x 224 and 1000 classes:

                                        output         parameters   multiply-adds
    conv1  11x11, stride 4, ReLU, LRN   96 x 55 x 55       34,944     105,415,200
    pool   3x3, stride 2                96 x 27 x 27
    conv2  5x5, 2 groups, ReLU, LRN    256 x 27 x 27      307,456     223,948,800
    pool   3x3, stride 2               256 x 13 x 13
    conv3  3x3, ReLU                   384 x 13 x 13      885,120     149,520,384
    conv4  3x3, 2 groups, ReLU         384 x 13 x 13      663,936     112,140,288
    conv5  3x3, 2 groups, ReLU         256 x 13 x 13      442,624      74,760,192
    pool   3x3, stride 2               256 x  6 x  6
    fc6    ReLU, dropout              4096             37,752,832      37,748,736
    fc7    ReLU, dropout              4096             16,781,312      16,777,216
    fc8                               1000              4,097,000       4,096,000
                                                       60,965,224     724,406,816

The two towers are groups of the convolutions: 2, 4 and 5 see the maps of their own tower, conv3 and the linear
layers see both. That halves their weights; it was made for the memory of the day and came back as ResNeXt's groups.

`alexnet`, the one tower of Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014, in
torchvision's form, whose weights load as they are: 64-192-384-256-256 channels without groups or normalisation,
dropout before fc6 and fc7 rather than after. 61,100,840 parameters and 714,188,480 multiply-adds.

What differs from the paper: conv1 pads by 2, since 224 px without padding does not give the 55 x 55 of its text; LRN
runs over the channels of both towers, and so also across their border; the PCA noise on the colours is left to
augmentation. What is torchvision's: pictures of another size are averaged to 6 x 6 before fc6 (at 224 px that
changes nothing).

The paper's figures on ImageNet 2012's validation split, averaged over ten crops: top-1 error 40.7 %, top-5 18.2 %.
torchvision's weights of `alexnet`, one crop: 43.5 % and 20.9 %.
"""

from typing import Any

from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 63
"""The last map is then 1 x 1."""
_ONES = (2, 4, 5)
"""The convolutions whose biases begin at 1."""


def alexnet(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """The one tower of 2014 with random weights; `drop_rate` is dropout before both hidden linear layers."""
    features = nn.Sequential(
        nn.Conv2d(in_chans, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
    )
    classifier = nn.Sequential(
        nn.Dropout(drop_rate),
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(),
        nn.Dropout(drop_rate),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, num_classes),
    )
    return AlexNet(name="alexnet", features=features, classifier=classifier, head_drop_rate=0.0)


def alexnet_two_tower(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.5) -> nn.Module:
    """The paper's net with random weights; `drop_rate` is dropout after both hidden linear layers."""
    features = nn.Sequential(
        nn.Conv2d(in_chans, 96, 11, stride=4, padding=2),
        nn.ReLU(),
        _response_norm(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(96, 256, 5, padding=2, groups=2),
        nn.ReLU(),
        _response_norm(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(256, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
    )
    classifier = nn.Sequential(
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(),
        nn.Dropout(drop_rate),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, num_classes),
    )
    return AlexNet(name="alexnet_two_tower", features=features, classifier=classifier, head_drop_rate=drop_rate)


class AlexNet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 63, to logits [B, num_classes].

    Initialised as the paper says (section 5): weights normal with a standard deviation of 0.01; biases 1 in
    convolutions 2, 4 and 5 and in the hidden linear layers, so that their ReLUs are on and learn from the first step;
    other biases 0.
    """

    def __init__(self, *, name: str, features: nn.Sequential, classifier: nn.Sequential, head_drop_rate: float) -> None:
        """`features` ends in 256 channels; `classifier` holds the hidden layers and, last, the classifier itself."""
        super().__init__()
        first, last = features[0], classifier[-1]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(last, nn.Linear)
        self.name = name
        self.num_classes = last.out_features
        self.num_features = 256
        self.head_hidden_size = last.in_features
        self.last = len(classifier) - 1
        self.pretrained_cfg: dict[str, Any] = interface.config(
            in_chans=first.in_channels,
            num_classes=last.out_features,
            px=224,
            min_px=MIN_PX,
            first_conv="features.0",
            classifier=f"classifier.{self.last}",
        )
        self.features = features
        self.feature_info = interface.levels_of_sequence(features, name="features")
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = classifier
        self.head_drop = nn.Dropout(head_drop_rate)
        convolutions = [layer for layer in features if isinstance(layer, nn.Conv2d)]
        *hidden, _ = [layer for layer in classifier if isinstance(layer, nn.Linear)]
        for index, conv in enumerate(convolutions, start=1):
            _init(conv, bias=1.0 if index in _ONES else 0.0)
        for linear in hidden:
            _init(linear, bias=1.0)
        _init(last, bias=0.0)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to the last pool's [B, 256, h, w], 6 x 6 at 224 px."""
        interface.refuse_small(x, min_px=MIN_PX, name=self.name)
        x_b256hw: Tensor = self.features(x)
        return x_b256hw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 256, h, w] to logits [B, num_classes], or to fc7's [B, 4096] after its ReLU.

        In training mode the 4096 have already met the dropout that lies between the hidden layers.
        """
        *hidden, classifier = self.classifier
        x_bd = self.avgpool(x).flatten(1)
        for layer in hidden:
            x_bd = layer(x_bd)
        x_b4096: Tensor = x_bd
        return x_b4096 if pre_logits else classifier(self.head_drop(x_b4096))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier[self.last]

    def reset_classifier(self, num_classes: int) -> None:
        old = self.classifier[self.last]
        assert isinstance(old, nn.Linear)
        self.num_classes = num_classes
        new = interface.like(old, num_classes=num_classes)
        _init(new, bias=0.0)
        self.classifier[self.last] = new

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        hidden = rf"^classifier\.(?!{self.last}\.)"
        return {
            "stem": r"^features\.0\.",
            "blocks": r"^features" if coarse else r"^features\.(\d+)",
            "hidden": hidden if coarse else hidden + r"(\d+)",
        }


def _response_norm() -> nn.LocalResponseNorm:
    """Each value over (2 + 1e-4 x the sum of squares of five neighbouring channels) to the power of 0.75.

    torch takes the mean of the squares where the paper takes the sum, hence five times the paper's alpha.
    """
    return nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)


def _init(layer: nn.Conv2d | nn.Linear, *, bias: float) -> None:
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
