"""A real Trainer on a few fake pictures: which weights moved, which did not, and when it must stop."""

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
from pipeline.errors import UserError
from pipeline.training.classifier import Classifier, Normalize
from pipeline.training.fit import Outcome, fit
from pipeline.training.schedule import Phase

ROOT = Path(__file__).parents[2]
PX = 32


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    splits = ["train"] * 12 + ["val"] * 6
    rows = (
        (Row(f"{i}", split, i % 3, 0, PX, PX), rng.integers(0, 256, (PX, PX, 3), dtype=np.uint8))
        for i, split in enumerate(splits)
    )
    store.write(folder, rows, dataset="tiny", classes=("a", "b", "c"), px=PX, channels=3, skipped=[])
    return Store(folder)


def _fit(net: nn.Module, pictures: Store, folder: Path, *, trainable: str, lr: float = 0.01, **changed: Any) -> Outcome:
    overrides = {"train.batch_size": 6, "train.accelerator": "cpu", **changed}
    params = config.load(ROOT / "params.yaml", overrides=overrides).train
    module = Classifier(
        net,
        phase=Phase("phase", 2, trainable, lr, "onecycle"),
        num_classes=3,
        px=PX,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        optimizer=params.optimizer,
        weight_decay=params.weight_decay,
        label_smoothing=params.label_smoothing,
        channels_last=params.channels_last,
    )
    data = PictureData(pictures, px=PX, in_chans=3, batch_size=6, chosen=params.transforms, seed=params.seed, workers=0)
    points: list[tuple[int, dict[str, float]]] = []
    outcome = fit(
        module,
        data,
        params=params,
        folder=folder,
        first_epoch=3,
        first_step=100,
        log=lambda metrics, *, step: points.append((step, dict(metrics))),
    )
    assert [step for step, metrics in points if "val/top1" in metrics] == [102, 104][: len(outcome.rows)]
    return outcome


def _moved(net: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def _state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "scratch/resnet20"])
def test_frozen_means_frozen_to_the_bit_and_the_head_moves(name: str, pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build(name, num_classes=3, **({"drop_rate": 0.1} if "test" in name else {}))
    before = _state(net)
    _fit(net, pictures, tmp_path, trainable="head")
    head = {id(parameter) for parameter in net.get_classifier().parameters()}
    assert _moved(net, before) == {key for key, parameter in net.named_parameters() if id(parameter) in head}


def test_everything_moves_when_all_learns(pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/resnet20", num_classes=3)
    before = _state(net)
    _fit(net, pictures, tmp_path, trainable="all")
    assert _moved(net, before) == set(before)


def test_auxiliary_classifiers_learn_with_their_share_of_the_loss(pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: Any = nets.build("scratch/ablation_inception_aux", num_classes=3)
    before = _state(net)
    module = Classifier(
        net,
        phase=Phase("phase", 1, "all", 0.01, "constant"),
        num_classes=3,
        px=PX,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        optimizer="sgd",
        weight_decay=0.0,
        label_smoothing=0.0,
        channels_last=False,
    )
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    pixels, labels = torch.randint(0, 256, (4, 3, PX, PX), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    loss = module.training_step((pixels, labels), 0)
    main, auxiliary = (
        nn.functional.cross_entropy(logits, labels) for logits in net.forward_with_auxiliary(module.normalize(pixels))
    )
    torch.testing.assert_close(loss, main + 0.3 * auxiliary)
    # what is reported is the main loss, as in validation
    torch.testing.assert_close(module.train_loss.compute(), main)
    _fit(net, pictures, tmp_path, trainable="all")
    assert {"auxiliary.weight", "auxiliary.bias"} <= _moved(net, before)


def test_only_auxiliary_classifiers_that_learn_count() -> None:
    torch.manual_seed(0)
    net: Any = nets.build("scratch/googlenet", num_classes=3)
    module = Classifier(
        net,
        phase=Phase("phase", 1, "all", 0.01, "constant"),
        num_classes=3,
        px=PX,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        optimizer="sgd",
        weight_decay=0.0,
        label_smoothing=0.0,
        channels_last=False,
    )
    pixels = torch.randint(0, 256, (2, 3, PX, PX), dtype=torch.uint8)
    assert len(module._all_logits(pixels)) == 3
    net.aux1.requires_grad_(False)
    assert len(module._all_logits(pixels)) == 2


def test_auxiliary_classifiers_cost_nothing_while_they_are_frozen(
    pictures: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: Any = nets.build("scratch/ablation_inception_aux", num_classes=3)
    monkeypatch.setattr(net, "forward_with_auxiliary", None)  # a call would fail
    before = _state(net)
    _fit(net, pictures, tmp_path, trainable="head")
    assert _moved(net, before) == {"fc.weight", "fc.bias"}


def test_gradient_norms_are_noted_once_an_epoch(pictures: Store, tmp_path: Path) -> None:
    outcome = _fit(
        nets.build("scratch/resnet20", num_classes=3),
        pictures,
        tmp_path,
        trainable="all",
        **{"train.gradient_norms": True},
    )
    assert [(row["epoch"], row["depth"]) for row in outcome.gradients] == [(e, d) for e in (4, 5) for d in range(20)]
    assert all(row["norm"] > 0 for row in outcome.gradients)
    assert outcome.gradients[0]["layer"] == "conv1"


def test_the_net_ends_with_the_best_epochs_weights_and_the_rows_count_on(pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/resnet20", num_classes=3)
    outcome = _fit(net, pictures, tmp_path, trainable="all", lr=0.1)
    assert [row["epoch"] for row in outcome.rows] == [4, 5]
    best = min(outcome.rows, key=lambda row: row["val/loss"])
    assert outcome.best_epoch == best["epoch"]
    saved = torch.load(outcome.best, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[f"net.{name}"]) for name, value in net.state_dict().items())
    assert outcome.steps == 4


def test_the_same_seed_gives_the_same_weights_bit_by_bit(pictures: Store, tmp_path: Path) -> None:
    import lightning as L

    states = []
    for run in ("a", "b"):
        L.seed_everything(1, verbose=False)
        net = nets.build("scratch/resnet20", num_classes=3)
        _fit(net, pictures, tmp_path / run, trainable="all")
        states.append(_state(net))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_phase_ends_early_when_nothing_gets_better(pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/lenet5", num_classes=3)
    # At a rate of 1e-30 no weight changes, so the second epoch cannot be better than the first.
    outcome = _fit(net, pictures, tmp_path, trainable="all", lr=1e-30, **{"train.patience": 1})
    assert len(outcome.rows) == 2
    assert outcome.best_epoch == 4


def test_a_loss_that_is_not_a_number_stops_the_training(pictures: Store, tmp_path: Path) -> None:
    net = nets.build("scratch/resnet20", num_classes=3)
    with torch.no_grad():
        net.get_classifier().weight.fill_(float("nan"))
    with pytest.raises(
        UserError, match=r"loss became nan in phase phase, epoch 1, step 1; lower train.phases.phase.lr"
    ):
        _fit(net, pictures, tmp_path, trainable="all")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precisions_a_processor_can_run(precision: str, pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/resnet20", num_classes=3)
    outcome = _fit(net, pictures, tmp_path, trainable="all", **{"train.precision": precision})
    assert all(np.isfinite(row["train/loss"]) for row in outcome.rows)
    assert all(value.dtype in (torch.float32, torch.int64) for value in net.state_dict().values())


def test_normalize_is_the_formula() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(Normalize(mean, std)(pixels), expected, atol=1e-6)


def test_what_this_machine_cannot_do_is_said_in_one_line(pictures: Store, tmp_path: Path) -> None:
    net = nets.build("scratch/lenet5", num_classes=3)
    with pytest.raises(UserError, match="16-mixed needs a GPU; use bf16-mixed or 32-true"):
        _fit(net, pictures, tmp_path, trainable="all", **{"train.precision": "16-mixed"})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"cannot give train\.accelerator gpu"):
            _fit(net, pictures, tmp_path, trainable="all", **{"train.accelerator": "gpu"})


def test_too_large_a_batch_says_what_to_lower(pictures: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Classifier, "training_step", full)
    with pytest.raises(UserError, match=r"does not hold train\.batch_size 6; lower it"):
        _fit(nets.build("scratch/lenet5", num_classes=3), pictures, tmp_path, trainable="all")
