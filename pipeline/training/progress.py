"""How far a training is, on disk: which phases are done and what they came to, so that it goes on after any end.

It lies outside every out of DVC's, and is taken up only by a training of the same configuration, data and first
weights.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import fresh_file
from pipeline.training.checkpoints import BEST, CHECKPOINTS, LAST

STATE = "state.json"
SWEEPS = "lr_find.png"
"""In a phase's folder: what the learning-rate finder saw."""


@dataclass(frozen=True)
class Outcome:
    """What a phase came to."""

    rows: list[dict[str, Any]]
    """A row per epoch: epoch (1-based, counting on across phases), phase, seconds, lr, the four metrics, and data_wait:
    the share of the seconds in which the next batch was waited for."""
    best: Path
    """Checkpoint of the best epoch by train.monitor."""
    last: Path
    """Checkpoint of the last epoch."""
    best_epoch: int
    """Of the best epoch: its number, counting on across phases."""
    steps: int
    """Optimiser steps of this phase."""
    gradients: list[dict[str, Any]]
    """Rows of GradientNorms, where train.gradient_norms asks for them."""


class Progress:
    """A training's folder.

    Several ranks open it at once, and only the leader writes. They agree all the same: what the leader takes away
    before it begins anew is what no rank would take up.

    Args:
        facts: what the weights follow from, by dotted names; plain values.
        leader: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, *, facts: Mapping[str, Any], leader: bool) -> None:
        self._folder, self._leader = folder, leader
        self._facts = json.loads(json.dumps(facts))
        self.run_id = ""
        """Of the tracker's run; empty before it has begun."""
        self.rates: dict[str, list[float]] = {}
        """By phase, the learning rates that were found for it."""
        self.tuned: dict[str, Any] = {}
        """What auto_tune found: choice, by parameters of train, and table, the rows of its trial; empty without it."""
        self._done: dict[str, dict[str, Any]] = {}
        self.difference = ""
        """Why an earlier training in this folder is not taken up; empty where it is, or where there was none."""
        self._open()

    @property
    def resumes(self) -> bool:
        """Whether there is something to go on from."""
        return bool(self.run_id)

    def phase_folder(self, phase: str) -> Path:
        """Where a phase's checkpoints lie."""
        return self._folder / "phases" / phase

    def begin(self, run_id: str) -> None:
        """Notes the tracker's run."""
        self.run_id = run_id
        self._write()

    def found(self, phase: str, rates: list[float]) -> None:
        """Notes the learning rates that were found for a phase, so that a resumed one has the same."""
        self.rates[phase] = rates
        self._write()

    def tune(self, choice: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> None:
        """Notes how this training computes, so that it does so to its end."""
        self.tuned = {"choice": dict(choice), "table": [dict(row) for row in table]}
        self._write()

    def finish(self, phase: str, outcome: Outcome) -> None:
        """Notes that a phase is over."""
        kept = {"rows": outcome.rows, "best_epoch": outcome.best_epoch, "steps": outcome.steps}
        self._done[phase] = {**kept, "gradients": outcome.gradients}
        self._write()

    def outcome(self, phase: str) -> Outcome | None:
        """What a phase came to; None where it is not over."""
        if phase not in self._done:
            return None
        folder = self.phase_folder(phase)
        return Outcome(best=folder / BEST, last=folder / LAST, **self._done[phase])

    def forget(self, phase: str) -> None:
        """Takes a phase that is over for one that is not: its checkpoints say how far it is.

        Those after it began with what it came to, and begin anew.
        """
        names = list(self._done)
        earlier = names[: names.index(phase)]
        self._done = {name: self._done[name] for name in earlier}
        self._write()
        if self._leader:
            for folder in (self._folder / "phases").iterdir():
                if folder.name not in (*earlier, phase):
                    for checkpoint in CHECKPOINTS:
                        (folder / checkpoint).unlink(missing_ok=True)

    def clear(self) -> None:
        """Takes away what only a resumed training needs; state first, since it is what the rest is taken up by."""
        if self._leader:
            (self._folder / STATE).unlink(missing_ok=True)
            shutil.rmtree(self._folder / "phases", ignore_errors=True)

    def _open(self) -> None:
        try:
            state = json.loads((self._folder / STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.clear()
            return
        except ValueError:  # neither JSON nor text: a disk's fault, since it is written whole or not at all
            self.difference = f"{self._folder / STATE} cannot be read"
            self.clear()
            return
        self.difference = _difference(state["facts"], self._facts)
        if self.difference:
            self.clear()
            return
        self.run_id, self.rates, self._done = state["run"], state["rates"], state["done"]
        self.tuned = state["tuned"]

    def _write(self) -> None:
        if not self._leader:
            return
        state = {"facts": self._facts, "run": self.run_id, "rates": self.rates, "tuned": self.tuned, "done": self._done}
        with fresh_file(self._folder / STATE) as path:
            path.write_text(json.dumps(state), encoding="utf-8")


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not keys:
        return ""
    key = keys[0]
    more = f" (and {len(keys) - 1} more)" if keys[1:] else ""
    return f"{key} was {before.get(key, 'unset')} and is {now.get(key, 'unset')}{more}"
