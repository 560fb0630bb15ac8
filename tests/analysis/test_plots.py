"""The pictures of a run, by what is drawn in them: colours, places, sizes."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from pipeline.analysis import plots

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
ALL, NO_PICTURES = "#08306B", "#CCCCCC"
CELL = 0.004
"""Less than the share of the whole picture that one of a hundred cells takes up, its number left out."""

Span = tuple[float, float]


def pixels(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width <= 1600
        return np.asarray(image.convert("RGB"))


def share(path: Path, colour: str, *, across: Span = (0, 1), down: Span = (0, 1)) -> float:
    """Share of the whole picture that has a colour within a part of it."""
    array = pixels(path)
    height, width = array.shape[:2]
    part = array[int(down[0] * height) : int(down[1] * height), int(across[0] * width) : int(across[1] * width)]
    return float((part == np.round(255 * np.array(to_rgb(colour)))).all(axis=2).sum() / (height * width))


def has(path: Path, colour: str) -> bool:
    return share(path, colour) > 0


def box(array: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of what has a colour, give or take what blends into the ground."""
    rows, columns = np.nonzero((np.abs(array.astype(int) - colour) <= 2).all(axis=2))
    return (
        int(columns.min()),
        int(rows.min()),
        int(columns.max() - columns.min() + 1),
        int(rows.max() - rows.min() + 1),
    )


def epochs(phases: dict[str, int]) -> pd.DataFrame:
    names = [name for name, count in phases.items() for _ in range(count)]
    epoch = np.arange(1, len(names) + 1)
    loss, top1 = 1 / epoch, 1 - 0.5 / epoch
    return pd.DataFrame(
        {
            "epoch": epoch,
            "phase": names,
            "train/loss": loss,
            "val/loss": 1.2 * loss,
            "train/top1": top1,
            "val/top1": 0.9 * top1,
            "lr": 1e-3,
            "best": [name != following for name, following in zip(names, [*names[1:], ""], strict=True)],
        }
    )


@pytest.mark.parametrize("phases", [{"frozen": 1}, {"frozen": 1, "finetune": 3}, {f"phase_{i}": 3 for i in range(12)}])
def test_curves_show_both_splits(tmp_path: Path, phases: dict[str, int]) -> None:
    path = plots.curves(epochs(phases), tmp_path / "curves.png")
    assert has(path, plots.TRAIN)
    assert has(path, plots.VAL)
    assert list(tmp_path.iterdir()) == [path]


def test_curves_mark_the_best_epochs(tmp_path: Path) -> None:
    rows = epochs({"frozen": 1, "finetune": 3})
    marked = pixels(plots.curves(rows, tmp_path / "marked.png"))
    unmarked = pixels(plots.curves(rows.drop(columns="best"), tmp_path / "unmarked.png"))
    assert (marked[: len(marked) // 2] != unmarked[: len(marked) // 2]).any()


@pytest.mark.parametrize("missing", [["val/loss", "val/top1"], ["train/loss", "val/loss", "train/top1", "val/top1"]])
def test_curves_leave_out_missing_figures(tmp_path: Path, missing: list[str]) -> None:
    rows = epochs({"frozen": 2, "finetune": 2})
    rows.loc[1:, missing] = np.nan
    assert has(plots.curves(rows, tmp_path / "curves.png"), plots.VAL)


def test_names_are_no_mathematics(tmp_path: Path) -> None:
    unbalanced = r"$\frac{a"
    plots.curves(epochs({unbalanced: 1, "$x$": 1}), tmp_path / "curves.png")
    plots.confusion(np.eye(2, dtype=np.int64), [unbalanced, "$x$"], tmp_path / "confusion.png")
    plots.grid([np.zeros((4, 4), np.uint8)], [unbalanced], tmp_path / "grid.png", columns=1)


def test_confusion_is_shares_of_each_row(tmp_path: Path) -> None:
    path = plots.confusion(np.diag(np.arange(1, 11)), CLASSES, tmp_path / "confusion.png")
    assert share(path, ALL) > 10 * CELL
    assert share(path, NO_PICTURES) < CELL / 10
    assert list(tmp_path.iterdir()) == [path]


def test_confusion_has_actual_classes_as_rows(tmp_path: Path) -> None:
    matrix = np.zeros((10, 10), np.int64)
    matrix[0, 7] = 5
    path = plots.confusion(matrix, CLASSES, tmp_path / "confusion.png")
    assert share(path, ALL, across=(0.5, 0.85), down=(0, 0.5)) > CELL
    assert share(path, ALL, across=(0, 0.5), down=(0.5, 1)) == 0


def test_confusion_greys_a_class_without_pictures(tmp_path: Path) -> None:
    matrix = 5 * np.eye(10, dtype=np.int64)
    matrix[3] = 0
    assert share(plots.confusion(matrix, CLASSES, tmp_path / "confusion.png"), NO_PICTURES) > 10 * CELL


@pytest.mark.parametrize("count", [2, 21, 200])
def test_confusion_of_any_size(tmp_path: Path, count: int) -> None:
    names = [f"a class with rather a long name {index}" for index in range(count)]
    path = plots.confusion(np.eye(count, dtype=np.int64), names, tmp_path / "confusion.png")
    array = pixels(path)
    assert (array[[0, -1]] == 255).all(), "cut off above or below"
    assert (array[:, [0, -1]] == 255).all(), "cut off at a side"


def test_grid_fits_each_picture_to_its_cell(tmp_path: Path) -> None:
    red, green, blue = (np.array(colour, np.uint8) for colour in [(200, 0, 0), (0, 200, 0), (0, 0, 200)])
    pictures = [np.tile(red, (10, 20, 1)), np.tile(green, (300, 300, 1)), np.tile(blue, (80, 40, 1))]
    path = plots.grid(pictures, ["wide", "large", "tall"], tmp_path / "grid.png", columns=2)
    array = pixels(path)
    wide, large, tall = box(array, (200, 0, 0)), box(array, (0, 200, 0)), box(array, (0, 0, 200))
    side = large[2]
    assert large[3] == pytest.approx(side, abs=2)
    assert (wide[2], wide[3]) == pytest.approx((side, side / 2), abs=3)
    assert (tall[2], tall[3]) == pytest.approx((side / 2, side), abs=3)
    assert wide[0] < large[0]
    assert tall[1] >= large[1] + side
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1)])
def test_grid_keeps_grey_values(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = plots.grid([np.full(shape, 119, np.uint8)], ["grey"], tmp_path / "grid.png", columns=8)
    assert has(path, "#777777")


def test_grid_of_many_columns_stays_narrow(tmp_path: Path) -> None:
    pictures = [np.zeros((4, 4), np.uint8)] * 30
    pixels(plots.grid(pictures, ["a title too long for its cell"] * 30, tmp_path / "grid.png", columns=15))


def test_long_names_lose_their_middle() -> None:
    assert plots._cut("golden retriever 17", 11) == "golde…er 17"
    assert plots._cut("tench", 5) == "tench"


def test_groups_show_every_seed_and_the_mean(tmp_path: Path) -> None:
    path = plots.groups({"a": [1.0, 2.0, 3.0], "b $x": [9.0, 9.5, 10.0]}, tmp_path / "groups.png", label="error %")
    taller = plots.groups({str(i): [1.0, 2.0] for i in range(12)}, tmp_path / "taller.png", label="error %")
    assert pixels(taller).shape[0] > pixels(path).shape[0]
    # the mean of the first is on the left, that of the second on the right, half-way up each
    assert share(path, plots.INK, across=(0.15, 0.5), down=(0.1, 0.4)) > 0
    assert share(path, plots.INK, across=(0.7, 1), down=(0.4, 0.7)) > 0


def test_series_have_a_colour_each(tmp_path: Path) -> None:
    lines = {"first": [(10.0, [5.0, 6.0]), (100.0, [3.0, 3.5])], "second": [(10.0, [9.0, 9.5]), (100.0, [4.0, 4.4])]}
    path = plots.series(lines, tmp_path / "series.png", x_label="pictures", label="error %")
    assert has(path, plots.VAL)
    assert has(path, plots.TRAIN)


def test_nets_of_different_depth_share_a_panel(tmp_path: Path) -> None:
    nets = {"shallow": [1.0, 0.1], "deep": [1.0, 0.5, 0.01, 0.001]}
    path = plots.by_depth({"first": nets, "last": nets}, tmp_path / "depth.png", label="norm")
    for half in ((0, 0.5), (0.5, 1)):
        assert share(path, plots.VAL, across=half) > 0
        assert share(path, plots.TRAIN, across=half) > 0
