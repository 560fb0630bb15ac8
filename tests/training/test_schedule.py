"""What learns in a phase follows from the phase alone, and what is frozen is in evaluation mode."""

import pytest
import timm
import torch
from torch import nn

from pipeline import nets
from pipeline.config import PhaseParams
from pipeline.errors import UserError
from pipeline.training import schedule

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


def test_random_weights_leave_nothing_frozen() -> None:
    phases = {
        "frozen": PhaseParams(epochs=1, trainable="head", lr=0.1),
        "finetune": PhaseParams(epochs=3, trainable="last:2", lr=0.01, scheduler="cosine"),
    }
    kept = schedule.plan(phases, random_start=False, fast_dev_run=False)
    assert [(p.name, p.trainable, p.epochs) for p in kept] == [("frozen", "head", 1), ("finetune", "last:2", 3)]
    assert [p.trainable for p in schedule.plan(phases, random_start=True, fast_dev_run=False)] == ["all", "all"]
    assert [p.epochs for p in schedule.plan(phases, random_start=False, fast_dev_run=True)] == [1, 1]
