"""Batches from the packed store, the same whatever the number of workers or ranks.

A sampler's item is a whole batch: a list of (epoch, index) pairs. The epoch travels with the index, so the random
version of a picture depends on (seed, epoch, index) alone and never on which process makes it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.data import transforms
from pipeline.data.store import Store
from pipeline.errors import UserError

Batch = tuple[torch.Tensor, torch.Tensor]
"""Pictures uint8 [B, C, H, W] and labels int64 [B]."""


class Batches(Sampler[list[tuple[int, int]]]):
    """The batches of one epoch, as this rank sees them.

    A global batch is cut into equal slices, one a rank; a last batch that does not divide is filled up from its own
    start, so that every rank makes the same number of steps with the same number of pictures.
    """

    def __init__(
        self,
        indices: np.ndarray,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert batch_size % world == 0, (batch_size, world)
        self._indices, self._batch_size, self._seed, self._shuffle = indices, batch_size, seed, shuffle
        self._rank, self._world = rank, world
        self._first_epoch = 0
        self._epoch = 0

    def start_at(self, epoch: int) -> None:
        """Epochs count on across phases, so that no phase repeats another's order or augmentation."""
        self._first_epoch = self._epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning with the epoch within the phase."""
        self._epoch = self._first_epoch + epoch

    def __len__(self) -> int:
        return -(-len(self._indices) // self._batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self._indices
        if self._shuffle:
            order = np.random.default_rng((self._seed, self._epoch)).permutation(order)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            share = -(-len(batch) // self._world)
            mine = np.resize(batch, share * self._world)[self._rank * share : (self._rank + 1) * share]
            yield [(self._epoch, int(index)) for index in mine]


class Pictures(Dataset[Batch]):
    """Whole batches by their list of (epoch, index): augmented where transforms are given, else centre-cropped."""

    def __init__(
        self,
        store: Store,
        *,
        px: int,
        in_chans: int,
        seed: int = 0,
        chosen: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._store, self._px, self._in_chans, self._seed = store, px, in_chans, seed
        self._augment = transforms.Augmenter(chosen, px=px) if chosen else None

    def __getitem__(self, batch: list[tuple[int, int]]) -> Batch:
        pictures = np.stack([self._one(epoch, index) for epoch, index in batch])
        labels = self._store.labels[[index for _, index in batch]]
        return torch.from_numpy(pictures).permute(0, 3, 1, 2), torch.from_numpy(labels)

    def _one(self, epoch: int, index: int) -> np.ndarray:
        picture = transforms.to_channels(self._store[index], self._in_chans)
        if self._augment is None:
            return transforms.center_crop(picture, self._px)
        return self._augment(picture, seed=(self._seed, epoch, index))


class PictureData(L.LightningDataModule):
    """Training, validation and test batches of a packed store.

    Args:
        px: side of the square that the net sees, in pixels.
        batch_size: pictures per optimiser step over all ranks.
        chosen: online augmentation, transforms by name.
        first_epoch: epochs trained before, in earlier phases.
    """

    def __init__(
        self,
        store: Store,
        *,
        px: int,
        in_chans: int,
        batch_size: int,
        chosen: Mapping[str, Mapping[str, Any]],
        seed: int,
        workers: int,
        first_epoch: int = 0,
    ) -> None:
        super().__init__()
        self._store, self._batch_size, self._seed, self._workers = store, batch_size, seed, workers
        self._first_epoch = first_epoch
        self._training = Pictures(store, px=px, in_chans=in_chans, seed=seed, chosen=chosen)
        self._plain = Pictures(store, px=px, in_chans=in_chans)

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world = self._place()
        if self._batch_size % world:
            raise UserError(
                f"train.batch_size {self._batch_size} is shared by {world} processes and does not divide; "
                f"use {self._batch_size // world * world or world}"
            )
        batches = Batches(
            self._store.indices("train"),
            batch_size=self._batch_size,
            seed=self._seed,
            shuffle=True,
            rank=rank,
            world=world,
        )
        batches.start_at(self._first_epoch)
        return self._loader(self._training, batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        rank, world = self._place()
        indices = self._store.indices("val")
        if len(indices) < world:
            raise UserError(f"{len(indices)} validation pictures for {world} processes; raise augment.val_fraction")
        mine = indices[rank::world]
        return self._loader(self._plain, Batches(mine, batch_size=max(1, self._batch_size // world)))

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, pictures: Pictures, batches: Batches) -> DataLoader[Batch]:
        return DataLoader(
            pictures,
            sampler=batches,
            batch_size=None,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self._workers > 0,
        )


def test_loader(store: Store, *, px: int, in_chans: int, batch_size: int, workers: int) -> DataLoader[Batch]:
    """The test split in the manifest's order, for one device."""
    batches = Batches(store.indices("test"), batch_size=batch_size)
    return DataLoader(Pictures(store, px=px, in_chans=in_chans), sampler=batches, batch_size=None, num_workers=workers)
