"""Means over an epoch whose parts stay on the device: nothing waits for them before the epoch's end."""

import torch
from torchmetrics import Metric


class Mean(Metric):
    """The mean of what was counted since the epoch began, over all ranks.

    Its sums are part of a checkpoint: an epoch that was stopped half-way counts its first half, too.

    Args:
        dtype: of the total: int64 where whole things are counted, which float32 stops telling apart at 2 ** 24.
    """

    full_state_update = False
    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, *, dtype: torch.dtype = torch.float32, persistent: bool = False) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=dtype), dist_reduce_fx="sum", persistent=persistent)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum", persistent=persistent)

    def update(self, total: torch.Tensor, count: int) -> None:
        """Adds a batch's sum [] over `count` pictures."""
        # In place: a metric looks at what it is given anew.
        self.total.add_(total)
        self.count.add_(count)

    def compute(self) -> torch.Tensor:
        return self.total / self.count
