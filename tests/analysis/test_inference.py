"""A picture at prediction goes the very way of a picture in evaluation."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import nets, paths
from pipeline.analysis import inference, predict
from pipeline.data import datamodule, packing
from pipeline.data.catalog import Item, Pictures
from pipeline.data.decode import decode
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.parameters import AugmentParams
from pipeline.training import weights
from pipeline.training.weights import ModelCard

CLASSES = ("ants", "bees", "wasps")
PACK_PX, PX = 40, 32


def _card(*, in_chans: int = 3, start: weights.Start = "pretrained") -> ModelCard:
    return ModelCard(
        name="scratch/lenet5",
        in_chans=in_chans,
        stem="default",
        classes=CLASSES,
        px=PX,
        pack_px=PACK_PX,
        mean=(0.4, 0.5, 0.6)[:in_chans],
        std=(0.2, 0.25, 0.3)[:in_chans],
        start=start,
        start_source="a test",
        fast_dev_run=False,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Larger, smaller, upright, lying, grey and transparent pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    shapes = [(90, 70, 3), (33, 50, 3), (40, 40, 3), (61, 47), (20, 25), (55, 80, 4)]
    made = []
    for index, shape in enumerate(shapes):
        made.append(folder / f"{index}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(made[-1])
    return made


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.nn.Module]:
    """A model where train puts it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nets.build("scratch/lenet5", num_classes=len(CLASSES)).eval()
    folder = paths.trained("scratch/lenet5")
    folder.mkdir(parents=True)
    weights.save_model(folder / "model.safetensors", net, _card())
    return net


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_picture_is_prepared_as_it_is_packed_and_tested_bit_by_bit(
    tmp_path: Path, files: list[Path], in_chans: int
) -> None:
    items = [Item(path.name, 0, "test") for path in files]
    items += [Item(f"{split} {label}", label, split) for split in ("train", "val") for label in range(3)]
    published = Pictures(CLASSES, items, load=lambda index: decode(files[index % len(files)]))
    packing.pack(tmp_path, published, dataset="tiny", channels=3, params=AugmentParams(px=PACK_PX))
    loader = datamodule.test_loader(Store(tmp_path), px=PX, in_chans=in_chans, batch_size=100, workers=0)
    (pixels, _), *_ = loader
    assert len(pixels) == len(files)
    for file, tested in zip(files, pixels, strict=True):
        prepared = inference.prepare(decode(file), _card(in_chans=in_chans))
        assert prepared.dtype == np.uint8
        assert np.array_equal(prepared, tested.permute(1, 2, 0).numpy())


def test_logits_are_the_nets_on_normalised_pictures(model: torch.nn.Module) -> None:
    card = _card()
    pixels = torch.randint(0, 256, (5, 3, PX, PX), dtype=torch.uint8)
    batches = [(pixels[:3], torch.tensor([0, 1, 2])), (pixels[3:], torch.tensor([2, 1]))]
    found, targets = inference.logits(model, card, batches)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (card.mean, card.std))
    with torch.no_grad():
        expected = model((pixels.float() / 255 - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert targets.tolist() == [0, 1, 2, 2, 1]


def test_predict_names_the_best_classes(
    model: torch.nn.Module, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    predict.run([str(file) for file in files[:2]], model="scratch/lenet5", top=2)
    prepared = np.stack([inference.prepare(decode(file), _card()) for file in files[:2]])
    found, _ = inference.logits(model, _card(), [(torch.from_numpy(prepared).permute(0, 3, 1, 2), torch.zeros(2))])
    expected = []
    for file, shares in zip(files[:2], found.softmax(dim=1).tolist(), strict=True):
        (first, one), (second, two), _ = sorted(enumerate(shares), key=lambda pair: -pair[1])
        expected.append(f"{file}: {CLASSES[first]} {one:.1%}, {CLASSES[second]} {two:.1%}")
    assert capsys.readouterr().out.splitlines() == expected


def test_predict_shows_no_more_classes_than_there_are_and_says_a_random_start(
    model: torch.nn.Module, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights.save_model(paths.trained("scratch/lenet5") / "model.safetensors", model, _card(start="random"))
    predict.run([str(files[0])], model="scratch/lenet5", top=9)
    note, line = capsys.readouterr().out.splitlines()
    assert note == "note: scratch/lenet5 started from random weights"
    assert all(name in line for name in CLASSES)


@pytest.mark.usefixtures("model")
def test_predict_without_the_picture_or_the_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.jpg"):
        predict.run(["missing.jpg"], model="scratch/lenet5", top=1)
    with pytest.raises(UserError, match=r"resnet18/train/model\.safetensors: no such file; train it first"):
        predict.run([str(tmp_path)], model="resnet18", top=1)
