"""Frozen work done once: what a phase's frozen layers give for each picture is computed before it, and kept on disk.

A phase then trains what learns alone, on what is kept, in every epoch, in every run whose pictures, transform, frozen
weights and precision are the same ones.
"""

import hashlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipeline import machine, paths
from pipeline.data import draws, pixels, transforms, workers
from pipeline.data import store as store_module
from pipeline.data.datamodule import Pictures
from pipeline.data.features import CachedPictures, FeatureCache
from pipeline.data.store import Store
from pipeline.parameters import TrainParams
from pipeline.training import normalize, schedule
from pipeline.training.cut import CannotCutError, Cut
from pipeline.training.cut import find as find_cut
from pipeline.training.normalize import Normalize, resized
from pipeline.training.schedule import Phase

GB = 1e9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """What becomes of a phase's frozen layers."""

    cut: Cut | None
    """Where they end; None where they are run in every step."""
    told: str
    """For the schedule's table."""


def plans(phases: Sequence[Phase], net: nn.Module, *, params: TrainParams, in_chans: int, pictures: int) -> list[Plan]:
    """What becomes of the frozen layers of each phase; arguments as of `plan`."""
    return [plan(phase, net, params=params, in_chans=in_chans, pictures=pictures) for phase in phases]


def plan(
    phase: Phase,
    net: nn.Module,
    *,
    params: TrainParams,
    in_chans: int,
    pictures: int,
) -> Plan:
    """Whether a phase's frozen layers can be run once for each picture, and where they end.

    Args:
        net: may be on the meta device; what learns in it is the phase's afterwards.
        pictures: of training and validation together; 0 where that is not known.
    """
    schedule.thaw(net, phase.trainable)
    if all(parameter.requires_grad for parameter in net.parameters()):
        return Plan(None, "none")
    if reason := _reason(phase, net, params):
        return Plan(None, f"every step: {reason}")
    training = net.training
    try:
        net.train()
        schedule.set_mode(net)
        cut = find_cut(net, in_chans=in_chans, px=phase.px)
    except CannotCutError as error:
        return Plan(None, f"every step: {error}")
    finally:
        net.train(training)
    numbers = sum(int(np.prod(crossing.shape)) for crossing in cut.crossings)
    versions = phase.views if _augments(phase, params) else 1
    needed = numbers * DTYPES[params.cache].itemsize * pictures * versions / GB
    if needed > params.cache_gb:
        return Plan(None, f"every step: {needed:.3g} GB are more than train.cache_gb")
    return Plan(cut, f"once, {numbers:,} numbers a picture")


def _reason(phase: Phase, net: Any, params: TrainParams) -> str:
    """Why what a frozen layer gives for a picture is not the same each time, or must not be kept."""
    auxiliary = net.auxiliary_heads() if hasattr(net, "auxiliary_heads") else []
    reasons = {
        "train.cache is none": params.cache == "none",
        "fresh augmentation": _augments(phase, params) and not phase.views,
        "train.mixup": params.mixup > 0,
        "train.cutmix": params.cutmix > 0,
        "train.frozen_bn is adapt": params.frozen_bn == "adapt",
        "the teacher looks at pictures": params.teacher != str(paths.NO_WEIGHTS),
        "auxiliary classifiers learn": any(p.requires_grad for head in auxiliary for p in head.parameters()),
        "train.strategy is fsdp": params.strategy == "fsdp",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _augments(phase: Phase, params: TrainParams) -> bool:
    return bool(transforms.weakened(params.transforms, strength=phase.strength))


def computed(
    cut: Cut,
    net: nn.Module,
    store: Store,
    *,
    phase: Phase,
    params: TrainParams,
    px: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    processes: int,
) -> tuple[CachedPictures, CachedPictures]:
    """What stands in for the training pictures and for those of validation; computes what is not on disk yet.

    Args:
        net: with the weights that the phase begins with; goes to the device that trains.
        px: side of the pictures as they come, in pixels.
        processes: that train together, and share a batch.
    """
    work = _Work(cut, net, store, phase=phase, params=params, px=px, mean=mean, std=std, processes=processes)
    train, val = store.indices("train"), store.indices("val")
    if not _augments(phase, params):
        both = work.filled(np.concatenate([train, val]), chosen={}, views=1)
        return both, both
    versions = np.arange(phase.views)[:, None] * len(store)
    chosen = transforms.weakened(params.transforms, strength=phase.strength)
    return (
        work.filled((versions + train).ravel(), chosen=chosen, views=phase.views),
        work.filled(val, chosen={}, views=1),
    )


class _Work:
    """The frozen layers of one phase, at work."""

    def __init__(
        self,
        cut: Cut,
        net: nn.Module,
        store: Store,
        *,
        phase: Phase,
        params: TrainParams,
        px: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        processes: int,
    ) -> None:
        self._cut, self._store, self._phase, self._params = cut, store, phase, params
        self._px, self._mean, self._std = px, mean, std
        self._size = max(1, phase.batch_size // (phase.accumulate * processes))  # as a step has on one device
        self._device = machine.device(params.accelerator)
        net.to(self._device)
        if params.channels_last:
            net.to(memory_format=torch.channels_last)
        schedule.thaw(net, phase.trainable)
        net.train()
        schedule.set_mode(net)
        self._below = cut.below(net)
        self._normalize = Normalize(mean, std).to(self._device)

    def filled(self, rows: np.ndarray, *, chosen: Mapping[str, Mapping[str, Any]], views: int) -> CachedPictures:
        """The cache of pictures that are changed by the chosen transforms, with these rows in it."""
        cache = FeatureCache(
            paths.features(),
            facts=self._facts(chosen, views),
            shapes=[crossing.shape for crossing in self._cut.crossings],
            dtype=DTYPES[self._params.cache],
            rows=views * len(self._store),
            channels_last=self._params.channels_last,
        )
        began = time.monotonic()
        pictures = Pictures(
            self._store,
            px=self._px,
            in_chans=len(self._mean),
            seed=self._params.seed,
            chosen=chosen,
            views=views,
        )
        made = cache.fill(rows, lambda missing: self._made(pictures, missing), limit=self._params.cache_gb * GB)
        seconds = f" in {time.monotonic() - began:.1f} s" if made else ""
        print(
            f"{self._phase.name}: frozen layers computed for {made:,} pictures{seconds}, "
            f"found for {len(rows) - made:,}" + (f" ({views} versions of each)" if views > 1 else ""),
            flush=True,
        )
        return CachedPictures(cache, self._store.labels, views=views)

    def _made(self, pictures: Pictures, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Sequence[Tensor]]]:
        """The tensors that cross the cut, for a batch of rows at a time."""
        params = self._params
        pieces = [rows[start : start + self._size] for start in range(0, len(rows), self._size)]
        batches = [np.stack(np.divmod(piece, len(self._store)), axis=1) for piece in pieces]
        count = params.workers
        if count == "auto":
            count = workers.auto(
                lambda: pictures[batches[0]], batches=len(batches), processes=1, accelerated=self._device.type != "cpu"
            )
        pinned = self._device.type == "cuda"
        loader = DataLoader(pictures, sampler=batches, batch_size=None, num_workers=count, pin_memory=pinned)
        memory_format = torch.channels_last if params.channels_last else torch.contiguous_format
        reduced = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(params.precision)
        for piece, (pictures_BCHW, _) in zip(pieces, loader, strict=True):
            with torch.inference_mode(), torch.autocast(self._device.type, reduced, enabled=reduced is not None):
                prepared = self._normalize(resized(pictures_BCHW.to(self._device, non_blocking=True), self._phase.px))
                yield piece, self._below(prepared.contiguous(memory_format=memory_format))

    def _facts(self, chosen: Mapping[str, Mapping[str, Any]], views: int) -> dict[str, str]:
        return {
            "pictures": self._store.meta.sha256,
            "transform": f"{self._px} px, then {self._phase.px} px, mean {self._mean}, std {self._std}",
            "augmentation": f"{dict(chosen)}, {views} views, seed {self._params.seed}" if chosen else "none",
            "cut": _digest(self._cut.code.encode()),
            "weights": _weights_digest(self._below),
            "precision": self._params.precision,
            "device": self._device.type,
            "versions": f"torch {torch.__version__}, timm {timm.__version__}",
            "preparation": _preparation(),
        }


def _preparation() -> str:
    """What the pixels that the net sees follow from, beside the parameters: our code, and that of others."""
    makers = (draws, pixels, transforms, normalize, store_module, Pictures, _Work)
    ours = "".join(inspect.getsource(maker) for maker in makers)
    others = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("albumentations", "numpy", "opencv-python-headless")
    )
    return f"code {_digest(ours.encode())}, {others}"


def _weights_digest(below: nn.Module) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(below.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
