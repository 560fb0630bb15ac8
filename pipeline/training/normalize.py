"""From pixels to what a net takes."""

import torch
from torch import nn
from torch.nn import functional as F


def resized(pixels_BCHW: torch.Tensor, px: int) -> torch.Tensor:
    """Square pictures at a side of `px`, bilinear and antialiased; as they are where they have it already."""
    if pixels_BCHW.shape[-2:] == (px, px):
        return pixels_BCHW
    return F.interpolate(pixels_BCHW.float(), size=(px, px), mode="bilinear", antialias=True, align_corners=False)


class Normalize(nn.Module):
    """From pixels to what the net was trained on: (pixel / 255 - mean) / std, per channel.

    Takes uint8 or float pixels 0 to 255, [B, C, H, W]; gives float32 [B, C, H, W]. Training, validation, prediction and
    the exported model all go through it.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float32))
        shift = -torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return pixels_BCHW.float() * self.scale + self.shift
