"""What a sweep came to: its best settings, a table of its trials, and a plot of them in their order."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML

from pipeline.analysis import metrics, plots
from pipeline.analysis.compare import PIPED_WIDTH
from pipeline.files import fresh_folder

if TYPE_CHECKING:
    import optuna

BEST, TRIALS, HISTORY = "best.yaml", "trials.csv", "history.png"
SHOWN = 5
"""Trials in the table that is printed."""
ENOUGH = 5
"""Finished trials from which on the parameters' importance is estimated."""


def write(study: "optuna.Study", folder: Path, *, figure: str, space: Iterable[str]) -> None:
    """Writes a folder in place of an earlier one: trials.csv, and where a trial has a figure best.yaml and history.png.

    trials.csv has a row per trial: trial, state (complete, pruned, failed, or stopped: such a trial is begun again
    under another number), the figure, epochs, minutes, run (MLflow's id of a complete one), the parameters, and why it
    failed. best.yaml has the best trial's parameters by their dotted names.
    """
    names = list(space)
    rows = _rows(study, figure, names)
    with fresh_folder(folder) as beside:
        metrics.write_csv(rows, beside / TRIALS)
        if rows[figure].notna().any():
            best = study.best_trial
            with (beside / BEST).open("w", encoding="utf-8") as file:
                file.write(f"# trial {best.number} of {study.study_name}: {figure} {best.value:.6g}\n")
                YAML().dump({name: best.params[name] for name in names}, file)
            _plot(rows, figure, beside / HISTORY, falls=_falls(study))


def tell(study: "optuna.Study", *, figure: str, space: Iterable[str]) -> None:
    """Prints the best trials, how many there are of each state, and what the parameters count for."""
    names = list(space)
    rows = _rows(study, figure, names)
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("trial", figure, *names, "epochs", "minutes"):
        shown.add_column(heading, overflow="fold", justify="right")
    for row in rows.dropna(subset=[figure]).sort_values(figure, ascending=_falls(study)).head(SHOWN).to_dict("records"):
        cells = [f"{row['trial']}", f"{row[figure]:.4f}", *(_short(row[name]) for name in names)]
        shown.add_row(*map(Text, [*cells, f"{row['epochs']}", f"{row['minutes']:.1f}"]))
    (Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)).print(shown)
    states = rows["state"].value_counts()
    print(f"{len(rows)} trials: {', '.join(f'{number} {state}' for state, number in states.items())}")
    if shares := importance(study):
        print(f"importance of each: {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}")


def importance(study: "optuna.Study") -> dict[str, float]:
    """Each parameter's share of the figures' variance over the trials, largest first (fANOVA, Hutter et al. 2014).

    Nothing where too few trials have a figure, or all the same one. Of few trials, it is a rough guess.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < ENOUGH or len({trial.value for trial in complete}) == 1:
        return {}
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


def _rows(study: "optuna.Study", figure: str, names: list[str]) -> pd.DataFrame:
    from optuna.trial import TrialState

    rows: list[dict[str, Any]] = []
    for trial in study.get_trials(deepcopy=False):
        why = trial.user_attrs.get("failed", "")
        state = trial.state.name.lower()
        if trial.state == TrialState.FAIL:
            state = "failed" if why else "stopped"
        rows.append(
            {
                "trial": trial.number,
                "state": state,
                # Optuna gives a pruned one the figure that it had last.
                figure: trial.value if trial.state == TrialState.COMPLETE else float("nan"),
                "epochs": trial.last_step or 0,
                "minutes": trial.duration.total_seconds() / 60 if trial.duration else float("nan"),
                "run": trial.user_attrs.get("run", ""),
                **{name: trial.params.get(name) for name in names},
                "why": why,
            }
        )
    return pd.DataFrame(rows)


def _falls(study: "optuna.Study") -> bool:
    return study.direction.name == "MINIMIZE"


def _plot(rows: pd.DataFrame, figure: str, path: Path, *, falls: bool) -> None:
    whole = rows.dropna(subset=[figure])
    best = whole[figure].cummin() if falls else whole[figure].cummax()
    drawn = Figure(figsize=(plots.WIDTH, 4.2), dpi=plots.DPI, layout="constrained")
    axes = drawn.subplots()
    axes.plot(whole["trial"], whole[figure], "o", color=plots.VAL, label="trial")
    axes.step(whole["trial"], best, where="post", color=plots.TRAIN, label="best so far")
    for number in rows["trial"][rows["state"].isin(["pruned", "failed"])]:
        axes.axvline(number, color="#CCCCCC", linewidth=1, zorder=0)
    axes.plot([], [], color="#CCCCCC", linewidth=1, label="pruned or failed")
    axes.set_xlabel("trial", fontsize=12)
    axes.set_ylabel(figure, fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    plots.save(drawn, path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
