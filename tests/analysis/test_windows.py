import itertools

import pytest
import torch
from torch import nn

from pipeline.analysis import windows
from pipeline.analysis.windows import Window


def real(layer: nn.Module, height: int, width: int) -> tuple[int, ...]:
    return tuple(layer.to("meta")(torch.zeros(1, 4, height, width, device="meta")).shape[2:])


def test_formula_gives_the_size_of_every_convolution() -> None:
    for kernel, stride, padding, dilation, size in itertools.product(
        (1, 2, 3, 7), (1, 2, 3), (0, 1, 3), (1, 2), (15, 16)
    ):
        layer = nn.Conv2d(4, 4, (kernel, 3), stride, (padding, 1), dilation, groups=2)
        window = windows.of_module(layer)
        assert window is not None
        assert window.predict((size, size + 5)) == real(layer, size, size + 5), layer


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_formula_gives_the_size_of_every_pool(ceil_mode: bool) -> None:
    for kernel, stride, padding, size in itertools.product((2, 3, 5), (1, 2, 3, 4), (0, 1), range(9, 17)):
        for layer in (
            nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode),
            nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil_mode),
        ):
            window = windows.of_module(layer)
            assert window is not None
            assert window.predict((size, size)) == real(layer, size, size), (layer, size)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 5, padding="same", dilation=2),
        nn.Conv2d(4, 4, 4, padding="valid"),
        nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1),
        nn.ConvTranspose2d(4, 4, 4, 2, 1, dilation=2),
        nn.MaxPool2d(3),
        nn.MaxPool2d(3, 2, dilation=2, ceil_mode=True),
    ],
)
def test_formula_knows_the_rarer_kinds(layer: nn.Module) -> None:
    window = windows.of_module(layer)
    assert window is not None
    assert window.predict((17, 20)) == real(layer, 17, 20)


def test_what_has_no_window_gives_none() -> None:
    assert windows.of_module(nn.Linear(3, 3)) is None
    assert windows.of_module(nn.AdaptiveAvgPool2d(1)) is None
    assert windows.of_operation("add", (torch.zeros(1, 1, 4, 4),)) is None


def test_window_of_a_function_is_read_from_its_arguments() -> None:
    x = torch.zeros(1, 4, 8, 8)
    kept = Window((3, 3), (2, 2), (1, 1), (1, 1), ceil_mode=True)
    assert windows.of_operation("max_pool2d_with_indices", (x, [3, 3], [2, 2], [1, 1], [1, 1], True)) == kept
    assert windows.of_operation("avg_pool2d", (x, [3, 3], [2, 2], [1, 1], True)) == kept
    assert windows.of_operation("avg_pool2d", (x, [2])) == Window((2, 2), (2, 2), (0, 0), (1, 1))
    arguments = (x, torch.zeros(6, 2, 3, 5), None, [2, 1], [1, 2], [1, 1], False, [0, 0], 2)
    assert windows.of_operation("convolution", arguments) == Window((3, 5), (2, 1), (1, 2), (1, 1), groups=2)
