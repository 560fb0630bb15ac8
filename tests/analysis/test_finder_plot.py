"""The finder's picture marks the rate that is taken where it belongs, in each panel."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from pipeline.analysis import finder_plot, plots
from pipeline.training.finder import Sweep

RATES = [float(rate) for rate in np.geomspace(1e-6, 1, 50)]


def _sweep(suggestion: float, *, group: str = "all layers") -> Sweep:
    losses = [2.0 - 1.5 * np.exp(-((np.log10(rate) + 2) ** 2)) for rate in RATES]
    return Sweep(group, RATES, losses, suggestion)


def _where(path: Path, colour: str) -> npt.NDArray[np.bool_]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width <= 1600
        pixels = np.asarray(image.convert("RGB"))
    return (pixels == np.round(255 * np.array(to_rgb(colour)))).all(axis=2)


def _column(mask: npt.NDArray[np.bool_]) -> float:
    return float(np.nonzero(mask)[1].mean())


def test_the_mark_stands_at_the_rates_place_on_a_logarithmic_axis(tmp_path: Path) -> None:
    places = []
    for rate in (1e-6, 1e-4, 1e-2):
        path = finder_plot.draw([_sweep(rate)], tmp_path / "sweep.png")
        places.append(_column(_where(path, plots.TRAIN)))
    assert places[2] - places[1] == pytest.approx(places[1] - places[0], abs=2)
    begin = np.nonzero(_where(path, plots.VAL))[1].min()
    assert places[0] == pytest.approx(begin, abs=6)


def test_each_sweep_has_a_panel_and_an_empty_place_has_none(tmp_path: Path) -> None:
    names = ["all layers", "a.long.name.of.a.first.layer to a.long.name.of.a.last.layer", "$x$", "head"]
    path = finder_plot.draw([_sweep(1e-3, group=name) for name in names], tmp_path / "sweeps.png")
    mask = _where(path, plots.TRAIN)
    height, width = mask.shape
    cells = [
        mask[row : row + height // 2, int(column * width / 3) : int((column + 1) * width / 3)].any()
        for row in (0, height // 2)
        for column in range(3)
    ]
    assert cells == [True, True, True, True, False, False]


def test_a_sweep_that_diverges_leaves_the_rest_to_be_seen(tmp_path: Path) -> None:
    calm = _sweep(1e-3)
    wild = calm._replace(losses=[*calm.losses[:-1], 1000.0])
    for sweep in (calm, wild):
        mask = _where(finder_plot.draw([sweep], tmp_path / "sweep.png"), plots.VAL)
        rows = np.nonzero(mask[:, : mask.shape[1] * 2 // 3])[0]
        assert rows.max() - rows.min() > 0.4 * mask.shape[0]
