"""Frozen work is done once, and the training is the same as if it had been done in every step."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import config, nets
from pipeline.data import store
from pipeline.data.datamodule import PictureData
from pipeline.data.store import Row, Store
from pipeline.parameters import TrainParams
from pipeline.training import frozen, schedule
from pipeline.training.classifier import Classifier
from pipeline.training.fit import fit
from pipeline.training.schedule import Phase

ROOT = Path(__file__).parents[2]
PX = 32
LABELLED = 12


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def _store(folder: Path, *, changed: int = -1) -> Store:
    """12 pictures for training and 6 for validation; one pixel of picture `changed` is another."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (18, PX, PX, 3), dtype=np.uint8)
    if changed >= 0:
        pictures[changed, 3, 3] ^= 1
    rows = [Row(f"{i}", "train" if i < LABELLED else "val", i % 3, 0, PX, PX) for i in range(18)]
    store.write(
        folder,
        zip(rows, pictures, strict=True),
        dataset="tiny",
        classes=("a", "b", "c"),
        px=PX,
        channels=3,
        skipped=[],
    )
    return Store(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Store:
    return _store(tmp_path / "store")


def _planned(net: nn.Module, **changed: Any) -> tuple[TrainParams, Phase, frozen.Plan]:
    """Of a training of the head over four epochs, without augmentation."""
    phase = {"trainable": "head", "epochs": 4, "lr": 0.01, **changed.pop("phase", {})}
    overrides = {"batch_size": 6, "accelerator": "cpu", "transforms": {}, "phases": {"phase": phase}, **changed}
    params = config.load(ROOT / "params.yaml", overrides={f"train.{k}": v for k, v in overrides.items()}).train
    (planned,) = schedule.plan(params, net, px=PX, random_start=False)
    return params, planned, frozen.plan(planned, net, params=params, in_chans=3, pictures=18)


def _net(name: str, **given: Any) -> nn.Module:
    torch.manual_seed(0)
    return nets.build(name, num_classes=3, **given)


def _unheard(metrics: Any, *, step: int) -> None:
    """Where points of metrics would be logged."""


def _trained(net: nn.Module, pictures: Store, folder: Path, **changed: Any) -> list[dict[str, Any]]:
    """Trains the net by its plan; gives back the rows of its epochs."""
    params, phase, plan = _planned(net, **changed)
    normal: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    kept = None
    if plan.cut is not None:
        kept = frozen.computed(plan.cut, net, pictures, phase=phase, params=params, px=PX, processes=1, **normal)
    module = Classifier(net, phase=phase, params=params, pictures=LABELLED, num_classes=3, cut=plan.cut, **normal)
    data = PictureData(
        pictures,
        px=PX,
        in_chans=3,
        batch_size=phase.batch_size,
        parts=phase.accumulate,
        chosen=params.transforms,
        strength=phase.strength,
        seed=params.seed,
        workers=0,
        views=phase.views,
        cached=kept,
    )
    outcome = fit(
        module, data, params=params, folder=folder, first_epoch=0, first_step=0, log=_unheard, sync=lambda: None
    )
    module.close()
    return outcome.rows


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures in each pass through the first convolution of any net."""
    seen: list[int] = []
    original = nn.Conv2d.forward

    def forward(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1:] == (3, PX, PX) and not x.is_meta:
            seen.append(len(x))
        return original(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    return seen


@pytest.mark.parametrize("trainable", ["head", "last:2"])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("test_resnet", {}),  # timm's, without dropout
        ("scratch/resnet20", {}),  # batch norms
        ("test_efficientnet", {"drop_rate": 0.5}),  # dropout after the cut
        ("test_vit", {}),
        pytest.param("scratch/vgg11", {"drop_rate": 0.5}, marks=pytest.mark.slow),
        pytest.param("scratch/googlenet", {}, marks=pytest.mark.slow),
        pytest.param("scratch/densenet_bc100_k12", {}, marks=pytest.mark.slow),
    ],
)
def test_what_is_trained_is_the_same_with_and_without(
    name: str, given: dict[str, Any], trainable: str, pictures: Store, tmp_path: Path
) -> None:
    results = []
    for cache in ("fp32", "none"):
        net = _net(name, **given)
        changed: dict[str, Any] = {"cache": cache, "phase": {"trainable": trainable}, "average": "ema"}
        assert (_planned(net, **copy.deepcopy(changed))[2].cut is not None) == (cache == "fp32")
        rows = _trained(net, pictures, tmp_path / cache, **changed)
        results.append((net.state_dict(), rows))
    (kept, kept_rows), (again, again_rows) = results
    for key, value in kept.items():
        torch.testing.assert_close(value, again[key], atol=1e-5, rtol=1e-5, msg=key)
    for one, other in zip(kept_rows, again_rows, strict=True):
        assert one["val/loss"] == pytest.approx(other["val/loss"], abs=1e-4)
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-4)


def test_each_picture_passes_the_frozen_layers_once_whatever_the_epochs(
    pictures: Store, tmp_path: Path, passes: list[int]
) -> None:
    net = _net("test_resnet")
    params, phase, plan = _planned(net)
    assert plan.told == "once, 96 numbers a picture"
    passes.clear()
    assert plan.cut is not None
    normal = (0.5,) * 3, (0.25,) * 3
    frozen.computed(
        plan.cut, net, pictures, phase=phase, params=params, px=PX, mean=normal[0], std=normal[1], processes=2
    )
    assert passes == [3] * 6  # what each of two processes has of a batch of 6
    _trained(net, pictures, tmp_path / "fit")
    tried = 2 + 3  # pictures that look for the cut
    assert sum(passes) == 18 + tried


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"phase": {"lr": 0.1, "epochs": 2}}, False),
        ({"label_smoothing": 0.1, "optimizer": "sgd", "batch_size": 4}, False),
        ({"precision": "bf16-mixed"}, True),
        ({"cache": "bf16"}, True),
        ({"phase": {"px": 24}}, True),
        ({"phase": {"trainable": "last:2"}}, True),
        ({"channels_last": False}, True),
    ],
)
def test_another_run_finds_what_does_not_depend_on_its_change(
    changed: dict[str, Any], again: bool, pictures: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _trained(_net("test_resnet"), pictures, tmp_path / "one")
    assert "computed for 18 pictures" in capsys.readouterr().out
    _trained(_net("test_resnet"), pictures, tmp_path / "two", **changed)
    assert ("computed for 18 pictures" if again else "found for 18") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"optimizer": "sgd"}, False),
        ({"seed": 7}, True),
        ({"views": 3}, True),
        ({"phase": {"strength": 0.5}}, True),
        ({"transforms": {"gaussian_noise": {"p": 0.9}}}, True),
    ],
)
def test_views_that_come_out_otherwise_are_another_cache(
    changed: dict[str, Any], again: bool, pictures: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy: dict[str, Any] = {"transforms": {"gaussian_noise": {"p": 1.0}}, "views": 2}
    _trained(_net("test_resnet"), pictures, tmp_path / "one", **noisy)
    assert "computed for 24 pictures" in capsys.readouterr().out
    _trained(_net("test_resnet"), pictures, tmp_path / "two", **{**noisy, **changed})
    told = capsys.readouterr().out
    assert ("found for 24" in told) == (not again), told


def test_another_normalisation_or_other_code_is_another_cache(
    pictures: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = _net("test_resnet")
    params, phase, plan = _planned(net)
    assert plan.cut is not None

    def computed(mean: float, std: float) -> str:
        assert plan.cut is not None
        frozen.computed(
            plan.cut,
            net,
            pictures,
            phase=phase,
            params=params,
            px=PX,
            mean=(mean,) * 3,
            std=(std,) * 3,
            processes=1,
        )
        return capsys.readouterr().out.partition("layers ")[2].partition(" pictures")[0]

    assert [computed(*given) for given in ((0.5, 0.2), (0.5, 0.2), (0.4, 0.2), (0.5, 0.3))] == [
        "computed for 18",
        "computed for 0",
        "computed for 18",
        "computed for 18",
    ]
    monkeypatch.setattr(frozen, "_preparation", lambda: "another way to make pixels")
    assert computed(0.5, 0.2) == "computed for 18"


def test_another_frozen_weight_is_another_cache_and_another_head_is_not(
    pictures: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nets_ = [_net("test_resnet") for _ in range(3)]
    with torch.no_grad():
        nets_[1].get_parameter("conv1.0.weight")[0, 0, 0, 0] += 1e-3
        nets_[2].get_classifier().weight.zero_()  # type: ignore[operator]
    for number, (net, told) in enumerate(
        zip(nets_, ["computed for 18", "computed for 18", "found for 18"], strict=True)
    ):
        _trained(net, pictures, tmp_path / str(number))
        assert told in capsys.readouterr().out


def test_a_buffer_of_a_frozen_batch_norm_counts_as_a_weight(
    pictures: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _trained(_net("test_resnet"), pictures, tmp_path / "one")
    net = _net("test_resnet")
    net.get_buffer("bn1.running_mean")[0] += 0.5
    _trained(net, pictures, tmp_path / "two")
    assert capsys.readouterr().out.count("computed for 18") == 2


def test_another_pixel_is_another_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changed in (-1, 5):
        _trained(_net("test_resnet"), _store(tmp_path / f"store{changed}", changed=changed), tmp_path / f"{changed}")
    assert capsys.readouterr().out.count("computed for 18") == 2


def test_views_are_augmented_versions_that_epochs_take_by_turns(
    pictures: Store, tmp_path: Path, passes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {"transforms": {"gaussian_noise": {"p": 1.0}, "horizontal_flip": {"p": 0.5}}, "views": 2}
    results = []
    for cache in ("fp32", "none"):
        net = _net("test_resnet")
        rows = _trained(net, pictures, tmp_path / cache, cache=cache, **changed)
        results.append((net.state_dict(), [row["train/loss"] for row in rows]))
        if cache == "fp32":
            assert sum(passes) == 2 * LABELLED + 6 + 5
            assert "computed for 24 pictures" in capsys.readouterr().out
    for key, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][key], atol=1e-5, rtol=1e-5, msg=key)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-4)


def test_views_differ_from_one_another(pictures: Store) -> None:
    net = _net("test_resnet")
    params, phase, plan = _planned(net, transforms={"gaussian_noise": {"p": 1.0}}, views=3)
    assert plan.cut is not None
    training, plain = frozen.computed(
        plan.cut, net, pictures, phase=phase, params=params, px=PX, mean=(0.5,) * 3, std=(0.25,) * 3, processes=1
    )
    versions = [training[[(epoch, 4)]][0][0] for epoch in range(4)]
    assert not any(torch.equal(versions[0], other) for other in versions[1:3])
    assert torch.equal(versions[0], versions[3])
    assert torch.equal(plain[[(0, 14)]][0][0], plain[[(1, 14)]][0][0])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"phase": {"trainable": "all"}}, "none"),
        ({"cache": "none"}, "every step: train.cache is none"),
        ({"transforms": {"horizontal_flip": {}}}, "every step: fresh augmentation"),
        ({"mixup": 0.2}, "every step: train.mixup"),
        ({"cutmix": 0.2}, "every step: train.cutmix"),
        ({"frozen_bn": "adapt"}, "every step: train.frozen_bn is adapt"),
        ({"teacher": "models/big/train/model.safetensors"}, "every step: the teacher looks at pictures"),
        ({"cache_gb": 1e-7}, "every step: 6.91e-06 GB are more than train.cache_gb"),
        ({"phase": {"trainable": "params:*.bias"}}, "every step: its frozen layers are too little work"),
    ],
)
def test_where_frozen_layers_must_run_every_step_it_says_why(changed: dict[str, Any], told: str) -> None:
    plan = _planned(_net("test_resnet"), **changed)[2]
    assert plan.cut is None
    assert plan.told == told


@pytest.mark.parametrize(
    "changed",
    [
        {"transforms": {"horizontal_flip": {}}, "phase": {"strength": 0}},
        {"transforms": {"horizontal_flip": {}}, "phase": {"views": 2}},
    ],
)
def test_pictures_that_come_again_are_kept(changed: dict[str, Any]) -> None:
    assert _planned(_net("test_resnet"), **changed)[2].cut is not None


def test_learning_auxiliary_classifiers_read_what_is_not_kept() -> None:
    net = _net("scratch/ablation_inception_aux")
    plan = _planned(net, phase={"trainable": "head+params:auxiliary*"})[2]
    assert plan.told == "every step: auxiliary classifiers learn"


def test_a_checkpoint_of_a_head_holds_the_head(pictures: Store, tmp_path: Path) -> None:
    net = _net("test_resnet")
    _trained(net, pictures, tmp_path / "fit", average="ema")
    state = torch.load(tmp_path / "fit" / "best.ckpt", weights_only=True)["state_dict"]
    assert {name for name in state if "net." in name} == {
        f"{prefix}fc.{name}" for prefix in ("net.", "average.net.") for name in ("weight", "bias")
    }
