from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline import nets
from pipeline.analysis import anatomy
from pipeline.analysis.anatomy import Anatomy, Layer
from pipeline.errors import UserError

FLOAT = 4
"""Bytes."""


def measure(name: str, *, px: int | None = None, in_chans: int = 3, num_classes: int = 1000) -> Anatomy:
    return anatomy.measure(name, px=px, in_chans=in_chans, num_classes=num_classes)


def dissect(net: nn.Module, *, px: int = 8, chans: int = 1) -> Anatomy:
    return anatomy.dissect(net.eval().to("meta"), torch.zeros(1, chans, px, px, device="meta"), name="net")


def row(found: Anatomy, name: str) -> Layer:
    return next(layer for layer in found.layers if layer.name == name and not layer.is_function)


def test_lenet_s_rows_are_those_of_its_table() -> None:
    found = measure("scratch/lenet5", in_chans=1, num_classes=10)
    rows = [(layer.name, layer.output, layer.parameters, layer.macs) for layer in found.layers if not layer.is_function]
    assert rows == [
        ("c1", (6, 28, 28), 156, 117_600),
        ("s2", (6, 14, 14), 0, 0),
        ("c3", (16, 10, 10), 2_416, 240_000),
        ("s4", (16, 5, 5), 0, 0),
        ("c5", (120, 1, 1), 48_120, 48_000),
        ("pool", (120, 1, 1), 0, 0),
        ("f6", (84,), 10_164, 10_080),
        ("output", (10,), 850, 840),
    ]
    assert (found.parameters, found.macs) == (61_706, 416_520)
    assert [layer.receptive_field for layer in found.layers][-1] == (32, 32)
    assert [(layer.name, layer.kind) for layer in found.layers if layer.is_function] == [("", "tanh")] * 4


def test_vgg16_is_as_published() -> None:
    found = measure("vgg16")
    assert (found.parameters, found.macs) == (138_357_544, 15_470_264_320)
    assert row(found, "features.28").receptive_field == (196, 196)
    assert row(found, "features.30").receptive_field == (212, 212)
    assert all(layer.agrees is not False for layer in found.layers)
    # the first two convolutions: the input of one beside its output, of 64 x 224 x 224 each, and the picture
    assert found.peak_bytes == FLOAT * (2 * 64 + 3) * 224**2


@pytest.mark.parametrize(
    "name",
    [
        *("scratch/lenet5", "scratch/resnet20", "resnet18", "densenet121", "tf_efficientnet_b0"),
        *("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "test_resnet"),
    ],
)
def test_every_parameter_and_multiply_add_is_counted_once(name: str) -> None:
    found = measure(name)
    with torch.device("meta"):
        net = nets.build(name, num_classes=1000).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            net(torch.zeros(1, 3, found.px, found.px))
    assert found.px == net.pretrained_cfg["input_size"][-1]
    assert found.parameters == sum(parameter.numel() for parameter in net.parameters())
    assert found.macs == counter.get_total_flops() // 2
    for by in ("block", "kind"):
        shares = found.shares("parameters", by=by)
        assert sum(share.value for share in shares) == found.parameters
        assert sum(share.share for share in shares) == pytest.approx(1)
        assert shares == sorted(shares, key=lambda share: -share.value)


def test_resnet18_sees_what_is_known_of_it() -> None:
    found = measure("resnet18")
    assert row(found, "layer4.1.conv2").receptive_field == (435, 435)
    assert row(found, "fc").sees_whole_picture
    # one container holds most of it, and is opened
    assert [share.name for share in found.shares("parameters", by="block")[:3]] == ["layer4.1", "layer4.0", "layer3"]


def test_padding_that_a_layer_does_not_declare_shows() -> None:
    found = measure("tf_efficientnet_b0")
    stem = row(found, "conv_stem")
    assert (stem.formula, stem.output, stem.agrees) == ((111, 111), (32, 112, 112), False)
    assert row(found, "blocks.0.0.conv_pw").agrees is True
    assert row(found, "bn1").agrees is None


def test_parameters_in_no_layer_are_listed() -> None:
    found = measure("vit_tiny_patch16_224")
    assert [(part.name, part.parameters, part.used) for part in found.outside] == [
        ("cls_token", 192, True),
        ("pos_embed", 197 * 192, True),
    ]


def test_parameters_of_a_layer_that_is_read_and_not_called_are_used() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.fc.weight)

    found = dissect(Reads())
    assert [(part.name, part.parameters, part.used) for part in found.outside] == [("fc.weight", 24, True)]
    assert found.macs == 24 * 8


class Shared(nn.Module):
    """A layer used twice, one that is not used in eval mode, and functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.relu = nn.ReLU(inplace=True)
        self.aux = nn.Linear(2, 3)
        self.fc = nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.relu(self.conv(torch.cat([x, x], dim=1))))
        x = F.max_pool2d(F.conv2d(x, self.conv.weight, stride=2), 3, 1, 1) * self.scale
        out: Tensor = self.fc(self.conv(x).mean((2, 3)))
        return out


def test_what_is_shared_unused_or_a_function_is_booked_where_it_belongs() -> None:
    found = dissect(Shared())
    rows = [(layer.name, layer.kind, layer.parameters, layer.macs, layer.activation_bytes) for layer in found.layers]
    assert rows == [
        ("", "cat", 0, 0, FLOAT * 2 * 64),
        ("conv", "Conv2d", 38, 36 * 64, FLOAT * 2 * 64),
        ("relu", "ReLU", 0, 0, 0),
        ("drop", "Dropout", 0, 0, 0),
        ("", "convolution", 0, 36 * 9, FLOAT * 2 * 9),
        ("", "max_pool2d", 0, 0, FLOAT * 2 * 9),
        ("", "mul", 0, 0, FLOAT * 2 * 9),
        ("conv", "Conv2d", 0, 36 * 9, FLOAT * 2 * 9),
        ("", "mean", 0, 0, FLOAT * 2),
        ("fc", "Linear", 9, 6, FLOAT * 3),
    ]
    assert [layer.formula for layer in found.layers if layer.formula] == [(8, 8), (3, 3), (3, 3), (3, 3)]
    assert all(layer.agrees is not False for layer in found.layers)
    outside = [(part.name, part.parameters, part.used) for part in found.outside]
    assert outside == [("scale", 1, True), ("aux.weight", 6, False), ("aux.bias", 3, False)]
    assert found.activation_bytes == sum(layer.activation_bytes for layer in found.layers)


def test_layer_with_another_inside_counts_each_output_once() -> None:
    from timm.layers import BatchNormAct2d

    rows = [
        (layer.name, layer.parameters, layer.activation_bytes)
        for layer in dissect(nn.Sequential(BatchNormAct2d(1, inplace=False))).layers
    ]
    assert rows == [("0", 2, FLOAT * 64), ("0.act", 0, FLOAT * 64)]


def test_measuring_leaves_the_net_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    x = torch.rand(1, 1, 8, 8)
    found = anatomy.dissect(net, x, name="net")
    assert found.macs == 18 * 36  # with numbers as without
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_net_that_needs_numbers_is_run_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 7)
            self.pretrained_cfg: dict[str, Any] = {"input_size": (3, 8, 8)}
            self.steps = int(torch.ones(()).item())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x.mean((2, 3)))
            return out

    monkeypatch.setattr(nets, "build", lambda *_, **__: Counts())
    monkeypatch.setattr(nets, "check_px", lambda *_, **__: None)
    assert measure("scratch/lenet5").macs == 21


@pytest.mark.parametrize(
    ("name", "px", "message"),
    [
        ("scratch/lenet5", 28, "scratch/lenet5 takes pictures of 32 px or more, got 28"),
        ("vit_tiny_patch16_224", 64, "vit_tiny_patch16_224 takes pictures of 224 px only, got 64"),
        ("inception_v3", 32, "inception_v3 does not take pictures of 32 px"),
        ("scratch/lenet", 32, "scratch/lenet: no such net"),
    ],
)
def test_side_or_net_that_is_not_to_be_had_is_refused(name: str, px: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        measure(name, px=px)
