"""Checkpoints are whole or not there, never run code, and a wish to stop waits for the right moment."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.checkpoints import BEFORE, LAST, Stop, load_weights, readable


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def _save(path: Path, number: int) -> None:
    torch.save({"state_dict": {"net.weight": torch.full((3,), float(number))}}, path)


def test_the_last_is_taken_and_the_one_before_where_the_last_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert readable(tmp_path) is None
    _save(tmp_path / BEFORE, 1)
    assert readable(tmp_path) == tmp_path / BEFORE  # a kill between two renames
    _save(tmp_path / LAST, 2)
    assert readable(tmp_path) == tmp_path / LAST
    whole = (tmp_path / LAST).read_bytes()
    for broken in (b"", whole[:50], whole[: len(whole) // 2], whole[:-1], b"nonsense"):
        (tmp_path / LAST).write_bytes(broken)
        assert readable(tmp_path) == tmp_path / BEFORE
        assert "last.ckpt cannot be read" in capsys.readouterr().err
    (tmp_path / BEFORE).write_bytes(b"")
    assert readable(tmp_path) is None


def test_a_checkpoint_that_would_run_code_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Evil()}, tmp_path / LAST)
    assert readable(tmp_path) is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("updates", "expected"), [(0, 1.0), (3, 2.0)])
def test_the_average_is_taken_once_there_is_one(updates: int, expected: float, tmp_path: Path) -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    state = {"net.weight": torch.ones(1, 1), "average.net.weight": torch.full((1, 1), 2.0)}
    torch.save({"state_dict": {**state, "average.count": torch.tensor(updates)}}, tmp_path / "best.ckpt")
    load_weights(net, tmp_path / "best.ckpt")
    assert net.weight.item() == expected


def test_a_signal_waits_until_it_is_obeyed_and_a_second_does_not() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        stop = Stop()
        stop.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == signal.SIGTERM
        assert heard == []
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 143
        assert heard == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)  # the handler of before is back
        assert heard == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)
