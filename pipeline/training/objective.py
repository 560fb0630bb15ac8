"""The loss that training minimises: cross-entropy, binary cross-entropy or focal, smoothed and weighted by class."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import UserError


def class_weights(labels: np.ndarray, *, num_classes: int) -> Tensor:
    """Balanced weights, n / (K * n_c): each class as a whole counts the same, and the mean over the pictures is 1.

    As scikit-learn's `balanced` (King and Zeng, "Logistic Regression in Rare Events Data", 2001).

    Args:
        labels: of the training pictures, integers 0 to num_classes - 1.

    Returns:
        float32 [num_classes].

    Raises:
        UserError: A class has no training picture.
    """
    counts_K = np.bincount(labels, minlength=num_classes)
    if missing := np.flatnonzero(counts_K == 0).tolist():
        numbers = ", ".join(map(str, missing[:5])) + (" and more" if missing[5:] else "")
        raise UserError(
            f"balanced class weights: no training picture has class number {numbers} (counted from 0); "
            "raise augment.train_size, or set train.class_weights to none",
            parameter="train.class_weights",
        )
    return torch.from_numpy(len(labels) / (num_classes * counts_K)).float()


class Objective(nn.Module):
    """The mean loss of a batch, in float32 whatever the logits' type.

    Label smoothing mixes every target with the uniform one: (1 - s) * t + s / K (Szegedy et al., "Rethinking the
    Inception Architecture", 2015), targets that are mixed already as well.

    - cross_entropy: -sum_k t_k w_k log p_k, as `F.cross_entropy`.
    - bce: binary cross-entropy of each class by itself, the mean over the classes, as in Wightman et al., "ResNet
      strikes back", 2021. A mean and not a sum, so that the loss does not grow with the number of classes. A picture
      is weighted by its class, sum_k t_k w_k, as in Cui et al., "Class-Balanced Loss", 2019: to weight the binary
      problem of a class would leave its negatives as far ahead of its positives as they were.
    - focal: -sum_k t_k w_k (1 - p_k)^gamma log p_k, Lin et al., "Focal Loss for Dense Object Detection", 2017, over a
      softmax in place of sigmoids; gamma 0 is cross_entropy.

    With weights, a batch's mean is as in `F.cross_entropy`: divided by the sum of the pictures' weights for labels, and
    by the number of pictures for probabilities.

    Args:
        label_smoothing: s above, 0 to 1.
        focal_gamma: of focal alone, 0 or more.
        weights: w above, one a class, [K]; None for 1. A buffer, but not of the state.
    """

    def __init__(
        self,
        *,
        loss: Literal["cross_entropy", "bce", "focal"],
        label_smoothing: float,
        focal_gamma: float,
        weights: Tensor | None,
    ) -> None:
        super().__init__()
        self._loss, self._smoothing, self._gamma = loss, label_smoothing, focal_gamma
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits_BK: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, float32 [].

        Args:
            targets: labels, int64 [B], or probabilities, float [B, K].
        """
        logits_BK = logits_BK.float()
        mixed = targets.is_floating_point()
        if self._loss == "cross_entropy":
            targets = targets.float() if mixed else targets
            return F.cross_entropy(logits_BK, targets, weight=self.weights, label_smoothing=self._smoothing)
        num_classes = logits_BK.shape[1]
        targets_BK = targets.float() if mixed else F.one_hot(targets, num_classes).float()
        smooth_BK = (1 - self._smoothing) * targets_BK + self._smoothing / num_classes
        weights_K = logits_BK.new_ones(num_classes) if self.weights is None else self.weights
        weights_B = (targets_BK * weights_K).sum(1)
        if self._loss == "bce":
            losses_B = weights_B * F.binary_cross_entropy_with_logits(logits_BK, smooth_BK, reduction="none").mean(1)
        else:
            losses_B = (smooth_BK * weights_K * self._focal(logits_BK)).sum(1)
        return losses_B.mean() if mixed else losses_B.sum() / weights_B.sum()

    def _focal(self, logits_BK: Tensor) -> Tensor:
        log_p_BK = logits_BK.log_softmax(1)
        # Above 0, where a gamma below 1 would have an infinite slope.
        rest_BK = (1 - log_p_BK.exp()).clamp(min=torch.finfo(torch.float32).tiny)
        return -(rest_BK**self._gamma) * log_p_BK
