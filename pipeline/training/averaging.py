"""Averages of a net's weights over the course of training, which are often better than the last weights."""

from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """A net whose weights are an average of another's.

    - ema: exponential moving average (Polyak and Juditsky 1992; Tarvainen and Valpola, "Mean teachers", 2017). Update
      n, counted from 0, keeps min(decay, (1 + n) / (10 + n)) of the average, so that the first weights are soon
      forgotten (the warm-up of TensorFlow's ExponentialMovingAverage).
    - swa: the mean of all updates, each counting the same (Izmailov et al., "Averaging Weights Leads to Wider Optima",
      2018). The first update replaces the weights that were copied at the start.

    The statistics of batch norms are averaged like weights, in place of another pass over the pictures. What does not
    learn, or is no floating-point number, is copied, and values that are equal in net and average stay equal, so that
    what is frozen is frozen here, too. The state holds the averaged net and the count: a resumed average goes on to
    the same bits.

    Args:
        net: on its device, in its memory format; a deep copy of it is the average before the first update.
        decay: share of the average that an update of ema keeps, 0 to 1.
    """

    def __init__(self, net: nn.Module, *, kind: Literal["ema", "swa"], decay: float) -> None:
        super().__init__()
        self.net = deepcopy(net).requires_grad_(False)
        """The average; in evaluation mode, and it never learns."""
        self.count: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._kind, self._decay = kind, decay
        self.eval()

    def train(self, mode: bool = True) -> "Average":
        super().train(mode)
        self.net.eval()  # whatever the module is put into that this one is a part of
        return self

    def update(self, net: nn.Module) -> None:
        """Takes in the present weights of the net, which must be the one that was copied or its like."""
        share = self._share()
        with torch.no_grad():
            for own, parameter in zip(self.net.parameters(), net.parameters(), strict=True):
                if parameter.requires_grad:
                    own.lerp_(parameter, share)
                else:
                    own.copy_(parameter)
            for mean, buffer in zip(self.net.buffers(), net.buffers(), strict=True):
                if buffer.is_floating_point():
                    # The infinities of an attention's mask never change, and would give inf - inf.
                    mean.copy_(torch.where(mean == buffer, buffer, mean.lerp(buffer, share)))
                else:
                    mean.copy_(buffer)
            self.count += 1

    def _share(self) -> float:
        """Of the present weights in the new average."""
        done = int(self.count)
        if self._kind == "swa":
            return 1 / (done + 1)
        return 1 - min(self._decay, (1 + done) / (10 + done))
