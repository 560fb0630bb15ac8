"""`python -m pipeline batch-size`: the largest batch that this machine's memory holds, and what params.yaml asks for.

A CUDA device says when it is full, so there batches are tried. A processor's memory does not: the kernel ends the
process. There, what the forward pass keeps for the backward pass is counted on two small batches, and a line through
them is followed.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import nets, paths
from pipeline.data.store import Store
from pipeline.errors import blaming
from pipeline.parameters import Config
from pipeline.training import optim, schedule

LIMIT = 65536
"""Pictures beyond which no batch is looked for."""
SMALL = (2, 4)
"""Batches that are measured; a batch norm takes no batch of 1."""
SHARE = 0.5
"""Of the free memory that a processor's batch may fill: its peak was 1.0 to 1.1 times what is kept, and up to 1.5 times
where cheap layers are computed again, by the allocator's gaps, which take a fifth more where freed memory stays with
the process; loaders and trackers need some as well."""
GB = 1e9
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_CLASSES = 1000
"""Of the net, while no dataset is prepared."""


def run(config: Config) -> None:
    """Prints the largest batch on this device, all weights learning, and whether what params.yaml asks for fits."""
    train, model = config.train, config.model
    prepared = paths.prepared(config.data.name)
    classes = len(Store(prepared).meta.classes) if prepared.exists() else _CLASSES
    with blaming("model.name"):
        net = nets.build(
            model.name,
            num_classes=classes,
            in_chans=model.in_chans,
            drop_rate=model.drop_rate,
            drop_path_rate=model.drop_path_rate,
            stem=model.stem,
            recompute=model.recompute,
        )
    with blaming("train.phases"):
        phases = schedule.plan(train, net, px=config.px, random_start=False)
    px = max(phase.px for phase in phases)
    with blaming("model.name"):
        nets.check_px(net, px, name=model.name)
    with blaming("train.optimizer"):
        optim.check_optimizer(train.optimizer)
    cuda = train.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    training = Training(
        net,
        device=torch.device("cuda" if cuda else "cpu"),
        in_chans=model.in_chans,
        px=px,
        precision=train.precision,
        channels_last=train.channels_last,
        optimizer=train.optimizer,
        averaged=train.average != "none",
    )
    largest, memory = _measured(training)
    print(
        f"{model.name} at {px} px, {train.precision}, all weights learning, in {memory}: {largest} pictures at a time"
    )
    devices = (torch.cuda.device_count() if cuda else 1) if train.devices == "auto" else train.devices
    asked = {}
    for phase in phases:
        own = (phase.batch_size, phase.accumulate) != (train.batch_size, train.accumulate)
        asked[f"train.phases.{phase.name}" if own else "train"] = phase
    for where, phase in asked.items():
        print(
            verdict(
                where,
                batch_size=phase.batch_size,
                accumulate=phase.accumulate,
                devices=devices * train.num_nodes,
                largest=largest,
            )
        )


def verdict(where: str, *, batch_size: int, accumulate: int, devices: int, largest: int) -> str:
    """One line: whether a batch fits in the parts that it is computed in, and if not, how many parts it takes.

    Args:
        where: the section of params.yaml that has the batch's size.
        batch_size: pictures per optimiser step, over all devices.
        largest: pictures that a device holds at a time.
    """
    name = f"{where}.batch_size {batch_size}"
    if largest == 0:
        return f"{name} does not fit, nor does any other; lower train.px, or take a smaller net"
    least = math.ceil(batch_size / (devices * largest))
    if least <= accumulate:
        fewer = f", and {where}.accumulate={least} would do" if least < accumulate else ""
        return f"{name} fits; up to {largest * devices * accumulate} would{fewer}"
    whole = (parts for parts in range(least, batch_size + 1) if batch_size % (devices * parts) == 0)
    parts = next(whole, 0)
    if not parts:
        return f"{name} does not fit; set {where}.batch_size={largest * devices * accumulate}"
    return f"{name} does not fit; set {where}.accumulate={parts}"


def on_cuda(step: Callable[[int], None], *, start: int = SMALL[0], limit: int = LIMIT) -> int:
    """The largest round batch for which a training step does not run out of memory; 0 where `start` does.

    Args:
        step: trains on so many pictures; raises torch.OutOfMemoryError where they are too many.
        start: the first batch; doubled until one is too large, then the gap is halved.
        limit: the largest batch that is tried.
    """
    fits, size = 0, start
    while size <= limit and _runs(step, size):
        fits, size = size, 2 * size
    fails = min(size, limit + 1)
    while fits and fails - fits > 1:
        middle = (fits + fails) // 2
        if _runs(step, middle):
            fits = middle
        else:
            fails = middle
    return _rounded(fits)


def on_cpu(kept: Callable[[int], int], *, available: int, limit: int = LIMIT) -> int:
    """The largest round batch whose forward pass fits into a safe share of the memory; 0 where not even one picture's.

    Args:
        kept: bytes that the forward pass of so many pictures keeps.
        available: bytes that are free.
        limit: the largest batch that is given.
    """
    few, more = (kept(size) for size in SMALL)
    each = (more - few) / (SMALL[1] - SMALL[0])
    fixed = few - each * SMALL[0]
    return _rounded(min(limit, max(0, int((SHARE * available - fixed) / each))))


def bytes_kept(forward: Callable[[], Tensor], net: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, the net's own tensors left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad  # held until here: what is kept has not been let go, and no address used again
    return sum(storages.values())


class Training:
    """Steps of a training on empty pictures.

    Args:
        net: all of it learns.
        in_chans, px: of the pictures.
        precision: Lightning's.
        optimizer: timm's name.
        averaged: whether there is an average of the weights beside them.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        device: torch.device,
        in_chans: int,
        px: int,
        precision: str,
        channels_last: bool,
        optimizer: str,
        averaged: bool,
    ) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.net: Any = net.to(device=device, memory_format=self._format).train()  # type: ignore[call-overload]
        self.device = device
        self._shape, self._dtype = (in_chans, px, px), _AUTOCAST.get(precision)
        self._optimizer = optim.optimizer(net, name=optimizer, lr=1e-6, weight_decay=0.0, layer_decay=1.0)
        self._average = deepcopy(net) if averaged else None

    def loss(self, size: int) -> Tensor:
        """Cross-entropy of a batch of so many pictures, auxiliary classifiers' included."""
        pixels = torch.zeros(size, *self._shape, device=self.device).contiguous(memory_format=self._format)
        labels = torch.zeros(size, dtype=torch.long, device=self.device)
        auxiliary = hasattr(self.net, "auxiliary_heads") and self.net.auxiliary_heads()
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            logits = self.net.forward_with_auxiliary(pixels) if auxiliary else (self.net(pixels),)
            return torch.stack([F.cross_entropy(each, labels) for each in logits]).sum()

    def step(self, size: int) -> None:
        """A whole step; afterwards gradients and the optimiser's state are there."""
        self._optimizer.zero_grad()
        self.loss(size).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def kept(self, size: int) -> int:
        """Bytes that the forward pass of so many pictures keeps."""
        return bytes_kept(lambda: self.loss(size), self.net)


def _measured(training: Training) -> tuple[int, str]:
    """The largest batch, and the memory that it was found in."""
    training.step(SMALL[0])  # what follows is beside gradients and the optimiser's state
    if training.device.type == "cuda":
        properties = torch.cuda.get_device_properties(training.device)
        return on_cuda(training.step), f"{properties.name}'s {properties.total_memory / GB:.1f} GB"
    available = psutil.virtual_memory().available
    return on_cpu(training.kept, available=available), f"{SHARE:.0%} of the {available / GB:.1f} GB that are free"


def _runs(step: Callable[[int], None], size: int) -> bool:
    try:
        step(size)
        runs = True
    except torch.OutOfMemoryError:
        runs = False
    torch.cuda.empty_cache()  # out here, where the error no longer holds the step's tensors
    return runs


def _rounded(size: int) -> int:
    """Down to a multiple of 8, which matrix units like, or below that to a power of two."""
    return size // 8 * 8 if size >= 8 else 2 ** int(math.log2(size)) if size else 0
