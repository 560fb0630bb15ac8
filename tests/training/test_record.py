"""What train tells evaluate."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.training.record import PhaseRecord, Record


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    phases = (
        PhaseRecord(name="frozen", trainable="head", epochs=1, best_epoch=1, lr=3e-3),
        PhaseRecord(name="finetune", trainable="last:2", epochs=3, best_epoch=3, lr=1e-5),
    )
    record = Record(run_id="a1", run_name="net-1", minutes=1.25, steps=80, monitor="val/loss", phases=phases)
    record.write(tmp_path)
    assert Record.read(tmp_path) == record


def test_without_one_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no trained model here; run `dvc repro`$"):
        Record.read(tmp_path)
