"""timm's own way of training, written from the documented settings of its train.py.

create_dataset and create_loader with train.py's defaults (random scale 0.08 to 1 if the spec says nothing else, flip,
colour jitter 0.4, random interpolation), label smoothing 0.1, create_optimizer_v2 and create_scheduler_v2 (cosine),
validation after each epoch. fp32 in the default memory format, as train.py is without --amp and --channels-last; a spec
with `fast` asks for these two (in bf16) and for --torchcompile. What differs from train.py's defaults: AdamW in place
of SGD, no warm-up, and the learning rate, batch, epochs and workers of the comparison.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn

from shared import Clock, build, freeze, normalization, num_classes, spec, test_top1


def main() -> None:
    """Trains as the spec says."""
    asked = spec()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    train, val = (create_dataset("", root=str(Path(asked.folder) / split), split=split) for split in ("train", "val"))
    net = build(asked.net, num_classes=num_classes(asked.folder), weights=asked.weights).to(device)
    mean, std = normalization(net)
    common: dict[str, Any] = {
        "input_size": (3, asked.px, asked.px),
        "batch_size": asked.batch,
        "mean": mean,
        "std": std,
        "num_workers": asked.workers,
        "persistent_workers": asked.workers > 0,
        "use_prefetcher": device.type == "cuda",
        "device": device,
    }
    whole: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    crops = {"scale": asked.crops} if asked.crops else whole
    random: dict[str, Any] = {"color_jitter": 0.4, "interpolation": "random", **crops}
    train_loader = create_loader(train, is_training=True, **random, **common)
    kept = 0.875 if asked.crops else 1.0
    val_loader = create_loader(val, is_training=False, interpolation="bilinear", crop_pct=kept, **common)
    if asked.fast:
        net.to(memory_format=torch.channels_last)
    if asked.frozen:
        net = freeze(net, batch_norms=asked.frozen_bn)
    run: Any = torch.compile(net) if asked.fast else net
    autocast = torch.autocast(device.type, torch.bfloat16) if asked.fast else nullcontext()
    optimizer = create_optimizer_v2(net, opt="adamw", lr=asked.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=asked.epochs, warmup_epochs=0, updates_per_epoch=len(train_loader)
    )
    smoothed = LabelSmoothingCrossEntropy(smoothing=0.1).to(device)
    clock, updates = Clock(stop_at=asked.stop_at), 0
    for epoch in range(asked.epochs):
        net.train()
        losses = AverageMeter()
        for cpu_pixels, cpu_labels in train_loader:
            pixels, labels = cpu_pixels.to(device), cpu_labels.to(device)
            if asked.fast:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            with autocast:
                loss = smoothed(run(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            losses.update(loss.item(), len(labels))
            scheduler.step_update(num_updates=updates, metric=losses.avg)
        clock.epoch(_validated(run, val_loader, device, autocast))
        scheduler.step(epoch + 1)
    clock.end()
    clock.tell(test=test_top1(net, net, asked))


@torch.inference_mode()
def _validated(net: nn.Module, loader: Any, device: torch.device, autocast: Any) -> float:
    """Top-1, as a share."""
    net.eval()
    top1 = AverageMeter()
    for cpu_pixels, cpu_labels in loader:
        pixels, labels = cpu_pixels.to(device), cpu_labels.to(device)
        with autocast:
            logits = net(pixels)
        top1.update(accuracy(logits, labels)[0].item(), len(labels))
    return float(top1.avg) / 100


if __name__ == "__main__":
    main()
