"""The pictures that every side of a comparison sees."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _kept_here(project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "KEPT", tmp_path)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_drawn_pictures_are_as_large_as_photographs_and_of_two_classes(project: Any) -> None:
    folder = project.drawn(train=5, val=2)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    assert [name.split("/")[:2] for name in files] == [
        ["train", "cold"],
        ["train", "cold"],
        ["train", "warm"],
        ["train", "warm"],
        ["train", "warm"],
        ["val", "cold"],
        ["val", "warm"],
    ]
    assert {_pixels(folder / name).shape for name in files} == {(375, 500, 3)}
    assert all(20_000 < (folder / name).stat().st_size < 200_000 for name in files)


def test_drawn_pictures_are_drawn_once_and_differ(project: Any) -> None:
    folder = project.drawn(train=3, val=1)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    assert project.drawn(train=3, val=1) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")} == times
    pixels = [_pixels(path).astype(float) for path in sorted(folder.glob("train/*/*"))]
    assert min(np.abs(a - b).mean() for i, a in enumerate(pixels) for b in pixels[:i]) > 10


def test_photographs_are_taken_where_there_are_some(project: Any, tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    (photographs / "train/ants").mkdir(parents=True)
    (photographs / "train/ants/1.jpg").touch()
    assert project.pictures_or_drawn(photographs) == (photographs, True)
    assert project.pictures_or_drawn(tmp_path / "none", train=2, val=1) == (tmp_path / "drawn-2-1", False)


def test_validation_may_be_the_published_one(project: Any) -> None:
    photographs = project.drawn(train=2, val=1)
    both = project.both_ways(photographs)
    assert project.both_ways(photographs) == both
    for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
        assert (both / split).resolve() == (photographs / source).resolve()


def test_a_change_of_settings_pictures_or_the_data_code_prepares_anew(
    project: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tmp_path / "tree"
    (root / "pipeline/data").mkdir(parents=True)
    (root / "params.yaml").write_text("a")
    (root / "pipeline/data/store.py").write_text("b")
    monkeypatch.setattr(project, "ROOT", root)
    first = project._key({"augment.px": 64}, None)
    assert project._key({"augment.px": 64}, None) == first
    assert project._key({"augment.px": 72}, None) != first
    photographs = project.drawn(train=2, val=1)
    of_pictures = project._key({"augment.px": 64}, photographs)
    next(photographs.glob("val/*/*")).write_bytes(b"another")
    assert len({first, of_pictures, project._key({"augment.px": 64}, photographs)}) == 3
    (root / "pipeline/data/store.py").write_text("c")
    assert project._key({"augment.px": 64}, None) != first


def test_parameters_that_are_not_right_are_refused_in_one_line(
    project: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((project.ROOT / "params.yaml").read_text().replace("batch_size: 64", "batch_size: -1"))
    with pytest.raises(SystemExit) as stopped:
        project.checked(path)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "train.batch_size" in said[0]
