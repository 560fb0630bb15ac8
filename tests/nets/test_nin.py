import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline.nets.nin import nin

SIZES = {
    "mlpconv1.0": 14_592,
    "mlpconv1.2": 30_880,
    "mlpconv1.4": 15_456,
    "mlpconv2.0": 460_992,
    "mlpconv2.2": 37_056,
    "mlpconv2.4": 37_056,
    "mlpconv3.0": 331_968,
    "mlpconv3.2": 37_056,
    "classifier": 1_930,
}


@pytest.fixture
def net() -> Any:
    torch.manual_seed(0)
    return nin(num_classes=10).eval()


def pictures(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_layers_have_the_table_s_sizes(net: Any) -> None:
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()} == SIZES
    assert sum(p.numel() for p in net.parameters()) == 966_986


@pytest.mark.parametrize(("px", "half", "quarter"), [(32, 16, 8), (4, 2, 1), (33, 16, 8), (64, 32, 16)])
def test_pools_halve_the_map_twice(net: Any, px: int, half: int, quarter: int) -> None:
    x_b96hw = net.pool(net.mlpconv1(pictures(1, 3, px, px)))
    assert x_b96hw.shape == (1, 96, half, half)
    assert net.forward_features(pictures(1, 3, px, px)).shape == (1, 192, quarter, quarter)


def test_classifier_after_the_average_is_the_paper_s_1x1_convolution_before_it(net: Any) -> None:
    features = net.forward_features(pictures(2, 3, 32, 32))
    maps = F.conv2d(features, net.classifier.weight[:, :, None, None], net.classifier.bias)
    torch.testing.assert_close(net.forward_head(features), maps.mean((2, 3)))


def test_1x1_convolutions_see_a_pixel_alone(net: Any) -> None:
    x = pictures(1, 192, 6, 6)
    micro = net.mlpconv1[2:]
    torch.testing.assert_close(micro(x.flip(3)), micro(x).flip(3))
    changed = x.clone()
    changed[:, :, 2, 3] += 1
    moved = (micro(changed) - micro(x)).abs().amax((0, 1)) > 1e-6
    assert moved.nonzero().tolist() == [[2, 3]]


def test_dropout_of_a_half_follows_the_first_two_pools(net: Any) -> None:
    x = pictures(8, 3, 32, 32)
    pooled = net.pool(net.mlpconv1(x))
    torch.manual_seed(0)
    dropped = net.drop.train()(pooled)
    positive = pooled > 0
    assert (dropped[positive] == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(dropped[dropped > 0], 2 * pooled[dropped > 0])
    calls: list[torch.Size] = []
    net.drop.register_forward_hook(lambda _, __, out: calls.append(out.shape[1:]))
    net.train().forward_features(x)
    assert calls == [(96, 16, 16), (192, 8, 8)]
    # the paper has none before the classifier
    features = net.forward_features(x)
    assert torch.equal(net.forward_head(features), net.forward_head(features))


@pytest.mark.parametrize("in_chans", [1, 3])
def test_initialisation_is_he_s(in_chans: int) -> None:
    torch.manual_seed(0)
    net: Any = nin(num_classes=10, in_chans=in_chans)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * math.prod(module.kernel_size)
            tolerance = 4 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=tolerance), name
            assert (module.bias == 0).all(), name
    assert net.classifier.weight.abs().max() <= 1 / math.sqrt(192)


def test_fresh_net_keeps_the_scale_of_its_input(net: Any) -> None:
    features = net.forward_features(pictures(8, 3, 32, 32))
    assert 0.1 < features.square().mean().sqrt() < 10


def test_channels_last_and_bfloat16_give_nearly_the_same_logits(net: Any) -> None:
    x = pictures(2, 3, 32, 40)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(net(x).float(), expected, atol=0.05, rtol=0.05)


def test_net_can_be_exported_for_any_batch(net: Any) -> None:
    x = pictures(2, 3, 32, 32)
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}}).module()
    more = pictures(5, 3, 32, 32)
    torch.testing.assert_close(program(more), net(more))


def test_groups_are_convolutions_or_mlpconvs(net: Any) -> None:
    assert len(group_parameters(net, net.group_matcher())) == 9
    coarse = group_parameters(net, net.group_matcher(coarse=True))
    assert [len(coarse[index]) for index in sorted(coarse)] == [6, 6, 4, 2]
