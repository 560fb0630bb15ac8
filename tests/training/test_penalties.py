"""Penalties: what counts in them, and that watching a net changes nothing else about it."""

import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from pipeline import nets
from pipeline.training import penalties
from pipeline.training.penalties import Activity


class Tiny(nn.Module):
    """Features 4 to 3, and a classifier of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.body(x)))
        return logits


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def batch(seed: int = 1, *, size: int = 5) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def test_l1_is_the_sum_over_the_kernels_that_learn() -> None:
    net = tiny()
    both = net.body.weight.abs().sum() + net.head.weight.abs().sum()
    torch.testing.assert_close(penalties.l1(net), both)
    net.body.requires_grad_(False)
    torch.testing.assert_close(penalties.l1(net), net.head.weight.abs().sum())


def test_l1_pulls_every_kernel_by_its_sign_and_nothing_else() -> None:
    net = tiny()
    penalties.l1(net).backward()
    assert net.body.weight.grad is not None
    assert torch.equal(net.body.weight.grad, net.body.weight.sign())
    assert net.body.bias.grad is None
    assert net.norm.weight.grad is None


def test_l1_counts_a_shared_kernel_once() -> None:
    net = tiny()
    once = penalties.l1(net)
    net.again = net.head
    assert torch.equal(penalties.l1(net), once)


def test_l1_is_0_where_no_kernel_learns() -> None:
    net = tiny().requires_grad_(False)
    net.body.bias.requires_grad_(True)
    assert torch.equal(penalties.l1(net), torch.tensor(0.0))


def test_activity_is_the_mean_square_of_what_enters_the_classifier() -> None:
    net = tiny()
    watched = Activity(net)
    net(batch())
    penalty = watched.take()
    torch.testing.assert_close(penalty, net.norm(net.body(batch())).square().mean())
    penalty.backward()
    assert net.body.weight.grad is not None
    assert net.body.weight.grad.abs().sum() > 0
    assert net.head.weight.grad is None


def test_activity_is_taken_once() -> None:
    net = tiny()
    watched = Activity(net)
    net(batch())
    assert watched.take() > 0
    assert torch.equal(watched.take(), torch.tensor(0.0))


def test_activity_sees_all_heads() -> None:
    torch.manual_seed(0)
    net = VisionTransformerDistilled(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3)
    entered: list[Tensor] = []
    for head in net.get_classifier():
        head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    watched = Activity(net)
    net(torch.rand(2, 3, 16, 16))
    assert len(entered) == 2
    torch.testing.assert_close(watched.take(), torch.stack(entered).square().mean())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "scratch/resnet20"])
def test_activity_sees_what_the_classifier_of_a_net_reads(name: str) -> None:
    torch.manual_seed(0)
    net: Any = nets.build(name, num_classes=3)
    pixels = torch.rand(2, 3, 160, 160)
    watched = Activity(net)
    net(pixels)
    entering = net.forward_head(net.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(watched.take(), entering.square().mean())


def test_only_training_with_gradients_counts() -> None:
    net = tiny()
    watched = Activity(net)
    with torch.no_grad():
        net(batch())
    assert watched.take() == 0
    net.eval()
    net(batch())
    assert watched.take() == 0
    net.train()
    net.head.eval()  # as a frozen classifier is
    net(batch())
    assert watched.take() > 0


def test_activity_is_float32_under_autocast() -> None:
    net = tiny()
    watched = Activity(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(batch())
        assert watched.take().dtype == torch.float32


def test_graphs_do_not_pile_up_when_nobody_takes_the_activity() -> None:
    net = tiny()
    watched = Activity(net)
    refs = []
    for seed in range(3):
        x = batch(seed)
        refs.append(weakref.ref(x))  # the graph keeps it, for the gradient of the kernel that it meets
        net(x)
        del x
    assert [ref() is None for ref in refs] == [True, True, False]
    watched.take()
    assert refs[-1]() is None


def test_watching_is_no_part_of_the_state_and_ends_when_closed() -> None:
    net = tiny()
    keys = list(net.state_dict())
    watched = Activity(net)
    assert list(net.state_dict()) == keys
    net(batch())
    watched.close()
    assert watched.take() == 0
    net(batch())
    assert watched.take() == 0
    assert not net.head._forward_pre_hooks


def test_a_copy_of_a_watched_net_reports_to_the_same_watcher() -> None:
    net = tiny()
    watched = Activity(net)
    net(batch())  # what is seen hangs on a graph, which cannot be copied
    copy = deepcopy(net)
    watched.take()
    with torch.no_grad():
        copy.body.weight.mul_(3)
    copy(batch())
    penalty = watched.take()
    torch.testing.assert_close(penalty, copy.norm(copy.body(batch())).square().mean())
    penalty.backward()
    assert copy.body.weight.grad is not None
    assert net.body.weight.grad is None
