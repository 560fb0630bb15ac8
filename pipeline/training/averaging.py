"""Averages of a net's weights over the course of training, which are often better than the last weights."""

from collections.abc import Sequence
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
        self._updates = 0
        self.register_load_state_dict_post_hook(_recount)  # type: ignore[no-untyped-call]
        self.eval()

    @property
    def updates(self) -> int:
        """How many there have been: `count`, without asking the device."""
        return self._updates

    def train(self, mode: bool = True) -> "Average":
        super().train(mode)
        self.net.eval()  # whatever the module is put into that this one is a part of
        return self

    def update(self, net: nn.Module) -> None:
        """Takes in the present weights of the net, which must be the one that was copied or its like."""
        parameters: list[tuple[Tensor, Tensor]] = list(zip(self.net.parameters(), net.parameters(), strict=True))
        buffers = list(zip(self.net.buffers(), net.buffers(), strict=True))
        learning = [pair for pair in parameters if pair[1].requires_grad]
        moving = [pair for pair in buffers if pair[1].is_floating_point()]
        copied = [pair for pair in parameters if not pair[1].requires_grad]
        copied += [pair for pair in buffers if not pair[1].is_floating_point()]
        share = self._share()
        # All at once: a net has hundreds of tensors, and a small one's step is over before each had its call.
        with torch.no_grad():
            if learning:
                own, present = _split(learning)
                torch._foreach_lerp_(own, present, share)
            if moving:
                own, present = _split(moving)
                mean, now = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (own, present))
                # The infinities of an attention's mask never change, and would give inf - inf; nor does a zero's sign.
                mixed = torch.where(mean == now, now, mean.lerp(now, share))
                parts = torch.split_with_sizes(mixed, [buffer.numel() for buffer in own])
                torch._foreach_copy_(own, [part.view(b.shape) for part, b in zip(parts, own, strict=True)])
            if copied:
                torch._foreach_copy_(*_split(copied))
            self.count += 1
        self._updates += 1

    def _share(self) -> float:
        """Of the present weights in the new average."""
        done = self._updates
        if self._kind == "swa":
            return 1 / (done + 1)
        return 1 - min(self._decay, (1 + done) / (10 + done))


def _recount(average: Average, _: object) -> None:
    average._updates = int(average.count)


def _split(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [own for own, _ in pairs], [present for _, present in pairs]
