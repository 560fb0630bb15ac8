"""The limits that Thaw is held against: what a net costs when nothing is done around it.

The spec's `mode` says which: `forward`, one pass of the net without its gradient over the packed pictures of training
and validation; `step`, training steps on one batch held in memory; `epochs`, training and validation passes over
tensors in memory, already normalised; `loader`, an epoch of Thaw's own training batches with nothing done to them;
`albumentations`, copies of the packed training pictures, one after another; `pack`, what copies cost the stage augment.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pipeline import machine, nets
from pipeline.data.store import Store
from shared import Clock, spec


def main() -> None:
    """Does what the spec says."""
    asked = spec()
    if getattr(asked, "keep_memory", False):
        machine.keep_memory()
    modes: dict[str, Callable[[SimpleNamespace], None]] = {
        "forward": forward,
        "step": step,
        "epochs": epochs,
        "loader": loader,
        "albumentations": albumentations,
        "pack": pack,
    }
    modes[asked.mode](asked)


def forward(asked: SimpleNamespace) -> None:
    """Reads, crops, normalises and sees every picture once, in batches, in the precision and format asked for."""
    store = Store(Path(asked.prepared))
    net = _net(asked, len(store.meta.classes)).eval()
    normalize = _normalizer(net)
    indices = np.concatenate([store.indices("train"), store.indices("val")])
    clock = Clock()
    with torch.inference_mode(), _autocast(asked):
        for start in range(0, len(indices), asked.batch):
            pixels = np.stack([_cropped(store[index], asked.px) for index in indices[start : start + asked.batch]])
            net(_formatted(normalize(_channels(torch.from_numpy(pixels).permute(0, 3, 1, 2), asked)), asked))
    clock.epoch(0.0)
    clock.tell(pictures=len(indices))


def step(asked: SimpleNamespace) -> None:
    """Steps of AdamW on one batch; the first ones are not counted."""
    net = _net(asked, asked.classes).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    pixels = _formatted(torch.randn(asked.batch, asked.in_chans, asked.px, asked.px), asked)
    labels = torch.randint(0, asked.classes, (asked.batch,))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, pixels, labels = net.to(device), pixels.to(device), labels.to(device)
    run = torch.compile(net) if asked.compile else net
    seconds = 0.0
    for number in range(asked.warm + asked.steps):
        if number == asked.warm:
            _wait(device)
            seconds = -time.monotonic()
        with _autocast(asked):
            loss = F.cross_entropy(run(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _wait(device)
    seconds += time.monotonic()
    clock = Clock()
    clock.epoch(0.0)
    clock.tell(rate=asked.batch * asked.steps / seconds)


def epochs(asked: SimpleNamespace) -> None:
    """Passes over training and validation tensors: shuffled by indexing, nothing augmented."""
    store = Store(Path(asked.prepared))
    net = _net(asked, len(store.meta.classes))
    normalize = _normalizer(net)
    splits = {}
    for split in ("train", "val"):
        indices = store.indices(split)
        pixels = torch.from_numpy(np.stack([_cropped(store[index], asked.px) for index in indices]))
        tensors = normalize(_channels(pixels.permute(0, 3, 1, 2), asked)), torch.from_numpy(store.labels[indices])
        splits[split] = (_formatted(tensors[0], asked), tensors[1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=asked.lr, fused=True)
    steps = -(-len(splits["train"][1]) // asked.batch) * asked.epochs
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, asked.lr, total_steps=steps)
    clock = Clock()
    for _ in range(asked.epochs):
        net.train()
        pixels, labels = splits["train"]
        for chosen in torch.randperm(len(labels)).split(asked.batch):
            with _autocast(asked):
                loss = F.cross_entropy(net(pixels[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        net.eval()
        pixels, labels = splits["val"]
        right = torch.zeros((), dtype=torch.int64)
        with torch.inference_mode(), _autocast(asked):
            for part, truth in zip(pixels.split(asked.batch), labels.split(asked.batch), strict=True):
                right += (net(part).argmax(1) == truth).sum()
        clock.epoch(int(right) / len(labels))
    clock.end()
    clock.tell()


def loader(asked: SimpleNamespace) -> None:
    """An epoch of training batches as Thaw's loader makes them in its own process; the first batch is not counted."""
    from pipeline import config
    from pipeline.data.datamodule import PictureData

    params = config.load(Path(asked.project) / "params.yaml")
    data = PictureData(
        Store(Path(asked.prepared)),
        px=params.px,
        in_chans=params.model.in_chans,
        batch_size=params.train.batch_size,
        chosen=params.train.transforms,
        seed=params.train.seed,
        workers=0,
    )
    batches = iter(data.train_dataloader())
    next(batches)
    clock = Clock()
    counted = sum(1 for _ in batches)
    clock.epoch(0.0)
    clock.tell(per_batch=clock.ends[0] / max(1, counted))


def albumentations(asked: SimpleNamespace) -> None:
    """Albumentations' own forms of the transforms, as its documentation composes them, on one core."""
    import albumentations as A
    import cv2

    own: dict[str, Callable[..., A.BasicTransform]] = {
        "rotate": lambda limit: A.Rotate(limit=(-limit, limit), border_mode=cv2.BORDER_REFLECT_101, p=0.5),
        "color_jitter": lambda: A.ColorJitter((0.8, 1.2), (0.8, 1.2), (0.8, 1.2), (0.0, 0.0), p=0.5),
        "gaussian_blur": lambda: A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
        "horizontal_flip": lambda: A.HorizontalFlip(p=0.5),
    }
    cv2.setNumThreads(0)
    store = Store(Path(asked.prepared))
    pictures = [np.array(store[index]) for index in store.indices("train") if not store.rows[index].copy]
    compose = A.Compose([own[name](**words) for name, words in asked.transforms.items()])
    compose(image=pictures[0])
    clock = Clock()
    for picture in pictures:
        for _ in range(asked.copies):
            compose(image=picture)
    clock.epoch(0.0)
    clock.tell(rate=len(pictures) * asked.copies / clock.ends[0])


def pack(asked: SimpleNamespace) -> None:
    """The stage augment with copies and without, in this process, whose imports are not counted."""
    from pipeline import config
    from pipeline.stages import augment

    os.chdir(asked.project)
    seconds = {}
    # The first one imports; the last one leaves the folder as it was.
    for name, copies in (("first", 0), ("copies", asked.copies), ("none", 0)):
        params = config.load(overrides={"augment.copies": copies})
        began = time.monotonic()
        augment.run(params)
        seconds[name] = time.monotonic() - began
    clock = Clock()
    clock.epoch(0.0)
    clock.tell(seconds=max(seconds["copies"] - seconds["none"], 1e-3))


def _net(asked: SimpleNamespace, classes: int) -> Any:
    torch.manual_seed(0)
    net = nets.build(asked.net, num_classes=classes, in_chans=asked.in_chans)
    return net.to(memory_format=torch.channels_last) if asked.channels_last else net


def _normalizer(net: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in nets.normalization(net, in_chans=_chans(net)))
    return lambda pixels: (pixels.float() / 255 - mean) / std


def _chans(net: Any) -> int:
    return int(net.pretrained_cfg["input_size"][0])


def _channels(pixels_BCHW: torch.Tensor, asked: SimpleNamespace) -> torch.Tensor:
    return pixels_BCHW.expand(-1, asked.in_chans, -1, -1)


def _cropped(picture: np.ndarray, px: int) -> np.ndarray:
    top, left = ((side - px) // 2 for side in picture.shape[:2])
    return picture[top : top + px, left : left + px]


def _formatted(pixels_BCHW: torch.Tensor, asked: SimpleNamespace) -> torch.Tensor:
    layout = torch.channels_last if asked.channels_last else torch.contiguous_format
    return pixels_BCHW.contiguous(memory_format=layout)


def _autocast(asked: SimpleNamespace) -> torch.autocast:
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=asked.bf16)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
