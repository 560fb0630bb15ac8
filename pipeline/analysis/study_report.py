"""What a study came to: a table, a plot, and its section of docs/experiments.md."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline.analysis import plots, seeds
from pipeline.errors import UserError
from pipeline.files import fresh_file

if TYPE_CHECKING:
    from pipeline.study import Result, Size, Study

DOCUMENT = Path("docs/experiments.md")
PICTURES = Path("docs/images/experiments")
MEASURES = {"train_error": "training error", "test_error": "test error"}


def write(name: str, study: "Study", results: "Sequence[Result]", *, size: "Size", folder: Path) -> list[Path]:
    """Writes plots, table and for the small size the section of the document; gives back plots and table."""
    pictures = PICTURES if size == "small" else folder
    pictures.mkdir(parents=True, exist_ok=True)
    stem = name if size == "small" else f"plot-{size}"
    drawn = [_plot(study, results, pictures / f"{stem}.png")]
    if all(result.gradients for result in results):
        drawn.append(_plot_gradients(study, results, pictures / f"{stem}-gradients.png"))
    table = folder / f"table-{size}.md"
    with fresh_file(table) as beside:
        beside.write_text(text(study, results) + "\n", encoding="utf-8")
    if size == "small":
        publish(name, study, results, drawn)
    return [*drawn, table]


def publish(name: str, study: "Study", results: "Sequence[Result]", drawn: Sequence[Path]) -> None:
    """Puts a study's section between its markers in the document; what stands outside of them is left alone.

    Raises:
        UserError: the document has no such markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    document = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    if begin not in document or end not in document:
        raise UserError(f"{DOCUMENT}: has no lines {begin} and {end}; add them where the results belong")
    before, rest = document.split(begin, 1)
    after = rest.split(end, 1)[1]
    with fresh_file(DOCUMENT) as beside:
        beside.write_text(f"{before}{begin}\n{section(name, study, results, drawn)}\n{end}{after}", encoding="utf-8")


def section(name: str, study: "Study", results: "Sequence[Result]", drawn: Sequence[Path]) -> str:
    """Question, settings at both sizes, table, verdicts and plots, as Markdown."""
    return "\n\n".join(
        [
            f"{study.question} ({study.source})",
            f"    make study NAME={name}",
            _settings(study),
            _variants(study),
            f"What came out of {len(results)} runs:",
            text(study, results),
            *(f"![{study.title}]({path.relative_to(DOCUMENT.parent)})" for path in drawn),
        ]
    )


def text(study: "Study", results: "Sequence[Result]") -> str:
    """The table and the verdicts."""
    return "\n\n".join([table(study, results), "\n".join(f"- {line}" for line in verdicts(study, results))])


def table(study: "Study", results: "Sequence[Result]") -> str:
    """A row per variant: parameters, and mean and standard deviation of both errors over the seeds."""
    lines = [
        "| variant | parameters | training error % | test error % |",
        "| --- | ---: | ---: | ---: |",
    ]
    for variant in study.variants:
        rows = [result for result in results if result.variant == variant]
        errors = ([r.train_error for r in rows], [r.test_error for r in rows])
        cells = [f"{fmean(values):.2f} ± {seeds.spread(values):.2f}" for values in errors]
        lines.append(f"| {variant} | {rows[0].parameters:,} | {' | '.join(cells)} |")
    count = len(study.seeds)
    return "\n".join(
        [*lines, "", f"Mean ± standard deviation over {count} seeds ({', '.join(map(str, study.seeds))})."]
    )


def verdicts(study: "Study", results: "Sequence[Result]") -> list[str]:
    """For each pair of a study whether the first is better, worse, or whether these runs can't tell."""
    name = MEASURES[study.measure]
    said = []
    for first, second in study.pairs:
        found = seeds.difference(_values(study, results, first), _values(study, results, second))
        word = {"lower": "better than", "higher": "worse than", "can't tell": "against"}[found.verdict]
        doubt = ": can't tell" if found.verdict == "can't tell" else ""
        said.append(
            f"**{first}** {word} **{second}**{doubt}: {name} {found.mean:+.2f} points "
            f"(95 % interval {found.low:+.2f} to {found.high:+.2f})"
        )
    return said


def metrics(study: "Study", results: "Sequence[Result]") -> dict[str, float]:
    """Means over the seeds, for the parent run."""
    found = {}
    for variant in study.variants:
        rows = [result for result in results if result.variant == variant]
        key = re.sub(r"[^\w./ -]", "_", variant)
        found[f"{key}/test_error"] = fmean(r.test_error for r in rows)
        found[f"{key}/train_error"] = fmean(r.train_error for r in rows)
    return found


def plain(value: Any) -> str:
    """A value as params.yaml would have it, on one line."""
    return json.dumps(value).replace('"', "")


def _values(study: "Study", results: "Sequence[Result]", variant: str) -> list[float]:
    return [getattr(result, study.measure) for result in results if result.variant == variant]


def _settings(study: "Study") -> str:
    """The parameters of both sizes side by side."""
    sizes = [study.settings | study.sizes[size] for size in ("small", "full")]
    keys = dict.fromkeys(key for settings in sizes for key in settings)
    lines = ["| parameter | small, as run here | full size: `SIZE=full` |", "| --- | --- | --- |"]
    for key in keys:
        cells = [f"`{plain(settings[key])}`" if key in settings else "as in params.yaml" for settings in sizes]
        lines.append(f"| `{key}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _variants(study: "Study") -> str:
    """What each variant sets beside that, at either size."""
    lines = ["| variant | sets |", "| --- | --- |"]
    for name, variant in study.variants.items():
        said = "; ".join(f"`{key}` `{plain(value)}`" for key, value in variant.settings.items())
        lines.append(f"| {name} | {said} |")
    return "\n".join(lines)


def _plot(study: "Study", results: "Sequence[Result]", path: Path) -> Path:
    label = f"{MEASURES[study.measure]} %"
    groups = {variant: _values(study, results, variant) for variant in study.variants}
    if all(variant.x is None for variant in study.variants.values()):
        return plots.groups(groups, path, label=label)
    series: dict[str, list[tuple[float, list[float]]]] = {}
    for name, variant in study.variants.items():
        assert variant.x is not None
        series.setdefault(variant.series, []).append((variant.x, groups[name]))
    return plots.series(series, path, x_label=study.x_label, label=label)


def _plot_gradients(study: "Study", results: "Sequence[Result]", path: Path) -> Path:
    panels = {}
    for when, title in (("first", "first step"), ("last", "first step of the last epoch")):
        panels[title] = {
            variant: [
                fmean(norms)
                for norms in zip(*(r.gradients[when] for r in results if r.variant == variant), strict=True)
            ]
            for variant in study.variants
        }
    return plots.by_depth(panels, path, label="gradient norm")
