"""Batches: no augmentation repeats, and neither workers nor ranks change what a picture looks like."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import datamodule, store
from pipeline.data.datamodule import Batches, PictureData
from pipeline.data.store import Row, Store

PX = 8


@pytest.fixture
def packed(tmp_path: Path) -> Store:
    rng = np.random.default_rng(0)
    splits = ["train"] * 16 + ["val"] * 5 + ["test"] * 6
    rows = (
        (Row(f"{i}", split, i % 2, 0, PX, PX), rng.integers(0, 256, (PX, PX, 1), dtype=np.uint8))
        for i, split in enumerate(splits)
    )
    store.write(tmp_path, rows, dataset="tiny", classes=("a", "b"), px=PX, channels=1, skipped=[])
    return Store(tmp_path)


def _data(packed: Store, *, workers: int = 0, first_epoch: int = 0) -> PictureData:
    return PictureData(
        packed,
        px=PX,
        in_chans=3,
        batch_size=6,
        chosen={"gaussian_noise": {"p": 1.0}},
        seed=0,
        workers=workers,
        first_epoch=first_epoch,
    )


def _epoch(data: PictureData, epoch: int) -> list[torch.Tensor]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [pixels for pixels, _ in loader]


def test_a_batch_is_what_the_net_takes(packed: Store) -> None:
    pixels, labels = next(iter(_data(packed).train_dataloader()))
    assert (pixels.shape, pixels.dtype) == ((6, 3, PX, PX), torch.uint8)
    assert (labels.shape, labels.dtype) == ((6,), torch.int64)
    assert [len(batch) for batch in _epoch(_data(packed), 0)] == [6, 6, 4]


def test_no_augmentation_repeats_within_or_across_epochs(packed: Store) -> None:
    data = _data(packed)
    seen = [picture.numpy().tobytes() for epoch in range(3) for batch in _epoch(data, epoch) for picture in batch]
    assert len(seen) == 48
    assert len(set(seen)) == 48


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(packed: Store, workers: int) -> None:
    alone, helped = _epoch(_data(packed), 1), _epoch(_data(packed, workers=workers), 1)
    assert all(torch.equal(one, two) for one, two in zip(alone, helped, strict=True))


def test_a_later_phase_goes_on_where_the_earlier_one_stopped(packed: Store) -> None:
    assert torch.equal(_epoch(_data(packed, first_epoch=2), 0)[0], _epoch(_data(packed), 2)[0])


def test_validation_and_test_are_in_order_and_untouched(packed: Store) -> None:
    pixels = torch.cat([batch for batch, _ in _data(packed).val_dataloader()])
    expected = np.stack([packed[i] for i in packed.indices("val")])
    assert np.array_equal(pixels[:, :1].permute(0, 2, 3, 1).numpy(), expected)
    loader = datamodule.test_loader(packed, px=PX, in_chans=1, batch_size=4, workers=0)
    assert torch.cat([labels for _, labels in loader]).tolist() == packed.labels[packed.indices("test")].tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_batches_together_are_the_whole_batch(world: int) -> None:
    indices = np.arange(100, 120)
    whole = list(Batches(indices, batch_size=6, seed=3, shuffle=True))
    slices = [list(Batches(indices, batch_size=6, seed=3, shuffle=True, rank=r, world=world)) for r in range(world)]
    for number, batch in enumerate(whole):
        together = [pair for rank in range(world) for pair in slices[rank][number]]
        assert together[: len(batch)] == batch
        assert len({len(slices[rank][number]) for rank in range(world)}) == 1
    assert sorted(index for batch in whole for _, index in batch) == list(indices)


def test_the_order_changes_with_the_epoch_and_the_seed() -> None:
    batches = Batches(np.arange(50), batch_size=50, seed=0, shuffle=True)
    first = [index for _, index in next(iter(batches))]
    batches.set_epoch(1)
    second = [index for _, index in next(iter(batches))]
    other = [index for _, index in next(iter(Batches(np.arange(50), batch_size=50, seed=1, shuffle=True)))]
    assert first != second != other != first
