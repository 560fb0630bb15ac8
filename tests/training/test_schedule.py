"""What learns in a phase follows from the phase alone, and what is frozen is in evaluation mode."""

from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from torch import nn

from pipeline import config, nets
from pipeline.errors import UserError
from pipeline.parameters import ScheduleName, TrainParams
from pipeline.training import schedule

ROOT = Path(__file__).parents[2]

NETS = ["test_resnet", "test_efficientnet", "test_vit", "scratch/lenet5", "scratch/resnet20"]


def _net(name: str) -> nn.Module:
    return nets.build(name, num_classes=3)


def _learning(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", NETS)
def test_head_is_the_classifier_and_nothing_else(name: str) -> None:
    net = _net(name)
    thawed = schedule.thaw(net, "head")
    head = {id(parameter) for parameter in net.get_classifier().parameters()}
    assert {id(p) for p in net.parameters() if p.requires_grad} == head
    assert set(thawed) == _learning(net)


@pytest.mark.parametrize("name", NETS)
def test_last_n_adds_groups_from_the_end_until_all_is_thawed(name: str) -> None:
    net = _net(name)
    sizes = [len(schedule.thaw(net, "head"))]
    number = 1
    while True:
        try:
            sizes.append(len(schedule.thaw(net, f"last:{number}")))
        except UserError as error:
            assert f"has {number - 1} groups" in str(error)  # noqa: PT017, the last of a sequence
            break
        number += 1
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == len(list(net.parameters()))


def test_last_n_thaws_the_layers_next_to_the_head() -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    assert {name.split(".")[0] for name in schedule.thaw(net, "last:1")} == {"layer4", "fc"}


def test_what_learns_does_not_depend_on_the_phase_before() -> None:
    net = _net("test_resnet")
    schedule.thaw(net, "last:1")
    fresh = _learning(net)
    schedule.thaw(net, "all")
    schedule.thaw(net, "last:1")
    assert _learning(net) == fresh


@pytest.mark.parametrize("name", NETS)
def test_a_frozen_module_is_wholly_in_evaluation_mode(name: str) -> None:
    net = _net(name)
    schedule.thaw(net, "head")
    schedule.set_mode(net)
    for path, module in net.named_modules():
        parameters = list(module.parameters())
        if parameters:
            assert module.training == any(p.requires_grad for p in parameters), path


def test_everything_trains_in_a_phase_of_all_a_norm_without_weights_included() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5))
    net.eval()
    schedule.set_mode(net)
    assert all(module.training for module in net.modules())


def test_a_frozen_nets_output_is_that_of_evaluation_while_its_dropout_before_the_head_is_on() -> None:
    net = nets.build("test_efficientnet", num_classes=3, drop_rate=0.5, drop_path_rate=0.5)
    schedule.thaw(net, "head")
    schedule.set_mode(net)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first, again = net.forward_features(x), net.forward_features(x)
    assert torch.equal(first, again)
    assert not torch.equal(net.forward_head(first), net.forward_head(first))


def _params(**changed: Any) -> TrainParams:
    return config.load(ROOT / "params.yaml", overrides={f"train.{key}": value for key, value in changed.items()}).train


def test_random_weights_leave_nothing_frozen() -> None:
    net = _net("test_resnet")
    params = _params(phases={"frozen": {"trainable": "head", "epochs": 1}, "finetune": {"trainable": "last:2"}})
    kept = schedule.plan(params, net, px=32, random_start=False)
    assert [(p.name, p.trainable, p.epochs) for p in kept] == [("frozen", "head", 1), ("finetune", "last:2", 3)]
    assert [p.trainable for p in schedule.plan(params, net, px=32, random_start=True)] == ["all", "all"]
    trial = params.model_copy(update={"fast_dev_run": True})
    assert [p.epochs for p in schedule.plan(trial, net, px=32, random_start=False)] == [1, 1]


def test_a_phase_takes_what_it_does_not_say_from_train() -> None:
    params = _params(
        lr=0.5, optimizer="lamb", clip=2.0, phases={"a": {"trainable": "all"}, "b": {"trainable": "all", "lr": 0.1}}
    )
    first, second = schedule.plan(params, _net("test_resnet"), px=48, random_start=False)
    assert (first.lr, first.optimizer, first.clip, first.px, first.batch_size) == (0.5, "lamb", 2.0, 48, 64)
    assert (second.lr, second.scheduler, second.warmup) == (0.1, "onecycle", "auto")


def test_steps_stand_in_place_of_epochs() -> None:
    phases = {"a": {"trainable": "all", "steps": 7, "batch_size": 10}, "b": {"trainable": "all", "epochs": 2}}
    by_steps, by_epochs = schedule.plan(_params(phases=phases), _net("test_resnet"), px=32, random_start=False)
    assert (by_steps.epochs_of(31), by_steps.total_steps(31)) == (2, 7)
    assert (by_epochs.epochs_of(130), by_epochs.total_steps(130)) == (2, 6)


@pytest.mark.parametrize("name", NETS)
def test_from_thaws_all_that_is_nearer_to_the_head(name: str) -> None:
    net = _net(name)
    first = next(n for n, module in net.named_modules() if n and any(True for _ in module.parameters()))
    assert set(schedule.thaw(net, f"from:{first}")) == {n for n, _ in net.named_parameters()}


def test_from_begins_with_the_block_that_holds_the_module() -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    thawed = schedule.thaw(net, "from:layer3")
    assert {name.split(".")[0] for name in thawed} == {"layer3", "layer4", "fc"}
    assert schedule.thaw(net, "from:fc") == ["fc.weight", "fc.bias"]
    assert {n.split(".")[0] for n in schedule.thaw(net, "from:layer[34]*")} == {"layer3", "layer4", "fc"}


def test_weights_by_name_and_parts_joined() -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    biases = {name for name, _ in net.named_parameters() if name.endswith(".bias")}
    assert set(schedule.thaw(net, "params:*.bias")) == biases
    assert set(schedule.thaw(net, "head+params:*.bias")) == biases | {"fc.weight"}


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("from:layr4", r"trainable from:layr4: this net has no such module with weights; did you mean layer4"),
        ("params:fc.wieght", r"no such parameter; did you mean fc.weight"),
        ("last:99", r"this net has 5 groups of layers below its head; use all"),
    ],
)
def test_what_the_net_has_not_is_said_with_what_it_has(trainable: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule.thaw(timm.create_model("test_resnet", num_classes=3), trainable)


@pytest.mark.parametrize("name", [*NETS, "scratch/densenet121", "scratch/vgg11_bn"])
def test_gradual_unfreezing_thaws_more_with_every_phase_until_all_learns(name: str) -> None:
    with torch.device("meta"):
        net = _net(name)
    phases = schedule.plan(_params(phases="gradual_unfreezing"), net, px=32, random_start=False)
    learning = [len(schedule.thaw(net, phase.trainable)) for phase in phases]
    assert learning == sorted(set(learning))
    assert learning[-1] == len(list(net.parameters()))
    assert [phase.epochs for phase in phases] == [1] * (len(phases) - 1) + [3]
    assert 3 <= len(phases) <= 9


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_every_ready_made_schedule_can_be_planned(name: str) -> None:
    phases = schedule.plan(_params(phases=name), _net("test_resnet"), px=32, random_start=False)
    assert phases[-1].epochs == 3
    for phase in phases:
        assert schedule.thaw(_net("test_resnet"), phase.trainable)


def test_frozen_batch_norms_adapt_only_where_that_is_asked_for() -> None:
    net = _net("test_resnet")
    schedule.thaw(net, "head")
    schedule.set_mode(net, adapt_bn=True)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.training for norm in norms)
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())
    assert not any(module.training for module in net.modules() if isinstance(module, nn.Conv2d))
    schedule.set_mode(net)
    assert not any(norm.training for norm in norms)
