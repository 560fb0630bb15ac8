import math
from typing import Any

import pytest
import torch
import torchvision
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.nets import vgg

PARAMETERS = {
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg11_bn": 132_868_840,
    "vgg13_bn": 133_053_736,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
}
STAGES_OF_16 = [38_720, 221_440, 1_475_328, 5_899_776, 7_079_424]


@pytest.fixture(scope="module")
def smallest() -> Any:
    torch.manual_seed(0)
    return vgg.vgg11(num_classes=7).eval()


def on_paper(name: str) -> Any:
    """The full net without memory for its weights: shapes only."""
    with torch.device("meta"):
        return getattr(vgg, name)(num_classes=1000).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_names_and_shapes_are_torchvision_s(name: str) -> None:
    net = on_paper(name)
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None)
    shapes = [(key, tensor.shape) for key, tensor in net.state_dict().items()]
    assert shapes == [(key, tensor.shape) for key, tensor in theirs.state_dict().items()]
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert net.name == name
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert f"vgg{len(layers)}" == name.removesuffix("_bn")


def test_stages_of_vgg16_have_the_table_s_sizes_and_maps() -> None:
    sizes, maps = [0], []
    x = torch.zeros(1, 3, 224, 224, device="meta")
    for layer in on_paper("vgg16").features:
        x = layer(x)
        sizes[-1] += sum(p.numel() for p in layer.parameters())
        if isinstance(layer, nn.MaxPool2d):
            sizes.append(0)
            maps.append(tuple(x.shape[1:]))
    assert sizes == [*STAGES_OF_16, 0]
    assert maps == [(64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (512, 7, 7)]


def test_batch_norm_stands_between_each_convolution_and_its_relu() -> None:
    kinds = [type(layer) for layer in on_paper("vgg19_bn").features if not isinstance(layer, nn.MaxPool2d)]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 16
    assert not [layer for layer in on_paper("vgg19").modules() if isinstance(layer, nn.BatchNorm2d)]


def test_initialisation_is_glorot_s(smallest: Any) -> None:
    torch.manual_seed(1)
    smallest.reset_classifier(7)
    layers = [layer for layer in smallest.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 11
    for layer in layers:
        fan_out, fan_in = layer.weight.shape[:2]
        field = layer.weight[0, 0].numel()
        bound = math.sqrt(6 / (field * (fan_in + fan_out)))
        some = layer.weight.detach().flatten()[:100_000]
        lowest, highest = (end.item() for end in layer.weight.detach().aminmax())
        assert -bound <= lowest < -0.98 * bound
        assert 0.98 * bound < highest <= bound
        assert some.std().item() == pytest.approx(bound / math.sqrt(3), rel=3 / some.numel() ** 0.5)
        assert (layer.bias == 0).all()


def test_dropout_follows_both_hidden_layers(smallest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 512, 7, 7)
    hidden, last = [layer for layer in smallest.modules() if isinstance(layer, nn.Dropout)]
    for dropout, is_last in ((hidden, False), (last, True)):
        assert dropout.p == 0.5
        with monkeypatch.context() as patch:
            patch.setattr(dropout, "p", 1.0)
            patch.setattr(dropout, "training", True)
            assert smallest.forward_head(x).abs().max() == 0
            assert (smallest.forward_head(x, pre_logits=True).abs().max() > 0) == is_last
    assert smallest.forward_head(x).abs().max() > 0


def test_channels_last_and_bfloat16_give_nearly_the_same_logits(smallest: Any) -> None:
    x = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = smallest(x)
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            smallest(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-4 * scale, rtol=0
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(smallest(x).float(), expected, atol=0.05 * scale, rtol=0)


@pytest.mark.parametrize("name", PARAMETERS)
def test_groups_are_convolutions_with_their_norms_then_hidden_layers(name: str) -> None:
    net = on_paper(name)
    num_tensors = 4 if name.endswith("_bn") else 2
    num_convolutions = int(name[3:5]) - 3
    fine = group_parameters(net, net.group_matcher())
    assert [len(fine[index]) for index in sorted(fine)] == [num_tensors] * num_convolutions + [2, 2, 2]
    coarse = group_parameters(net, net.group_matcher(coarse=True))
    # in vgg11 the first stage is the stem alone
    assert len(coarse) == (7 if name.startswith("vgg11") else 8)
    assert [len(coarse[index]) for index in sorted(coarse)][-2:] == [4, 2]
