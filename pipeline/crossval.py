"""k-fold cross-validation: every training and validation picture is judged once, by a net that has not seen it.

The test split is never touched. One parent run in MLflow has the folds' runs as children. What was interrupted goes on
where it was: a fold that is done is not trained again.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline import paths, tracking
from pipeline.analysis import inference, metrics
from pipeline.analysis.compare import PIPED_WIDTH
from pipeline.analysis.metrics import Evaluation
from pipeline.config import flat
from pipeline.data import folds as division
from pipeline.data.datamodule import Batches, Pictures
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.files import fresh_file
from pipeline.parameters import Config
from pipeline.training import job, weights
from pipeline.training.fit import rank
from pipeline.training.job import Job
from pipeline.training.pretrained import Origin
from pipeline.training.record import Record

MOST = 100
"""Folds at most."""
FIGURES = ("top1", "top5", "loss")
"""What is given per fold, with its mean and standard deviation."""
FACTS = "facts.json"
PREDICTIONS = "out_of_fold.parquet"
RESULT = "crossval.json"


@dataclass(frozen=True, kw_only=True)
class Fold:
    """What one fold came to."""

    fold: int
    """From 1."""
    pictures: int
    """Validation pictures."""
    top1: float
    top5: float
    loss: float
    """Mean cross-entropy, in nats."""
    best_epoch: int
    """Of the last phase, counting on across phases, from 1."""
    run_id: str


class _Judged(NamedTuple):
    """A fold with what its net says of each of its pictures."""

    fold: Fold
    keys: list[str]
    targets: torch.Tensor
    logits: torch.Tensor


def folder_of(model: str) -> Path:
    """Where a net's cross-validation lies: fold-1, fold-2 and so on, each a model's folder, and what they come to."""
    return Path("models") / "crossval" / model


def run(config: Config, *, folds: int, seed: int | None = None) -> None:
    """Trains a net for each fold from the same first weights, and judges it on the pictures of that fold.

    Writes models/crossval/NET: a folder per fold, out_of_fold.parquet (a row per picture: key, fold, actual, predicted,
    correct, confidence, a probability per class) and crossval.json (each fold's top-1, top-5 and loss, their mean and
    standard deviation, and top-1 over all pictures together with its bootstrap interval).

    Two figures ask for care. The standard deviation over the folds tells how far one training is from another; it is
    no standard error of the mean, since the trainings share most of their pictures, and nothing unbiased can be made of
    it (Bengio and Grandvalet 2004). And the best epoch of each fold is picked on the pictures that the fold is judged
    on, so the figures are slightly better than those of new pictures.

    Offline copies go with their picture into training, and are never judged. The cross-validation of a net takes the
    place of an earlier one with other parameters, pictures or folds.

    Args:
        folds: 2 to 100.
        seed: of the division into folds; None for augment.seed.

    Raises:
        UserError: the number of folds is out of range, a class is too small for it, or the stages weights and augment
            have not been run.
    """
    seed = config.augment.seed if seed is None else seed
    if not 2 <= folds <= MOST:
        raise UserError(f"{folds} folds: it must be 2 to {MOST}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: it must be 0 or more, and below 2^32")
    store, origin = _inputs(config)
    fold_of = division.divide(store.rows, folds=folds, seed=seed)
    facts = _facts(config, store, origin, folds=folds, seed=seed)
    jobs = (_job(config, store, fold_of, fold=fold, folds=folds, seed=seed) for fold in range(1, folds + 1))
    if rank() == 0:
        store.verify()
        with _locked(config.model.name):
            _lead(config, store, jobs, fold_of=fold_of, facts=facts)
        return
    done = _done(folder_of(config.model.name), facts)
    for one in jobs:
        if one.facts["fold"] not in done:
            job.run(one)


def _lead(config: Config, store: Store, jobs: Iterable[Job], *, fold_of: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Trains and judges fold by fold under the parent run, and writes what they come to."""
    folder, judged = folder_of(config.model.name), list[_Judged]()
    done = _done(folder, facts)
    if not done:
        _begin(config.model.name, facts)
    parent = _parent(config, store, facts)
    with tracking.ending(parent), parent.adopting():
        for fold, one in enumerate(jobs, start=1):
            told = ": done before" if fold in done else ""
            print(f"== {config.model.name}, fold {fold} of {facts['folds']}{told}", flush=True)
            if fold not in done:
                job.run(one)
            judged.append(_judge(config, store, np.flatnonzero(fold_of == fold), one))
            _log(parent, judged[-1].fold)
        logits, targets = torch.cat([one.logits for one in judged]), torch.cat([one.targets for one in judged])
        whole = _figures(config, store, logits, targets)
        _write(folder, config, store, judged, whole, facts=facts, run=parent)
        for name in (PREDICTIONS, RESULT):
            parent.log_artifact(folder / name)
        parent.log_metrics(_summary(judged, whole), step=0)
    _tell(judged, whole, _notes(config, store, whole))
    print(f"MLflow's parent run: {parent.name} ({parent.id}); files: {folder}")


def _inputs(config: Config) -> tuple[Store, Origin]:
    """The packed pictures and what training starts from."""
    try:
        origin = Origin.read(paths.pretrained(config.model.name))
    except FileNotFoundError:
        raise UserError(
            f"{paths.pretrained(config.model.name)}: no weights to start from here; run `dvc repro weights augment`"
        ) from None
    store = Store(paths.prepared(config.data.name))
    if store.meta.px != config.augment.px:
        raise UserError(
            f"{store.folder}: packed at {store.meta.px} px where augment.px is {config.augment.px}; "
            "run `dvc repro weights augment`"
        )
    return store, origin


def _facts(config: Config, store: Store, origin: Origin, *, folds: int, seed: int) -> dict[str, Any]:
    """What the folds' nets follow from."""
    facts = {**job.facts(config, store, origin), "folds": folds, "seed": seed}
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def _job(config: Config, store: Store, fold_of: np.ndarray, *, fold: int, folds: int, seed: int) -> Job:
    model = config.model.name
    return Job(
        config=config,
        store=Store(store.folder, splits=division.splits(store.rows, fold_of, fold=fold)),
        out=folder_of(model) / f"fold-{fold}",
        progress=_progress(model) / f"fold-{fold}",
        name=f"{model}-{store.meta.dataset}-fold-{fold}",
        # Without figures on the test split, it is not to be compared with other runs.
        tags={tracking.SERVES: "crossval", "fold": str(fold), "folds": str(folds)},
        facts={"fold": fold, "folds": folds, "seed": seed},
    )


def _progress(model: str) -> Path:
    return paths.progress(f"{model}/crossval")


def _done(folder: Path, facts: Mapping[str, Any]) -> set[int]:
    """The folds that are there. A fold's folder is whole, and lies there only under the facts that it was made of.

    Ranks that start together agree on it, since what the leader clears away is nothing that another would find done.
    """
    known = _read(folder / FACTS)
    if known != facts:
        return set()
    return {int(path.name.removeprefix("fold-")) for path in folder.glob("fold-*")}


def _begin(model: str, facts: Mapping[str, Any]) -> None:
    """Clears away a cross-validation of other facts. Checkpoints of an unfinished first fold of these stay."""
    folder = folder_of(model)
    known = _read(folder / FACTS)
    differs = [key for key in {**known, **facts} if known.get(key) != facts.get(key)]
    if known and differs:
        told = f"{differs[0]} was {known.get(differs[0], 'unset')} and is {facts.get(differs[0], 'unset')}"
        told += f" (and {len(differs) - 1} more)" if differs[1:] else ""
        print(f"starting anew, in place of an earlier cross-validation: {told}")
    (folder / FACTS).unlink(missing_ok=True)  # first, since it is what the folds are taken up by
    shutil.rmtree(folder, ignore_errors=True)
    for path in _progress(model).glob("fold-*") if differs else ():
        shutil.rmtree(path)
    _write_json(folder / FACTS, facts)


@contextmanager
def _locked(model: str) -> Iterator[None]:
    _progress(model).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(_progress(model) / "lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{model} is being cross-validated by another process; wait for it, or stop it") from None


def _parent(config: Config, store: Store, facts: Mapping[str, Any]) -> tracking.Run:
    """The run of the whole in MLflow: a new one, or that of an earlier start of the same cross-validation."""
    model = config.model.name
    note, spool = _progress(model) / "parent.json", _progress(model) / "metrics.spool"
    known = _read(note)
    if known.get("facts") == facts and (resumed := tracking.Run.resume(known["run"], spool=spool)):
        return resumed
    parent = tracking.Run.start(
        experiment=config.tracking.experiment,
        name=f"crossval-{model}-{store.meta.dataset}",
        tags={tracking.SERVES: "crossval", "data.sha256": store.meta.sha256},
        spool=spool,
    )
    parent.log_params({**flat(config), "crossval.folds": facts["folds"], "crossval.seed": facts["seed"]})
    _write_json(note, {"facts": facts, "run": parent.id})
    return parent


def _judge(config: Config, store: Store, indices: np.ndarray, one: Job) -> _Judged:
    """The fold's pictures as its exported model sees them."""
    net, card = weights.load_model(one.out / "model.safetensors")
    record = Record.read(one.out)
    pictures = Pictures(store, px=card.px, in_chans=card.in_chans)
    batches = Batches(indices, batch_size=config.evaluate.batch_size)
    chosen = islice(batches, 1 if card.fast_dev_run else None)
    logits, targets = inference.logits(net, card, (pictures[batch] for batch in chosen))
    found = _figures(config, store, logits, targets)
    fold = Fold(
        fold=one.facts["fold"],
        pictures=found.pictures,
        top1=found.top1,
        top5=found.top5,
        loss=found.loss,
        best_epoch=record.phases[-1].best_epoch,
        run_id=record.run_id,
    )
    return _Judged(fold, [store.rows[index].key for index in indices[: len(targets)]], targets, logits)


def _figures(config: Config, store: Store, logits: torch.Tensor, targets: torch.Tensor) -> Evaluation:
    return metrics.evaluate(
        logits,
        targets,
        classes=store.meta.classes,
        bootstrap=config.evaluate.bootstrap,
        confidence=config.evaluate.confidence,
        seed=config.evaluate.seed,
    )


def _log(parent: tracking.Run, fold: Fold) -> None:
    points = {name: getattr(fold, name) for name in FIGURES}
    parent.log_metrics({f"fold/{name}": value for name, value in points.items()}, step=fold.fold, once=True)
    # Where MLflow has lost the run that the fold was begun under, its run has another parent.
    parent.include(fold.run_id, name=f"fold-{fold.fold}", metrics=points)


def _spread(judged: list[_Judged]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (with folds - 1 in the denominator) of each figure over the folds."""
    of = {name: [float(getattr(one.fold, name)) for one in judged] for name in FIGURES}
    return {
        "mean": {name: statistics.fmean(values) for name, values in of.items()},
        "sd": {name: statistics.stdev(values) for name, values in of.items()},
    }


def _summary(judged: list[_Judged], whole: Evaluation) -> dict[str, float]:
    """The figures of the whole by the names they have in MLflow."""
    points = {
        f"crossval/{name}_{kind}": value for kind, values in _spread(judged).items() for name, value in values.items()
    }
    return {**points, **{f"crossval/{name}": getattr(whole, name) for name in (*FIGURES, "top1_low", "top1_high")}}


def _write(
    folder: Path,
    config: Config,
    store: Store,
    judged: list[_Judged],
    whole: Evaluation,
    *,
    facts: Mapping[str, Any],
    run: tracking.Run,
) -> None:
    table = pd.concat(
        [metrics.predictions(one.keys, one.targets, one.logits, store.meta.classes) for one in judged],
        ignore_index=True,
    )
    table.insert(1, "fold", np.repeat([one.fold.fold for one in judged], [len(one.keys) for one in judged]))
    metrics.write_parquet(table, folder / PREDICTIONS)
    pooled = ("pictures", *FIGURES, "top1_low", "top1_high", "confidence", "macro_f1")
    result = {
        "model": config.model.name,
        "dataset": store.meta.dataset,
        "folds": len(judged),
        "seed": facts["seed"],
        **_spread(judged),
        "per_fold": [asdict(one.fold) for one in judged],
        "out_of_fold": {name: getattr(whole, name) for name in pooled},
        "run": {"name": run.name, "id": run.id},
        "fast_dev_run": config.train.fast_dev_run,
        "notes": _notes(config, store, whole),
    }
    _write_json(folder / RESULT, result)


def _notes(config: Config, store: Store, whole: Evaluation) -> list[str]:
    notes = [
        "sd is that of the folds' figures. It is no standard error of the mean: the folds' trainings share pictures.",
        "Each fold's best epoch was picked on the pictures that it is judged on: the figures are slightly optimistic.",
    ]
    if any(row.group for row in store.rows):
        notes.append("Pictures of one group resemble one another, and the interval does not know: it is too narrow.")
    if config.train.fast_dev_run:
        notes.append("A TRIAL of one batch of everything: the figures mean nothing.")
    return notes + [note.replace("test picture", "picture") for note in whole.notes]


def _tell(judged: list[_Judged], whole: Evaluation, notes: list[str]) -> None:
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("fold", "pictures", "top-1 %", "top-5 %", "loss", "best epoch", "run"):
        shown.add_column(heading, overflow="fold", justify="left" if heading == "run" else "right", no_wrap=True)
    for fold in (one.fold for one in judged):
        shown.add_row(str(fold.fold), str(fold.pictures), *_cells(asdict(fold)), str(fold.best_epoch), fold.run_id)
    shown.add_section()
    for kind, values in _spread(judged).items():
        shown.add_row(kind, "", *_cells(values), "", "")
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    console.print(shown)
    low, high = 100 * whole.top1_low, 100 * whole.top1_high
    print(f"all {whole.pictures:,} pictures together: top-1 {100 * whole.top1:.2f} % ({low:.2f} to {high:.2f})")
    for note in notes:
        print(note)


def _cells(figures: Mapping[str, float]) -> list[str]:
    return [f"{100 * figures['top1']:.2f}", f"{100 * figures['top5']:.2f}", f"{figures['loss']:.4f}"]


def _read(path: Path) -> dict[str, Any]:
    """A file of JSON; nothing where there is none."""
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with fresh_file(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
