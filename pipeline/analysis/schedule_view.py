"""The whole schedule before it is run: a table, and learning rates and trainable share over the steps as a picture."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from torch import nn

from pipeline.analysis import plots
from pipeline.parameters import Config, PhaseParams
from pipeline.training import optim, schedule
from pipeline.training.schedule import Phase

POINTS = 400
"""Steps that are drawn of a phase at most: schedules are shapes over a phase, whatever its length."""
WIDTH = 118
"""Columns of the table where the terminal has no width."""


def run(config: Config, *, as_yaml: bool) -> None:
    """Prints the schedule that params.yaml asks for, as a table or as phases that can stand under train.phases."""
    from pipeline import nets, paths
    from pipeline.data.store import Store
    from pipeline.errors import blaming
    from pipeline.training import checks, frozen
    from pipeline.training.pretrained import Origin

    model = config.model
    prepared, pretrained = paths.prepared(config.data.name), paths.pretrained(model.name)
    store = Store(prepared) if prepared.exists() else None
    random_start = Origin.read(pretrained).start == "random" if pretrained.exists() else model.pretrained is False
    with blaming("model.name"), torch.device("meta"):
        net = nets.build(
            model.name,
            num_classes=len(store.meta.classes) if store else 1000,
            in_chans=model.in_chans,
            drop_rate=model.drop_rate,
            drop_path_rate=model.drop_path_rate,
            stem=model.stem,
            recompute=model.recompute,
        )
    with blaming("train.phases"):
        if as_yaml:
            YAML().dump({"phases": _written_out(config, net)}, sys.stdout)
            return
        phases = schedule.plan(config.train, net, px=config.px, random_start=random_start)
        with torch.device("meta"):
            checks.check_schedule(phases, net, config)
        counts = store.counts() if store else {"train": 0, "val": 0}
        both = counts["train"] + counts["val"]
        plans = frozen.plans(phases, net, params=config.train, in_chans=model.in_chans, pictures=both)
        print(text(phases, net, pictures=counts["train"], frozen=[plan.told for plan in plans]))
    if store is None:
        print(f"steps are known once {prepared} is there: dvc repro augment")


def text(phases: Sequence[Phase], net: nn.Module, *, pictures: int, frozen: Sequence[str]) -> str:
    """A line a phase: how long, what learns and at which rates, and how often frozen layers are run.

    Args:
        pictures: for training; 0 leaves the steps out.
        frozen: what is said of each phase's frozen layers.
    """
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    headings = (
        "phase",
        "epochs",
        "steps",
        "learns",
        "parameters",
        "learning rate",
        "schedule",
        "batch",
        "px",
        "frozen run",
    )
    for heading in headings:
        shown.add_column(heading, overflow="fold", justify="right" if heading in ("epochs", "steps", "px") else "left")
    whole = sum(parameter.numel() for parameter in net.parameters())
    for phase, run_when in zip(phases, frozen, strict=True):
        names = schedule.thaw(net, phase.trainable)
        learning = sum(p.numel() for p in net.parameters() if p.requires_grad)
        shown.add_row(
            phase.name,
            str(phase.epochs_of(pictures)) if pictures else "" if phase.steps else str(phase.epochs),
            f"{phase.total_steps(pictures):,}" if pictures else str(phase.steps or ""),
            f"{phase.trainable}: {len(names)} tensors",
            f"{learning:,} ({learning / whole:.1%})",
            _rates(phase, net),
            _shape(phase),
            f"{phase.batch_size}" + (f" in {phase.accumulate} parts" if phase.accumulate > 1 else ""),
            str(phase.px),
            run_when,
        )
    console = Console(width=None if Console().is_terminal else WIDTH)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def draw(
    phases: Sequence[Phase], net: nn.Module, path: Path, *, pictures: int, rates: Mapping[str, Sequence[float]]
) -> Path:
    """The learning rate of each group, and the share of parameters that learns, over the optimiser steps.

    Args:
        rates: those found, by phase, where a phase's lr is `find`.
        path: where the PNG goes; returned.
    """
    figure = Figure(figsize=(plots.WIDTH, 6), dpi=plots.DPI)
    figure.set_layout_engine("constrained", w_pad=plots.MARGIN, h_pad=plots.MARGIN)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    whole = sum(parameter.numel() for parameter in net.parameters())
    begin = 0
    for number, phase in enumerate(phases):
        schedule.thaw(net, phase.trainable)
        total = phase.total_steps(pictures)
        points = min(total, POINTS)
        steps = [begin + total * point / points for point in range(points)]
        curves = _simulated(phase, net, rates.get(phase.name), points=points)
        for place, curve in enumerate(curves):
            upper.plot(steps, curve, color=plots.VAL, alpha=1 if len(curves) == 1 else 0.3 + 0.7 * place / len(curves))
        share = sum(p.numel() for p in net.parameters() if p.requires_grad) / whole
        lower.fill_between([begin, begin + total], 100 * share, color=plots.TRAIN, linewidth=0, alpha=0.8)
        _named(phase.name, (upper, lower), begin, begin + total, shaded=number % 2 == 0)
        begin += total
    upper.set_ylabel("learning rate", fontsize=12)
    lower.set_ylabel("% of parameters\nthat learn", fontsize=12)
    lower.set_ylim(0, 105)
    lower.set_xlabel("optimiser step", fontsize=12)
    lower.set_xlim(0, begin)
    upper.set_ylim(bottom=0)
    return plots.save(figure, path)


def _simulated(phase: Phase, net: nn.Module, rates: Sequence[float] | None, *, points: int) -> list[list[float]]:
    """The learning rate of each distinct group at each point."""
    lr = phase.lr if rates is None else rates
    assert lr != "find"
    optimizer = optim.optimizer(net, name="sgd", lr=lr, weight_decay=phase.weight_decay, layer_decay=phase.layer_decay)
    scheduler = optim.scheduler(optimizer, name=phase.scheduler, total_steps=points, warmup=phase.warmup)
    rows: list[tuple[float, ...]] = []
    with warnings.catch_warnings():
        # That no optimiser steps in between is the point here.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
        for point in range(points):
            rows.append(tuple(group["lr"] for group in optimizer.param_groups))
            if scheduler is not None and point + 1 < points:
                scheduler.step()
    return [list(curve) for curve in sorted(set(zip(*rows, strict=True)))]


def _rates(phase: Phase, net: nn.Module) -> str:
    if phase.lr == "find":
        return "looked for"
    scales = [group.scale for group in optim.groups(net, weight_decay=0.0, layer_decay=phase.layer_decay)]
    low, high = phase.lr * min(scales), phase.lr * max(scales)
    return f"{high:g}" if low == high else f"{high:g} (head) to {low:.2g}, {len(set(scales))} layers"


def _shape(phase: Phase) -> str:
    warm = "" if phase.warmup in ("auto", 0) else f", {phase.warmup:.0%} warm-up"
    early = f", at most {phase.patience} epochs without a better one" if phase.patience else ""
    return f"{phase.optimizer}, {phase.scheduler}{warm}{early}"


def _written_out(config: Config, net: nn.Module) -> dict[str, dict[str, Any]]:
    """The phases as params.yaml takes them, without what is left to `train`."""
    asked = config.train.phases
    phases = schedule.ready_made(asked, net) if isinstance(asked, str) else asked
    plain = {name: field.default for name, field in PhaseParams.model_fields.items()}
    return {
        name: {key: value for key, value in phase if value != plain[key]} | {"epochs": config.train.phase(phase).epochs}
        for name, phase in phases.items()
    }


def _named(name: str, panels: Sequence[Axes], first: float, last: float, *, shaded: bool) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=11)
        if shaded:
            axes.axvspan(first, last, color=plots.SHADE, zorder=0, linewidth=0)
    panels[0].text(
        (first + last) / 2,
        1.02,
        name,
        transform=panels[0].get_xaxis_transform(),
        fontsize=11,
        color=plots.INK,
        horizontalalignment="center",
        verticalalignment="bottom",
        parse_math=False,
    )
