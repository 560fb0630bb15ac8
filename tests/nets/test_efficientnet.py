from typing import Any

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline import nets
from pipeline.nets.efficientnet import SCALES, EfficientNet, MBConv, StochasticDepth, efficientnet_b0
from pipeline.training import weights

PARAMETERS = (5_288_548, 7_794_184, 9_109_994, 12_233_232, 19_341_616, 30_389_784, 43_040_704, 66_347_960)
BLOCKS = (16, 23, 23, 26, 32, 39, 45, 55)
FEATURES = (1280, 1280, 1408, 1536, 1792, 2048, 2304, 2560)
DROP_RATES = (0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5)
PX = (224, 240, 260, 300, 380, 456, 528, 600)


def of_type(net: nn.Module, kind: type) -> list[Any]:
    return [module for module in net.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("size", range(8))
def test_scaling_makes_the_family(size: int) -> None:
    with torch.device("meta"):
        net: Any = nets.build(f"scratch/efficientnet_b{size}", num_classes=1000)
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[size]
    assert len(of_type(net, MBConv)) == BLOCKS[size]
    assert net.num_features == net.head_hidden_size == FEATURES[size]
    assert net.pretrained_cfg["input_size"] == (3, PX[size], PX[size])
    assert [module.p for module in of_type(net, nn.Dropout)] == [DROP_RATES[size]]
    norm = (1e-5, 0.1) if size < 5 else (1e-3, 0.01)
    assert {(module.eps, module.momentum) for module in of_type(net, nn.BatchNorm2d)} == {norm}
    side = -(-PX[size] // 32)
    with torch.no_grad():
        features = net.eval().forward_features(torch.zeros(1, 3, PX[size], PX[size], device="meta"))
    assert features.shape == (1, FEATURES[size], side, side)
    assert len(SCALES) == 8


def test_b0_s_stages_have_the_table_s_sizes() -> None:
    net: Any = efficientnet_b0(num_classes=1000)
    sizes = [sum(parameter.numel() for parameter in stage.parameters()) for stage in net.features]
    assert sizes == [928, 1_448, 16_714, 46_640, 242_930, 543_148, 2_026_348, 717_232, 412_160]


def test_squeeze_is_a_quarter_of_the_block_s_input() -> None:
    net: Any = efficientnet_b0(num_classes=2)
    block = net.features[3][0].block
    assert block[0][0].in_channels == 24
    assert (block[2].fc1.in_channels, block[2].fc1.out_channels, block[2].fc2.out_channels) == (144, 6, 144)


def test_channels_are_weighed_by_the_mean_of_the_whole_map() -> None:
    net: Any = efficientnet_b0(num_classes=2)
    squeeze = net.features[1][0].block[1]
    x = torch.randn(2, 32, 5, 7)
    hidden = torch.nn.functional.silu(squeeze.fc1.weight[:, :, 0, 0] @ x.mean((2, 3)).T + squeeze.fc1.bias[:, None])
    scale = torch.sigmoid(squeeze.fc2.weight[:, :, 0, 0] @ hidden + squeeze.fc2.bias[:, None]).T
    torch.testing.assert_close(squeeze(x), x * scale[:, :, None, None])


def test_initialisation_is_that_of_the_paper_s_code() -> None:
    torch.manual_seed(0)
    net: Any = efficientnet_b0(num_classes=100)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            taps = module.kernel_size[0] ** 2
            std = (2 / (taps * (1 if module.groups > 1 else module.out_channels))) ** 0.5
            assert module.weight.std().item() == pytest.approx(std, rel=5 / (2 * module.weight.numel()) ** 0.5), name
            assert module.bias is None or (module.bias == 0).all()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    for classes in (100, 4):
        net.reset_classifier(classes)
        weight, bias = net.get_classifier().parameters()
        assert 0.99 * classes**-0.5 < weight.abs().max() <= classes**-0.5
        assert (bias == 0).all()


def test_chance_of_leaving_a_block_out_grows_with_its_number() -> None:
    net: Any = efficientnet_b0(num_classes=2)
    rates = [block.stochastic_depth.p if block.has_shortcut else None for block in of_type(net, MBConv)]
    expected = [0.2 * number / 16 for number in range(16)]
    assert [number for number, rate in enumerate(rates) if rate is None] == [0, 1, 3, 5, 8, 11, 15]
    assert all(rate is None or rate == pytest.approx(expected[number]) for number, rate in enumerate(rates))
    given: Any = nets.build("scratch/efficientnet_b0", num_classes=2, drop_path_rate=0.4)
    assert of_type(given, MBConv)[2].stochastic_depth.p == pytest.approx(0.4 * 2 / 16)
    left_alone: Any = nets.build("scratch/efficientnet_b0", num_classes=2)
    assert of_type(left_alone, MBConv)[2].stochastic_depth.p == pytest.approx(0.2 * 2 / 16)


def test_stochastic_depth_has_its_rate_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = StochasticDepth(0.3)
    x = torch.rand(4000, 3, 2, 2) + 1
    found = layer(x)
    dropped = (found == 0).flatten(1)
    assert (dropped.all(1) == dropped.any(1)).all()  # whole pictures
    assert dropped[:, 0].float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(found[~dropped[:, 0]], x[~dropped[:, 0]] / 0.7)
    torch.manual_seed(7)
    first = layer(x)
    torch.manual_seed(7)
    assert torch.equal(layer(x), first)
    assert layer.eval()(x) is x


def test_block_with_a_silent_residual_is_its_input() -> None:
    net: Any = efficientnet_b0(num_classes=2)
    block = net.features[2][1].eval()
    nn.init.zeros_(block.block[-1][1].weight)
    x = torch.randn(2, 24, 6, 6)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("size", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_timm_s_weights_of_the_same_name_give_the_same_logits(size: int) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(f"efficientnet_b{size}").double().eval()
    ours: Any = nets.build(f"scratch/efficientnet_b{size}", num_classes=1000).double().eval()
    weights.load_pretrained(ours, theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_names_of_timm_become_ours(size: int) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"efficientnet_b{size}")
        ours = nets.build(f"scratch/efficientnet_b{size}", num_classes=1000)
    renamed = weights.renamed_for(ours, theirs.state_dict())
    assert {key: tensor.shape for key, tensor in renamed.items()} == {
        key: tensor.shape for key, tensor in ours.state_dict().items()
    }


def test_smallest_picture_can_be_learnt_from() -> None:
    net: Any = efficientnet_b0(num_classes=2).train()
    assert nets.min_px(net) == 32
    assert net(torch.randn(4, 3, 32, 32)).isfinite().all()


def test_groups_are_stem_blocks_head_and_classifier() -> None:
    net = efficientnet_b0(num_classes=2)
    assert isinstance(net, EfficientNet)
    assert len(group_parameters(net, net.group_matcher())) == 1 + 16 + 1 + 1
    assert len(group_parameters(net, net.group_matcher(coarse=True))) == 1 + 7 + 1 + 1
