from pathlib import Path

import pytest
from PIL import Image

from pipeline import config
from pipeline.errors import UserError
from pipeline.stages import download

PARAMS = Path(__file__).parents[2] / "params.yaml"


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def run(name: str) -> None:
    download.run(config.load(PARAMS, overrides={"data.name": name, "data.path": "mine"}))


def paint(*names: str) -> None:
    for name in names:
        path = Path("mine", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path)


def files(folder: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def test_the_dataset_is_put_in_place_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    run("digits")
    assert files("data") == ["cache/downloads/digits.lock", "raw/digits/digits.npz"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"digits: 10 classes, 1797 pictures (not split 1797), 0 skipped -> {Path('data/raw/digits')}"


def test_a_second_run_replaces_what_was_there(capsys: pytest.CaptureFixture[str]) -> None:
    paint("train/a/1.png", "train/b/1.png", "val/b/1.png")
    run("image_folder")
    assert "2 classes, 3 pictures (train 2, test 1), 0 skipped" in capsys.readouterr().out
    Path("mine/train/a/1.png").rename("mine/train/a/2.png")
    Path("mine/train/b/notes.txt").touch()
    Path("data/raw/.image_folder.part").mkdir()
    Path("data/raw/.image_folder.part/left-by-a-kill").touch()
    run("image_folder")
    assert files("data/raw") == [
        f"image_folder/{name}" for name in ("skipped.txt", "train/a/2.png", "train/b/1.png", "val/b/1.png")
    ]
    assert "SKIPPED 1 of 4 files: train/b/notes.txt" in capsys.readouterr().out


def test_a_failure_leaves_what_was_there() -> None:
    paint("a/1.png", "b/1.png")
    run("image_folder")
    before = files("data/raw")
    Path("mine/b/1.png").unlink()
    with pytest.raises(UserError, match="b: no pictures"):
        run("image_folder")
    assert files("data/raw") == before
    assert [path.name for path in Path("data/raw").iterdir()] == ["image_folder"]


def test_partial_downloads_lie_outside_a_temporary_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "repository"))
    run("digits")
    assert (tmp_path / "repository/data/cache/downloads/digits.lock").exists()
    assert files("data") == ["raw/digits/digits.npz"]
