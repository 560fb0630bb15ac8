"""Writes the results of bench/results/ into docs/performance.md: tables between its marks, and pictures beside.

    python bench/report.py

What has no results file is said to be missing there.
"""

import argparse
import json
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common import RESULTS, ROOT, letter, table

PAGE = ROOT / "docs/performance.md"
IMAGES = ROOT / "docs/images"
MARKS = ("<!-- results: written by bench/report.py -->", "<!-- end of results -->")
BENCHES = {
    "startup": "Starting",
    "step": "The step",
    "evaluate": "Evaluation",
    "memory": "Memory",
    "upkeep": "Checkpoints and tracking",
    "datapath": "The data path",
    "throughput": "Throughput against the limit",
    "frozen": "Frozen epochs",
    "loop": "Fine-tuning from JPEGs",
    "scaling": "What more pictures, epochs and threads cost",
    "accuracy": "Time to a given accuracy",
    "frozen_peers": "Frozen epochs, against fastai",
    "loop_peers": "Fine-tuning from JPEGs, against other trainers",
    "accuracy_peers": "Time to a given accuracy, against other trainers",
    "gpu": "On a GPU",
}
"""Heading of each results file, in the page's order."""
WIDTH_IN, ROW_IN, DPI = 9.0, 0.62, 110
OURS, NEUTRAL, MISSED, AIM = "#1f77b4", "#7f7f7f", "#d62728", "#2ca02c"


def main() -> None:
    """Draws the pictures and writes the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("\n".join(write(RESULTS, page=PAGE, images=IMAGES)))


def write(results: Path, *, page: Path, images: Path) -> list[str]:
    """Puts the results into the page; gives back a line for each bench."""
    parts, said = [], []
    for name, heading in BENCHES.items():
        path = results / f"{name}.json"
        if not path.exists():
            parts.append(f"### {heading}\n\nNot measured yet: `bench/results/{name}.json` is missing.\n")
            said.append(f"{name}: missing")
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        parts.append(_section(name, heading, result, images))
        said.append(f"{name}: {len(result['comparisons'])} comparisons")
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    assert after or rest.endswith(MARKS[1]), f"{page} has no marks"
    page.write_text(f"{before}{MARKS[0]}\n\n" + "\n".join(parts) + f"\n{MARKS[1]}{after}", encoding="utf-8")
    return said


def _section(name: str, heading: str, result: dict[str, Any], images: Path) -> str:
    runs = result["runs"]
    lines = [f"### {heading}", ""]
    for number, one in enumerate(runs):
        mark = f"{letter(number)}: " if len(runs) > 1 else ""
        lines += [f"{mark}`{one['command']}` on {_where(one['machine'])}, {_commit(one['commit'])}.", ""]
    if result["quick"]:
        lines += ["A smoke test (`--quick`): these figures mean nothing.", ""]
    if result["comparisons"]:
        lines += [table([result]), ""]
        picture = _ratios(result["comparisons"], images / f"performance-{name}.png")
        lines += [f"![{heading}: medians and 95% intervals of the ratios](images/{picture.name})", ""]
    if result.get("series"):
        picture = _series(result["series"], images / f"performance-{name}-curves.png")
        lines += [f"![{heading}: curves of Thaw and the plain PyTorch loop](images/{picture.name})", ""]
    for what in result["missing"]:
        lines += [f"Not measured: {what['what']}: {what['why']}.", ""]
    return "\n".join(lines)


def _where(machine: dict[str, Any]) -> str:
    """A machine, and when, in a few words."""
    bf16 = "computes bfloat16" if machine["bf16"] else "without bfloat16"
    gpu = f", {machine['gpu']}" if "gpu" in machine else ""
    cores = f"{machine['usable_cores']} cores, threads: {machine['threads']}{gpu}"
    return f"{machine['processor']} ({bf16}), {cores}; torch {machine['torch']}, {machine['date']}"


def _commit(name: str) -> str:
    clean = name.removesuffix("-dirty")
    if not clean:
        return "of no known commit"
    return f"commit {clean}" + (" and changes" if clean != name else "")


def _ratios(comparisons: list[dict[str, Any]], path: Path) -> Path:
    """A row per comparison: median, interval, range and target, on a logarithmic axis."""
    figure = Figure(figsize=(WIDTH_IN, 1.1 + ROW_IN * len(comparisons)), dpi=DPI)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for row, c in enumerate(comparisons):
        colour = {None: NEUTRAL, True: OURS, False: MISSED}[c["met"]]
        axes.plot([c["min"], c["max"]], [row, row], color=colour, linewidth=1)
        axes.plot(c["interval"], [row, row], color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt")
        axes.plot(c["median"], row, "o", color=colour)
        axes.annotate(f"{c['median']:.3g}", (c["median"], row), (0, 7), textcoords="offset points", ha="center")
        if c["target"]:
            aim = float(c["target"].split()[-1])
            axes.plot([aim, aim], [row - 0.32, row + 0.32], color=AIM, linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(comparisons)), [fill(c["name"], 46) for c in comparisons], fontsize=8)
    axes.set_ylim(len(comparisons) - 0.5, -0.6)
    axes.set_xscale("log")
    everything = [v for c in comparisons for v in (c["min"], c["max"], *_aim(c), 1)]
    axes.set_xlim(min(everything) / 1.3, max(everything) * 1.3)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if _within(t, axes.get_xlim())]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        "ratio: median, 95% interval (band), range (line), target (green); blue: met, red: not met, grey: none",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path


def _aim(comparison: dict[str, Any]) -> list[float]:
    return [float(comparison["target"].split()[-1])] if comparison["target"] else []


def _within(value: float, edges: tuple[float, float]) -> bool:
    return edges[0] <= value <= edges[1]


def _series(series: dict[str, Any], path: Path) -> Path:
    """A panel per curve, in multiples of Thaw's first point: seconds would be a claim."""
    figure = Figure(figsize=(WIDTH_IN, 3.2), dpi=DPI)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(series), squeeze=False)[0]
    for axes, curve in zip(panels, series.values(), strict=True):
        unit = next(iter(curve["points"]["Thaw"].values()))
        for colour, (side, points) in zip((OURS, NEUTRAL), curve["points"].items(), strict=True):
            axes.plot([float(x) for x in points], [y / unit for y in points.values()], "o-", color=colour, label=side)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel(curve["x"])
        axes.set_ylabel(f"{curve['y']}\n(Thaw's first point: 1)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path


if __name__ == "__main__":
    main()
