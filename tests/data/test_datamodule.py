"""Batches: no augmentation repeats, and neither workers nor ranks change what a picture looks like."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import datamodule, pixels, store
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


def _data(packed: Store, *, workers: int | str = 0, first_epoch: int = 0) -> PictureData:
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


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_batch_is_its_pictures_whether_their_shapes_are_alike_or_not(tmp_path: Path, in_chans: int) -> None:
    rng = np.random.default_rng(0)
    for name, shapes in {"alike": [(12, 10)] * 9, "photographs": [(10 + i % 4, 10 + i) for i in range(9)]}.items():
        for channels in (1, 3):
            folder = tmp_path / f"{name}{channels}"
            folder.mkdir()
            made = [rng.integers(0, 256, (*shape, channels), dtype=np.uint8) for shape in shapes]
            rows = (Row(f"{i}", "val", i, 0, *picture.shape[:2]) for i, picture in enumerate(made))
            about = {"dataset": "tiny", "classes": tuple("abcdefghi"), "px": 10, "channels": channels, "skipped": []}
            store.write(folder, zip(rows, made, strict=True), **about)
            chosen = [7, 0, 3, 3]
            batch, labels = datamodule.Pictures(Store(folder), px=PX, in_chans=in_chans)[[(0, i) for i in chosen]]
            assert labels.tolist() == chosen
            assert batch.shape == (4, in_chans, PX, PX)
            assert batch.is_contiguous(memory_format=torch.channels_last)
            for index, pixels_chw in zip(chosen, batch, strict=True):
                whole = pixels.center_crop(pixels.to_channels(made[index], in_chans), PX)
                assert np.array_equal(pixels_chw.permute(1, 2, 0), whole)


def test_a_picture_looks_the_same_in_any_batch(packed: Store) -> None:
    chain = {"random_resized_crop": {}, "shift": {}, "rotate": {}, "horizontal_flip": {}, "gaussian_noise": {}}
    pictures = datamodule.Pictures(packed, px=PX, in_chans=3, seed=4, chosen=chain)
    whole = pictures[[(epoch, index) for epoch in (0, 5) for index in range(16)]][0]
    for at in (0, 3, 17, 31):
        assert torch.equal(pictures[[(7, 2), (5 * (at // 16), at % 16)]][0][1], whole[at])
    assert len({picture.numpy().tobytes() for picture in whole}) == 32


def test_no_augmentation_repeats_within_or_across_epochs(packed: Store) -> None:
    data = _data(packed)
    seen = [picture.numpy().tobytes() for epoch in range(3) for batch in _epoch(data, epoch) for picture in batch]
    assert len(seen) == 48
    assert len(set(seen)) == 48


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(packed: Store, workers: int) -> None:
    alone, helped = _epoch(_data(packed), 1), _epoch(_data(packed, workers=workers), 1)
    assert all(torch.equal(one, two) for one, two in zip(alone, helped, strict=True))


def test_auto_decides_by_one_of_the_batches_and_moves_nothing_on(
    packed: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def auto(make: Callable[[], datamodule.Batch], **of: object) -> int:
        asked.append((make()[0], of))
        return 1

    monkeypatch.setattr(datamodule.workers, "auto", auto)
    loader = _data(packed, workers="auto").train_dataloader()
    assert loader.num_workers == 1
    loader.sampler.set_epoch(1)
    assert all(torch.equal(one, two) for (one, _), two in zip(loader, _epoch(_data(packed), 1), strict=True))
    ((batch, of),) = asked
    assert torch.equal(batch, _epoch(_data(packed), 0)[0])
    assert of == {"batches": 3, "processes": 1, "accelerated": False}


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
        together = np.concatenate([slices[rank][number] for rank in range(world)])
        assert np.array_equal(together[: len(batch)], batch)
        assert len({len(slices[rank][number]) for rank in range(world)}) == 1
    assert sorted(index for batch in whole for _, index in batch) == list(indices)


@pytest.mark.parametrize(("batch_size", "share"), [(8, 2), (16, 4), (4, 1)])
def test_the_last_parts_are_filled_up_to_two_pictures_where_whole_ones_have_them(batch_size: int, share: int) -> None:
    indices = np.arange(100, 100 + 2 * batch_size + 1)  # one left over
    ranks = [
        list(Batches(indices, batch_size=batch_size, rank=rank, world=2, parts=2, least=2, shuffle=True))
        for rank in range(2)
    ]
    assert [len(part) for parts in ranks for part in parts[:-2]] == [share] * 8
    last = [part for parts in ranks for part in parts[-2:]]
    assert [len(part) for part in last] == [min(2, share)] * 4
    assert len({index for part in last for _, index in part}) == 1


def test_no_picture_of_validation_counts_twice(packed: Store) -> None:
    # Five pictures in batches of 4, and of 2 where there are parts.
    for batch_size, parts in ((4, 1), (4, 2)):
        data = PictureData(packed, px=PX, in_chans=3, batch_size=batch_size, parts=parts, chosen={}, seed=0, workers=0)
        assert sum(len(labels) for _, labels in data.val_dataloader()) == 5


@pytest.mark.parametrize("world", [1, 2])
def test_the_parts_of_a_batch_together_are_the_batch(world: int) -> None:
    indices = np.arange(100, 121)
    whole = list(Batches(indices, batch_size=12, seed=3, shuffle=True))
    ranks = [
        list(Batches(indices, batch_size=12, seed=3, shuffle=True, rank=r, world=world, parts=3)) for r in range(world)
    ]
    for number, batch in enumerate(whole):
        pieces = [part for parts in ranks for part in parts[3 * number : 3 * number + 3]]
        assert np.array_equal(np.concatenate(pieces)[: len(batch)], batch)
        assert len({len(piece) for piece in pieces}) == 1  # so the mean of their means is the batch's mean


def test_balanced_epochs_show_every_class_as_often() -> None:
    labels = np.array([0] * 40 + [1] * 9 + [2] * 3)
    indices = np.arange(200, 252)
    batches = Batches(indices, batch_size=52, seed=0, shuffle=True, labels=labels)
    seen = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        drawn = np.array([index for _, index in next(iter(batches))])
        assert len(drawn) == 52
        counts = np.bincount(labels[drawn - 200], minlength=3)
        assert sorted(counts) == [17, 17, 18]
        repeats = np.unique(drawn, return_counts=True)[1]
        assert {labels[i - 200] for i, n in zip(np.unique(drawn), repeats, strict=True) if n > 1} == {1, 2}
        assert np.ptp(repeats[labels[np.unique(drawn) - 200] == 2]) <= 1
        seen.append(drawn.tolist())
    assert len({tuple(order) for order in seen}) == 3


def test_balanced_batches_of_the_ranks_together_are_the_whole_batch() -> None:
    labels = np.array([0] * 30 + [1] * 6)
    args = {"batch_size": 6, "seed": 3, "shuffle": True, "labels": labels}
    whole = list(Batches(np.arange(36), **args))
    slices = [list(Batches(np.arange(36), **args, rank=rank, world=2)) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([ranks[number] for ranks in slices]), batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_its_state_says(packed: Store, workers: int) -> None:
    whole = _epoch(_data(packed), 1)
    stopped = _data(packed, workers=workers).train_dataloader()
    stopped.sampler.set_epoch(1)
    batches = iter(stopped)
    for _ in range(2):
        next(batches)
    state = stopped.state_dict()
    assert state == {"epoch": 1, "batches": 2}
    resumed = _data(packed, workers=workers).train_dataloader()
    resumed.load_state_dict(state)
    rest = [pixels for pixels, _ in resumed]
    assert [torch.equal(one, two) for one, two in zip(rest, whole[2:], strict=True)] == [True]
    assert resumed.state_dict()["batches"] == 0
    resumed.sampler.set_epoch(2)
    assert all(torch.equal(a, b) for (a, _), b in zip(resumed, _epoch(_data(packed), 2), strict=True))


def test_strength_multiplies_the_rate_of_augmentation(packed: Store) -> None:
    def changed(strength: float) -> float:
        data = PictureData(
            packed,
            px=PX,
            in_chans=1,
            batch_size=16,
            chosen={"gaussian_noise": {"p": 0.8}},
            seed=0,
            workers=0,
            strength=strength,
        )
        loader = data.train_dataloader()
        flags = []
        for epoch in range(25):
            loader.sampler.set_epoch(epoch)
            order = [index for batch in loader.sampler for _, index in batch]
            for batch, _ in loader:
                flags += [not np.array_equal(p.permute(1, 2, 0), packed[i]) for p, i in zip(batch, order, strict=True)]
        return float(np.mean(flags))

    assert changed(0.0) == 0.0
    assert changed(0.5) == pytest.approx(0.4, abs=0.07)
    assert changed(1.0) == pytest.approx(0.8, abs=0.06)


def test_another_division_of_the_same_pictures(packed: Store) -> None:
    splits = tuple("val" if index < 4 else "train" for index in range(len(packed)))
    again = Store(packed.folder, splits=splits)
    assert again.counts() == {"train": 23, "val": 4, "test": 0}
    copied = pickle.loads(pickle.dumps(again))  # as a worker receives it
    assert copied.counts() == again.counts()


def test_the_order_changes_with_the_epoch_and_the_seed() -> None:
    batches = Batches(np.arange(50), batch_size=50, seed=0, shuffle=True)
    first = [index for _, index in next(iter(batches))]
    batches.set_epoch(1)
    second = [index for _, index in next(iter(batches))]
    other = [index for _, index in next(iter(Batches(np.arange(50), batch_size=50, seed=1, shuffle=True)))]
    assert first != second != other != first
