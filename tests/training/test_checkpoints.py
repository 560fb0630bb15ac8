"""Checkpoints are whole or not there, never run code, and a wish to stop waits for the right moment."""

import errno
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.training.checkpoints import BEFORE, BEST, LAST, Stop, Straight, _put_in_place, load_weights, taken_up


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def _save(path: Path, number: int) -> None:
    torch.save({"state_dict": {"net.weight": torch.full((3,), float(number))}}, path)


def test_the_last_is_taken_and_the_one_before_where_the_last_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert taken_up(tmp_path, leader=True) is None
    _save(tmp_path / BEFORE, 1)
    assert taken_up(tmp_path, leader=True) == tmp_path / BEFORE  # a kill between two renames
    _save(tmp_path / LAST, 2)
    assert taken_up(tmp_path, leader=True) == tmp_path / LAST
    assert capsys.readouterr().err == ""
    whole = (tmp_path / LAST).read_bytes()
    for broken in (b"", whole[:50], whole[: len(whole) // 2], whole[:-1], b"nonsense"):
        (tmp_path / LAST).write_bytes(broken)
        assert taken_up(tmp_path, leader=False) == tmp_path / BEFORE
        assert capsys.readouterr().err == ""
        assert taken_up(tmp_path, leader=True) == tmp_path / BEFORE
        told = f"WARNING: {tmp_path / LAST} cannot be read (cut short, damaged, or not written by Thaw)"
        assert capsys.readouterr().err == f"{told}; the one before is taken\n"
    (tmp_path / BEFORE).write_bytes(b"")
    assert taken_up(tmp_path, leader=True) is None
    assert f"{BEFORE} cannot be read" in capsys.readouterr().err


def test_a_broken_last_does_not_push_the_one_before_out_of_its_place(tmp_path: Path) -> None:
    _save(tmp_path / BEFORE, 1)
    (tmp_path / LAST).write_bytes(b"broken")
    assert taken_up(tmp_path, leader=True) == tmp_path / BEFORE
    _save(tmp_path / "beside", 3)
    _put_in_place(tmp_path / "beside", best=False)
    (tmp_path / LAST).write_bytes(b"broken again")
    assert taken_up(tmp_path, leader=True) == tmp_path / BEFORE
    assert torch.load(tmp_path / BEFORE)["state_dict"]["net.weight"][0] == 1


def test_a_checkpoint_goes_into_its_file_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))  # Lightning's own would write there first
    state = {"state_dict": {"net.weight": torch.arange(3.0)}, "epoch": 4}
    Straight().save_checkpoint(state, tmp_path / "new.ckpt")
    read = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert read["epoch"] == 4
    assert torch.equal(read["state_dict"]["net.weight"], torch.arange(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["new.ckpt"]


def test_what_a_kill_left_under_two_names_is_not_written_into(tmp_path: Path) -> None:
    _save(tmp_path / BEST, 1)
    (tmp_path / "beside").hardlink_to(tmp_path / BEST)  # killed before it was renamed
    Straight().save_checkpoint({"state_dict": {"net.weight": torch.zeros(3)}}, tmp_path / "beside")
    assert torch.load(tmp_path / BEST)["state_dict"]["net.weight"][0] == 1


@pytest.mark.parametrize("after", [0, 100])
def test_a_full_disk_is_told_in_one_line(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.RawIOBase):
        written = 0

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if self.written >= after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.written += len(data)
            return len(data)

    monkeypatch.setattr(Path, "open", lambda *_: Full())
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written: No space left on device; mend that"):
        Straight().save_checkpoint({"state_dict": {"net.weight": torch.zeros(100_000)}}, Path("last.ckpt"))


def test_a_phase_whose_best_is_broken_begins_anew_on_every_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate((BEFORE, LAST)):
        _save(tmp_path / name, number)
    (tmp_path / BEST).write_bytes(b"broken")
    assert taken_up(tmp_path, leader=False) is None
    assert taken_up(tmp_path, leader=True) is None
    assert "best.ckpt cannot be read (cut short, damaged, or not written by Thaw); its phase begins anew" in (
        capsys.readouterr().err
    )
    assert taken_up(tmp_path, leader=False) is None  # one that looks after the leader has
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_would_run_code_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Evil()}, tmp_path / LAST)
    assert taken_up(tmp_path, leader=True) is None
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in capsys.readouterr().err  # torch's advice is to run it all the same


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
