"""GoogLeNet. Szegedy et al., "Going deeper with convolutions", 2014.

It showed that a layer may be a small network: an inception module looks at its map with kernels of several sizes at
once and sets the answers side by side, and 1x1 convolutions before the wide kernels keep that cheap. With no large
linear layers at its end, the net has about 9 times fewer parameters than AlexNet (the paper says 12) at nearly three
times the depth.

                                                       googlenet                     googlenet_paper
                                 output      parameters   multiply-adds      parameters   multiply-adds
    conv1   7x7/2          64 x 112 x 112         9,536     118,013,952           9,472     118,013,952
    pool    3x3/2          64 x  56 x  56
    conv2   1x1            64 x  56 x  56         4,224      12,845,056           4,160      12,845,056
    conv3   3x3           192 x  56 x  56       110,976     346,816,512         110,784     346,816,512
    pool    3x3/2         192 x  28 x  28
    inception3a           256 x  28 x  28       155,872     121,626,624         163,696     128,049,152
    inception3b           480 x  28 x  28       340,224     265,732,096         388,736     304,267,264
    pool    3x3/2         480 x  14 x  14
    inception4a           512 x  14 x  14       364,512      71,199,744         376,176      73,608,192
    inception4b           512 x  14 x  14       425,232      83,091,456         449,160      87,908,352
    inception4c           512 x  14 x  14       486,192      95,033,344         510,104      99,850,240
    inception4d           528 x  14 x  14       573,312     112,093,184         605,376     118,515,712
    inception4e           832 x  14 x  14       803,840     157,151,232         868,352     169,996,288
    pool4                 832 x   7 x   7
    inception5a           832 x   7 x   7       978,944      47,867,904       1,043,456      51,079,168
    inception5b          1024 x   7 x   7     1,347,040      65,881,088       1,444,080      70,697,984
    mean, fc             1000                 1,025,000       1,024,000       1,025,000       1,024,000
                                              6,624,904   1,498,376,192       6,998,552   1,582,671,872
    aux1    on 4a        1000                 3,188,968       4,169,728       3,188,840       4,169,728
    aux2    on 4d        1000                 3,191,016       4,202,496       3,190,888       4,202,496
                                             13,004,888   1,506,748,416      13,378,280   1,591,044,096
                                                                       at 3 x 224 x 224 and 1000 classes

`googlenet_paper` is the paper's net: 5x5 kernels, biases, local response norms around the first convolutions. What
differs: the paper's auxiliary classifiers pool 5x5 with stride 3, which gives 4 x 4 near 224 px only; here 4 x 4 cells
are averaged, whatever the size. `googlenet` is torchvision's, so that its published weights fit: batch norm (Ioffe
and Szegedy 2015) in place of biases and response norms, 3x3 kernels where the paper has 5x5, and a last pool of 2x2
in place of 3x3. With its weights torchvision's rescales the colours within the net (`transform_input`) to a mean and
standard deviation of 0.5 a channel; here `pretrained_cfg` says so, and normalisation before the net does it.

The paper's figure on ImageNet: 10.07 % top-5 error on the validation split by one net and one crop, 6.67 % by seven
nets and 144 crops. torchvision's weights: 69.778 % top-1 and 89.530 % top-5 accuracy.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 15
"""The map before the third pool is then 2 x 2; below, that 3x3 pool has nothing left to give."""
PAPER_MIN_PX = 31
"""The same of the fourth pool, which is 3x3 in the paper."""
AUXILIARY_WEIGHT = 0.3
"""Of each auxiliary loss beside the main one (section 5)."""
AUXILIARY_DROP_RATE = 0.7
"""Before each auxiliary classifier (section 5)."""
AUXILIARY_SIDE = 4
"""Of the map that an auxiliary classifier reads, in pixels."""

Widths = tuple[int, int, int, int, int, int]
"""A row of the paper's table 1: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj, in channels."""


def googlenet(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.2) -> nn.Module:
    """GoogLeNet as torchvision has it, with random weights: batch norm, and 3x3 kernels where the paper has 5x5.

    `drop_rate` is dropout before `fc`; torchvision's is the default, the paper has 0.4.
    """
    return GoogLeNet(
        kernel=3, batch_norm=True, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, name="googlenet"
    )


def googlenet_paper(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.4) -> nn.Module:
    """GoogLeNet as the paper has it, with random weights; `drop_rate` is dropout before `fc`."""
    return GoogLeNet(
        kernel=5,
        batch_norm=False,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        name="googlenet_paper",
    )


class Conv(nn.Module):
    """A convolution that keeps the size (but for its stride), batch norm or a bias, and ReLU."""

    def __init__(self, in_chans: int, *, out_chans: int, kernel: int, stride: int = 1, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride=stride, padding=kernel // 2, bias=not batch_norm)
        self.bn = nn.BatchNorm2d(out_chans, eps=0.001) if batch_norm else nn.Identity()

    def forward(self, x_bchw: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_bchw)))


class Inception(nn.Module):
    """Four views of the same map, side by side in the channels: [B, in_chans, H, W] to [B, out_chans, H, W].

    What looks at 3x3 and 5x5 pixels reads a few mixtures of the channels, made by a 1x1 convolution before it: that
    bottleneck is what makes wide kernels affordable. The pool is what networks of the time were used to (figure 2b).
    """

    def __init__(self, in_chans: int, *, widths: Widths, kernel: int, batch_norm: bool) -> None:
        super().__init__()
        one, reduce_three, three, reduce_five, five, pool = widths
        conv = partial(Conv, batch_norm=batch_norm)
        self.branch1 = conv(in_chans, out_chans=one, kernel=1)
        self.branch2 = nn.Sequential(
            conv(in_chans, out_chans=reduce_three, kernel=1), conv(reduce_three, out_chans=three, kernel=3)
        )
        self.branch3 = nn.Sequential(
            conv(in_chans, out_chans=reduce_five, kernel=1), conv(reduce_five, out_chans=five, kernel=kernel)
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(in_chans, out_chans=pool, kernel=1))

    def forward(self, x_bchw: Tensor) -> Tensor:
        views = (self.branch1(x_bchw), self.branch2(x_bchw), self.branch3(x_bchw), self.branch4(x_bchw))
        return torch.cat(views, dim=1)


class Auxiliary(nn.Module):
    """A classifier on a map in the middle of the net, for training alone: [B, in_chans, h, w] to [B, num_classes].

    Its loss brings a gradient to the lower layers by a short way, which a net of this depth needed before batch norm.
    """

    def __init__(self, in_chans: int, *, num_classes: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv = Conv(in_chans, out_chans=128, kernel=1, batch_norm=batch_norm)
        self.fc1 = nn.Linear(128 * AUXILIARY_SIDE**2, 1024)
        self.dropout = nn.Dropout(AUXILIARY_DROP_RATE)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bc44 = F.adaptive_avg_pool2d(x_bchw, AUXILIARY_SIDE)
        x_b2048 = self.conv(x_bc44).flatten(1)
        logits: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x_b2048))))
        return logits


class GoogLeNet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 15 (31 in the paper's net), to logits [B, num_classes].

    The paper says nothing of initialisation. With batch norm it is torchvision's: all weights normal with standard
    deviation 0.01, cut off at +-2. Without, so small a start would not reach the end of the net: what a ReLU follows
    is normal with variance 2 / fan_in (He et al. 2015), the classifiers are normal with standard deviation 0.01, and
    biases are zero.

    Args:
        kernel: Of the third branch of each inception: 5 as in the paper, or 3.
        batch_norm: In place of biases and of the paper's local response norms.
        name: For the message on pictures that are too small.
    """

    def __init__(
        self, *, kernel: int, batch_norm: bool, num_classes: int, in_chans: int, drop_rate: float, name: str
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 1024
        self.auxiliary_weight = AUXILIARY_WEIGHT
        min_px = MIN_PX if batch_norm else PAPER_MIN_PX
        self.pretrained_cfg = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=224,
            min_px=min_px,
            first_conv="conv1.conv",
            classifier="fc",
            mean=(0.5,) * 3 if batch_norm else interface.IMAGENET_MEAN,
            std=(0.5,) * 3 if batch_norm else interface.IMAGENET_STD,
            auxiliary_classifiers=("aux1.fc2", "aux2.fc2"),
        )
        self.feature_info = [
            interface.level("conv1", num_chs=64, reduction=2),
            interface.level("norm2", num_chs=192, reduction=4),
            interface.level("inception3b", num_chs=480, reduction=8),
            interface.level("inception4e", num_chs=832, reduction=16),
            interface.level("inception5b", num_chs=1024, reduction=32),
        ]
        self._name, self._batch_norm, self._min_px = name, batch_norm, min_px
        conv = partial(Conv, batch_norm=batch_norm)
        inception = partial(Inception, kernel=kernel, batch_norm=batch_norm)
        auxiliary = partial(Auxiliary, num_classes=num_classes, batch_norm=batch_norm)
        self.conv1 = conv(in_chans, out_chans=64, kernel=7, stride=2)
        self.norm1 = _norm(batch_norm=batch_norm)
        self.conv2 = conv(64, out_chans=64, kernel=1)
        self.conv3 = conv(64, out_chans=192, kernel=3)
        self.norm2 = _norm(batch_norm=batch_norm)
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = inception(192, widths=(64, 96, 128, 16, 32, 32))
        self.inception3b = inception(256, widths=(128, 128, 192, 32, 96, 64))
        self.inception4a = inception(480, widths=(192, 96, 208, 16, 48, 64))
        self.aux1 = auxiliary(512)
        self.inception4b = inception(512, widths=(160, 112, 224, 24, 64, 64))
        self.inception4c = inception(512, widths=(128, 128, 256, 24, 64, 64))
        self.inception4d = inception(512, widths=(112, 144, 288, 32, 64, 64))
        self.aux2 = auxiliary(528)
        self.inception4e = inception(528, widths=(256, 160, 320, 32, 128, 128))
        self.pool4 = nn.MaxPool2d(2 if batch_norm else 3, stride=2, ceil_mode=True)
        self.inception5a = inception(832, widths=(256, 160, 320, 32, 128, 128))
        self.inception5b = inception(832, widths=(384, 192, 384, 48, 128, 128))
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.head_hidden_size, num_classes)
        self._init()

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to inception 5b's [B, 1024, H/32, W/32], rounded up or down by a pixel."""
        return self._maps(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 1024, h, w] to logits [B, num_classes], or to the pooled [B, 1024]."""
        x_b1024 = x.mean(dim=(2, 3))
        return x_b1024 if pre_logits else self.fc(self.head_drop(x_b1024))

    def forward(self, x: Tensor) -> Tensor:
        """The main logits [B, num_classes], in training mode too: the auxiliary classifiers cost nothing here."""
        return self.forward_head(self.forward_features(x))

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, ...]:
        """The logits of `fc`, of `aux1` and of `aux2`, each [B, num_classes].

        What training minimises is the first's loss plus `auxiliary_weight` times the sum of the other two's.
        """
        at_4a, at_4d, features = self._maps(x)
        return self.forward_head(features), self.aux1(at_4a), self.aux2(at_4d)

    def auxiliary_heads(self) -> list[nn.Module]:
        """What `forward_with_auxiliary` runs beyond `forward`."""
        return [self.aux1, self.aux2]

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Three new classifiers: the main one and the two auxiliary ones."""
        self.num_classes = num_classes
        self.fc = interface.like(self.fc, num_classes=num_classes)
        self.aux1.fc2 = interface.like(self.aux1.fc2, num_classes=num_classes)
        self.aux2.fc2 = interface.like(self.aux2.fc2, num_classes=num_classes)
        self._init_classifiers()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """An auxiliary classifier stands with the inception that it reads: it is frozen and learns with that."""
        stages = ("3", "4|^aux", "5")
        modules = ("3a", "3b", "4a|^aux1", "4b", "4c", "4d|^aux2", "4e", "5a", "5b")
        blocks = [(f"^inception{pattern}", (index,)) for index, pattern in enumerate(stages if coarse else modules)]
        return {"stem": r"^conv[123]", "blocks": blocks}

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of inceptions 4a [B, 512, h, w], 4d [B, 528, h, w] and 5b [B, 1024, h/2, w/2]."""
        interface.refuse_small(x, min_px=self._min_px, name=self._name)
        x_b64hw = self.norm1(self.pool(self.conv1(x)))
        x_b192hw = self.pool(self.norm2(self.conv3(self.conv2(x_b64hw))))
        x_b480hw = self.pool(self.inception3b(self.inception3a(x_b192hw)))
        at_4a: Tensor = self.inception4a(x_b480hw)
        at_4d: Tensor = self.inception4d(self.inception4c(self.inception4b(at_4a)))
        x_b832hw = self.pool4(self.inception4e(at_4d))
        features: Tensor = self.inception5b(self.inception5a(x_b832hw))
        return at_4a, at_4d, features

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if self._batch_norm:
                    nn.init.trunc_normal_(module.weight, std=0.01)
                    continue
                nn.init.normal_(module.weight, std=math.sqrt(2 / math.prod(module.weight.shape[1:])))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        self._init_classifiers()

    def _init_classifiers(self) -> None:
        for classifier in (self.fc, self.aux1.fc2, self.aux2.fc2):
            nn.init.trunc_normal_(classifier.weight, std=0.01)
            if not self._batch_norm:
                nn.init.zeros_(classifier.bias)


def _norm(*, batch_norm: bool) -> nn.Module:
    """The paper's local response norm, with the constants of Caffe's GoogLeNet (the paper gives none)."""
    return nn.Identity() if batch_norm else nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
