"""Ablations: what each choice of params.yaml brings, by switching it off and leaving all else as it is.

An ablation is a study that no file holds: the set-up of params.yaml, and a variant without each choice, every one with
the same seeds. `study.run_all` trains them, as DVC experiments under one parent run in MLflow.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline import config, paths, tracking
from pipeline.analysis import plots, study_report
from pipeline.analysis.seeds import Difference, Verdict, holm, interval, paired
from pipeline.analysis.study_report import plain
from pipeline.errors import UserError
from pipeline.files import fresh_folder
from pipeline.parameters import Config, operational
from pipeline.study import Result, Study, Variant, run_all

FOLDER = Path("models/ablations")
FULL = "full"
"""The variant that is params.yaml as it stands."""
CONFIDENCE = 0.95
SECTIONS = ("augment", "model", "train")
"""Where the choices stand that can be judged by the error on the same test pictures."""
DIVIDING = ("train.seed", "augment.seed", "augment.test_fraction")
"""What makes another run of the same set-up, or other test pictures, and is no choice."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """How much more the error is without a choice, in percent points."""

    difference: Difference
    """Paired by seed; its interval and its p are of this comparison alone."""
    p: float
    """Raised for the number of comparisons (Holm 1979)."""
    verdict: Verdict
    """By that p: higher where the choice helps."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one variant came to, in percent of the test pictures."""

    variant: str
    errors: list[float]
    """Top-1 error, seed by seed."""
    mean: float
    low: float
    """Lower end of Student's interval on the mean."""
    high: float
    """Upper end of that interval."""
    effect: Effect | None
    """None for the full set-up."""


def run(off: Sequence[str], *, seeds: Sequence[int], name: str = "") -> None:
    """Trains params.yaml as it stands, and without each choice in turn, with each seed; writes what each brings.

    Writes models/ablations/NAME: table.md, results.json and plot.png, which stand on the parent run too. params.yaml,
    dvc.lock and the files that all nets share are afterwards as they were; models/NET holds the full set-up's model,
    that of params.yaml's own seed where it is among `seeds`. What DVC has in its cache is not trained again.

    Args:
        off: words such as `train.mixup=0`: a parameter, and its value without the choice.
        seeds: of training, two or more.
        name: of the ablation's folder; the net's name where there is none.

    Raises:
        UserError: a parameter is unknown, is no choice or has that value already, there is one seed only, or there is
            no git repository for DVC's experiments.
    """
    base = config.load()
    study = plan(base, off, seeds=seeds)
    name = name or base.model.name.replace("/", "-")
    if not re.fullmatch(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*", name):
        raise UserError(f"--name {name}: use letters, digits, and single - or . between them")

    def write(parent: tracking.Run, results: list[Result]) -> None:
        rows = judge(study, results)
        with fresh_folder(FOLDER / name) as folder:
            _write(folder, base, study, rows, results, run=parent)
        for path in sorted((FOLDER / name).iterdir()):
            parent.log_artifact(path)
        effects = {f"{row.variant}/difference": row.effect.difference.mean for row in rows if row.effect}
        parent.log_metrics({**study_report.metrics(study, results), **effects}, step=0)

    results = run_all(
        name,
        study,
        size=None,
        variants=[*(variant for variant in study.variants if variant != FULL), FULL],  # whose model is to stay
        tags={tracking.SERVES: "ablation", "ablation": name},
        source="params.yaml",
        write=write,
    )
    print(text(base, study, judge(study, results)))
    print(f"files: {FOLDER / name}")
    if base.train.seed not in seeds:
        print(
            f"{paths.trained(base.model.name)} is of seed {study.seeds[-1]} now; `dvc repro` brings back params.yaml's"
        )


def plan(base: Config, off: Sequence[str], *, seeds: Sequence[int]) -> Study:
    """The study of a set-up and of what it is without each choice.

    Raises:
        UserError: as `run`.
    """
    choices = config.parse_settings(off)
    if not choices:
        raise UserError("--off: name what to switch off, such as train.mixup=0")
    _check_once("--off", [word.partition("=")[0] for word in off])
    _check_once("--seeds", seeds)
    if len(seeds) < 2:
        raise UserError("--seeds: name at least 2: a single run does not tell chance from effect")
    for key, value in choices.items():
        _check_choice(base, key, value)
    words = ", ".join(f"{key}={plain(value)}" for key, value in choices.items())
    variants = {FULL: Variant(settings={})}
    variants |= {_without(key): Variant(settings={key: value}) for key, value in choices.items()}
    return Study(
        title=f"Ablation of {base.model.name} on {base.data.name}",
        question=f"What does each choice bring? Switched off one at a time: {words}.",
        source="params.yaml",
        measure="test_error",
        seeds=sorted(seeds, key=lambda seed: seed == base.train.seed),  # its model is trained last, and stays
        settings={},
        variants=variants,
        pairs=[(_without(key), FULL) for key in choices],
    )


def judge(study: Study, results: Sequence[Result]) -> list[Row]:
    """A row per variant, the full set-up first; the verdicts hold for all comparisons together."""
    errors = {
        variant: [result.test_error for result in results if result.variant == variant] for variant in study.variants
    }
    found = {first: paired(errors[first], errors[second], confidence=CONFIDENCE) for first, second in study.pairs}
    raised = dict(zip(found, holm([difference.p for difference in found.values()]), strict=True))
    rows = []
    for variant, values in errors.items():
        low, high = interval(values, confidence=CONFIDENCE)
        effect = _effect(found[variant], raised[variant]) if variant in found else None
        rows.append(Row(variant=variant, errors=values, mean=fmean(values), low=low, high=high, effect=effect))
    return rows


def text(base: Config, study: Study, rows: Sequence[Row]) -> str:
    """The table and what a reader has to know to read it rightly, as Markdown."""
    return "\n".join([*_table(rows), "", *(f"- {note}" for note in _notes(base, study, rows))])


def _check_once(option: str, values: Sequence[object]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise UserError(f"{option}: {value}: named {count} times")


def _check_choice(base: Config, key: str, value: Any) -> None:
    without = config.load(overrides={key: value})
    if key in DIVIDING:
        raise UserError(f"{key}: is no choice to switch off: all variants have the same seeds and test pictures")
    if key.split(".")[0] not in SECTIONS or key in operational():
        raise UserError(f"{key}: is no choice to switch off: take one of {', '.join(SECTIONS)} that changes the result")
    if without == base:
        raise UserError(f"{key} is {plain(value)} already: nothing to switch off")


def _without(key: str) -> str:
    return f"without {key}"


def _effect(difference: Difference, p: float) -> Effect:
    sure = p < 1 - CONFIDENCE
    verdict: Verdict = "can't tell" if not sure else "higher" if difference.mean > 0 else "lower"
    return Effect(difference=difference, p=p, verdict=verdict)


def _write(
    folder: Path, base: Config, study: Study, rows: list[Row], results: list[Result], *, run: tracking.Run
) -> None:
    (folder / "table.md").write_text(f"# {study.title}\n\n{text(base, study, rows)}\n", encoding="utf-8")
    content = {
        "title": study.title,
        "off": {key: value for variant in study.variants.values() for key, value in variant.settings.items()},
        "seeds": study.seeds,
        "confidence": CONFIDENCE,
        "comparisons": len(study.pairs),
        "variants": [asdict(row) for row in rows],
        "results": [asdict(result) for result in results],
        "notes": _notes(base, study, rows),
        "run": {"name": run.name, "id": run.id},
    }
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plots.groups({row.variant: row.errors for row in rows}, folder / "plot.png", label="test top-1 error %")


def _table(rows: Sequence[Row]) -> list[str]:
    percent = f"{100 * CONFIDENCE:g} %"
    lines = [
        f"| variant | test error % | {percent} interval | minus {FULL}, points | {percent} interval | p | verdict |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        cells = [row.variant, f"{row.mean:.2f}", f"{row.low:.2f} to {row.high:.2f}"]
        if row.effect:
            found = row.effect.difference
            cells += [f"{found.mean:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}"]
            cells += [f"{row.effect.p:.3f}", row.effect.verdict]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _is_level(difference: Difference) -> bool:
    """Whether all pairs differ by the same, which small numbers of pictures make likely; up to rounding errors."""
    return difference.mean != 0 and difference.high - difference.low < 1e-6


def _notes(base: Config, study: Study, rows: Sequence[Row]) -> list[str]:
    count = len(study.pairs)
    notes = [
        f"Means over {len(study.seeds)} seeds ({', '.join(map(str, study.seeds))}), with Student's interval. It covers "
        "the chance in training, not the chance in which pictures were tested.",
        f"A difference is that to the {FULL} set-up with the same seed, so that what the two share drops out. Higher: "
        "without the choice the error is higher, so here the choice helps.",
        f"Comparisons made: {count}. The p-values are raised for that by Holm's rule, and the verdicts go by them: the "
        f"chance of any false verdict in the table is {100 * (1 - CONFIDENCE):.0f} % at most. Each interval on a "
        "difference is for that comparison alone.",
    ]
    level = [row.variant for row in rows if row.effect and _is_level(row.effect.difference)]
    if level:
        notes.append(
            f"{', '.join(level)}: every seed shows the same difference, so the interval has no width. Read it as too "
            "narrow, and take more seeds."
        )
    if base.train.fast_dev_run:
        notes.append("A TRIAL of one batch of everything: the figures mean nothing.")
    return notes
