"""The learning-rate finder's sweeps as a picture: the loss over the rate, and the rate that was taken."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.analysis import plots
from pipeline.training.finder import Sweep

COLUMNS = 3
LONG = 34
"""Letters from which a panel's name takes two lines."""


def draw(sweeps: Sequence[Sweep], path: Path) -> Path:
    """A panel a sweep, all on the same axes; a dashed line marks the rate of what learned in it.

    Where layers have rates of their own, they train at those, and the first panel's rate is only what these are
    balanced around; layers that were not swept alone, or did nothing alone, have no panel.

    Args:
        sweeps: one or more, in the order of the panels, that of all layers first.
        path: where the PNG goes; returned.
    """
    columns = min(COLUMNS, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure = Figure(figsize=(plots.WIDTH * (0.5 + columns / 6), 3.9 if rows == 1 else 0.5 + 2.6 * rows), dpi=plots.DPI)
    figure.set_layout_engine("constrained", w_pad=plots.MARGIN, h_pad=plots.MARGIN)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, sweep in zip(panels.flat, sweeps, strict=False):
        _sweep(axes, sweep)
    for axes in panels.flat[len(sweeps) :]:
        axes.set_visible(False)
    for axes in panels.flat[len(sweeps) - columns : len(sweeps)]:
        axes.tick_params(labelbottom=True)
    top = max(sweep.losses[0] for sweep in sweeps)
    bottom = min(min(sweep.losses) for sweep in sweeps)
    # What is above, where a sweep diverges, is of no interest.
    panels[0, 0].set_ylim(bottom - 0.1 * (top - bottom), top + 0.5 * (top - bottom))
    figure.supxlabel(_told(len(sweeps)), fontsize=12)
    figure.supylabel("loss while training, smoothed", fontsize=12)
    return plots.save(figure, path)


def _told(panels: int) -> str:
    """What the dashed lines are."""
    if panels == 1:
        return "learning rate (dashed: the one to train with)"
    return (
        "learning rate (dashed: the one to train with, balanced around that of all layers;\n"
        "layers without a panel do nothing alone, and have at most that rate)"
    )


def _sweep(axes: Axes, sweep: Sweep) -> None:
    axes.plot(sweep.rates, sweep.losses, color=plots.VAL, linewidth=2)
    place = np.interp(math.log(sweep.suggestion), np.log(sweep.rates), sweep.losses)
    axes.axvline(sweep.suggestion, color=plots.TRAIN, linewidth=1.6, linestyle="--")
    axes.plot([sweep.suggestion], [place], color=plots.TRAIN, marker="o", markersize=7)
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)
    name = sweep.group.replace(" to ", " to\n") if len(sweep.group) > LONG else sweep.group
    axes.set_title(f"{name}: {sweep.suggestion:.2g}", fontsize=10, color=plots.INK, parse_math=False)
