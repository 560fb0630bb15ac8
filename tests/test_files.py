"""What is half-written is never taken for whole, and a failure keeps what was there."""

from pathlib import Path

import pytest

from pipeline.files import fresh_file, fresh_folder


def _stopped_folder(target: Path) -> None:
    with fresh_folder(target) as folder:
        (folder / "new").touch()
        raise KeyboardInterrupt


def _stopped_file(target: Path) -> None:
    with fresh_file(target) as path:
        path.write_text("half")
        raise KeyboardInterrupt


def test_a_folder_takes_the_old_ones_place_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with fresh_folder(target) as folder:
        (folder / "new").touch()
        assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(KeyboardInterrupt):
        _stopped_folder(target)
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part/half").touch()
    with fresh_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []


def test_a_file_takes_the_old_ones_place_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "below" / "out.txt"
    for text in ("old", "new"):
        with fresh_file(target) as path:
            path.write_text(text)
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        _stopped_file(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
