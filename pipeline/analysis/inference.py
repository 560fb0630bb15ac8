"""A trained model applied to pictures: the same preprocessing as in training, on one device."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from pipeline import machine
from pipeline.data.datamodule import Batch
from pipeline.data.decode import shrink
from pipeline.data.pixels import center_crop, to_channels
from pipeline.training.normalize import Normalize
from pipeline.training.weights import ModelCard


def with_preprocessing(net: nn.Module, card: ModelCard) -> nn.Sequential:
    """The model as it is used: pixels 0 to 255 [B, C, px, px] in, logits [B, classes] out."""
    return nn.Sequential(Normalize(card.mean, card.std), net).eval()


def logits(net: nn.Module, card: ModelCard, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits [N, classes] and labels [N] of all batches, on the CPU."""
    place = machine.device("auto")
    model = with_preprocessing(net, card).to(place).to(memory_format=torch.channels_last)
    outputs, targets = [], []
    with torch.inference_mode():
        for pixels, labels in batches:
            moved = pixels.to(place, memory_format=torch.channels_last, non_blocking=True)
            outputs.append(model(moved).float())
            targets.append(labels)
    return torch.cat(outputs).cpu(), torch.cat(targets)  # to the CPU once: every time would wait for the device


def prepare(picture: np.ndarray, card: ModelCard) -> np.ndarray:
    """A decoded picture [H, W] or [H, W, C] as the net sees it, uint8 [px, px, in_chans], by the way of packing."""
    small = shrink(picture, card.pack_px)
    whole = small if small.ndim == 3 else small[:, :, None]
    return center_crop(to_channels(whole, card.in_chans), card.px)
