from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.analysis import anatomy
from pipeline.analysis.anatomy import Layer


def last(net: nn.Module, *, px: int = 64, chans: int = 1) -> Layer:
    """The last row of a net on the meta device."""
    return anatomy.dissect(
        net.eval().float().to("meta"), torch.zeros(1, chans, px, px, device="meta"), name="net"
    ).layers[-1]


def reached(net: nn.Module, *, px: int) -> tuple[int, int]:
    """Height and width of the pixels that the middle of the output truly depends on: those with a gradient."""
    net.eval()
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.1, 1)  # all of one sign: no two paths cancel
    x = torch.rand(1, 1, px, px, dtype=torch.float64).requires_grad_()
    out = net.double()(x)
    out[0, :, out.shape[2] // 2, out.shape[3] // 2].sum().backward()
    assert x.grad is not None
    rows, columns = x.grad[0, 0].nonzero().T
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


class Branches(nn.Module):
    """Joins what several paths make of the same map."""

    def __init__(self, *paths: nn.Module, join: str) -> None:
        super().__init__()
        self.paths, self.join = nn.ModuleList(paths), join

    def forward(self, x: Tensor) -> Tensor:
        outs = [path(x) for path in self.paths]
        return torch.cat(outs, dim=1) if self.join == "cat" else torch.stack(outs).sum(dim=0)


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(x)
        return out


CHAINS = {
    "stride": nn.Sequential(nn.Conv2d(1, 2, 5, 2, 2), nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, 3)),
    "dilation": nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Conv2d(2, 2, 3, dilation=(2, 4))),
    "oblong": nn.Sequential(nn.Conv2d(1, 2, (1, 7)), nn.Conv2d(2, 2, (3, 1), stride=(1, 2)), nn.Conv2d(2, 2, 3)),
    "groups": nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)),
    "pools": nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Conv2d(1, 1, 3), nn.AvgPool2d(2), nn.Conv2d(1, 1, 3)),
    "transposed": nn.Sequential(nn.Conv2d(1, 1, 4, 4), nn.ConvTranspose2d(1, 1, 4, 2, 1), nn.Conv2d(1, 1, 3)),
    "every other": nn.Sequential(nn.Conv2d(1, 1, 3), Function(lambda x: x[:, :, ::2, ::2]), nn.Conv2d(1, 1, 3)),
    "cat": Branches(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 5, padding=2), nn.AvgPool2d(3, 1, 1), join="cat"),
    "sum": nn.Sequential(
        nn.Conv2d(1, 1, 3, 2, 1),
        Branches(nn.Conv2d(1, 1, 1), nn.Sequential(nn.Conv2d(1, 1, 3, 1, 1), nn.ReLU()), join="sum"),
        nn.Conv2d(1, 1, 3),
    ),
    "channels last": nn.Sequential(
        nn.Conv2d(1, 4, 3),
        Function(lambda x: x.permute(0, 2, 3, 1)),
        nn.Linear(4, 4),
        Function(lambda x: x.permute(0, 3, 1, 2)),
        nn.Conv2d(4, 1, 3, 2),
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_window_is_what_the_gradient_reaches(chain: str) -> None:
    truth = reached(CHAINS[chain], px=64)
    row = last(CHAINS[chain])
    assert row.receptive_field == truth
    assert not row.sees_whole_picture


def conv(kernel: int, stride: int = 1, *, chans: int = 1) -> nn.Module:
    return nn.Conv2d(chans, 1, kernel, stride, kernel // 2)


def bottlenecks(count: int, *, stride: int) -> list[nn.Module]:
    """With the stride in the first 1x1, as in the paper on ResNets."""
    blocks: list[nn.Module] = []
    for index in range(count):
        step = stride if index == 0 else 1
        blocks.append(Branches(conv(1, step), nn.Sequential(conv(1, step), conv(3), conv(1)), join="sum"))
    return blocks


def test_alexnet_and_resnet50_have_the_published_fields() -> None:
    """195 and 483 px, in table 1 of Araujo, Norris and Sim, 2019."""
    pool = nn.MaxPool2d(3, 2)
    alexnet = nn.Sequential(conv(11, 4, chans=3), pool, conv(5), pool, *(conv(3) for _ in range(3)), pool)
    assert last(alexnet, px=224, chans=3).receptive_field == (195, 195)
    stages = [*bottlenecks(3, stride=1), *bottlenecks(4, stride=2), *bottlenecks(6, stride=2)]
    resnet50 = nn.Sequential(conv(7, 2, chans=3), nn.MaxPool2d(3, 2, 1), *stages, *bottlenecks(3, stride=2))
    assert last(resnet50, px=224, chans=3).receptive_field == (483, 483)


@pytest.mark.parametrize(
    ("head", "whole"),
    [
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1)), True),
        (Function(lambda x: x.mean((2, 3))), True),
        (Function(lambda x: x.amax(dim=-1, keepdim=True)), True),
        (nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 6, 2)), True),
        (Function(lambda x: x.flatten(2).softmax(-1)), True),
        (Function(lambda x: x.flatten(2).mT @ x.flatten(2)), False),  # over channels: of two places
        (Function(lambda x: x.flatten(2) @ x.flatten(2).mT), True),  # over places
        (nn.Sequential(Function(lambda x: x.flatten(2).mT), nn.Linear(4, 2)), False),  # on each token
        (nn.Sequential(Function(lambda x: x.flatten(2)), nn.Linear(36, 2)), True),  # across tokens
        (Function(lambda x: x.view(1, 2, 2, 6, 6).transpose(1, 2).flatten(1, 2)), False),  # a shuffle of channels
        (nn.AdaptiveAvgPool2d(6), False),
        (nn.LayerNorm(6), False),
    ],
)
def test_what_adds_up_along_the_picture_sees_all_of_it(head: nn.Module, whole: bool) -> None:
    row = last(nn.Sequential(nn.Conv2d(1, 4, 3, stride=10), head), px=60)
    assert row.sees_whole_picture is whole
    assert row.receptive_field == (None if whole else (3, 3))


def test_rows_and_columns_are_found_again_after_they_were_merged_and_split() -> None:
    """As tokens and as windows of attention, then as a map again."""
    tokens = Function(lambda x: x.flatten(2).mT)
    windows = Function(lambda x: x.view(1, 4, 5, 6, 10, 4).transpose(2, 3))
    back = Function(lambda x: x.transpose(2, 3).reshape(1, 20, 60, 4).permute(0, 3, 1, 2))
    net = nn.Sequential(nn.Conv2d(1, 4, 1, (3, 1)), tokens, nn.Linear(4, 4), windows, back, nn.Conv2d(4, 1, (3, 5)))
    row = last(net, px=60)
    assert (row.receptive_field, row.sees_whole_picture) == ((7, 5), False)
    # 6 rows of 4 do not nest in 3 of 8: each axis then holds some of both
    scrambled = nn.Sequential(nn.Conv2d(1, 1, 1, (2, 3)), Function(lambda x: x.view(1, 1, 8, 3)), nn.Conv2d(1, 1, 2))
    row = last(scrambled, px=12)
    assert (row.receptive_field, row.sees_whole_picture) == (None, True)


def test_a_map_of_one_place_stays_what_it_is() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    row = last(nn.Sequential(nn.Conv2d(1, 4, 64), head))
    assert (row.receptive_field, row.sees_whole_picture) == ((64, 64), False)


def test_a_gate_adds_the_whole_picture_to_the_window() -> None:
    gated = nn.Sequential(nn.Conv2d(1, 4, 3), Function(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()))
    row = last(nn.Sequential(gated, nn.Conv2d(4, 1, 3)))
    assert (row.receptive_field, row.sees_whole_picture) == ((5, 5), True)


def test_jump_is_that_of_the_windows_and_not_of_a_gate() -> None:
    net = Function(lambda x: x + x[:, :, ::8, ::8].mean((2, 3), keepdim=True))
    assert last(nn.Sequential(net, nn.Conv2d(1, 1, 3))).receptive_field == (3, 3)


def test_coarser_adaptive_pool_is_a_window() -> None:
    assert last(nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Conv2d(1, 1, 3))).receptive_field == (24, 24)
    # of 10 places to 4, a place of the output takes up to 3
    assert last(nn.AdaptiveAvgPool2d(4), px=10).receptive_field == (3, 3)
