"""Ensembles: the mean of probabilities, exactly, and what is written of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline import config, nets, paths, tracking
from pipeline.analysis import compare, ensemble
from pipeline.data import store
from pipeline.data.store import Row, Store
from pipeline.errors import UserError
from pipeline.training import weights
from pipeline.training.record import PhaseRecord, Record
from pipeline.training.weights import ModelCard

ROOT = Path(__file__).parents[2]
PACKED, CLASSES, PICTURES = 36, ("a", "b", "c"), 20
FIRST, SECOND = "scratch/lenet5", "scratch/nin"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty tracking store, since it takes seconds to make one."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.ensure_store()
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed pictures, and two models that see them by cards of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv(tracking.PARENT, raising=False)
    shutil.copyfile(database, tmp_path / "mlflow.db")
    shutil.copyfile(ROOT / "params.yaml", paths.PARAMS)
    config.write(overrides={"data.name": "tiny", "augment.px": PACKED, "evaluate.batch_size": 7})
    folder = paths.prepared("tiny")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = (
        (
            Row(f"{i}.png", "test" if i < PICTURES else "train", i % 3, 0, PACKED, PACKED),
            rng.integers(0, 256, (PACKED, PACKED, 3), np.uint8),
        )
        for i in range(PICTURES + 4)
    )
    store.write(folder, rows, dataset="tiny", classes=CLASSES, px=PACKED, channels=3, skipped=[])
    _trained(FIRST, seed=0, in_chans=1, px=32)
    _trained(SECOND, seed=1, in_chans=3, px=PACKED)


def _trained(name: str, *, seed: int, folder: Path | None = None, **changed: Any) -> Path:
    """A model as train leaves it, untrained but sure of itself."""
    facts: dict[str, Any] = {"in_chans": 3, "px": 32, "pack_px": PACKED, "classes": CLASSES, "fast_dev_run": False}
    facts |= changed
    colours = facts["in_chans"]
    torch.manual_seed(seed)
    net = nets.build(name, num_classes=len(facts["classes"]), in_chans=colours)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    mean, std = (0.3 + 0.1 * seed,) * colours, (0.25,) * colours
    card = ModelCard(name=name, stem="default", mean=mean, std=std, start="random", start_source="a test", **facts)
    folder = folder or paths.trained(name)
    weights.save_model(folder / "model.safetensors", net, card)
    phases = (PhaseRecord(name="all", trainable="all", epochs=1, best_epoch=1, lr=0.01),)
    run = f"{seed}" * 32
    Record(run_id=run, run_name=name, minutes=1.0, steps=7, monitor="val/loss", phases=phases).write(folder)
    return folder / "model.safetensors"


def _by_hand(name: str) -> np.ndarray:
    """The model's probabilities [N, C], from the packed pictures and its card alone."""
    net, card = weights.load_model(paths.trained(name) / "model.safetensors")
    packed = Store(paths.prepared("tiny"))
    margin = (PACKED - card.px) // 2
    pixels = np.stack([packed[i][margin : margin + card.px, margin : margin + card.px] for i in range(PICTURES)])
    if card.in_chans == 1:
        import cv2

        pixels = np.stack([cv2.cvtColor(one, cv2.COLOR_RGB2GRAY)[:, :, None] for one in pixels])
    scaled = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - card.mean[0]) / card.std[0]
    with torch.inference_mode():
        shares: np.ndarray = net(scaled).double().softmax(dim=1).numpy()
    return shares


def test_a_model_with_itself_is_that_model() -> None:
    logits = 20 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    averaged = ensemble.average([logits, logits, logits])
    assert averaged.dtype == torch.float64
    torch.testing.assert_close(averaged.exp(), logits.double().softmax(dim=1), rtol=0, atol=1e-12)


def test_two_models_give_the_mean_of_their_probabilities() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (scale * torch.randn(50, 7, generator=draw) for scale in (1, 30))
    expected = (first.double().softmax(dim=1) + second.double().softmax(dim=1)) / 2
    averaged = ensemble.average([first, second])
    torch.testing.assert_close(averaged.exp(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(averaged.softmax(dim=1), expected, rtol=0, atol=1e-12)


def test_what_is_too_unlikely_for_a_float_keeps_its_place() -> None:
    sure = torch.tensor([[0.0, -2000.0, -1000.0]])
    averaged = ensemble.average([sure, sure])
    torch.testing.assert_close(averaged, sure.double(), rtol=0, atol=1e-12)


def test_each_member_sees_the_pictures_by_its_own_card() -> None:
    ensemble.run([FIRST, SECOND])
    rows = pd.read_parquet("models/ensembles/scratch-lenet5+scratch-nin/predictions.parquet")
    found = rows[[f"p_{name}" for name in CLASSES]].to_numpy()
    first, second = _by_hand(FIRST), _by_hand(SECOND)
    np.testing.assert_allclose(found, (first + second) / 2, atol=1e-5)
    assert np.abs(first - second).max() > 0.1
    assert rows["key"].tolist() == [f"{i}.png" for i in range(PICTURES)]


def test_the_files_say_what_the_predictions_say() -> None:
    ensemble.run([FIRST, SECOND], name="both")
    folder = Path("models/ensembles/both")
    assert {path.name for path in folder.iterdir()} == {
        "predictions.parquet",
        "per_class.csv",
        "confusion.png",
        "metrics.json",
        "report.md",
    }
    rows = pd.read_parquet(folder / "predictions.parquet")
    content = json.loads((folder / "metrics.json").read_text())
    shares = rows[[f"p_{name}" for name in CLASSES]].to_numpy()
    actual = rows["actual"].map(CLASSES.index).to_numpy()
    assert content["test"]["top1"] == (shares.argmax(axis=1) == actual).mean() == rows["correct"].mean()
    assert content["test"]["loss"] == pytest.approx(-np.log(shares[np.arange(PICTURES), actual]).mean(), rel=1e-12)
    for member, name in zip(content["members"], (FIRST, SECOND), strict=True):
        assert member["test"]["top1"] == (_by_hand(name).argmax(axis=1) == actual).mean()
    assert pd.read_csv(folder / "per_class.csv")["support"].tolist() == [7, 7, 6]
    assert f"| **together** | {content['test']['top1']:.4f} |" in (folder / "report.md").read_text()
    assert not paths.METRICS.exists()


def test_its_run_names_the_members_and_stands_among_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    ensemble.run([FIRST, SECOND], name="both")
    printed = capsys.readouterr().out.splitlines()
    (run,) = tracking.runs("thaw")
    assert [line.split(":")[0] for line in printed[:3]] == [FIRST, SECOND, "ensemble of 2 on tiny"]
    assert (run.status, run.tags["fast_dev_run"]) == ("FINISHED", "false")
    assert run.tags["members"] == f"{FIRST}, {SECOND}"
    assert run.tags["members.runs"] == f"{'0' * 32}, {'1' * 32}"
    assert (
        run.metrics["test/top1"] == json.loads(Path("models/ensembles/both/metrics.json").read_text())["test"]["top1"]
    )
    compare.run("thaw")
    shown = capsys.readouterr().out
    assert f"ensemble({FIRST}+{SECOND})" in shown
    assert f"{100 * run.metrics['test/top1']:.2f} (" in shown


def test_files_of_folds_are_members_by_their_paths() -> None:
    folds = [_trained(FIRST, seed=seed, folder=Path(f"models/crossval/lenet5/fold-{seed}")) for seed in (1, 2)]
    (folds[1].parent / "record.json").unlink()
    ensemble.run([str(path) for path in folds], name="folds")
    members = json.loads(Path("models/ensembles/folds/metrics.json").read_text())["members"]
    assert [member["name"] for member in members] == ["crossval/lenet5/fold-1", "crossval/lenet5/fold-2"]
    assert [member["run"] for member in members] == ["1" * 32, ""]


def test_a_trial_among_the_members_is_said_aloud() -> None:
    _trained("scratch/resnet20", seed=2, fast_dev_run=True)
    ensemble.run([FIRST, "scratch/resnet20"], name="trial")
    (run,) = tracking.runs("thaw")
    assert run.tags["fast_dev_run"] == "true"
    assert run.metrics["test/pictures"] == 7  # one batch
    assert "mean NOTHING" in Path("models/ensembles/trial/report.md").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": ("a", "c", "b")}, r"^scratch/resnet20: its classes are not those of data/prepared/tiny"),
        ({"pack_px": 32}, r"^scratch/resnet20: takes pictures packed at 32 px, and data/prepared/tiny has 36"),
    ],
)
def test_a_model_for_other_pictures_is_named(changed: dict[str, Any], message: str) -> None:
    _trained("scratch/resnet20", seed=2, **changed)
    with pytest.raises(UserError, match=message):
        ensemble.run([FIRST, "scratch/resnet20", SECOND])
    assert not Path("models/ensembles").exists()


def test_a_member_whose_logits_are_not_finite_is_named() -> None:
    path = paths.trained(SECOND) / "model.safetensors"
    net, card = weights.load_model(path)
    with torch.no_grad():
        next(net.parameters()).fill_(torch.nan)
    weights.save_model(path, net, card)
    with pytest.raises(UserError, match=r"^scratch/nin: the model gives non-finite logits for 20 of 20"):
        ensemble.run([FIRST, SECOND])


@pytest.mark.parametrize(
    ("words", "name", "message"),
    [
        ([FIRST], "", "an ensemble has two members or more"),
        ([FIRST, "scratch/nim"], "", r"^scratch/nim: no trained model of that name; did you mean scratch/nin"),
        ([FIRST, "models/x/model.safetensors"], "", r"^models/x/model\.safetensors: no such file"),
        ([FIRST, SECOND], "../up", r"^--name \.\./up: use letters"),
        ([FIRST] * 8, "", "too long for a folder; name the ensemble: --name NAME"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ensemble.run(words, name=name)
    assert tracking.runs() == []
