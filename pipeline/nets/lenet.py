"""LeNet-5. LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998.

                       output            parameters   multiply-adds
    input              in_chans x 32 x 32
    C1  conv 5x5        6 x 28 x 28             156         117,600
    S2  average 2x2     6 x 14 x 14
    C3  conv 5x5       16 x 10 x 10           2,416         240,000
    S4  average 2x2    16 x  5 x  5
    C5  conv 5x5      120 x  1 x  1          48,120          48,000
    F6  linear         84                    10,164          10,080
        linear         10                       850             840
                                             61,706         416,520     at 1 x 32 x 32 and 10 classes

What differs from the paper, as in every LeNet-5 of today: C3 sees all six maps of S2 in place of a table of subsets,
the average pools have no weights of their own, tanh is unscaled, and a linear layer under cross-entropy replaces the
radial basis functions. What is ours: pictures larger than 32 px are averaged to 1 x 1 after C5 (at 32 px that changes
nothing), so that one net serves any size.

The paper's figure on MNIST: 0.95 % error on the test split, 0.8 % with distorted copies.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 32


def lenet5(*, num_classes: int, in_chans: int = 1, drop_rate: float = 0.0) -> nn.Module:
    """LeNet-5 with random weights; `drop_rate` is dropout between F6 and the classifier (the paper has none)."""
    return LeNet5(num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


class LeNet5(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 32, to logits [B, num_classes].

    Initialised as the paper says: weights uniform within +-2.4 / fan_in. It says nothing of biases: they are zero.
    """

    def __init__(self, *, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 120
        self.head_hidden_size = 84
        self.pretrained_cfg: dict[str, Any] = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=32,
            min_px=MIN_PX,
            first_conv="c1",
            classifier="output",
            # the paper's scale: background -0.1, foreground 1.175
            mean=(0.0784,),
            std=(0.7843,),
        )
        self.feature_info = [
            interface.level("s2", num_chs=6, reduction=1, entering=True),
            interface.level("s4", num_chs=16, reduction=2, entering=True),
            interface.level("pool", num_chs=120, reduction=4, entering=True),
        ]
        self.c1 = nn.Conv2d(in_chans, 6, 5)
        self.s2 = nn.AvgPool2d(2)
        self.c3 = nn.Conv2d(6, 16, 5)
        self.s4 = nn.AvgPool2d(2)
        self.c5 = nn.Conv2d(16, 120, 5)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.f6 = nn.Linear(120, self.head_hidden_size)
        self.head_drop = nn.Dropout(drop_rate)
        self.output = nn.Linear(self.head_hidden_size, num_classes)
        for layer in (self.c1, self.c3, self.c5, self.f6, self.output):
            _init(layer)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to C5's [B, 120, h, w], 1 x 1 at 32 px."""
        interface.refuse_small(x, min_px=MIN_PX, name="lenet5")
        x_b6hw = self.s2(torch.tanh(self.c1(x)))
        x_b16hw = self.s4(torch.tanh(self.c3(x_b6hw)))
        return torch.tanh(self.c5(x_b16hw))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 120, h, w] to logits [B, num_classes], or to F6's [B, 84]."""
        x_b120 = self.pool(x).flatten(1)
        x_b84 = torch.tanh(self.f6(x_b120))
        return x_b84 if pre_logits else self.output(self.head_drop(x_b84))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.output

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.output = interface.like(self.output, num_classes=num_classes)
        _init(self.output)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^c1", "blocks": r"^c[35]|^f6" if coarse else r"^[cf](\d)"}


def _init(layer: nn.Conv2d | nn.Linear) -> None:
    bound = 2.4 / math.prod(layer.weight.shape[1:])
    nn.init.uniform_(layer.weight, -bound, bound)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
