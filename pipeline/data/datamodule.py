"""Batches from the packed store, the same whatever the number of workers or ranks.

A sampler's item is a whole batch: (epoch, index) pairs, int64 [B, 2]. The epoch travels with the index, so the random
version of a picture depends on (seed, epoch, index) alone and never on which process makes it. The training loader
tells how far it is and goes on from there, so that a training stopped in mid-epoch sees the rest of that epoch.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.data import draws, pixels, transforms, workers
from pipeline.data.features import CachedPictures
from pipeline.data.store import Store

Batch = tuple[torch.Tensor, torch.Tensor]
"""Pictures uint8 [B, C, H, W] and labels int64 [B]."""


class Batches(Sampler[np.ndarray]):
    """The batches of one epoch, as this rank sees them.

    A global batch is cut into equal slices, one a rank, and each into `parts`, which are batches of their own; a last
    batch that does not divide is filled up from its own start, so that every rank makes the same number of steps with
    the same number of pictures.

    Args:
        least: pictures that a part of the last batch is filled up to, where a whole part has as many. A batch norm
            learns from no single picture where its map is one pixel large, so training takes 2.
        labels: of `indices`, for epochs that are balanced: as many pictures in all, every class as often (a picture
            twice only where its class has no other left); None for each picture once.
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
        parts: int = 1,
        least: int = 1,
        labels: np.ndarray | None = None,
    ) -> None:
        assert batch_size % (world * parts) == 0, (batch_size, world, parts)
        self._least = min(least, batch_size // (world * parts))
        self._indices, self._batch_size, self._seed, self._shuffle = indices, batch_size, seed, shuffle
        self._rank, self._world, self._parts, self._labels = rank, world, parts, labels
        self._first_epoch = 0
        self.epoch = 0
        self.skip = 0
        """Batches that the next pass leaves out at its beginning."""

    def start_at(self, first_epoch: int, *, done: int = 0) -> None:
        """Epochs count on across phases, so that no phase repeats another's order or augmentation.

        Args:
            first_epoch: of the phase.
            done: epochs of the phase that are over.
        """
        self._first_epoch, self.epoch = first_epoch, first_epoch + done

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning with the epoch within the phase."""
        self.epoch = self._first_epoch + epoch

    def __len__(self) -> int:
        return -(-len(self._indices) // self._batch_size) * self._parts

    def example(self) -> np.ndarray:
        """The first batch of the epoch, whatever is left out; iterating goes on from where it was."""
        return next(self._all())

    def __iter__(self) -> Iterator[np.ndarray]:
        # With the first batch and not before: a DataLoader with workers makes two iterators and uses one.
        skip, self.skip = self.skip, 0
        yield from islice(self._all(), skip, None)

    def _all(self) -> Iterator[np.ndarray]:
        order = self._order()
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            pieces = self._world * self._parts
            share = max(self._least, -(-len(batch) // pieces))
            filled = np.resize(batch, share * pieces)
            for part in range(self._rank * self._parts, (self._rank + 1) * self._parts):
                mine = filled[part * share : (part + 1) * share]
                yield np.stack([np.full_like(mine, self.epoch), mine], axis=1)

    def _order(self) -> np.ndarray:
        if not self._shuffle:
            return self._indices
        draw = np.random.default_rng((self._seed, self.epoch))
        if self._labels is None:
            return draw.permutation(self._indices)
        classes = draw.permutation(np.unique(self._labels))
        shares = np.full(len(classes), len(self._indices) // len(classes))
        shares[: len(self._indices) % len(classes)] += 1
        return draw.permutation(
            np.concatenate([self._drawn(draw, label, share) for label, share in zip(classes, shares, strict=True)])
        )

    def _drawn(self, draw: np.random.Generator, label: int, share: int) -> np.ndarray:
        mine = self._indices[self._labels == label]
        rounds = [draw.permutation(mine) for _ in range(-(-share // len(mine)))]
        return np.concatenate(rounds)[:share] if rounds else mine[:0]


class Pictures(Dataset[Batch]):
    """Whole batches by their (epoch, index) pairs: augmented where transforms are given, else centre-cropped.

    The pixels lie in memory as [B, H, W, C], which torch calls channels-last.

    Args:
        views: augmented versions of each picture, which epochs take by turns; 0 for a fresh one every epoch.
    """

    def __init__(
        self,
        store: Store,
        *,
        px: int,
        in_chans: int,
        seed: int = 0,
        chosen: Mapping[str, Mapping[str, Any]] | None = None,
        views: int = 0,
    ) -> None:
        self._store, self._px, self._in_chans, self._seed, self._views = store, px, in_chans, seed, views
        self._augment = transforms.Augmenter(chosen, px=px) if chosen else None

    def __getitem__(self, batch: Sequence[tuple[int, int]] | np.ndarray) -> Batch:
        epochs, indices = np.asarray(batch, dtype=np.int64).T
        pictures = self._store.gather(indices)
        if isinstance(pictures, np.ndarray):
            pictures = pixels.to_channels(pictures, self._in_chans)
        else:
            pictures = [pixels.to_channels(picture, self._in_chans) for picture in pictures]
        if self._augment is None:
            made = pixels.center_crops(pictures, self._px)
        else:
            epochs = epochs % self._views if self._views else epochs
            versions = self._augment(pictures, keys=draws.keys(self._seed, epochs, indices))
            assert isinstance(versions, np.ndarray)  # squares, every one
            made = versions
        return torch.from_numpy(made).permute(0, 3, 1, 2), torch.from_numpy(self._store.labels[indices])


class TrainLoader(DataLoader[Batch]):
    """Tells how many batches of which epoch it has handed out, and goes on from there: Lightning keeps its state."""

    _handed_out = 0

    def state_dict(self) -> dict[str, int]:
        # After an epoch's last batch, the place is the beginning of the next one.
        return {"epoch": self._batches.epoch + (self._handed_out == 0), "batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # Now, and not when Lightning says the epoch: workers begin with the next batches before that.
        self._batches.epoch, self._batches.skip = state["epoch"], state["batches"]
        self._handed_out = state["batches"]

    def __iter__(self) -> Any:
        self._handed_out = self._batches.skip
        return self._counted(super().__iter__())

    @property
    def _batches(self) -> Batches:
        assert isinstance(self.sampler, Batches)
        return self.sampler

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._handed_out = (self._handed_out + 1) % len(self)
            yield batch


class PictureData(L.LightningDataModule):
    """Training and validation batches of a packed store.

    Args:
        px: side of the square that the net sees, in pixels.
        batch_size: pictures per optimiser step over all ranks.
        parts: batches that one optimiser step is computed in.
        chosen: online augmentation, transforms by name; `strength` multiplies their probabilities.
        balanced: every class as often in an epoch.
        views: augmented versions of each picture; 0 for a fresh one every epoch.
        workers: processes that load batches, 0 for this one; auto for what the machine and the work call for.
        first_epoch: epochs trained before, in earlier phases.
        cached: what stands in for the training pictures and for those of validation.
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
        workers: int | Literal["auto"],
        parts: int = 1,
        strength: float = 1.0,
        balanced: bool = False,
        views: int = 0,
        first_epoch: int = 0,
        cached: tuple[CachedPictures, CachedPictures] | None = None,
    ) -> None:
        super().__init__()
        self._store, self._batch_size, self._parts = store, batch_size, parts
        self._seed, self._workers, self._balanced = seed, workers, balanced
        self._first_epoch = first_epoch
        weaker = transforms.weakened(chosen, strength=strength)
        self._training: Dataset[Any] = Pictures(store, px=px, in_chans=in_chans, seed=seed, chosen=weaker, views=views)
        self._plain: Dataset[Any] = Pictures(store, px=px, in_chans=in_chans)
        if cached is not None:
            self._training, self._plain = cached
            self._workers = 0  # reading them is less work than handing them over

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world = self._place()
        indices = self._store.indices("train")
        batches = Batches(
            indices,
            batch_size=self._batch_size,
            seed=self._seed,
            shuffle=True,
            rank=rank,
            world=world,
            parts=self._parts,
            least=2,
            labels=self._store.labels[indices] if self._balanced else None,
        )
        # Lightning asks for this loader after it has read a checkpoint, but says the epoch only after the workers have
        # begun with its first batches; and a checkpoint of an epoch's end brings the loader no state.
        progress: Any = self.trainer.fit_loop.epoch_progress.current if self.trainer else None
        batches.start_at(self._first_epoch, done=0 if progress is None else progress.processed)
        return self._loader(TrainLoader, self._training, batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        rank, world = self._place()
        indices = self._store.indices("val")
        batches = Batches(indices[rank::world], batch_size=max(1, self._batch_size // (world * self._parts)))
        return self._loader(DataLoader, self._plain, batches)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _device_type(self) -> str:
        return str(self.trainer.strategy.root_device.type) if self.trainer else "cpu"

    def _loader(self, kind: type[DataLoader[Batch]], pictures: Dataset[Any], batches: Batches) -> DataLoader[Batch]:
        count = self._fitting(pictures, batches) if self._workers == "auto" else self._workers
        return kind(
            pictures,
            sampler=batches,
            batch_size=None,
            num_workers=count,
            pin_memory=self._device_type() == "cuda",
            persistent_workers=count > 0,
        )

    def _fitting(self, pictures: Dataset[Any], batches: Batches) -> int:
        """Workers by a batch that is made to time it: one of the sampler's, which stays where it is."""
        return workers.auto(
            lambda: pictures[batches.example()],
            batches=len(batches),
            processes=int(os.environ.get("LOCAL_WORLD_SIZE", self._place()[1])),
            accelerated=self._device_type() != "cpu",
        )


def test_loader(store: Store, *, px: int, in_chans: int, batch_size: int, workers: int) -> DataLoader[Batch]:
    """The test split in the manifest's order, for one device."""
    batches = Batches(store.indices("test"), batch_size=batch_size)
    return DataLoader(
        Pictures(store, px=px, in_chans=in_chans),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
