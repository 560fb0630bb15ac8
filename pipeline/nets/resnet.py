"""ResNets. He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2015.

Those for CIFAR (section 4.2) are a 3x3 convolution, three stages of n basic blocks each, and a linear layer: 6n + 2
layers. `resnet20` at 3 x 32 x 32 and 10 classes:

                              output         parameters   multiply-adds
    conv1   3x3, BN, ReLU     16 x 32 x 32          464         442,368
    layer1  3 blocks          16 x 32 x 32       14,016      14,155,776
    layer2  3 blocks          32 x 16 x 16       51,072      12,976,128
    layer3  3 blocks          64 x  8 x  8      203,520      12,976,128
    pool, fc                  10                    650             640
                                                269,722      40,551,040

The paper's figure on CIFAR-10: 8.75 % error on the test split, after 64,000 steps of 128 pictures.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError

CIFAR_MIN_PX = 8
"""The last stage's map is then 2 x 2, the smallest on which every tap of its 3x3 kernels meets a pixel."""


def resnet20(*, num_classes: int, in_chans: int = 3, drop_rate: float = 0.0) -> nn.Module:
    """The 20 layers of section 4.2, with random weights; `drop_rate` is dropout before `fc` (the paper has none)."""
    return CifarResNet(blocks_per_stage=3, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, in_chans, H, W] to [B, out_chans, ceil(H/stride), ceil(W/stride)].

    The shortcut is option A, which has no parameters: take every stride-th pixel, and zeros as the new channels.
    """

    def __init__(self, *, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_chans = out_chans - in_chans
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)

    def shortcut(self, x_bchw: Tensor) -> Tensor:
        """Option A: the old channels first, then the zeros."""
        return F.pad(x_bchw[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_chans))

    def forward(self, x_bchw: Tensor) -> Tensor:
        residual_bchw = F.relu(self.bn1(self.conv1(x_bchw)))
        residual_bchw = self.bn2(self.conv2(residual_bchw))
        return F.relu(residual_bchw + self.shortcut(x_bchw))


class CifarResNet(nn.Module):
    """Pictures [B, in_chans, H, W], H and W at least 8, to logits [B, num_classes].

    Convolutions are initialised as by He et al., "Delving deep into rectifiers", 2015, for ReLU: normal, with
    variance 2 / fan_out; batch norms with weight 1 and bias 0; `fc` as nn.Linear does, uniform within +-1 / sqrt(64).
    """

    def __init__(self, *, blocks_per_stage: int, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 64
        self.head_hidden_size = 64
        self.pretrained_cfg: dict[str, Any] = {
            "input_size": (in_chans, 32, 32),
            "min_input_size": (in_chans, CIFAR_MIN_PX, CIFAR_MIN_PX),
            # near those of natural pictures; the paper subtracts CIFAR's mean, pixel by pixel
            "mean": (0.5,) * in_chans,
            "std": (0.25,) * in_chans,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "first_conv": "conv1",
            "classifier": "fc",
            "num_classes": num_classes,
        }
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(in_chans=16, out_chans=16, stride=1, num_blocks=blocks_per_stage)
        self.layer2 = _stage(in_chans=16, out_chans=32, stride=2, num_blocks=blocks_per_stage)
        self.layer3 = _stage(in_chans=32, out_chans=64, stride=2, num_blocks=blocks_per_stage)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.head_hidden_size, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to [B, 64, ceil(H/4), ceil(W/4)]."""
        if min(x.shape[-2:]) < CIFAR_MIN_PX:
            raise UserError(
                f"a CIFAR ResNet takes pictures of {CIFAR_MIN_PX} px or more, got {min(x.shape[-2:])};"
                f" raise augment.px and train.px to {CIFAR_MIN_PX}"
            )
        x_b16hw = F.relu(self.bn1(self.conv1(x)))
        x_b64hw: Tensor = self.layer3(self.layer2(self.layer1(x_b16hw)))
        return x_b64hw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 64, h, w] to logits [B, num_classes], or to the pooled [B, 64]."""
        x_b64: Tensor = self.pool(x).flatten(1)
        return x_b64 if pre_logits else self.fc(self.head_drop(x_b64))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        weight = self.fc.weight
        self.fc = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _stage(*, in_chans: int, out_chans: int, stride: int, num_blocks: int) -> nn.Sequential:
    """`num_blocks` blocks, of which the first widens and strides."""
    first = BasicBlock(in_chans=in_chans, out_chans=out_chans, stride=stride)
    rest = (BasicBlock(in_chans=out_chans, out_chans=out_chans, stride=1) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *rest)
