"""Kept numbers: there once, found again, never half-written, never more than the disk may hold."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data import features
from pipeline.data.features import FACTS, SUMS, CachedPictures, FeatureCache
from pipeline.errors import UserError

SHAPES = [(3, 2, 2), (5,)]
LIMIT = 1e9
Make = Callable[[np.ndarray], Iterator[tuple[np.ndarray, Sequence[torch.Tensor]]]]


def _cache(base: Path, *, rows: int = 20, dtype: torch.dtype = torch.float32, **facts: str) -> FeatureCache:
    return FeatureCache(base, facts={"net": "a", **facts}, shapes=SHAPES, dtype=dtype, rows=rows, channels_last=True)


def _numbers(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Of each row: others than of any other."""
    return tuple(
        torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(row))) for row in rows])
        for shape in SHAPES
    )


def _maker(asked: list[int], *, dies_after: int = 10**6) -> Make:
    def make(rows: np.ndarray) -> Iterator[tuple[np.ndarray, Sequence[torch.Tensor]]]:
        for piece in np.array_split(rows, max(1, len(rows) // 4)):
            if len(asked) >= dies_after:
                raise KeyboardInterrupt
            asked.extend(piece.tolist())
            yield piece, _numbers(piece)

    return make


def test_rows_come_back_as_they_were_and_are_made_once(tmp_path: Path) -> None:
    asked: list[int] = []
    wanted = np.array([7, 3, 11, 19, 0])
    assert _cache(tmp_path).fill(wanted, _maker(asked), limit=LIMIT) == 5
    assert _cache(tmp_path).fill(wanted, _maker(asked), limit=LIMIT) == 0
    assert _cache(tmp_path).fill(np.array([3, 4, 0, 5]), _maker(asked), limit=LIMIT) == 2
    assert sorted(asked) == [0, 3, 4, 5, 7, 11, 19]
    rows = np.array([19, 4, 7])
    found = _cache(tmp_path).read(rows)
    assert all(torch.equal(one, other) for one, other in zip(found, _numbers(rows), strict=True))
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_bf16_takes_half_the_disk_and_rounds(tmp_path: Path) -> None:
    rows = np.arange(20)
    caches = [_cache(tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    for cache in caches:
        cache.fill(rows, _maker([]), limit=LIMIT)
    assert caches[0].row_bytes == 2 * caches[1].row_bytes
    for found, exact in zip(caches[1].read(rows), _numbers(rows), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, exact.bfloat16())


def test_what_was_made_before_a_kill_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "NOTED_S", 0.0)
    asked: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        _cache(tmp_path).fill(np.arange(20), _maker(asked, dies_after=8), limit=LIMIT)
    assert len(asked) == 8
    assert _cache(tmp_path).fill(np.arange(20), _maker(asked), limit=LIMIT) == 12
    assert sorted(asked) == list(range(20))


def test_rows_are_not_there_before_they_are_noted(tmp_path: Path) -> None:
    asked: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        _cache(tmp_path).fill(np.arange(20), _maker(asked, dies_after=8), limit=LIMIT)
    assert not (_cache(tmp_path).folder / SUMS).exists()
    assert _cache(tmp_path).fill(np.arange(20), _maker(asked), limit=LIMIT) == 20


@pytest.mark.parametrize("name", ["1.bin", SUMS, FACTS])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 5)], ids=["lost", "cut off"])
def test_a_file_that_is_not_whole_is_made_again(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    cache = _cache(tmp_path)
    cache.fill(np.arange(20), _maker([]), limit=LIMIT)
    damage(cache.folder / name)
    again = _cache(tmp_path)
    assert again.fill(np.arange(20), _maker([]), limit=LIMIT) == (0 if name == FACTS and damage != Path.unlink else 20)
    assert all(
        torch.equal(found, right)
        for found, right in zip(again.read(np.arange(20)), _numbers(np.arange(20)), strict=True)
    )


def test_a_kill_after_a_loss_leaves_no_zeros(tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    cache.fill(np.arange(20), _maker([]), limit=LIMIT)
    (cache.folder / "0.bin").unlink()
    with pytest.raises(KeyboardInterrupt):
        _cache(tmp_path).fill(np.arange(20), _maker([], dies_after=8), limit=LIMIT)
    assert _cache(tmp_path).fill(np.arange(20), _maker([]), limit=LIMIT) == 12
    assert torch.equal(_cache(tmp_path).read(np.arange(20))[0], _numbers(np.arange(20))[0])


def test_rows_that_were_changed_in_place_are_made_again(tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    cache.fill(np.arange(20), _maker([]), limit=LIMIT)
    with (cache.folder / "1.bin").open("r+b") as file:
        file.seek(7 * 5 * 4)
        file.write(b"damage")
    asked: list[int] = []
    assert _cache(tmp_path).fill(np.arange(20), _maker(asked), limit=LIMIT) == 1
    assert asked == [7]


def test_other_facts_are_another_cache(tmp_path: Path) -> None:
    one, other = _cache(tmp_path, weights="1"), _cache(tmp_path, weights="2")
    one.fill(np.arange(4), _maker([]), limit=LIMIT)
    assert one.folder != other.folder
    assert other.fill(np.arange(4), _maker([]), limit=LIMIT) == 4
    assert _cache(tmp_path, weights="1").folder == one.folder


def test_the_longest_unused_makes_room_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_size", lambda _: 20 * _cache(tmp_path).row_bytes)
    caches = [_cache(tmp_path, weights=str(number)) for number in range(4)]
    rows = np.arange(20)
    limit = 3 * 20 * caches[0].row_bytes
    clock = iter(range(1, 100))
    utime = features.os.utime
    monkeypatch.setattr(features.os, "utime", lambda path: utime(path, times=(0, next(clock))))
    for cache in caches[:3]:
        cache.fill(rows, _maker([]), limit=limit)
    assert all(cache.folder.exists() for cache in caches[:3])
    assert caches[0].fill(rows, _maker([]), limit=limit) == 0  # used again: now 1 is the oldest
    caches[3].fill(rows, _maker([]), limit=limit)
    assert [cache.folder.exists() for cache in caches] == [True, False, True, True]


def test_a_lower_limit_holds_at_once(tmp_path: Path) -> None:
    one, other = _cache(tmp_path, weights="1"), _cache(tmp_path, weights="2")
    for cache in (one, other):
        cache.fill(np.arange(20), _maker([]), limit=LIMIT)
    assert other.fill(np.arange(20), _maker([]), limit=20 * other.row_bytes) == 0
    assert not one.folder.exists()


def test_rows_that_others_wanted_go_where_all_together_are_too_many(tmp_path: Path) -> None:
    cache, asked = _cache(tmp_path), list[int]()
    limit = 12 * cache.row_bytes
    cache.fill(np.arange(10), _maker([]), limit=limit)
    assert cache.fill(np.arange(8, 20), _maker(asked), limit=limit) == 12
    assert sorted(asked) == list(range(8, 20))
    assert np.count_nonzero(np.fromfile(cache.folder / SUMS, dtype=np.uint64)) == 12


def test_something_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "features").write_text("no folder")
    with pytest.raises(UserError, match=r"features must be a folder: something else is in its place; remove it$"):
        _cache(tmp_path / "features").fill(np.arange(2), _maker([]), limit=LIMIT)


def test_a_reader_reads_on_when_its_cache_makes_room(tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    cache.fill(np.arange(20), _maker([]), limit=LIMIT)
    cache.read(np.arange(2))
    _cache(tmp_path, weights="2").fill(np.arange(20), _maker([]), limit=1)
    assert not cache.folder.exists()
    assert torch.equal(cache.read(np.array([5]))[1], _numbers(np.array([5]))[1])


def test_what_the_disk_does_not_hold_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    cache = _cache(tmp_path)
    needed = 20 * cache.row_bytes
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match=r"GB left; free some, or set train.cache=none$"):
        cache.fill(np.arange(20), _maker(made), limit=LIMIT)
    assert made == []
    assert cache.fill(np.arange(19), _maker(made), limit=LIMIT) == 19
    assert cache.fill(np.arange(20), _maker(made), limit=LIMIT) == 1  # of which one is missing yet


def test_a_worker_gets_the_file_and_not_the_numbers(tmp_path: Path) -> None:
    cache = _cache(tmp_path, rows=2000)
    cache.fill(np.arange(2000), _maker([]), limit=LIMIT)
    cache.read(np.arange(2))
    sent = pickle.dumps(cache)
    assert len(sent) < 2000
    again: FeatureCache = pickle.loads(sent)
    assert again.folder == cache.folder
    assert torch.equal(again.read(np.array([1234]))[1], cache.read(np.array([1234]))[1])


def test_epochs_take_the_views_by_turns(tmp_path: Path) -> None:
    labels = np.array([2, 0, 1, 1], dtype=np.int64)
    cache = _cache(tmp_path, rows=12)
    cache.fill(np.arange(12), _maker([]), limit=LIMIT)
    pictures: Any = CachedPictures(cache, labels, views=3)
    for epoch in range(7):
        tensors, found = pictures[[(epoch, 3), (epoch, 0)]]
        assert found.tolist() == [1, 2]
        expected = _numbers(np.array([epoch % 3 * 4 + 3, epoch % 3 * 4]))
        assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))


FILLER = """
import sys, time
from pathlib import Path
import numpy as np, torch
from pipeline.data.features import FeatureCache
base, log = Path(sys.argv[1]), Path(sys.argv[2])
def make(rows):
    for row in rows:
        time.sleep(0.005)
        with log.open("a") as file:
            print(row, file=file)
        yield np.array([row]), [torch.full((1, 3), float(row))]
cache = FeatureCache(base, facts={"net": "a"}, shapes=[(3,)], dtype=torch.float32, rows=40, channels_last=False)
cache.fill(np.arange(40), make, limit=1e9)
assert cache.read(np.arange(40))[0][:, 2].tolist() == list(range(40))
"""


def test_processes_that_ask_together_make_each_row_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FILLER, str(tmp_path / "caches"), str(log)]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
    assert sorted(int(row) for row in log.read_text().split()) == list(range(40))


def test_a_cache_that_goes_while_room_is_made_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = _cache(tmp_path, weights="1")
    gone.fill(np.arange(20), _maker([]), limit=LIMIT)
    last_used = features._last_used

    def going(folder: Path) -> float:
        shutil.rmtree(folder)
        return last_used(folder)

    monkeypatch.setattr(features, "_last_used", going)
    assert _cache(tmp_path, weights="2").fill(np.arange(20), _maker([]), limit=LIMIT) == 20
