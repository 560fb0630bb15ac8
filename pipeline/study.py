"""Studies: groups of experiments that ask one question, every variant with several seeds.

A study is a file, experiments/NAME/study.yaml. `run` trains each variant with each seed as a DVC experiment of the
usual chain, under one parent run in MLflow, and writes what came out beside the file and into docs/experiments.md. What
DVC has in its cache is not trained again, so an interrupted study goes on where it was. An ablation is a study without
a file: `ablation` makes it, and `run_all` runs it too.
"""

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from pipeline import config, experiment, paths, tracking
from pipeline.errors import UserError, nearest
from pipeline.files import fresh_file
from pipeline.parameters import Config, Params, operational

FOLDER = Path("experiments")
Size = Literal["small", "full"]
Settings = dict[str, Any]
"""Dotted keys of params.yaml with their values."""


class Variant(Params):
    """One of the things that a study sets side by side."""

    settings: Settings
    """What is different here."""
    series: str = ""
    """Line of the plot that it belongs to, where `x` is given."""
    x: float | None = None
    """Place on the plot's axis of numbers."""


class Study(Params):
    """The whole of a study.yaml, or what `ablation` makes of params.yaml."""

    title: str
    question: str
    """What is asked, and what the paper says."""
    source: str
    """The paper."""
    measure: Literal["train_error", "test_error"]
    """What is drawn and judged, in percent: of the last epoch in training, or of the test split."""
    x_label: str = ""
    """Name of the plot's axis of numbers, where the variants have `x`."""
    seeds: list[int] = Field(min_length=2)
    """Seeds that every variant is trained with; three or more in a study.yaml."""
    settings: Settings
    """What all runs have in common, at either size."""
    sizes: dict[Size, Settings] = Field(default={})
    """small runs on two processor cores in 20 minutes or less; full is the paper's, or as near as one machine gets.
    Both in a study.yaml; an ablation has none."""
    variants: dict[str, Variant] = Field(min_length=2)
    """By name, in the order of the plot."""
    pairs: list[tuple[str, str]]
    """Variants to judge against one another."""

    @model_validator(mode="after")
    def _complete(self) -> "Study":
        for name in (name for pair in self.pairs for name in pair):
            if name not in self.variants:
                raise ValueError(f"pairs: {name}: no such variant{nearest(name, self.variants)}")
        return self

    def common(self, size: Size | None) -> Settings:
        """What all runs of a size set in params.yaml."""
        return {**self.settings, **(self.sizes[size] if size else {})}

    def overrides(self, variant: str, *, seed: int, size: Size | None) -> Settings:
        """Everything that one run sets in params.yaml."""
        return {**self.common(size), **self.variants[variant].settings, "train.seed": seed}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run came to."""

    variant: str
    seed: int
    parameters: int
    train_error: float
    """Percent, over the pictures of the last epoch as they were trained on."""
    test_error: float
    """Percent of the test split."""
    minutes: float
    run: str
    """MLflow's id of the run."""
    experiment: str
    """DVC's name of the experiment."""
    gradients: dict[str, list[float]]
    """Each kernel's gradient norm, input side first, at the first step of the first and the last epoch; or nothing."""


def names() -> list[str]:
    """The studies that there are."""
    return sorted(path.parent.name for path in FOLDER.glob("*/study.yaml"))


def read(name: str) -> Study:
    """A study by name.

    Raises:
        UserError: there is none of that name, or its file is wrong.
    """
    path = FOLDER / name / "study.yaml"
    if not path.is_file():
        raise UserError(f"{name}: no such study{nearest(name, names())}")
    try:
        study = Study.model_validate(YAML(typ="safe").load(path))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {place + ': ' if place else ''}{message}") from None
    if len(study.seeds) < 3:
        raise UserError(f"{path}: seeds: name at least 3")
    if set(study.sizes) != {"small", "full"}:
        raise UserError(f"{path}: sizes: must be small and full")
    return study


def run(name: str, *, size: Size, variants: list[str] | None = None) -> None:
    """Trains a study's runs that are not in DVC's cache, and writes results, table and plot.

    params.yaml, dvc.lock and the files that all nets share are afterwards as they were. `variants` limits the runs, and
    then nothing is written but MLflow's runs and DVC's experiments.

    Raises:
        UserError: the study or one of its settings is wrong, or there is no git repository for DVC's experiments.
    """
    from pipeline.analysis import study_report

    study = read(name)

    def write(parent: tracking.Run, results: list[Result]) -> None:
        if variants:
            return
        folder = _write(name, results, size=size)
        for path in study_report.write(name, study, results, size=size, folder=folder):
            parent.log_artifact(path)
        parent.log_metrics(study_report.metrics(study, results), step=0)

    results = run_all(
        f"{name}-{size}",
        study,
        size=size,
        variants=_chosen(study, variants),
        tags={tracking.SERVES: "study", "study": name, "size": size},
        source=str(FOLDER / name / "study.yaml"),
        write=write,
    )
    if not variants:
        print(study_report.text(study, results))


def run_all(
    name: str,
    study: Study,
    *,
    size: Size | None,
    variants: Sequence[str],
    tags: Mapping[str, str],
    source: str,
    write: Callable[[tracking.Run, list[Result]], None],
) -> list[Result]:
    """Trains variants of a study with each seed, and gives back what each run came to, seed by seed.

    params.yaml, dvc.lock and the files that all nets share are afterwards as they were.

    Args:
        name: what DVC's experiments and the parent run are called by.
        size: of the study, if it has sizes.
        variants: names of those to train.
        tags: of the parent run; tracking.SERVES says what it is.
        source: where the settings stand, for the line of a mistake in them.
        write: is called at the end, with the parent run while that is open.

    Raises:
        UserError: one of the settings is wrong, or there is no git repository for DVC's experiments.
    """
    plans = [
        (variant, seed, study.overrides(variant, seed=seed, size=size)) for seed in study.seeds for variant in variants
    ]
    wanted = [_checked(source, variant, overrides) for variant, _, overrides in plans]
    experiment.check_repository()
    parent = _parent(name, study, wanted[0], size=size, tags=tags)
    results = []
    with tracking.ending(parent), parent.adopting():
        for number, ((variant, seed, overrides), settings) in enumerate(zip(plans, wanted, strict=True), start=1):
            print(f"== {name}, {variant}, seed {seed}: run {number} of {len(plans)}", flush=True)
            # DVC keeps an experiment as a git reference, which takes no spaces and no slashes.
            label = re.sub(r"[^\w.-]", "-", f"{name}-{variant}-{seed}")
            result = _one(label, variant, seed, overrides, settings)
            figures = {"test/top1": 1 - result.test_error / 100, "train/top1": 1 - result.train_error / 100}
            parent.include(result.run, name=label, metrics=figures)
            results.append(result)
            print(f"== {variant}: {study.measure.replace('_', ' ')} {getattr(result, study.measure):.2f} %", flush=True)
        write(parent, results)
    print(f"MLflow's parent run: {parent.name} ({parent.id}); DVC's experiments: dvc exp show")
    return results


def published(name: str) -> list[Result]:
    """The results of the small size that stand in the repository.

    Raises:
        UserError: the study has not been run.
    """
    path = FOLDER / name / "results-small.json"
    if not path.is_file():
        raise UserError(f"{path}: no results yet; run it: make study NAME={name}")
    return [Result(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def _chosen(study: Study, variants: Sequence[str] | None) -> Sequence[str]:
    for variant in variants or ():
        if variant not in study.variants:
            raise UserError(f"{variant}: no such variant{nearest(variant, study.variants)}")
    return variants or list(study.variants)


def _checked(source: str, variant: str, overrides: Settings) -> Config:
    try:
        wanted = config.load(overrides=overrides)
        experiment.check_names(wanted)
        experiment.check_net(wanted)
    except UserError as error:
        raise UserError(f"{source}: {variant}: {error}") from None
    return wanted


def _parent(name: str, study: Study, wanted: Config, *, size: Size | None, tags: Mapping[str, str]) -> tracking.Run:
    """The study's run in MLflow: a new one, or that of an earlier start of the same study of the same parameters."""
    serves = tags[tracking.SERVES]
    folder = paths.progress(f"{serves}-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    spool, note = folder / "metrics.spool", folder / "parent.json"
    fingerprint = _fingerprint(study, size=size)
    known = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    if known.get("study") == fingerprint and (resumed := tracking.Run.resume(known["run"], spool=spool)):
        return resumed
    parent = tracking.Run.start(
        experiment=wanted.tracking.experiment,
        name=f"{serves}-{name}",
        tags={**tags, "mlflow.note.content": f"{study.title}. {study.question}"},
        spool=spool,
    )
    told = {key: value for key, value in tags.items() if key != tracking.SERVES}
    parent.log_params({**told, "seeds": study.seeds, **study.common(size)})
    with fresh_file(note) as beside:
        beside.write_text(json.dumps({"study": fingerprint, "run": parent.id}), encoding="utf-8")
    return parent


def _fingerprint(study: Study, *, size: Size | None) -> str:
    """Of all that the runs follow from: the study, and what it leaves to params.yaml."""
    of_all = set.intersection(*(set(variant.settings) for variant in study.variants.values()))
    own = tuple(f"{key}." for key in ("train.seed", *study.common(size), *of_all))
    left = {
        key: value
        for key, value in config.flat(config.load()).items()
        if key not in operational() and not f"{key}.".startswith(own)
    }
    return hashlib.sha256(json.dumps([study.model_dump(), left]).encode()).hexdigest()


def _one(label: str, variant: str, seed: int, overrides: Settings, wanted: Config) -> Result:
    """One run as a DVC experiment of its own, which takes the place of an earlier one of its name."""
    with ExitStack() as stack:
        for path in (paths.PARAMS, Path("dvc.lock"), paths.METRICS, paths.CURVES, paths.CONFUSION):
            stack.enter_context(experiment.restored(path, always=True))
        # Rewritten rather than passed as -S, which merges a mapping such as the phases with what stands there.
        config.write(overrides=overrides)
        if _exists(label):
            experiment.dvc(["exp", "remove", "--quiet", label])
        if experiment.dvc(["exp", "run", "evaluate", "--quiet", "--name", label]):
            raise SystemExit(1)
        return _result(label, variant, seed, wanted)


def _exists(label: str) -> bool:
    listed = subprocess.run(["git", "for-each-ref", "refs/exps"], capture_output=True, text=True, check=True).stdout
    return any(line.endswith(f"/{label}") for line in listed.splitlines())


def _result(label: str, variant: str, seed: int, wanted: Config) -> Result:
    import pandas as pd

    metrics = json.loads(paths.METRICS.read_text(encoding="utf-8"))
    last = pd.read_csv(paths.CURVES).iloc[-1]
    return Result(
        variant=variant,
        seed=seed,
        parameters=_parameters(wanted),
        train_error=round(100 * (1 - float(last["train/top1"])), 4),
        test_error=round(100 * float(metrics["test"]["top1_error"]), 4),
        minutes=round(float(metrics["run"]["train_minutes"]), 3),
        run=metrics["run"]["id"],
        experiment=label,
        gradients=_gradients(paths.trained(wanted.model.name) / "gradients.csv"),
    )


def _parameters(wanted: Config) -> int:
    import torch

    from pipeline import nets
    from pipeline.training import weights

    model = wanted.model
    card = weights.read_card(paths.trained(model.name) / "model.safetensors")
    with torch.device("meta"):
        net = nets.build(model.name, num_classes=len(card.classes), in_chans=model.in_chans, stem=model.stem)
    return sum(parameter.numel() for parameter in net.parameters())


def _gradients(path: Path) -> dict[str, list[float]]:
    import pandas as pd

    if not path.exists():
        return {}
    rows = pd.read_csv(path).sort_values(["epoch", "depth"])
    epochs = {"first": rows["epoch"].min(), "last": rows["epoch"].max()}
    return {when: [float(f"{n:.4g}") for n in rows[rows["epoch"] == epoch]["norm"]] for when, epoch in epochs.items()}


def _write(name: str, results: list[Result], *, size: Size) -> Path:
    path = FOLDER / name / f"results-{size}.json"
    rows = ",\n".join(json.dumps(asdict(result)) for result in results)
    with fresh_file(path) as beside:
        beside.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    return path.parent
