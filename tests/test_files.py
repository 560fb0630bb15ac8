"""What is half-written is never taken for whole, and a failure keeps what was there."""

from pathlib import Path

import pytest

from pipeline import files
from pipeline.errors import UserError
from pipeline.files import fresh_file, fresh_folder, make_folder


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


def test_what_is_in_a_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=rf"^{tmp_path}/cache must be a folder: something else is in its place; remove"):
        make_folder(tmp_path / "cache" / "deep" / "down")
    with pytest.raises(UserError, match="cache must be a folder"), fresh_file(tmp_path / "cache" / "file"):
        pass


def test_a_folder_that_takes_nothing_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # whom permissions stop, root is not
    with pytest.raises(UserError, match=r"must be writable: change its permissions$"):
        make_folder(tmp_path / "cache")


def test_a_folder_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be made: File name too long$"):
        make_folder(tmp_path / ("long" * 100))
