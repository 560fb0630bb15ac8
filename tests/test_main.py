"""The command line: light, and every mistake is one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import __main__ as command_line
from pipeline import config

ROOT = Path(__file__).parents[1]


def _thaw(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_help_has_every_command() -> None:
    words = _thaw("--help").stdout.split()
    assert set(command_line.COMMANDS) <= set(words)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["evalute"]) == 2
    assert capsys.readouterr().err == "thaw: evalute: no such command; did you mean evaluate or ablate?\n"


def test_a_users_mistake_is_one_line(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text().replace("  batch_size: 64", "  batchsize: 64")
    (tmp_path / "params.yaml").write_text(text)
    done = _thaw("check", cwd=tmp_path)
    line = text[: text.index("batchsize")].count("\n") + 1
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"thaw check: params.yaml:{line}: train.batchsize: no such parameter; did you mean batch_size?\n"
    )


def test_outside_the_repository_it_says_where_to_run(tmp_path: Path) -> None:
    done = _thaw("train", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "run from the repository's top folder" in done.stderr


def test_check_shows_every_parameter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert command_line.main(["check", "--show"]) == 0
    assert json.loads(capsys.readouterr().out) == config.load().model_dump(mode="json")


def test_models_lists_ours_and_timms(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["models", "--search", "*net20*"]) == 0
    listed = capsys.readouterr().out.split()
    assert "scratch/resnet20" in listed
    assert "densenet201" in listed


def test_models_that_match_nothing_are_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["models", "--search", "no-such-*"]) == 2
    assert "no net matches no-such-*" in capsys.readouterr().err
