"""The pictures beside a run's figures: learning curves, confusion matrix, preview grid.

Each function writes one PNG, whole or not at all, at most 1600 pixels wide, into a folder that exists. Figures are made
as objects, without pyplot, so that nothing is left open and no display is looked for. Names are data: they are drawn
as they are, `$` included, and never read as mathematics.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.files import fresh_file

DPI = 150
WIDTH = 1590 / DPI
"""Inches; a little under 1600 pixels."""
TRAIN, VAL, INK, SHADE = "#D55E00", "#0072B2", "#333333", "#F1F1F1"
"""Vermilion and blue of Okabe and Ito's palette, which colour-blind readers tell apart; text; the tint behind it."""
NUMBERED = 20
"""Classes up to which a confusion matrix has a number in each cell."""
LABELLED = 60
"""Classes up to which it has names along its sides."""
LETTER = 0.6 / 72
"""A letter's mean width in inches, a point of the font's size."""
MARGIN = 0.12
"""Inches around a figure's contents."""


def curves(rows: pd.DataFrame, path: Path) -> Path:
    """Learning curves over all phases: loss above, top-1 accuracy below.

    Args:
        rows: a row per epoch with the columns epoch (from 1, counting on across phases), phase, train/loss, val/loss,
            train/top1, val/top1, and optionally best (bool: the best epoch of its phase). A missing figure is NaN.
        path: where the PNG goes; returned.
    """
    assert len(rows) > 0
    figure = Figure(figsize=(WIDTH, 7.4), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=MARGIN, h_pad=MARGIN)
    panels = figure.subplots(2, 1, sharex=True)
    size = 7 if len(rows) <= 40 else 3
    for axes, figure_name, label in zip(
        panels, ["loss", "top1"], ["loss (cross-entropy)", "top-1 accuracy"], strict=True
    ):
        for split, colour, marker in [("train", TRAIN, "o"), ("val", VAL, "s")]:
            values = rows[f"{split}/{figure_name}"]
            axes.plot(rows["epoch"], values, color=colour, marker=marker, markersize=size, linewidth=2, label=split)
        if "best" in rows:
            best = rows[rows["best"].astype(bool)]
            axes.plot(
                best["epoch"],
                best[f"val/{figure_name}"],
                linestyle="none",
                marker="o",
                markersize=size + 10,
                markerfacecolor="none",
                markeredgecolor=INK,
                markeredgewidth=1.6,
                label="best epoch of its phase",
            )
        _plain(axes)
        axes.set_ylabel(label, fontsize=12)
    _phases(rows, panels)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=11, frameon=False)
    figure.align_ylabels()
    panels[1].set_xlabel("epoch", fontsize=12)
    panels[1].set_xlim(rows["epoch"].min() - 0.5, rows["epoch"].max() + 0.5)
    panels[1].xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    return save(figure, path)


def confusion(matrix: npt.NDArray[np.int64], classes: Sequence[str], path: Path) -> Path:
    """Heat map of a confusion matrix, each row as shares of that class's pictures.

    Args:
        matrix: [C, C] pictures: rows actual, columns predicted. A row without a picture is grey.
        classes: the C class names.
        path: where the PNG goes; returned.

    Up to 20 classes each cell has its number. Beyond that the shades follow the square root of the share, or single
    mistakes among many classes could not be seen.
    """
    count = len(classes)
    assert matrix.shape == (count, count)
    totals = matrix.sum(axis=1, keepdims=True)
    percent = np.full(matrix.shape, np.nan)
    np.divide(100.0 * matrix, totals, out=percent, where=totals > 0)

    width = min(WIDTH, 5 + 0.6 * count)
    figure = Figure(figsize=(width, 0.87 * width), dpi=DPI)
    figure.set_layout_engine("compressed", w_pad=MARGIN, h_pad=MARGIN)
    axes = figure.subplots()
    axes.set_facecolor("#CCCCCC")
    numbered = count <= NUMBERED
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(1 if numbered else 0.5, vmin=0, vmax=100))
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
    bar.set_label(f"% of the actual class's test pictures{'' if numbered else ' (square-root scale)'}", fontsize=11)
    bar.outline.set_visible(False)
    unit = "" if count <= LABELLED else " (class number, from 0)"
    axes.set_xlabel(f"predicted{unit}", fontsize=12)
    axes.set_ylabel(f"actual{unit}", fontsize=12)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=10)
    if count <= LABELLED:
        _class_ticks(axes, classes, width=0.75 * width)
    if numbered:
        _numbers(axes, percent, size=12 if count <= 10 else 9)
    return save(figure, path)


def grid(pictures: Sequence[npt.NDArray[np.uint8]], titles: Sequence[str], path: Path, *, columns: int) -> Path:
    """Pictures in rows of equal square cells, each scaled to fit its own and named above it.

    Args:
        pictures: uint8, each [H, W], [H, W, 1] or [H, W, 3], of any sizes.
        titles: one a picture; a long one is cut at the cell's width.
        path: where the PNG goes; returned.
        columns: cells in a row.
    """
    assert len(pictures) == len(titles) > 0
    columns = min(columns, len(pictures))
    gap, caption = 0.1, 0.2
    cell = min(1.6, (WIDTH - gap) / columns)
    size = 9 if cell > 1.2 else 7
    lines = -(-len(pictures) // columns)
    width, height = columns * cell + gap, lines * (cell + caption) + gap
    figure = Figure(figsize=(width, height), dpi=DPI)
    for index, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        row, column = divmod(index, columns)
        left, bottom = column * cell + gap, height - (row + 1) * (cell + caption)
        axes = figure.add_axes((left / width, bottom / height, (cell - gap) / width, (cell - gap) / height))
        _fit(axes, picture)
        axes.set_title(
            _cut(title, int((cell - gap) / (LETTER * size))), fontsize=size, color=INK, pad=3, parse_math=False
        )
    return save(figure, path)


def groups(values: Mapping[str, Sequence[float]], path: Path, *, label: str) -> Path:
    """A row per group: each value a dot, and their mean a line. The axis need not begin at zero.

    Args:
        values: one or more per group, by the group's name; drawn from the top.
        path: where the PNG goes; returned.
        label: of the axis of values.
    """
    figure = Figure(figsize=(0.75 * WIDTH, 1.2 + 0.45 * len(values)), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=MARGIN, h_pad=MARGIN)
    axes = figure.subplots()
    for row, found in enumerate(values.values()):
        axes.plot(found, [row] * len(found), linestyle="none", marker="o", markersize=7, color=VAL, alpha=0.6)
        axes.plot([np.mean(found)] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=2)
    _plain(axes)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_yticks(range(len(values)), list(values))
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel(f"{label} (dots: seeds; line: mean)", fontsize=12)
    return save(figure, path)


def series(
    lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]], path: Path, *, x_label: str, label: str
) -> Path:
    """A line a series through the means, with every value as a dot, over a logarithmic axis.

    Args:
        lines: by name, the values at each place of the axis.
        path: where the PNG goes; returned.
        x_label: of the axis of places.
        label: of the axis of values.
    """
    figure = Figure(figsize=(0.75 * WIDTH, 4.6), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=MARGIN, h_pad=MARGIN)
    axes = figure.subplots()
    for name, colour, points in zip(lines, _colours(len(lines)), lines.values(), strict=True):
        places = [x for x, _ in points]
        axes.plot(places, [np.mean(found) for _, found in points], color=colour, linewidth=2, label=name)
        for x, found in points:
            axes.plot([x] * len(found), found, linestyle="none", marker="o", markersize=6, color=colour, alpha=0.6)
    _plain(axes)
    axes.set_xscale("log")
    every = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(every, [f"{x:g}" for x in every])
    axes.minorticks_off()
    axes.set_xlabel(x_label, fontsize=12)
    axes.set_ylabel(f"{label} (dots: seeds; line: mean)", fontsize=12)
    axes.legend(fontsize=11, frameon=False)
    return save(figure, path)


def by_depth(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path, *, label: str) -> Path:
    """A panel each, with a line of positive values over the layers of a net, the input on the left.

    Args:
        panels: by title, then by the net's name, a value per layer; nets may differ in depth.
        path: where the PNG goes; returned.
        label: of the axis of values, which is logarithmic.
    """
    figure = Figure(figsize=(WIDTH, 4.4), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=MARGIN, h_pad=MARGIN)
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, nets) in zip(drawn, panels.items(), strict=True):
        for (name, values), colour in zip(nets.items(), _colours(len(nets)), strict=True):
            axes.plot(np.linspace(0, 1, len(values)), values, color=colour, linewidth=1.6, label=name)
        _plain(axes)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=12, color=INK)
        axes.set_xlabel("place in the net: 0 first layer, 1 classifier", fontsize=12)
    drawn[0].set_ylabel(label, fontsize=12)
    drawn[0].legend(fontsize=11, frameon=False)
    return save(figure, path)


def _colours(count: int) -> list[str]:
    """Okabe and Ito's palette, again from its start where there are more lines than colours."""
    palette = (VAL, TRAIN, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", INK)
    return [palette[index % len(palette)] for index in range(count)]


def _phases(rows: pd.DataFrame, panels: Sequence[Axes]) -> None:
    """Shades every other phase and names each above the top panel, slanted where the names would touch."""
    spans = [(str(name), group.min(), group.max()) for name, group in rows.groupby("phase", sort=False)["epoch"]]
    middles = [(first + last) / 2 for _, first, last in spans]
    needed = [len(name) * LETTER * 11 * len(rows) / (0.85 * WIDTH) for name, _, _ in spans]
    room = np.diff(middles) - (np.array(needed[1:]) + np.array(needed[:-1])) / 2
    slanted = bool((room < 0).any())
    for index, (name, first, last) in enumerate(spans):
        for axes in panels:
            if index % 2 == 0:
                axes.axvspan(first - 0.5, last + 0.5, color=SHADE, zorder=0, linewidth=0)
            if index:
                axes.axvline(first - 0.5, color="#BBBBBB", linewidth=1, zorder=1)
        panels[0].text(
            middles[index],
            1.02,
            _cut(name, 24),
            transform=panels[0].get_xaxis_transform(),
            fontsize=11,
            color=INK,
            rotation=35 if slanted else 0,
            rotation_mode="anchor",
            horizontalalignment="left" if slanted else "center",
            verticalalignment="bottom",
            parse_math=False,
        )


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)


def _class_ticks(axes: Axes, classes: Sequence[str], *, width: float) -> None:
    """Names along both sides, slanted below where a name is wider than its share of `width` inches."""
    labels = [_cut(name, 24) for name in classes]
    size = 11 if len(classes) <= 10 else 9 if len(classes) <= NUMBERED else 6
    slanted = max(map(len, labels)) * LETTER * size > width / len(labels)
    axes.set_xticks(
        range(len(classes)),
        labels,
        fontsize=size,
        rotation=45 if slanted else 0,
        horizontalalignment="right" if slanted else "center",
        rotation_mode="anchor" if slanted else "default",
    )
    axes.set_yticks(range(len(classes)), labels, fontsize=size)
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        text.set_parse_math(False)


def _numbers(axes: Axes, percent: npt.NDArray[np.float64], *, size: int) -> None:
    """Whole percents; a cell without a picture stays empty, so that a small mistake can be told from none."""
    for (row, column), value in np.ndenumerate(percent):
        if value > 0:
            text = "<1" if value <= 0.5 else f"{value:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if value > 55 else INK)


def _fit(axes: Axes, picture: npt.NDArray[np.uint8]) -> None:
    """Shows a picture as large as its square cell allows, in the middle."""
    flat = picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
    axes.imshow(flat, cmap="gray", vmin=0, vmax=255)
    height, width = flat.shape[:2]
    side = max(height, width)
    axes.set_xlim((width - side) / 2 - 0.5, (width + side) / 2 - 0.5)
    axes.set_ylim((height + side) / 2 - 0.5, (height - side) / 2 - 0.5)
    axes.set_facecolor(SHADE)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _cut(text: str, letters: int) -> str:
    """A long text without its middle: names of one family often differ at the end only."""
    tail = (letters - 1) // 2
    return text if len(text) <= letters else f"{text[: letters - 1 - tail]}…{text[len(text) - tail :]}"


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG, whole or not at all."""
    with fresh_file(path) as beside:
        figure.savefig(beside, format="png", dpi=DPI)
    return path
