"""The augment stage, from a folder of pictures to the packed store and its preview."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import config, paths
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.stages import augment

PARAMS = Path(__file__).parents[2] / "params.yaml"


@pytest.fixture(autouse=True)
def _raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of two classes as download leaves them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for index in range(24):
        folder = paths.raw("image_folder") / ("ants" if index % 2 else "bees")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")


def _run(**params: Any) -> Store:
    overrides = {f"augment.{name}": value for name, value in params.items()}
    base = {"data.name": "image_folder", "augment.px": 16, "augment.train_size": "all"}
    augment.run(config.load(PARAMS, overrides=base | overrides))
    return Store(paths.prepared("image_folder"))


def test_the_store_and_a_preview_are_there_and_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    store = _run(copies=1, transforms={"rotate": {"limit": 20, "p": 1.0}})
    store.verify()
    assert store.meta.classes == ("ants", "bees")
    with Image.open(store.folder / "preview.png") as preview:
        assert preview.width > 100
    told = capsys.readouterr().out.splitlines()
    counts = store.counts()
    assert told == [
        f"image_folder: 2 classes, colour, 16 px; train {counts['train']}, val {counts['val']}, test {counts['test']}",
        f"of the training pictures {counts['train'] // 2} are offline-augmented copies",
    ]


def test_a_failure_keeps_what_was_prepared_before() -> None:
    before = _run().meta.sha256
    (paths.raw("image_folder") / "ants/broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"ants/broken\.jpg.*augment\.skip_unreadable"):
        _run()
    assert Store(paths.prepared("image_folder")).meta.sha256 == before


def test_what_is_left_out_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    (paths.raw("image_folder") / "ants/broken.jpg").write_bytes(b"\xff\xd8\xff")
    _run(skip_unreadable=True)
    assert "left out: " in capsys.readouterr().out
