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
from pipeline.parameters import TrainParams
from pipeline.training import checkpoints, schedule
from pipeline.training.checkpoints import load_weights
from pipeline.training.classifier import Classifier
from pipeline.training.distillation import Teacher
from pipeline.training.fit import fit
from pipeline.training.normalize import Normalize
from pipeline.training.progress import Outcome
from pipeline.training.weights import ModelCard, save_model

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


def _params(**changed: Any) -> TrainParams:
    """Of train; `phase` is the phase's own, beside two epochs of everything at a rate of 0.01."""
    overrides = {"batch_size": 6, "accelerator": "cpu", "transforms": {}, **changed}
    phase = {"trainable": "all", "epochs": 2, "lr": 0.01, **overrides.pop("phase", {})}
    if "steps" in phase:
        del phase["epochs"]
    overrides["phases"] = {"phase": phase}
    return config.load(
        ROOT / "params.yaml", overrides={f"train.{key}": value for key, value in overrides.items()}
    ).train


def _module(net: nn.Module, params: TrainParams, **given: Any) -> Classifier:
    (phase,) = schedule.plan(params, net, px=PX, random_start=False)
    return Classifier(
        net, phase=phase, params=params, pictures=12, num_classes=3, mean=(0.5,) * 3, std=(0.25,) * 3, **given
    )


def _fit(
    net: nn.Module,
    pictures: Store,
    folder: Path,
    *,
    given: dict[str, Any] | None = None,
    before: int = 0,
    **changed: Any,
) -> Outcome:
    """One phase; `before` is how many of its epochs an earlier call has been through, which was stopped."""
    params = _params(**changed)
    module = _module(net, params, **(given or {}))
    data = PictureData(
        pictures,
        px=PX,
        in_chans=3,
        batch_size=module.phase.batch_size,
        parts=module.phase.accumulate,
        chosen=params.transforms,
        seed=params.seed,
        workers=0,
    )
    points: list[tuple[int, dict[str, float]]] = []
    outcome = fit(
        module,
        data,
        params=params,
        folder=folder,
        first_epoch=3,
        first_step=100,
        log=lambda metrics, *, step: points.append((step, dict(metrics))),
        sync=lambda: None,
    )
    module.close()
    assert len([step for step, metrics in points if "val/top1" in metrics]) == len(outcome.rows) - before
    assert points[-1][0] == 100 + outcome.steps
    return outcome


def _moved(net: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def _state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


FAMILIES = ["alexnet", "zfnet", "vgg_f", "nin", "vgg11_bn", "googlenet", "preact_resnet18", "densenet121"]
FAMILIES += ["resnext29_8x64d", "se_resnet50", "mobilenet_v1_025", "efficientnet_b0", "unet_encoder", "plain20"]


@pytest.mark.parametrize("average", ["none", "ema", "swa"])
@pytest.mark.parametrize(
    "name",
    [
        *["test_resnet", "test_efficientnet", "test_vit", "scratch/resnet20", "scratch/lenet5"],
        *(pytest.param(f"scratch/{name}", marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_frozen_means_frozen_to_the_bit_and_the_head_moves(
    name: str, average: str, pictures: Store, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nets.build(name, num_classes=3, **({"drop_rate": 0.1} if "test" in name else {}))
    before = _state(net)
    px = 64 if any(word in name for word in ("alexnet", "zfnet", "vgg_f", "nin")) else PX
    _fit(net, pictures, tmp_path, phase={"trainable": "head", "px": px}, average=average, clip=1.0, l1=1e-4, mixup=0.2)
    head = {id(parameter) for parameter in net.get_classifier().parameters()}
    assert _moved(net, before) == {key for key, parameter in net.named_parameters() if id(parameter) in head}


@pytest.mark.parametrize(
    ("trainable", "learning"), [("head", {"", "head_drop", "classifier"}), ("all", None)], ids=["head", "all"]
)
def test_a_module_learns_in_training_alone(
    trainable: str,
    learning: set[str] | None,
    pictures: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: dict[str, list[set[str]]] = {"train": [], "val": []}
    net = nets.build("scratch/mobilenet_v1_025", num_classes=3)
    every = {name for name, _ in net.named_modules()}
    for split, name in (("train", "training_step"), ("val", "validation_step")):
        step = getattr(Classifier, name)

        def noted(self: Classifier, batch: Any, index: int, *, split: str = split, step: Any = step) -> Any:
            modes[split].append({name for name, module in self.net.named_modules() if module.training})
            return step(self, batch, index)

        monkeypatch.setattr(Classifier, name, noted)
    _fit(net, pictures, tmp_path, phase={"trainable": trainable})
    assert modes["val"] == [set()] * 2
    assert modes["train"] == [learning or every] * 4


def test_a_module_that_keeps_something_for_evaluation_hears_of_each(pictures: Store, tmp_path: Path) -> None:
    class Keeper(nn.Identity):
        """As timm's levit has one: what it computes from its weights is kept until its mode is set again."""

        heard: list[bool]

        def train(self, mode: bool = True) -> "Keeper":
            self.heard.append(mode)
            return super().train(mode)

    net = nets.build("scratch/mobilenet_v1_025", num_classes=3)
    net.keeper = Keeper()
    net.keeper.heard = []
    _fit(net, pictures, tmp_path)
    assert net.keeper.heard.count(False) >= 2


def test_everything_moves_when_all_learns(pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/resnet20", num_classes=3)
    before = _state(net)
    _fit(net, pictures, tmp_path)
    assert _moved(net, before) == set(before)


def test_auxiliary_classifiers_learn_with_their_share_of_the_loss(pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: Any = nets.build("scratch/ablation_inception_aux", num_classes=3)
    before = _state(net)
    module = _module(net, _params(phase={"epochs": 1}, channels_last=False))
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    pixels, labels = torch.randint(0, 256, (4, 3, PX, PX), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    loss = module.training_step((pixels, labels), 0)
    main, auxiliary = (
        nn.functional.cross_entropy(logits, labels) for logits in net.forward_with_auxiliary(module.normalize(pixels))
    )
    torch.testing.assert_close(loss, main + 0.3 * auxiliary)
    # what is reported is the main loss, as in validation
    torch.testing.assert_close(module.train_loss.compute(), main)
    _fit(net, pictures, tmp_path)
    assert {"auxiliary.weight", "auxiliary.bias"} <= _moved(net, before)


def test_only_auxiliary_classifiers_that_learn_count() -> None:
    torch.manual_seed(0)
    net: Any = nets.build("scratch/googlenet", num_classes=3)
    module = _module(net, _params(phase={"epochs": 1}, channels_last=False))
    pixels = torch.randint(0, 256, (2, 3, PX, PX), dtype=torch.uint8)
    assert len(module._all_logits(net, pixels)) == 3
    net.aux1.requires_grad_(False)
    assert len(module._all_logits(net, pixels)) == 2


def test_auxiliary_classifiers_cost_nothing_while_they_are_frozen(
    pictures: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: Any = nets.build("scratch/ablation_inception_aux", num_classes=3)
    monkeypatch.setattr(net, "forward_with_auxiliary", None)  # a call would fail
    before = _state(net)
    _fit(net, pictures, tmp_path, phase={"trainable": "head"})
    assert _moved(net, before) == {"fc.weight", "fc.bias"}


def test_gradient_norms_are_noted_once_an_epoch(pictures: Store, tmp_path: Path) -> None:
    outcome = _fit(
        nets.build("scratch/resnet20", num_classes=3),
        pictures,
        tmp_path,
        gradient_norms=True,
    )
    assert [(row["epoch"], row["depth"]) for row in outcome.gradients] == [(e, d) for e in (4, 5) for d in range(20)]
    assert all(row["norm"] > 0 for row in outcome.gradients)
    assert outcome.gradients[0]["layer"] == "conv1"


def test_the_net_ends_with_the_best_epochs_weights_and_the_rows_count_on(pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/resnet20", num_classes=3)
    outcome = _fit(net, pictures, tmp_path, phase={"lr": 0.1})
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
        _fit(net, pictures, tmp_path / run)
        states.append(_state(net))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_phase_ends_early_when_nothing_gets_better(pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/lenet5", num_classes=3)
    # At a rate of 1e-30 no weight changes, so the second epoch cannot be better than the first.
    outcome = _fit(net, pictures, tmp_path, phase={"lr": 1e-30, "patience": 1})
    assert len(outcome.rows) == 2
    assert outcome.best_epoch == 4


def test_a_loss_that_is_not_a_number_stops_the_training(pictures: Store, tmp_path: Path) -> None:
    net = nets.build("scratch/resnet20", num_classes=3)
    with torch.no_grad():
        net.get_classifier().weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"loss became nan in phase phase, epoch 1, step 1; lower its lr"):
        _fit(net, pictures, tmp_path)


def test_no_checkpoint_is_written_after_such_a_loss_was_left_unseen_on_a_device() -> None:
    module = _module(nets.build("scratch/lenet5", num_classes=3), _params())
    # As on an accelerator, where they are looked at together.
    module._unseen = [("epoch 1, step 3", torch.tensor(1.0)), ("epoch 1, step 4", torch.tensor(float("inf")))]
    with pytest.raises(UserError, match=r"loss became inf in phase phase, epoch 1, step 4; lower its lr"):
        module.on_save_checkpoint({"state_dict": {}})


def test_the_best_epochs_checkpoint_is_the_last_one_until_there_is_a_later(pictures: Store, tmp_path: Path) -> None:
    one = _fit(nets.build("scratch/lenet5", num_classes=3), pictures, tmp_path / "1", phase={"epochs": 1})
    assert one.best.read_bytes() == one.last.read_bytes()
    # At a rate of 1e-30 no weight changes, so the second epoch cannot be better than the first.
    two = _fit(nets.build("scratch/lenet5", num_classes=3), pictures, tmp_path / "2", phase={"lr": 1e-30})
    best, last = (torch.load(path, weights_only=True)["epoch"] for path in (two.best, two.last))
    assert (best, last) == (0, 1)


def test_an_epochs_row_says_how_long_data_was_waited_for(pictures: Store, tmp_path: Path) -> None:
    outcome = _fit(nets.build("scratch/lenet5", num_classes=3), pictures, tmp_path)
    assert all(0 < row["data_wait"] < 1 for row in outcome.rows)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precisions_a_processor_can_run(precision: str, pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/resnet20", num_classes=3)
    outcome = _fit(net, pictures, tmp_path, precision=precision)
    assert all(np.isfinite(row["train/loss"]) for row in outcome.rows)
    assert all(value.dtype in (torch.float32, torch.int64) for value in net.state_dict().values())


def test_frozen_batch_norms_adapt_their_statistics_and_nothing_else(pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/resnet20", num_classes=3)
    before = _state(net)
    _fit(net, pictures, tmp_path, phase={"trainable": "head"}, frozen_bn="adapt")
    moved = _moved(net, before)
    assert {"fc.weight", "bn1.running_mean", "layer3.2.bn2.running_var"} <= moved
    assert all(name.startswith("fc.") or "running_" in name or name.endswith("num_batches_tracked") for name in moved)


def test_a_batch_in_parts_is_the_batch(pictures: Store, tmp_path: Path) -> None:
    states = []
    for parts in (1, 3):
        torch.manual_seed(0)
        net = nets.build("scratch/lenet5", num_classes=3)  # without batch norms
        _fit(net, pictures, tmp_path / str(parts), phase={"accumulate": parts})
        states.append(_state(net))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-5, rtol=1e-4)


def test_a_phase_of_steps_ends_with_them_and_is_judged(pictures: Store, tmp_path: Path) -> None:
    outcome = _fit(nets.build("scratch/lenet5", num_classes=3), pictures, tmp_path, phase={"steps": 3, "epochs": 50})
    assert outcome.steps == 3
    assert [row["epoch"] for row in outcome.rows] == [4, 5]  # two steps an epoch


@pytest.mark.parametrize(
    "changed",
    [{"precision": "bf16-mixed"}, {"channels_last": True}, {"precision": "bf16-mixed", "channels_last": True}]
    + [
        pytest.param({"compile": True, **more}, marks=pytest.mark.slow)
        for more in (
            {},
            {"precision": "bf16-mixed"},
            {"channels_last": True},
            {"phase": {"epochs": 3, "accumulate": 2}},
        )
    ],
)
def test_every_way_of_computing_has_the_same_loss_curve(
    changed: dict[str, Any], pictures: Store, tmp_path: Path
) -> None:
    curves = []
    for number, settings in enumerate(({"channels_last": False}, {"channels_last": False, **changed})):
        torch.manual_seed(0)
        net = nets.build("scratch/lenet5", num_classes=3)
        outcome = _fit(net, pictures, tmp_path / str(number), **{"phase": {"epochs": 3}, **settings})
        curves.append([row["train/loss"] for row in outcome.rows])
    assert len(curves[0]) == len(curves[1])
    tolerance = 0.03 if "precision" in changed else 1e-4
    np.testing.assert_allclose(curves[1][: len(curves[0])], curves[0], rtol=tolerance)


def test_a_gradient_is_cut_to_the_largest_norm(pictures: Store, tmp_path: Path) -> None:
    net = nets.build("scratch/lenet5", num_classes=3)
    before = _state(net)
    # One step of plain descent at a rate of 1 moves the weights by the gradient itself.
    phase = {"steps": 1, "lr": 1.0, "clip": 0.001, "optimizer": "momentum", "scheduler": "constant"}
    _fit(net, pictures, tmp_path, phase=phase, weight_decay=0.0)
    moved = torch.cat([(value - before[name]).flatten() for name, value in net.state_dict().items()])
    assert float(moved.norm()) == pytest.approx(0.001, rel=1e-2)


def test_class_weights_penalties_and_smoothing_are_in_the_loss() -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/lenet5", num_classes=3)
    weights = torch.tensor([1.0, 2.0, 0.5])
    params = _params(label_smoothing=0.1, l1=1e-3, activity=0.01, channels_last=False)
    module = _module(net, params, class_weights=weights)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    pixels, labels = torch.randint(0, 256, (4, 3, PX, PX), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    loss = module.training_step((pixels, labels), 0)
    x = module.normalize(pixels)
    classes = nn.functional.cross_entropy(net(x), labels, weight=weights, label_smoothing=0.1)
    absolute = sum(p.abs().sum() for p in net.parameters() if p.ndim > 1)
    reaching = net.forward_head(net.forward_features(x), pre_logits=True)
    torch.testing.assert_close(loss, classes + 1e-3 * absolute + 0.01 * reaching.square().mean())
    torch.testing.assert_close(module.train_loss.compute(), classes)


def test_smaller_pictures_reach_the_net_in_a_phase_that_asks_for_them() -> None:
    net = nets.build("scratch/resnet20", num_classes=3)
    module = _module(net, _params(phase={"px": 28}))
    seen: list[torch.Size] = []
    net.conv1.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    module(torch.randint(0, 256, (2, 3, PX, PX), dtype=torch.uint8))
    assert seen == [torch.Size([2, 3, 28, 28])]


def test_a_plateau_lowers_the_rate_after_validations_that_are_no_better(pictures: Store, tmp_path: Path) -> None:
    phase = {"scheduler": "plateau", "lr": 1e-30, "epochs": 6}
    outcome = _fit(nets.build("scratch/lenet5", num_classes=3), pictures, tmp_path, phase=phase)
    rates = [row["lr"] for row in outcome.rows]
    assert rates[0] == 1e-30
    assert min(rates) <= 1.01e-31


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_what_is_judged_and_kept_is_the_average(average: str, pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/resnet20", num_classes=3)
    phase = {"epochs": 4, "lr": 0.05}
    outcome = _fit(net, pictures, tmp_path, phase=phase, average=average, swa_start=0.5, ema_decay=0.5)
    saved = torch.load(outcome.best, weights_only=True)["state_dict"]
    kept = "average.net" if int(saved["average.count"]) else "net"
    assert all(torch.equal(value, saved[f"{kept}.{name}"]) for name, value in net.state_dict().items())
    last = torch.load(outcome.last, weights_only=True)["state_dict"]
    assert int(last["average.count"]) == (8 if average == "ema" else 2)
    assert not torch.equal(last["net.conv1.weight"], last["average.net.conv1.weight"])


def _states_after_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Where the net's state after each optimiser step will be."""
    states: list[dict[str, torch.Tensor]] = []
    step = Classifier.optimizer_step

    def noted(self: Classifier, *args: Any, **given: Any) -> None:
        step(self, *args, **given)
        states.append(_state(self.net))

    monkeypatch.setattr(Classifier, "optimizer_step", noted)
    return states


@pytest.mark.parametrize(
    ("phase", "start", "averaged"),
    [
        ({"epochs": 1}, 0.5, [2]),
        ({"epochs": 3}, 0.5, [4, 6]),
        ({"epochs": 4}, 0.5, [6, 8]),
        ({"steps": 1}, 0.5, [1]),
        ({"steps": 5}, 0.5, [4, 5]),
        ({"steps": 7}, 0.9, [7]),
        ({"epochs": 5, "lr": 1e-30, "patience": 2}, 0.3, [4, 6]),  # the third epoch of five is the last
        ({"epochs": 2, "batch_size": 12, "accumulate": 2}, 0.0, [1, 2]),
    ],
)
def test_swa_is_the_mean_over_epochs_ends_after_its_start_and_the_very_last_step(
    phase: dict[str, Any],
    start: float,
    averaged: list[int],
    pictures: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An epoch has two steps, but where its batch is 12 pictures."""
    states = _states_after_steps(monkeypatch)
    net = nets.build("scratch/lenet5", num_classes=3)
    outcome = _fit(net, pictures, tmp_path, phase=phase, average="swa", swa_start=start)
    assert outcome.steps == len(states) == averaged[-1]
    last = torch.load(outcome.last, weights_only=True)["state_dict"]
    assert int(last["average.count"]) == len(averaged)
    for name, _ in net.named_parameters():
        mean = torch.stack([states[step - 1][name] for step in averaged]).mean(0)
        torch.testing.assert_close(last[f"average.net.{name}"], mean, msg=name)


def test_a_trial_of_one_batch_is_averaged_too(pictures: Store, tmp_path: Path) -> None:
    net = nets.build("scratch/lenet5", num_classes=3)
    outcome = _fit(net, pictures, tmp_path, average="swa", fast_dev_run=True)
    assert int(torch.load(outcome.last, weights_only=True)["state_dict"]["average.count"]) == 1


@pytest.mark.parametrize("stop", [3, 5, 6])
def test_swa_of_a_resumed_phase_that_ends_in_mid_epoch_is_the_same_to_the_bit(
    stop: int, pictures: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"phase": {"steps": 7}, "average": "swa", "swa_start": 0.3, "checkpoint_every": 1}

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nets.build("scratch/resnet20", num_classes=3)

    monkeypatch.setattr(checkpoints, "SPACED_S", 0.0)
    step = Classifier.training_step

    def broken(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        if self.global_step == stop:
            raise RuntimeError("stopped here")
        return step(self, batch, index)

    whole = _fit(fresh(), pictures, tmp_path / "whole", **asked)
    monkeypatch.setattr(Classifier, "training_step", broken)
    with pytest.raises(RuntimeError, match="stopped here"):
        _fit(fresh(), pictures, tmp_path / "stopped", **asked)
    monkeypatch.setattr(Classifier, "training_step", step)
    resumed = _fit(fresh(), pictures, tmp_path / "stopped", before=stop // 2, **asked)
    first, second = (torch.load(each.last, weights_only=True)["state_dict"] for each in (whole, resumed))
    assert int(first["average.count"]) == 3
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_teacher_pulls_the_logits_towards_its_own(pictures: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    card = ModelCard(
        name="scratch/lenet5",
        in_chans=3,
        stem="default",
        classes=("a", "b", "c"),
        px=PX,
        pack_px=PX,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        start="random",
        start_source="a test",
        fast_dev_run=False,
    )
    sure: Any = nets.build("scratch/lenet5", num_classes=3)
    with torch.no_grad():
        sure.get_classifier().bias.copy_(torch.tensor([2.0, 0.0, -2.0]))
    save_model(tmp_path / "teacher.safetensors", sure, card)
    teacher = Teacher(tmp_path / "teacher.safetensors", classes=card.classes, in_chans=3)
    pixels = torch.from_numpy(np.stack([pictures[i] for i in range(12)])).permute(0, 3, 1, 2)

    def apart(net: nn.Module) -> float:
        module = _module(net, _params())
        with torch.no_grad():
            return float((module.eval()(pixels).softmax(1) - teacher.logits(pixels).softmax(1)).abs().mean())

    pupil = nets.build("scratch/lenet5", num_classes=3)
    before, names = apart(pupil), set(pupil.state_dict())
    phase = {"epochs": 20, "scheduler": "constant"}
    outcome = _fit(pupil, pictures, tmp_path / "fit", given={"teacher": teacher}, phase=phase, distill_weight=1.0)
    load_weights(pupil, outcome.last)  # the best by the labels may be from before
    assert apart(pupil) < before / 4
    saved = torch.load(tmp_path / "fit" / "best.ckpt", weights_only=True)["state_dict"]
    assert {name for name in saved if name.startswith("net.")} == {f"net.{name}" for name in names}


def test_normalize_is_the_formula() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(Normalize(mean, std)(pixels), expected, atol=1e-6)


def test_what_this_machine_cannot_do_is_said_in_one_line(pictures: Store, tmp_path: Path) -> None:
    net = nets.build("scratch/lenet5", num_classes=3)
    with pytest.raises(UserError, match="16-mixed needs a GPU; use bf16-mixed or 32-true"):
        _fit(net, pictures, tmp_path, precision="16-mixed")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"cannot give train\.accelerator gpu"):
            _fit(net, pictures, tmp_path, accelerator="gpu")


def test_too_large_a_batch_says_what_to_lower(pictures: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Classifier, "training_step", full)
    with pytest.raises(UserError, match=r"does not hold train\.batch_size 6; lower it"):
        _fit(nets.build("scratch/lenet5", num_classes=3), pictures, tmp_path)


@pytest.mark.parametrize("parts", [{"batch_size": 11}, {"batch_size": 8, "accumulate": 4}])
def test_what_is_left_for_the_last_batch_trains_a_batch_norm_of_one_pixel(
    parts: dict[str, int], pictures: Store, tmp_path: Path
) -> None:
    # Of 12 pictures: a last batch of 1, or of 4 in 4 parts.
    net = nets.build("scratch/mobilenet_v1_025", num_classes=3, in_chans=3)
    assert _fit(net, pictures, tmp_path, phase={"epochs": 1}, **parts).steps == 2


def test_what_was_logged_is_on_disk_before_a_checkpoint_is_in_place(
    pictures: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    place = checkpoints._put_in_place

    def placed(beside: Path, *, best: bool) -> None:
        happened.append("checkpoint")
        place(beside, best=best)

    monkeypatch.setattr(checkpoints, "_put_in_place", placed)
    monkeypatch.setattr(checkpoints, "SPACED_S", 0.0)
    params = _params(checkpoint_every=1)
    module = _module(nets.build("scratch/lenet5", num_classes=3, in_chans=3), params)
    data = PictureData(pictures, px=PX, in_chans=3, batch_size=6, chosen={}, seed=0, workers=0)
    fit(
        module,
        data,
        params=params,
        folder=tmp_path,
        first_epoch=0,
        first_step=0,
        log=lambda _, *, step: happened.append(f"step {step}"),
        sync=lambda: happened.append("sync"),
    )
    # Two epochs of two steps: a checkpoint after each first step, and one at each end.
    one = ["sync", "checkpoint"]
    assert happened == [*one, "step 2", *one, *one, "step 4", *one]
