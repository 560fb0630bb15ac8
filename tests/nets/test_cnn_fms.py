from typing import Any

import pytest
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.nets.cnn_fms import vgg_f, vgg_m, vgg_s

FULL = [(16_781_312, (4096,)), (4_097_000, (1000,))]
TABLE: dict[Any, list[tuple[int, tuple[int, ...]]]] = {
    vgg_f: [
        (23_296, (64, 54, 54)),
        (409_856, (256, 27, 27)),
        *[(590_080, (256, 13, 13))] * 3,
        (37_752_832, (4096,)),
        *FULL,
    ],
    vgg_m: [
        (14_208, (96, 109, 109)),
        (614_656, (256, 26, 26)),
        (1_180_160, (512, 13, 13)),
        *[(2_359_808, (512, 13, 13))] * 2,
        (75_501_568, (4096,)),
        *FULL,
    ],
    vgg_s: [
        (14_208, (96, 109, 109)),
        (614_656, (256, 35, 35)),
        (1_180_160, (512, 18, 18)),
        *[(2_359_808, (512, 18, 18))] * 2,
        (75_501_568, (4096,)),
        *FULL,
    ],
}
"""Parameters and output of each layer with weights at 3 x 224 x 224."""


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    return vgg_f(num_classes=7).eval()


def on_paper(function: Any) -> Any:
    """The full net without memory for its weights: shapes only."""
    with torch.device("meta"):
        return function(num_classes=1000).eval()


@pytest.mark.parametrize("function", TABLE)
def test_layers_and_maps_are_those_of_the_table(function: Any) -> None:
    paper = on_paper(function)
    seen = []
    for layer in paper.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            size = sum(p.numel() for p in layer.parameters())
            layer.register_forward_hook(lambda _, __, out, size=size: seen.append((size, out.shape[1:])))
    x = torch.zeros(1, 3, 224, 224, device="meta")
    assert paper(x).shape == (1, 1000)
    assert seen == TABLE[function]
    assert paper.forward_features(x).shape == (1, paper.num_features, 6, 6)


@pytest.mark.parametrize(("function", "count"), [(vgg_f, 60_834_536), (vgg_m, 102_908_520), (vgg_s, 102_908_520)])
def test_numbers_of_parameters(function: Any, count: int) -> None:
    assert sum(p.numel() for p in on_paper(function).parameters()) == count


@pytest.mark.parametrize(
    ("function", "norms", "pools"),
    [
        (vgg_f, [2, 6], [(3, 2), (3, 2), (3, 2)]),
        (vgg_m, [2, 6], [(3, 2), (3, 2), (3, 2)]),
        (vgg_s, [2], [(3, 3), (2, 2), (3, 3)]),
    ],
)
def test_norms_and_pools_are_where_the_table_has_them(
    function: Any, norms: list[int], pools: list[tuple[int, int]]
) -> None:
    layers = on_paper(function).features
    assert [index for index, layer in enumerate(layers) if isinstance(layer, nn.LocalResponseNorm)] == norms
    assert [(pool.kernel_size, pool.stride) for pool in layers if isinstance(pool, nn.MaxPool2d)] == pools


def test_response_norm_is_alexnet_s(net: Any) -> None:
    x = torch.randn(1, 64, 2, 2, generator=torch.Generator().manual_seed(0)) * 100
    squares = x[:, 8:13].square().sum(1)
    torch.testing.assert_close(net.features[2](x)[:, 10], x[:, 10] / (2 + 1e-4 * squares) ** 0.75)


def test_weights_are_normal_and_biases_zero(net: Any) -> None:
    net.reset_classifier(7)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 8
    for layer in layers:
        some = layer.weight.detach().flatten()[:100_000]
        assert some.std().item() == pytest.approx(0.01, rel=4 / (2 * some.numel()) ** 0.5)
        assert abs(some.mean()) < 4 * 0.01 / some.numel() ** 0.5
        assert (layer.bias == 0).all()


def test_dropout_follows_both_hidden_layers(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 256, 6, 6)
    for name, dropout in (("full6_drop", net.full6_drop), ("head_drop", net.head_drop)):
        assert dropout.p == 0.5
        with monkeypatch.context() as patch:
            patch.setattr(dropout, "p", 1.0)
            patch.setattr(dropout, "training", True)
            assert net.forward_head(x).abs().max() == 0, name
    assert net.forward_head(x).abs().max() > 0


def test_channels_last_and_bfloat16_give_nearly_the_same_logits(net: Any) -> None:
    x = torch.rand(2, 3, 39, 50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(x)
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            net(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-4 * scale, rtol=0
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(net(x).float(), expected, atol=0.05 * scale, rtol=0)


@pytest.mark.parametrize(("function", "px"), [(vgg_f, 39), (vgg_m, 41), (vgg_s, 19)])
def test_smallest_picture_leaves_one_pixel(function: Any, px: int) -> None:
    paper = on_paper(function)
    assert paper.forward_features(torch.zeros(1, 3, px, px, device="meta")).shape[2:] == (1, 1)
    with pytest.raises(RuntimeError, match=r"too small|greater than actual input size"):
        paper.features(torch.zeros(1, 3, px - 1, px - 1, device="meta"))


@pytest.mark.parametrize("function", TABLE)
def test_groups_are_the_layers(function: Any) -> None:
    paper = on_paper(function)
    assert len(group_parameters(paper, paper.group_matcher())) == 8
    coarse = group_parameters(paper, paper.group_matcher(coarse=True))
    assert [len(coarse[index]) for index in sorted(coarse)] == [2, 8, 4, 2]
