"""docs/performance.md: what was measured, with its machine, and what was not."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PAGE = (
    "# Performance\n\nProse.\n\n<!-- results: written by bench/report.py -->\nold\n<!-- end of results -->\n\nAfter.\n"
)
COMPARISON = {
    "name": "5 frozen epochs against a plain loop",
    "ratio_of": "their time / Thaw's",
    "rounds": 5,
    "median": 9.5,
    "min": 8.1,
    "max": 11.0,
    "quartiles": [9.0, 10.0],
    "interval": [8.1, 11.0],
    "target": ">= 8",
    "met": True,
    "notes": "",
    "ratios": [8.1, 9.0, 9.5, 10.0, 11.0],
    "sides": {},
    "run": 0,
}
RUN: dict[str, Any] = {
    "command": "python bench/frozen.py",
    "commit": "abc1234",
    "machine": {
        "processor": "A CPU",
        "bf16": True,
        "usable_cores": 2,
        "threads": "one a core",
        "torch": "2",
        "date": "2026-01-01",
    },
    "settings": {},
}
RESULT: dict[str, Any] = {
    "bench": "frozen",
    "quick": False,
    "runs": [RUN],
    "comparisons": [COMPARISON],
    "missing": [{"what": "fastai", "why": "make bench-peers makes it"}],
    "series": {
        "epochs": {
            "x": "frozen epochs",
            "y": "s",
            "points": {"Thaw": {"1": 2.0, "5": 2.5}, "plain": {"1": 4.0}},
            "run": 0,
        }
    },
}


@pytest.fixture
def written(report: Any, tmp_path: Path) -> str:
    page = tmp_path / "performance.md"
    page.write_text(PAGE)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/frozen.json").write_text(json.dumps(RESULT))
    report.write(tmp_path / "results", page=page, images=tmp_path / "images")
    return page.read_text()


def test_what_was_measured_stands_between_the_marks(written: str) -> None:
    assert written.startswith("# Performance\n\nProse.\n")
    assert written.endswith("<!-- end of results -->\n\nAfter.\n")
    assert "old" not in written
    assert (
        "`python bench/frozen.py` on A CPU (computes bfloat16), 2 cores, threads: one a core; torch 2, 2026-01-01, "
        "commit abc1234." in written
    )
    row = (
        "| 5 frozen epochs against a plain loop | their time / Thaw's | 9.5 | 8.1 to 11 | 8.1 to 11 | 5 | >= 8 | met |"
    )
    assert row in written


def test_what_was_not_measured_is_said(written: str, report: Any) -> None:
    assert "Not measured: fastai: make bench-peers makes it." in written
    for name in report.BENCHES.keys() - {"frozen"}:
        assert f"`bench/results/{name}.json` is missing" in written


def test_each_row_says_of_which_run_it_is(report: Any, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(PAGE)
    (tmp_path / "results").mkdir()
    later = {**RUN, "command": "python bench/frozen.py --add", "machine": {**RUN["machine"], "bf16": False}}
    rows = [COMPARISON, {**COMPARISON, "name": "50 epochs", "run": 1}]
    (tmp_path / "results/frozen.json").write_text(json.dumps({**RESULT, "runs": [RUN, later], "comparisons": rows}))
    report.write(tmp_path / "results", page=page, images=tmp_path / "images")
    written = page.read_text()
    assert "a: `python bench/frozen.py` on A CPU (computes bfloat16), 2 cores" in written
    assert "b: `python bench/frozen.py --add` on A CPU (without bfloat16), 2 cores" in written
    assert "| 5 frozen epochs against a plain loop (a) |" in written
    assert "| 50 epochs (b) |" in written


def test_pictures_are_drawn_where_the_page_says(written: str, tmp_path: Path) -> None:
    for name in ("performance-frozen.png", "performance-frozen-curves.png"):
        assert f"(images/{name})" in written
        with Image.open(tmp_path / "images" / name) as picture:
            assert picture.width > 900


def test_a_second_writing_changes_nothing(written: str, report: Any, tmp_path: Path) -> None:
    report.write(tmp_path / "results", page=tmp_path / "performance.md", images=tmp_path / "images")
    assert (tmp_path / "performance.md").read_text() == written


def test_the_committed_page_is_that_of_the_committed_results(report: Any, tmp_path: Path) -> None:
    again = tmp_path / "performance.md"
    again.write_text(report.PAGE.read_text())
    report.write(report.RESULTS, page=again, images=tmp_path / "images")
    assert again.read_text() == report.PAGE.read_text()
