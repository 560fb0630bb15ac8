"""What the train stage tells the evaluate stage, beside the weights: the schedule as it was run, and the MLflow run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import fresh_file

NAME = "record.json"


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """One phase as it was run."""

    name: str
    trainable: str
    epochs: int
    """Epochs run; fewer than asked for after an early stop."""
    best_epoch: int
    """Counting on across phases, from 1."""
    lr: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One training."""

    run_id: str
    run_name: str
    minutes: float
    """Wall time of the phases."""
    steps: int
    """Optimiser steps of all phases."""
    monitor: str
    phases: tuple[PhaseRecord, ...]

    def write(self, folder: Path) -> None:
        """Puts the record into a model's folder."""
        with fresh_file(folder / NAME) as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """The record in a model's folder.

        Raises:
            UserError: nothing was trained there.
        """
        try:
            facts = json.loads((folder / NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder}: no trained model here; run `dvc repro`") from None
        return cls(**{**facts, "phases": tuple(PhaseRecord(**phase) for phase in facts["phases"])})
