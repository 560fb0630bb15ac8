"""Mixup and CutMix: pictures and targets of a batch, blended in pairs."""

import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional as F


class Mixer:
    """Mixes each picture of a batch with one other: the first with the last, the second with the last but one, ...

    Mixup (Zhang et al. 2017) blends them, lambda of the one and 1 - lambda of the other; CutMix (Yun et al. 2019)
    pastes a rectangle of the other, lambda being the share of the picture that is left. The targets are blended by the
    same lambda, which is drawn from Beta(alpha, alpha) for the batch as a whole; CutMix then takes what the rectangle
    leaves after the picture's edge has cut it. With both alphas, a batch is the one or the other with equal chance. Of
    an odd batch the last picture stays as it is.

    Every draw is from numpy's global generator: who seeds it gets the same batch again.

    Args:
        mixup: alpha of Mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none. One of the two must be above 0.
    """

    def __init__(self, *, mixup: float, cutmix: float, num_classes: int) -> None:
        assert mixup > 0 or cutmix > 0
        self._num_classes = num_classes
        self._mix = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=1.0,
            switch_prob=0.5,
            mode="batch",
            label_smoothing=0.0,  # the loss smooths
            num_classes=num_classes,
        )

    def __call__(self, pixels_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed pixels, float32 [B, C, H, W] in the range that they came in, and probabilities, float32 [B, K].

        Args:
            pixels_BCHW: uint8 or float; left as they are.
            labels_B: int64.
        """
        # timm mixes in place, and would round uint8 down.
        pixels_BCHW = pixels_BCHW.to(torch.float32, copy=True)
        paired = len(labels_B) // 2 * 2
        mixed, targets = self._mix(pixels_BCHW[:paired], labels_B[:paired])
        single = F.one_hot(labels_B[paired:], self._num_classes).float()
        return torch.cat([mixed, pixels_BCHW[paired:]]), torch.cat([targets, single])
