import os
from pathlib import Path

import pytest

from pipeline import outbox
from pipeline.outbox import Outbox, Point, Spool


def test_a_spool_gives_back_what_was_not_acknowledged(tmp_path: Path) -> None:
    points = [Point(1_700_000_000_000 + n, n, {"val/loss": n / 4}) for n in range(4)]
    spool = Spool(tmp_path / "run/spool.jsonl", run_id="a")
    for point in points[:3]:
        spool.add(point)
    spool.acknowledge(2)
    spool.add(points[3])
    assert spool.waiting == points[2:]
    again = Spool(tmp_path / "run/spool.jsonl", run_id="a")
    assert again.waiting == points[2:]
    again.acknowledge(1)
    assert Spool(tmp_path / "run/spool.jsonl", run_id="a").waiting == points[3:]


def test_a_line_cut_short_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    spool = Spool(path, run_id="a")
    spool.add(Point(1, 1, {"val/loss": 0.5}))
    spool.add(Point(2, 2, {"val/loss": 0.25}))
    path.write_bytes(path.read_bytes()[:-10])
    after = Spool(path, run_id="a")
    assert after.waiting == [Point(1, 1, {"val/loss": 0.5})]
    after.add(Point(3, 3, {"val/loss": 0.125}))
    assert [point.step for point in Spool(path, run_id="a").waiting] == [1, 3]


@pytest.mark.parametrize("content", ["", '{"run": "b"}\n{"point": [1, 1, {}]}\n', "not json\n"])
def test_a_spool_of_another_run_is_begun_anew(content: str, tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    path.write_text(content)
    assert Spool(path, run_id="a").waiting == []
    assert path.read_text() == '{"run": "a"}\n'


def test_a_server_that_failed_is_tried_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 100.0
    monkeypatch.setattr(outbox.time, "monotonic", lambda: clock)
    box = Outbox("MLflow at http://me:secret@tracking", failures=(OSError,))
    calls: list[str] = []

    def fails() -> None:
        calls.append("tried")
        raise OSError("no route\nto host")

    for pause in (10.0, 20.0, 40.0):
        box.do("tags", fails)
        clock += pause - 1
        box.do("tags", fails)
        clock += 1
        assert not box.rests
    assert len(calls) == 3
    line = "MLflow at http://tracking fails; training goes on, what is tracked is sent later: no route"
    assert capsys.readouterr().err == f"WARNING: {line}\n"


def test_what_fails_again_is_named_and_holds_nothing_up() -> None:
    box = Outbox("MLflow", failures=(OSError,))
    sent: list[str] = []

    def gone() -> None:
        raise FileNotFoundError("curves.csv")

    box.do("curves.csv", gone)
    box.do("tags", lambda: sent.append("tags"))
    assert sent == []
    assert box.drain(alive=False) == ["curves.csv", "tags"]
    assert box.drain(alive=True) == ["curves.csv"]
    assert sent == ["tags"]


def test_a_mistake_of_ours_is_no_outage() -> None:
    with pytest.raises(KeyError):
        Outbox("MLflow", failures=(OSError,)).do("tags", lambda: {}["missing"])


def test_a_spool_knows_what_was_added_before_a_stop(tmp_path: Path) -> None:
    first = Spool(tmp_path / "spool", run_id="a")
    first.add(Point(1, 10, {"lr": 0.1, "loss": 2.0}))
    first.acknowledge(1)
    again = Spool(tmp_path / "spool", run_id="a")
    assert again.knows(10, ["loss", "lr"])
    assert not again.knows(10, ["loss"])
    assert not again.knows(11, ["loss", "lr"])
    assert not Spool(tmp_path / "spool", run_id="b").knows(10, ["loss", "lr"])


def test_a_spool_is_synced_where_there_is_something_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(outbox.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    spool = Spool(tmp_path / "spool", run_id="a")
    for number in range(3):
        spool.add(Point(number, number, {"loss": 1.0}))
    assert synced == []  # no point waits for a disk
    spool.sync()
    spool.sync()
    assert synced == [spool.path.stat().st_size]
    spool.add(Point(3, 3, {"loss": 1.0}))
    spool.sync()
    assert synced[1:] == [spool.path.stat().st_size]
