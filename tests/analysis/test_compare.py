import pytest

from pipeline import tracking
from pipeline.analysis import compare
from pipeline.tracking import RunRow


def row(name: str, *, status: str = "FINISHED", tags: dict[str, str] | None = None, **metrics: float) -> RunRow:
    named = {f"test/{key}": value for key, value in metrics.items()}
    weights = {"weights": "imagenet", "minutes": "12.34"}
    params = {"data.name": "digits", "model.name": "tf_efficientnet_lite0", "train.batch_size": "64"}
    return RunRow(name, name, "thaw", status, 0, 60_000, params, weights | (tags or {}), named)


def printed(rows: list[RunRow], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setattr(tracking, "runs", lambda _: rows)
    compare.run("thaw")
    return [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_the_best_comes_first_and_what_means_nothing_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row("tried", tags={"fast_dev_run": "true"}, top1=0.99, top5=1.0),
        row("killed", status="KILLED"),
        row("good", top1=0.8, top1_low=0.7891, top1_high=0.81, top5=0.95),
        row("best", top1=0.9, top5=0.99),
    ]
    heading, _, *lines = printed(rows, monkeypatch, capsys)
    assert heading.split() == ["run", "dataset", "net", "weights", "top-1", "%", "top-5", "%", "minutes"]
    assert [line.split()[0] for line in lines] == ["best", "good", "killed", "tried"]
    assert lines[0].split() == ["best", "digits", "tf_efficientnet_lite0", "imagenet", "90.00", "99.00", "12.3"]
    assert "80.00 (78.91 to 81.00)" in lines[1]
    assert "unfinished (killed)" in lines[2]
    assert "99.00 meaningless: fast_dev_run" in lines[3]


def test_a_pipe_gets_names_whole_and_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = "[red]" + "resnet-" * 20
    *_, line = printed([row(long, top1=0.5)], monkeypatch, capsys)
    assert line.startswith(f"{long} ")
    assert "…" not in line


def test_a_narrow_terminal_folds_and_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    name = "tf_efficientnet_lite0-frozen-then-all-20260101"
    Console(width=80).print(compare.table([row(name, top1=0.9123, top1_low=0.9, top1_high=0.92, top5=0.9987)]))
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "".join(line.split("  ")[0].strip() for line in out.splitlines()[2:]) == name
    assert "99.87" in out


def test_an_empty_store_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed([], monkeypatch, capsys)
    assert lines == ["No runs in experiment 'thaw' yet: train a model first (make train)."]
