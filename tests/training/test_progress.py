"""What a training has done is taken up by the same training, and by no other."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.training.checkpoints import BEST, LAST
from pipeline.training.progress import Outcome, Progress

FACTS: dict[str, Any] = {"train.lr": 0.1, "train.transforms": {"rotate": {"limit": 5}}, "data.sha256": "ab"}


def _outcome(progress: Progress) -> Outcome:
    folder = progress.phase_folder("one")
    rows = [{"epoch": 1, "phase": "one", "val/loss": 0.1 + 0.2}]
    return Outcome(rows=rows, best=folder / BEST, last=folder / "last.ckpt", best_epoch=1, steps=7, gradients=[])


def test_what_was_noted_is_there_again(tmp_path: Path) -> None:
    first = Progress(tmp_path, facts=FACTS, leader=True)
    assert not first.resumes
    first.begin("run1")
    first.found("one", [0.1, 0.025])
    first.finish("one", _outcome(first))
    again = Progress(tmp_path, facts=dict(reversed(FACTS.items())), leader=True)
    assert again.resumes
    assert (again.run_id, again.rates, again.difference) == ("run1", {"one": [0.1, 0.025]}, "")
    assert again.outcome("one") == _outcome(first)
    assert again.outcome("two") is None


def test_another_configuration_finds_nothing_and_is_told_which_key_differs(tmp_path: Path) -> None:
    first = Progress(tmp_path, facts=FACTS, leader=True)
    first.begin("run1")
    first.phase_folder("one").mkdir(parents=True)
    other = Progress(tmp_path, facts={**FACTS, "train.lr": 0.2, "fold": 3}, leader=True)
    assert other.difference == "train.lr was 0.1 and is 0.2 (and 1 more)"
    assert not other.resumes
    assert not first.phase_folder("one").exists()


def test_ranks_that_do_not_lead_write_and_remove_nothing(tmp_path: Path) -> None:
    leader = Progress(tmp_path, facts=FACTS, leader=True)
    leader.begin("run1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for facts in (FACTS, {**FACTS, "train.lr": 9}):
        follower = Progress(tmp_path, facts=facts, leader=False)
        follower.begin("run2")
        follower.finish("one", _outcome(follower))
        follower.clear()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_training_leaves_nothing_to_take_up(tmp_path: Path) -> None:
    first = Progress(tmp_path, facts=FACTS, leader=True)
    first.begin("run1")
    first.phase_folder("one").mkdir(parents=True)
    first.clear()
    assert not Progress(tmp_path, facts=FACTS, leader=True).resumes
    assert not (tmp_path / "phases").exists()


@pytest.mark.parametrize("kept", [0, 40, -1])
def test_a_state_that_is_cut_short_is_begun_anew(kept: int, tmp_path: Path) -> None:
    first = Progress(tmp_path, facts=FACTS, leader=True)
    first.begin("run1")
    first.phase_folder("one").mkdir(parents=True)
    state = tmp_path / "state.json"
    state.write_bytes(state.read_bytes()[:kept])
    for leader in (False, True):
        again = Progress(tmp_path, facts=FACTS, leader=leader)
        assert not again.resumes
        assert again.difference == f"{state} cannot be read"
    assert not first.phase_folder("one").exists()
    again.begin("run2")
    assert Progress(tmp_path, facts=FACTS, leader=True).run_id == "run2"


def test_a_phase_is_forgotten_with_those_that_began_with_it(tmp_path: Path) -> None:
    first = Progress(tmp_path, facts=FACTS, leader=True)
    for phase in ("one", "two", "three", "under_way"):
        first.phase_folder(phase).mkdir(parents=True)
        (first.phase_folder(phase) / LAST).touch()
        if phase != "under_way":
            first.finish(phase, _outcome(first))
    first.forget("two")
    for progress in (first, Progress(tmp_path, facts=FACTS, leader=True)):
        assert [progress.outcome(phase) is not None for phase in ("one", "two", "three")] == [True, False, False]
    left = [phase for phase in ("one", "two", "three", "under_way") if (first.phase_folder(phase) / LAST).exists()]
    assert left == ["one", "two"]  # how far two is, its checkpoints say
