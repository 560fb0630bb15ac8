"""The batch-size finder: the largest batch that the device's memory holds in training."""

from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from pipeline.parameters import Config

SHARE = 0.8
"""Of the memory that is free: the rest is for what is not counted, such as the data and other programs."""
BACKWARD = 2.0
"""Times what is kept that the backward pass needs at its peak: 1.1 to 1.9 where it was measured, by the net."""
LIMIT = 65_536
"""Largest batch that is looked for, in pictures."""
PROBED = (4, 8)
"""Batches whose memory is measured where running out of it ends the process; two make a line."""


def run(config: Config) -> None:
    """Prints the largest batch for params.yaml's net on this device, and what train.accumulate it asks for.

    Everything learns in the measurement, as in the phase that needs most.
    """
    from pipeline import nets
    from pipeline.errors import blaming

    train, model = config.train, config.model
    cuda = train.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    with blaming("model.name"):
        net = nets.build(
            model.name,
            num_classes=10,
            in_chans=model.in_chans,
            drop_rate=model.drop_rate,
            drop_path_rate=model.drop_path_rate,
            stem=model.stem,
            recompute=model.recompute,
        )
        nets.check_px(net, config.px, name=model.name)
    net.to(device).train()
    step = partial(_step, net, px=config.px, in_chans=model.in_chans, mixed=train.precision != "32-true", device=device)
    largest = on_cuda(step) if cuda else on_cpu(net, step)
    print(f"{model.name} at {config.px} px, {train.precision}, on {device.type}: {_advice(largest, config)}")


def on_cuda(step: Callable[[int], Tensor], *, limit: int = LIMIT) -> int:
    """The largest batch whose step does not run out of memory: doubled until it does, then halved in between.

    Args:
        step: computes the loss of so many pictures; its backward pass is run here.
        limit: where the doubling ends.

    Returns:
        Pictures; 0 where not even one fits.
    """
    fits, fails, size = 0, limit + 1, 1
    while fails - fits > max(1, fits // 16):  # to a sixteenth: the last pictures change nothing
        if _fits(step, size):
            fits = size
        else:
            fails = size
        size = min(2 * fits, limit) if fails > limit else (fits + fails) // 2
        if size <= fits:
            break
    return fits


def on_cpu(net: nn.Module, step: Callable[[int], Tensor], *, available: int | None = None, limit: int = LIMIT) -> int:
    """The largest batch whose step should fit into free memory, from what two small ones keep for the backward pass.

    A processor's memory cannot be tried out: the operating system ends the process.

    Args:
        net: whose gradients and optimiser's state (two values a weight) are counted as well.
        step: computes the loss of so many pictures.
        available: bytes that are free; None for what the system says.
    """
    free = psutil.virtual_memory().available if available is None else available
    few, many = PROBED
    kept = [_kept(step, size) for size in PROBED]
    a_picture = max(1, BACKWARD * (kept[1] - kept[0]) / (many - few))
    # What a step keeps beside pictures (kernels, mostly) is among what the line starts with.
    fixed = max(0.0, 2 * kept[0] - kept[1]) + 3 * sum(p.numel() * p.element_size() for p in net.parameters())
    largest = int((SHARE * free - fixed) / a_picture)
    return max(0, min(limit, largest - largest % 8 if largest >= 8 else largest))


def _fits(step: Callable[[int], Tensor], size: int) -> bool:
    try:
        step(size).backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def _kept(step: Callable[[int], Tensor], size: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step(size)
    del loss
    return sum(storages.values())


def _step(net: Any, size: int, *, px: int, in_chans: int, mixed: bool, device: torch.device) -> Tensor:
    pixels = torch.rand(size, in_chans, px, px, device=device)
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        logits = net(pixels)
    return nn.functional.cross_entropy(logits.float(), labels)


def _advice(largest: int, config: Config) -> str:
    train = config.train
    part = train.batch_size // train.accumulate
    if largest == 0:
        return "not even one picture fits; lower train.px, or take a smaller net"
    held = f"a batch of {largest:,} pictures fits" if largest < LIMIT else f"{LIMIT:,} pictures and more fit"
    asked = f"train.batch_size {train.batch_size}" + (f" in {train.accumulate} parts" if train.accumulate > 1 else "")
    if part <= largest:
        return f"{held}, so {asked} does"
    parts = next(
        n for n in range(2, train.batch_size + 1) if train.batch_size % n == 0 and train.batch_size // n <= largest
    )
    return f"{held}; for {asked} set train.accumulate={parts}"
