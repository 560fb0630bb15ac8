"""What the learning-rate finder saw: the loss of each trial over the rate, and the rate that was taken."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.analysis import plots
from pipeline.training.finder import Sweep

COLUMNS = 3


def draw(sweeps: Sequence[Sweep], path: Path) -> Path:
    """A panel per sweep: its smoothed loss over the learning rate, logarithmic, with the suggestion marked.

    Args:
        sweeps: as `finder.find` gives them; the first is that of all layers.
        path: where the PNG goes; returned.
    """
    columns = min(COLUMNS, len(sweeps))
    rows = math.ceil(len(sweeps) / columns)
    figure = Figure(figsize=(plots.WIDTH if columns > 1 else plots.WIDTH / 2, 1 + 2.6 * rows), dpi=plots.DPI)
    figure.set_layout_engine("constrained", w_pad=plots.MARGIN, h_pad=plots.MARGIN)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, sweep in zip(panels, sweeps, strict=False):
        _panel(axes, sweep)
    for axes in panels[len(sweeps) :]:
        axes.set_axis_off()
    figure.supxlabel("learning rate", fontsize=12)
    figure.supylabel("loss, smoothed", fontsize=12)
    return plots.save(figure, path)


def _panel(axes: Axes, sweep: Sweep) -> None:
    axes.plot(sweep.rates, sweep.losses, color=plots.VAL, linewidth=2)
    axes.axvline(sweep.suggestion, color=plots.TRAIN, linewidth=2, linestyle="--")
    axes.set_xscale("log")
    axes.set_title(f"{sweep.group}: {sweep.suggestion:.2g}", fontsize=11, color=plots.INK, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.tick_params(labelsize=9)
