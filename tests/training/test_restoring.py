"""A real run on a few small pictures: what is damaged, what is mended, and that a classifier takes what was learnt."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import tracking
from pipeline.data import store
from pipeline.data.datamodule import Pictures
from pipeline.data.store import Row, Store
from pipeline.errors import UserError
from pipeline.nets.unet import unet, unet_encoder
from pipeline.training import restoring, weights

PX = 32
WIDTH = 4
PLAIN: dict[str, Any] = {
    "dataset": "tiny",
    "epochs": 1,
    "batch_size": 8,
    "lr": 0.003,
    "px": PX,
    "in_chans": 1,
    "seed": 1,
    "noise": 0.1,
    "hole": 0.125,
    "width": WIDTH,
    "experiment": "thaw",
}


@pytest.fixture(autouse=True, scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a store: each picture an edge between two greys, of its own place and direction."""
    before, top = Path.cwd(), tmp_path_factory.mktemp("project")
    folder = top / "data" / "prepared" / "tiny"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        picture = np.full((PX, PX, 1), 40, np.uint8)
        picture[rng.integers(4, PX - 4) :] = 220
        picture = picture.transpose(1, 0, 2) if number % 2 else picture
        rows.append((Row(f"{number}", "train" if number < 32 else "val", 0, 0, PX, PX), picture))
    store.write(folder, rows, dataset="tiny", classes=("edge",), px=PX, channels=1, skipped=[])
    os.chdir(top)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("DVC_ROOT", raising=False)
        yield top
    os.chdir(before)


def damaged(*, fixed: bool = False, seed: int = 1) -> restoring.DamagedPictures:
    pictures = Pictures(Store(Path("data/prepared/tiny")), px=PX, in_chans=1)
    return restoring.DamagedPictures(pictures, seed=seed, noise=0.1, hole=0.125, fixed=fixed)


def test_damage_follows_seed_epoch_and_picture() -> None:
    found, clean = damaged()[[(0, 3), (1, 3), (0, 5)]]
    again, _ = damaged()[[(1, 3)]]
    assert found.shape == clean.shape == (3, 1, PX, PX)
    assert found.dtype == clean.dtype == torch.float32
    assert torch.equal(clean[0], clean[1])
    assert clean.unique().tolist() == pytest.approx([40 / 255, 220 / 255])
    assert torch.equal(again[0], found[1])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0] - clean[0], found[2] - clean[2])
    assert not torch.equal(damaged(seed=2)[[(0, 3)]][0][0], found[0])


def test_validation_pictures_are_damaged_alike_in_every_epoch() -> None:
    found, _ = damaged(fixed=True)[[(0, 3), (7, 3)]]
    assert torch.equal(found[0], found[1])


def test_noise_has_the_documented_deviation() -> None:
    clean = np.full((3, 96, 96), 128, np.uint8)
    noise = restoring.damage(clean, noise=0.2, hole=0.0, seed=(0, 0, 0)) - 128 / 255
    assert noise.std() == pytest.approx(0.2, rel=0.02)
    assert abs(noise.mean()) < 0.005
    assert not np.allclose(noise[0], noise[1])


@pytest.mark.parametrize(("hole", "cells"), [(0.125, 8), (0.5, 32), (0.01, 1), (0.0, 0)])
def test_holes_have_the_documented_share_and_lie_alike_in_each_channel(hole: float, cells: int) -> None:
    clean = np.zeros((3, 64, 64), np.uint8)
    blank = restoring.damage(clean, noise=0.0, hole=hole, seed=(0, 0, 0)) == restoring.BLANK
    assert blank.mean() == cells / 64
    assert (blank == blank[0]).all()
    squares = blank[0].reshape(8, 8, 8, 8).mean(axis=(1, 3))
    assert set(squares.ravel()) <= {0.0, 1.0}
    elsewhere = restoring.damage(clean, noise=0.0, hole=hole, seed=(0, 1, 0)) == restoring.BLANK
    assert (elsewhere == blank).all() == (cells == 0)


def test_holes_cover_a_side_that_does_not_divide() -> None:
    clean = np.zeros((1, 35, 21), np.uint8)
    blank = restoring.damage(clean, noise=0.0, hole=63 / 64, seed=(0, 0, 0)) == restoring.BLANK
    assert 1 - blank.mean() == pytest.approx(1 / 64, abs=0.006)


def test_psnr_is_in_decibels_of_what_a_file_would_hold() -> None:
    clean = torch.full((3, 1, 4, 4), 1.0)
    found = torch.stack([torch.full((1, 4, 4), value) for value in (0.9, 1.5, 0.99)])
    assert restoring.psnr(found, clean).tolist() == pytest.approx([20.0, 100.0, 40.0], abs=1e-3)


def test_run_restores_pictures_and_a_classifier_takes_the_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    restoring.run(**{**PLAIN, "epochs": 12, "batch_size": 4, "lr": 0.01, "width": 8}, out=tmp_path)
    *lines, told = capsys.readouterr().out.splitlines()
    assert told.startswith(f"wrote {tmp_path / restoring.ENCODER} and {tmp_path / restoring.GRID}; MLflow run restore-")
    run = next(row for row in tracking.runs("thaw") if f"({row.id})" in told)
    assert (run.status, run.tags["serves"], run.params["noise"]) == ("FINISHED", "restore", "0.1")
    assert f"{run.metrics['val/psnr']:.2f}" == lines[-1].split()[7]
    words = [line.split() for line in lines]
    assert [line[1] for line in words] == [f"{epoch}/12:" for epoch in range(1, 13)]
    losses = [float(line[4].rstrip(";")) for line in words]
    restored, before = ([float(line[at]) for line in words] for at in (7, 10))
    assert losses[-1] < losses[0] / 4
    assert restored[-1] > before[-1] + 3
    assert len(set(before)) == 1

    encoder: Any = unet_encoder(num_classes=3, in_chans=1, width=8)
    weights.load_pretrained(encoder, weights.read_state(tmp_path / restoring.ENCODER))
    assert encoder.classifier.weight.abs().max() == 0
    fresh = unet_encoder(num_classes=3, in_chans=1, width=8).state_dict()
    assert not any(torch.equal(value, fresh[key]) for key, value in encoder.state_dict().items())

    with Image.open(tmp_path / restoring.GRID) as picture:
        assert picture.height > picture.width  # six rows of three
    assert sorted(path.name for path in tmp_path.iterdir()) == [restoring.GRID, restoring.ENCODER]


def test_written_encoder_computes_what_the_whole_net_s_did(tmp_path: Path) -> None:
    whole = unet(in_chans=3, width=WIDTH)
    weights.save_state(tmp_path / "encoder.safetensors", whole.encoder.state_dict())
    encoder: Any = unet_encoder(num_classes=3, width=WIDTH)
    weights.load_pretrained(encoder, weights.read_state(tmp_path / "encoder.safetensors"))
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(encoder.forward_features(x), whole.encoder["levels"](x)[-1])


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    for name in "ab":
        restoring.run(**PLAIN, out=tmp_path / name)
    a, b = ((tmp_path / name / restoring.ENCODER).read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "none"}, "data/prepared/none: no packed pictures here; run `dvc repro augment` first"),
        ({"epochs": 0}, "epochs, batch_size and width are 1 or more, got 0, 8, 4"),
        ({"batch_size": 0}, "epochs, batch_size and width are 1 or more, got 1, 0, 4"),
        ({"lr": 0.0}, "lr 0.0: give a learning rate above 0"),
        ({"in_chans": 2}, "in_chans 2: give 1 for grey or 3 for colour"),
        ({"hole": 1.0}, "noise 0.1 and hole 1.0: give shares"),
        ({"noise": -0.1}, "noise -0.1 and hole 0.125: give shares"),
        ({"noise": 0.0, "hole": 0.0}, "noise 0.0 and hole 0.0 leave the pictures whole"),
        ({"px": 15}, "px 15: a U-Net takes pictures of 16 px or more"),
        ({"px": 33}, "px 33: data/prepared/tiny is packed at 32 px; lower px"),
        ({"lr": 1e30, "epochs": 3}, "the loss became .* lower the learning rate below 1e"),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        restoring.run(**{**PLAIN, **changed}, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
