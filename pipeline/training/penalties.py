"""Penalties that are added to the loss: on the weights, and on what reaches the classifier."""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn


def l1(net: nn.Module) -> Tensor:
    """The sum of the absolute values of the kernels (more than one axis) that learn; [], 0 where there are none.

    Biases and norms are left alone, as by weight decay (Tibshirani, "Regression Shrinkage and Selection via the Lasso",
    1996).
    """
    sums = [p.abs().sum() for p in net.parameters() if p.requires_grad and p.ndim > 1]
    return torch.stack(sums).sum() if sums else torch.zeros(())


class Activity:
    """Watches what reaches a net's classifier in training, after dropout, until it is closed.

    It is no module, so it is no part of the net's state. A deep copy of the net reports to this same object, as the net
    itself does.

    Args:
        net: speaks timm's interface; `get_classifier` may give several heads.
    """

    def __init__(self, net: Any) -> None:
        classifier = net.get_classifier()
        heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
        self._net = net
        # No longer than one pass: where nobody takes it, the graphs of earlier passes must not pile up.
        self._seen: deque[Tensor] = deque(maxlen=len(heads))
        self._handles = [head.register_forward_pre_hook(self._see) for head in heads]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Activity":
        # Reached through the hook of a net that is being copied. What was seen hangs on a graph, which has no copy.
        return self

    def take(self) -> Tensor:
        """The mean square, float32 [], of what reached the classifier in the last pass; then forgets it.

        The graph behind it is kept. Passes in evaluation mode, or without gradients, do not count; 0 where nothing has
        been seen since the last take.
        """
        seen = [x.float().flatten() for x in self._seen]
        self._seen.clear()
        return torch.cat(seen).square().mean() if seen else torch.zeros(())

    def close(self) -> None:
        """Stops watching the net, and forgets what was seen."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def _see(self, head: nn.Module, inputs: tuple[Any, ...]) -> None:
        # A frozen classifier is in evaluation mode while what is below it learns.
        if torch.is_grad_enabled() and (head.training or self._net.training):
            self._seen.append(inputs[0])
