from typing import Any

import pytest
import torch

from pipeline.nets.lenet import lenet5

SIZES = {"c1": 156, "c3": 2_416, "c5": 48_120, "f6": 10_164, "output": 850}
FAN_IN = {"c1": 25, "c3": 150, "c5": 400, "f6": 120, "output": 84}


def test_layers_have_the_table_s_sizes() -> None:
    net = lenet5(num_classes=10)
    sizes = {name: sum(p.numel() for p in layer.parameters()) for name, layer in net.named_children()}
    assert {name: size for name, size in sizes.items() if size} == SIZES


@pytest.mark.parametrize("in_chans", [1, 3])
def test_weights_fill_the_paper_s_interval_and_biases_are_zero(in_chans: int) -> None:
    torch.manual_seed(0)
    net: Any = lenet5(num_classes=10, in_chans=in_chans)
    net.reset_classifier(10)
    for name, fan_in in {**FAN_IN, "c1": 25 * in_chans}.items():
        layer = net.get_submodule(name)
        bound = 2.4 / fan_in
        assert layer.weight.abs().max() <= bound
        assert layer.weight.max() > 0.9 * bound
        assert layer.weight.min() < -0.9 * bound
        assert layer.bias.abs().max() == 0


def test_maps_are_those_of_the_paper_at_32_px() -> None:
    net: Any = lenet5(num_classes=10)
    x = torch.randn(2, 1, 32, 32)
    s2 = net.s2(torch.tanh(net.c1(x)))
    s4 = net.s4(torch.tanh(net.c3(s2)))
    assert s2.shape == (2, 6, 14, 14)
    assert s4.shape == (2, 16, 5, 5)
    features = net.forward_features(x)
    assert features.shape == (2, 120, 1, 1)
    assert torch.equal(net.pool(features), features)
    assert net.forward_features(torch.randn(2, 1, 40, 40)).shape == (2, 120, 3, 3)


def test_coarse_groups_are_stem_blocks_and_classifier() -> None:
    from timm.models._manipulate import group_parameters

    net: Any = lenet5(num_classes=10)
    groups = group_parameters(net, net.group_matcher(coarse=True))
    assert [sorted({key.split(".")[0] for key in groups[index]}) for index in sorted(groups)] == [
        ["c1"],
        ["c3", "c5", "f6"],
        ["output"],
    ]
