"""U-Net. Ronneberger, Fischer and Brox, "U-Net: convolutional networks for biomedical image segmentation", 2015.

It gives a picture for a picture. A contracting path finds out what is there, at ever fewer pixels; an expanding path
brings that back to full size; and skip connections hand over the fine maps of the way down, by concatenation, so that
edges need not be remembered through the bottom. `unet` at 3 x 512 x 512:

                                        output         parameters      multiply-adds
    encoder.levels.0  2 conv 3x3      64 x 512 x 512       38,720     10,116,661,248
    encoder.levels.1  pool, 2 conv   128 x 256 x 256      221,440     14,495,514,624
    encoder.levels.2  pool, 2 conv   256 x 128 x 128      885,248     14,495,514,624
    encoder.levels.3  pool, 2 conv   512 x  64 x  64    3,539,968     14,495,514,624
    encoder.levels.4  pool, 2 conv  1024 x  32 x  32   14,157,824     14,495,514,624
    ups.0  up, join, 2 conv          512 x  64 x  64    9,176,576     31,138,512,896
    ups.1  up, join, 2 conv          256 x 128 x 128    2,294,528     31,138,512,896
    ups.2  up, join, 2 conv          128 x 256 x 256      573,824     31,138,512,896
    ups.3  up, join, 2 conv           64 x 512 x 512      143,552     31,138,512,896
    output conv 1x1                    3 x 512 x 512          195         50,331,648
                                                       31,031,875    192,703,102,976

`unet_encoder` is the contracting path with a mean over the map and a linear layer, a classifier: 18,843,200 parameters
and, for 1000 classes, 1,025,000 more. The two belong together: `unet` learns without labels to restore damaged
pictures, and its encoder is then what the classifier starts from (Pathak et al., "Context encoders", 2016).

What differs from the paper: convolutions keep the size by zero padding, where the paper's lose a pixel a side and its
tiles of 572 px give 388 px; so the skips fit without cropping, and a side that 16 does not divide is made up for on
the way up. The last layer gives a picture in place of classes of pixels. As in the paper there is no batch norm: ten
convolutions with He's initialisation learn without it, with AdamW or at a careful rate with SGD.

The paper's figures are of segmentation: a warping error of 0.000353 on the EM challenge of ISBI 2012, and an
intersection over union of 92 % on PhC-U373 and 77.5 % on DIC-HeLa.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets import interface

MIN_PX = 16
"""Four pools then leave one pixel."""
WIDTH = 64
"""Channels of the first level; each of the five levels has twice those of the one before."""
NUM_LEVELS = 5


def unet_encoder(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, width: int = WIDTH) -> nn.Module:
    """The contracting path as a classifier, with random weights.

    Args:
        num_classes: Width of the logits.
        in_chans: Channels of the pictures.
        drop_rate: Dropout before the classifier; the paper has dropout at the end of this path, and gives no rate.
        width: Channels of the first level; the paper's is the default.
    """
    return UNetEncoder(num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, width=width)


def unet(*, in_chans: int, width: int = WIDTH) -> "UNet":
    """The full net from picture to picture, with random weights; `width` is that of the first level."""
    return UNet(in_chans=in_chans, width=width)


class TwoConvs(nn.Module):
    """Two 3x3 convolutions that keep the size, each with ReLU: [B, in_chans, H, W] to [B, out_chans, H, W]."""

    def __init__(self, in_chans: int, *, out_chans: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, padding=1)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x_bchw))))


class Contracting(nn.ModuleList):
    """The left side of the U: at each level two convolutions, between levels a 2x2 max pool.

    What is where is traded for what it is: each level sees half the pixels a side, and twice the channels.
    """

    def __init__(self, in_chans: int, *, width: int) -> None:
        widths = [width * 2**level for level in range(NUM_LEVELS)]
        ins = [in_chans, *widths[:-1]]
        super().__init__(TwoConvs(before, out_chans=after) for before, after in zip(ins, widths, strict=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pictures [B, in_chans, H, W] to five maps [B, width * 2^k, H / 2^k, W / 2^k], the finest first."""
        interface.refuse_small(x, min_px=MIN_PX, name="unet_encoder")
        maps: list[Tensor] = []
        for level in self:
            maps.append(level(F.max_pool2d(maps[-1], 2) if maps else x))
        return maps


class UNetEncoder(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 16, to logits [B, num_classes].

    Initialised as section 3 says: normal with variance 2 / N, N the incoming nodes of a unit; biases are zero. The
    classifier, which the paper has not, is as nn.Linear.
    """

    def __init__(self, *, num_classes: int, in_chans: int, drop_rate: float, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = width * 2 ** (NUM_LEVELS - 1)
        self.pretrained_cfg = interface.config(
            in_chans=in_chans,
            num_classes=num_classes,
            px=512,
            min_px=MIN_PX,
            first_conv="levels.0.conv1",
            classifier="classifier",
        )
        self.feature_info = [
            interface.level(f"levels.{number}", num_chs=width * 2**number, reduction=2**number)
            for number in range(NUM_LEVELS)
        ]
        self.levels = Contracting(in_chans, width=width)
        self.head_drop = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(self.head_hidden_size, num_classes)
        _init(self.levels)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to [B, 16 * width, H/16, W/16], rounded down."""
        maps: list[Tensor] = self.levels(x)
        return maps[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 16 * width, h, w] to logits [B, num_classes], or to the pooled [B, 16 * width]."""
        x_bc = x.mean(dim=(2, 3))
        return x_bc if pre_logits else self.classifier(self.head_drop(x_bc))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.classifier = interface.like(self.classifier, num_classes=num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^levels\.0", "blocks": r"^levels\.(\d)" if coarse else r"^levels\.(\d)\.conv(\d)"}


class Up(nn.Module):
    """One level of the right side: a coarse map made twice as large, joined with the left side's map of its level.

    The skip connection concatenates: what the picture is comes from below, where its edges are from the left.
    [B, 2C, h, w] and [B, C, H, W] to [B, C, H, W].
    """

    def __init__(self, out_chans: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * out_chans, out_chans, 2, stride=2)
        self.convs = TwoConvs(2 * out_chans, out_chans=out_chans)

    def forward(self, coarse_b2chw: Tensor, skip_bchw: Tensor) -> Tensor:
        x_bchw = self.up(coarse_b2chw)
        # a pool drops an odd side's last line; the map grows back to it by repeating its own last line
        missing = [skip_bchw.shape[axis] - x_bchw.shape[axis] for axis in (-2, -1)]
        if any(missing):
            x_bchw = F.pad(x_bchw, (0, missing[1], 0, missing[0]), mode="replicate")
        joined: Tensor = self.convs(torch.cat((skip_bchw, x_bchw), dim=1))
        return joined


class UNet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 16, to pictures of the same shape.

    Its left side has the names of `UNetEncoder` after `encoder.`, so what it learns there can be taken over.
    """

    def __init__(self, *, in_chans: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"levels": Contracting(in_chans, width=width)})
        self.ups = nn.ModuleList(Up(width * 2**level) for level in reversed(range(NUM_LEVELS - 1)))
        self.output = nn.Conv2d(width, in_chans, 1)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        *skips, x_bchw = self.encoder["levels"](x)
        for up, skip_bchw in zip(self.ups, reversed(skips), strict=True):
            x_bchw = up(x_bchw, skip_bchw)
        picture: Tensor = self.output(x_bchw)
        return picture


def _init(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # a unit of an up-convolution sees one pixel of the map below: kernel and stride are equal
            taps = module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
            nn.init.normal_(module.weight, std=math.sqrt(2 / (module.in_channels * taps)))
            assert module.bias is not None
            nn.init.zeros_(module.bias)
