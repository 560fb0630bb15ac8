from typing import Any

import pytest
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.nets.alexnet import alexnet_two_tower
from pipeline.nets.zfnet import zfnet

LAYERS = [
    ("conv1", 14_208, (96, 110, 110)),
    ("pool1", 0, (96, 55, 55)),
    ("norm", 0, (96, 55, 55)),
    ("conv2", 614_656, (256, 26, 26)),
    ("pool2", 0, (256, 13, 13)),
    ("norm", 0, (256, 13, 13)),
    ("conv3", 885_120, (384, 13, 13)),
    ("conv4", 1_327_488, (384, 13, 13)),
    ("conv5", 884_992, (256, 13, 13)),
    ("pool5", 0, (256, 6, 6)),
    ("avgpool", 0, (256, 6, 6)),
    ("fc6", 37_752_832, (4096,)),
    ("fc6_drop", 0, (4096,)),
    ("fc7", 16_781_312, (4096,)),
    ("head_drop", 0, (4096,)),
    ("fc8", 4_097_000, (1000,)),
]
"""Figure 3 of the paper: parameters and output of each layer in their order, at 3 x 224 x 224."""


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    return zfnet(num_classes=7).eval()


def on_paper(function: Any) -> Any:
    """The full net without memory for its weights: shapes only."""
    with torch.device("meta"):
        return function(num_classes=1000).eval()


def test_layers_and_maps_are_those_of_the_paper_in_its_order() -> None:
    paper = on_paper(zfnet)
    seen = []
    for name, layer in paper.named_children():
        size = sum(p.numel() for p in layer.parameters())
        layer.register_forward_hook(lambda _, __, out, name=name, size=size: seen.append((name, size, out.shape[1:])))
    paper(torch.zeros(1, 3, 224, 224, device="meta"))
    assert seen == LAYERS
    assert sum(p.numel() for p in paper.parameters()) == 62_357_608


def test_first_layer_takes_smaller_steps_than_alexnet_s() -> None:
    x = torch.zeros(1, 3, 224, 224, device="meta")
    ours, theirs = on_paper(zfnet).conv1, on_paper(alexnet_two_tower).features[0]
    assert (ours.kernel_size, ours.stride) == ((7, 7), (2, 2))
    assert (theirs.kernel_size, theirs.stride) == ((11, 11), (4, 4))
    assert ours(x).numel() == 4 * theirs(x).numel()
    assert ours.weight.numel() < theirs.weight.numel() / 2


def test_contrast_normalisation_is_over_five_channels(net: Any) -> None:
    x = torch.zeros(1, 9, 1, 1)
    x[0, 4] = 100.0
    x[0, [1, 2, 6, 7]] = 1.0
    found = net.norm(x).flatten()
    loud, alone = (2 + 1e-4 * (100.0**2 + 2)) ** -0.75, (2 + 2e-4) ** -0.75
    # channels 2 and 6 are two away from the loud one, channels 1 and 7 are three away
    torch.testing.assert_close(found[[4, 2, 6, 1, 7]], torch.tensor([100 * loud, *(2 * [loud]), *(2 * [alone])]))


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
    for name, dropout in (("fc6_drop", net.fc6_drop), ("head_drop", net.head_drop)):
        assert dropout.p == 0.5
        with monkeypatch.context() as patch:
            patch.setattr(dropout, "p", 1.0)
            patch.setattr(dropout, "training", True)
            assert net.forward_head(x).abs().max() == 0, name
    assert net.forward_head(x).abs().max() > 0


def test_channels_last_and_bfloat16_give_nearly_the_same_logits(net: Any) -> None:
    x = torch.rand(2, 3, 47, 60, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(x)
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            net(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-4 * scale, rtol=0
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(net(x).float(), expected, atol=0.05 * scale, rtol=0)


def test_groups_are_the_layers() -> None:
    paper = on_paper(zfnet)
    assert len(group_parameters(paper, paper.group_matcher())) == 8
    coarse = group_parameters(paper, paper.group_matcher(coarse=True))
    assert [len(coarse[index]) for index in sorted(coarse)] == [2, 8, 4, 2]
