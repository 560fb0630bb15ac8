from typing import Any

import pytest
import torch
import torchvision
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.nets.alexnet import alexnet, alexnet_two_tower

TWO_TOWER = {
    "features.0": (34_944, (96, 55, 55)),
    "features.3": (0, (96, 27, 27)),
    "features.4": (307_456, (256, 27, 27)),
    "features.7": (0, (256, 13, 13)),
    "features.8": (885_120, (384, 13, 13)),
    "features.10": (663_936, (384, 13, 13)),
    "features.12": (442_624, (256, 13, 13)),
    "features.14": (0, (256, 6, 6)),
    "classifier.0": (37_752_832, (4096,)),
    "classifier.3": (16_781_312, (4096,)),
    "classifier.5": (4_097_000, (1000,)),
}
"""Parameters and output of each layer at 3 x 224 x 224."""


@pytest.fixture(scope="module")
def one_tower() -> Any:
    torch.manual_seed(0)
    return alexnet(num_classes=7).eval()


@pytest.fixture(scope="module")
def two_tower() -> Any:
    torch.manual_seed(0)
    return alexnet_two_tower(num_classes=7).eval()


def on_paper(function: Any) -> Any:
    """The full net without memory for its weights: shapes only."""
    with torch.device("meta"):
        return function(num_classes=1000).eval()


def test_layers_and_maps_are_those_of_the_table() -> None:
    net = on_paper(alexnet_two_tower)
    seen: dict[str, Any] = {}
    for name in TWO_TOWER:
        layer = net.get_submodule(name)
        size = sum(p.numel() for p in layer.parameters())
        layer.register_forward_hook(lambda _, __, out, name=name, size=size: seen.update({name: (size, out.shape[1:])}))
    net(torch.zeros(1, 3, 224, 224, device="meta"))
    assert seen == TWO_TOWER
    assert sum(p.numel() for p in net.parameters()) == 60_965_224


def test_one_tower_has_torchvision_s_names_and_shapes() -> None:
    net = on_paper(alexnet)
    with torch.device("meta"):
        theirs = torchvision.models.alexnet(weights=None)
    shapes = [(key, tensor.shape) for key, tensor in net.state_dict().items()]
    assert shapes == [(key, tensor.shape) for key, tensor in theirs.state_dict().items()]
    assert sum(p.numel() for p in net.parameters()) == 61_100_840


@pytest.mark.parametrize(("layer", "apart"), [("4", True), ("8", False), ("10", True), ("12", True)])
def test_towers_meet_in_the_third_convolution_only(two_tower: Any, layer: str, apart: bool) -> None:
    conv = two_tower.features.get_submodule(layer)
    half, out_half = conv.in_channels // 2, conv.out_channels // 2
    x = torch.rand(1, conv.in_channels, 5, 5)
    other = x.clone()
    other[:, half:] += 1
    assert torch.equal(conv(x)[:, :out_half], conv(other)[:, :out_half]) == apart
    assert not torch.allclose(conv(x)[:, out_half:], conv(other)[:, out_half:])


def test_response_norm_is_the_paper_s_formula(two_tower: Any) -> None:
    norms = [layer for layer in two_tower.features if isinstance(layer, nn.LocalResponseNorm)]
    assert len(norms) == 2
    x = torch.randn(2, 96, 3, 3, generator=torch.Generator().manual_seed(0)) * 100
    expected = torch.empty_like(x)
    for i in range(96):
        squares = x[:, max(0, i - 2) : i + 3].square().sum(1)
        expected[:, i] = x[:, i] / (2 + 1e-4 * squares) ** 0.75
    for norm in norms:
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("fixture", ["one_tower", "two_tower"])
def test_initialisation_is_the_paper_s(fixture: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    net = request.getfixturevalue(fixture)
    net.reset_classifier(7)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 8
    for layer, bias in zip(layers, (0, 1, 0, 1, 1, 1, 1, 0), strict=True):
        some = layer.weight.detach().flatten()[:100_000]
        assert some.std().item() == pytest.approx(0.01, rel=4 / (2 * some.numel()) ** 0.5)
        assert abs(some.mean()) < 4 * 0.01 / some.numel() ** 0.5
        assert (layer.bias == bias).all()


@pytest.mark.parametrize(("fixture", "drops_last"), [("one_tower", False), ("two_tower", True)])
def test_dropout_lies_before_or_after_the_hidden_layers(
    fixture: str, drops_last: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = request.getfixturevalue(fixture)
    for dropout in (layer for layer in net.modules() if isinstance(layer, nn.Dropout) and layer.p > 0):
        assert dropout.p == 0.5
        monkeypatch.setattr(dropout, "p", 1.0)
        monkeypatch.setattr(dropout, "training", True)
    x = torch.rand(2, 256, 6, 6)
    # everything dropped: what is left of the last hidden layer is its bias of 1
    assert torch.equal(net.forward_head(x, pre_logits=True), torch.ones(2, 4096))
    expected = torch.zeros(7) if drops_last else net.get_classifier().weight.sum(1)
    torch.testing.assert_close(net.forward_head(x)[0], expected)


def test_channels_last_and_bfloat16_give_nearly_the_same_logits(two_tower: Any) -> None:
    x = torch.rand(2, 3, 63, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = two_tower(x)
        torch.testing.assert_close(two_tower(x.contiguous(memory_format=torch.channels_last)), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(two_tower(x).float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("function", [alexnet, alexnet_two_tower])
def test_groups_are_the_layers(function: Any) -> None:
    net = on_paper(function)
    assert len(group_parameters(net, net.group_matcher())) == 8
    coarse = group_parameters(net, net.group_matcher(coarse=True))
    assert [len(coarse[index]) for index in sorted(coarse)] == [2, 8, 4, 2]
