"""What the benches share: turns, ratios and their intervals, targets, processes, the results file and its table."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest


def _asked(path: Path | None, *, quick: bool = True, add: bool = False) -> argparse.Namespace:
    return argparse.Namespace(quick=quick, json=path, add=add)


def test_sides_take_turns(common: Any) -> None:
    heard: list[str] = []

    def side(name: str) -> Any:
        return lambda: heard.append(name) or len(heard)

    found = common.rounds({"a": side("a"), "b": side("b"), "c": side("c")}, number=2)
    assert heard == ["a", "b", "c", "a", "b", "c"]
    assert found == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}


def test_ratios_are_taken_within_a_round(common: Any) -> None:
    assert common.ratios([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        common.ratios([1.0, 2.0], [1.0])


def test_the_interval_holds_the_median_and_is_the_same_each_time(common: Any) -> None:
    values = [1.0, 1.1, 1.2, 1.3, 5.0]
    low, high = common.interval(values)
    assert 1.0 <= low <= 1.2 <= high <= 5.0
    assert common.interval(values) == (low, high)
    assert common.interval([2.0]) == (2.0, 2.0)


@pytest.mark.parametrize(("ratio", "least", "most"), [(1.29, False, True), (1.3, False, True), (8.0, True, False)])
def test_a_target_is_a_bound(common: Any, ratio: float, least: bool, most: bool) -> None:
    assert common.Target(at_least=8).met(ratio) is least
    assert common.Target(at_most=1.3).met(ratio) is most
    assert (str(common.Target(at_least=8)), str(common.Target(at_most=1.3))) == (">= 8", "<= 1.3")


def test_a_comparison_is_judged_by_its_median_and_by_what_has_to_hold(common: Any) -> None:
    facts = {"name": "x", "ratio_of": "a / b", "ratios": [7.0, 9.0, 30.0], "target": common.Target(at_least=8)}
    found = common.Comparison(**facts).facts()
    assert (found["median"], found["min"], found["max"], found["rounds"], found["met"]) == (9.0, 7.0, 30.0, 3, True)
    assert common.Comparison(**facts, holds=False).facts()["met"] is False
    assert common.Comparison(**{**facts, "target": None}).facts()["met"] is None


def test_a_process_gives_its_lines_with_their_times_and_its_figures(common: Any, tmp_path: Path) -> None:
    code = "print('begin'); print('RESULT {\"train\": 2.5}'); print('end')"
    done = common.run([sys.executable, "-c", code], folder=tmp_path)
    assert [line for _, line in done.lines] == ["begin", 'RESULT {"train": 2.5}', "end"]
    assert 0 < done.line("begin")[0] <= done.line("end")[0] <= done.seconds
    assert done.told == {"train": 2.5}
    with pytest.raises(SystemExit, match="no line 'nowhere'"):
        done.line("nowhere")


def test_a_process_that_fails_is_no_measurement(common: Any, tmp_path: Path) -> None:
    failing = "import sys; print('what went wrong', file=sys.stderr); sys.exit(3)"
    with pytest.raises(SystemExit, match=r"exit code 3(.|\n)*what went wrong"):
        common.run([sys.executable, "-c", failing], folder=tmp_path)


def test_a_mistake_of_the_users_is_passed_on_in_its_line(
    common: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistaken = (
        "import sys; print('a warning', file=sys.stderr); print('train.lr: too high', file=sys.stderr); sys.exit(2)"
    )
    with pytest.raises(SystemExit) as refused:
        common.run([sys.executable, "-c", mistaken], folder=tmp_path)
    assert refused.value.code == 2
    assert capsys.readouterr().err == "train.lr: too high\n"


def test_a_process_may_be_told_to_end_once_it_has_shown_enough(common: Any, tmp_path: Path) -> None:
    endless = "import itertools, time\nfor i in itertools.count(): print(i); time.sleep(0.01)"
    done = common.run([sys.executable, "-c", endless], folder=tmp_path, enough=lambda line: int(line) >= 3)
    assert [line for _, line in done.lines[:4]] == ["0", "1", "2", "3"]
    whole = common.run([sys.executable, "-c", "print(1)"], folder=tmp_path, enough=lambda line: int(line) >= 3)
    assert [line for _, line in whole.lines] == ["1"]


def test_processes_are_given_this_tree_and_no_hub(common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    code = "import os, pipeline; print(os.environ.get('DVC_ROOT'), os.environ['HF_HUB_OFFLINE'], pipeline.__file__)"
    ((_, line),) = common.run([sys.executable, "-c", code], folder=tmp_path).lines
    assert line == f"None 1 {common.ROOT / 'pipeline/__init__.py'}"


def test_later_epochs_leave_the_first_out(common: Any) -> None:
    assert common.later({"ends": [10.0, 12.0, 16.0]}) == 3.0


def test_results_are_written_with_the_machine_and_what_is_missing(
    common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench/frozen.py", "--pictures", "/home/someone/pictures", "--pairs", "2"])
    bench = common.Bench("frozen", _asked(tmp_path / "results/frozen.json"))
    bench.comparisons.append(
        common.Comparison(name="x against y", ratio_of="y / x", ratios=[2.0, 4.0], target=common.Target(at_least=8))
    )
    bench.lacks("fastai", "not installed")
    bench.write()
    found = json.loads((tmp_path / "results/frozen.json").read_text())
    (run,) = found["runs"]
    assert run["command"] == "python bench/frozen.py --pictures FOLDER --pairs 2"
    assert found["missing"] == [{"what": "fastai", "why": "not installed"}]
    assert found["comparisons"][0]["ratios"] == [2.0, 4.0]
    assert run["machine"]["usable_cores"] >= 1
    assert {"processor", "threads", "torch", "date"} <= run["machine"].keys()
    told = capsys.readouterr().out
    assert "| x against y | y / x | 3 | 2 to 4 | 2 to 4 | 2 | >= 8 | **not met** |" in told


def test_a_smoke_test_overwrites_no_results(common: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.Bench("frozen", _asked(None)).write()
    assert not list(tmp_path.iterdir())
    common.Bench("frozen", _asked(None, quick=False)).write()
    assert [path.name for path in tmp_path.iterdir()] == ["frozen.json"]


def test_parts_of_a_bench_are_put_together(common: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "loop.json"

    def run(words: str, *, add: bool, **measured: float) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["bench/loop.py", *words.split()])
        bench = common.Bench("loop", _asked(path, quick=False, add=add))
        for name, ratio in measured.items():
            bench.comparisons.append(common.Comparison(name=name, ratio_of="y / x", ratios=[ratio]))
        bench.write()
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    run("--px 64", add=False, small=1.0, large=2.0)
    found = run("--px 224 --add", add=True, large=3.0)
    assert {c["name"]: (c["median"], c["run"]) for c in found["comparisons"]} == {"small": (1.0, 0), "large": (3.0, 1)}
    assert [run["command"] for run in found["runs"]] == [
        "python bench/loop.py --px 64",
        "python bench/loop.py --px 224 --add",
    ]
    found = run("--px 64 --add", add=True, small=4.0)  # the first run has nothing left in it
    assert {c["name"]: (c["median"], c["run"]) for c in found["comparisons"]} == {"large": (3.0, 0), "small": (4.0, 1)}
    assert [run["command"].split()[-2] for run in found["runs"]] == ["224", "64"]
    path.write_text(json.dumps({**found, "bench": "frozen"}))
    with pytest.raises(SystemExit) as refused:
        run("--px 128 --add", add=True, middle=1.0)
    assert refused.value.code == 2


def test_what_was_missing_is_missing_until_it_is_measured(common: Any) -> None:
    def result(*names: str, missing: str = "") -> dict[str, Any]:
        lacks = [{"what": missing, "why": "late"}] if missing else []
        rows = [{"name": name, "run": 0} for name in names]
        return {"bench": "x", "quick": False, "runs": [{}], "comparisons": rows, "missing": lacks, "series": {}}

    before = result("one", missing="time to 0.9")
    assert common.together(before, result("two"))["missing"] == before["missing"]
    assert common.together(before, result("time to 0.9, against a loop"))["missing"] == []
    again = result(missing="time to 0.9")
    assert common.together(before, again)["missing"] == again["missing"]


def test_a_peer_that_is_not_installed_is_named(common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "PEERS_PYTHON", tmp_path / "python")
    assert "make bench-peers" in common.peers_missing("fastai")
    monkeypatch.setattr(common, "PEERS_PYTHON", Path(sys.executable))
    assert common.peers_missing("json") == ""
    assert "No module named 'no_such_peer'" in common.peers_missing("no_such_peer")


@pytest.mark.parametrize(
    ("ratios", "told"),
    [
        ([9.0, 9.5, 10.0], "met"),
        ([7.0, 9.0, 10.0], "met (can't tell)"),
        ([7.0, 7.5, 9.0], "**not met** (can't tell)"),
        ([5.0, 6.0, 7.0], "**not met**"),
    ],
)
def test_a_table_says_whether_an_interval_leaves_the_target_open(common: Any, ratios: list[float], told: str) -> None:
    one = common.Comparison(name="x", ratio_of="y / x", ratios=ratios, target=common.Target(at_least=8)).facts()
    assert common.table([{"runs": [{}], "comparisons": [{**one, "run": 0}]}]).endswith(f"| >= 8 | {told} |")


def test_a_smoke_test_takes_one_round_unless_told_otherwise(common: Any) -> None:
    made = common.parser("A bench.", pairs=7)
    given = ([], ["--quick"], ["--quick", "--pairs", "2"], ["--pairs", "2", "--quick"])
    assert [made.parse_args(words).pairs for words in given] == [7, 1, 2, 2]
