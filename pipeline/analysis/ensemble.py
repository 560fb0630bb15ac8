"""Ensembles: several trained models whose probabilities are averaged, judged on the test split like one model."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from pipeline import config, machine, paths, provenance, tracking
from pipeline.analysis import metrics
from pipeline.analysis.metrics import Evaluation
from pipeline.data.store import Store
from pipeline.errors import UserError, nearest
from pipeline.files import fresh_folder
from pipeline.parameters import Config
from pipeline.stages import evaluate
from pipeline.training import record, weights
from pipeline.training.record import Record
from pipeline.training.weights import ModelCard

FOLDER = Path("models/ensembles")
FILE = "model.safetensors"
LONGEST = 100
"""Letters of a folder's name that is made of the members' names."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A trained model, and what is known of it before its weights are read."""

    name: str
    path: Path
    card: ModelCard
    run: str
    """Id of the MLflow run that trained it; empty where no record lies beside the model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """All that is told of an ensemble."""

    members: Sequence[Member]
    alone: Sequence[Evaluation]
    """Each member by itself."""
    together: Evaluation
    logits: torch.Tensor
    """[N, C] float64: the logarithms of the averaged probabilities."""
    targets: torch.Tensor
    """[N] int64."""


def run(nets: Sequence[str], *, name: str = "") -> None:
    """Judges models by the mean of their probabilities, on the test split of params.yaml's dataset.

    Writes models/ensembles/NAME (predictions.parquet, per_class.csv, confusion.png, metrics.json, report.md) and a run
    of its own in MLflow. Each member sees the pictures by its own card: side, channels, mean and standard deviation.

    What a member was trained on is not checked beyond classes and size: one of another division of the same pictures,
    by another augment.seed say, may have seen the test split.

    Args:
        nets: two or more: names of trained nets, or paths of model.safetensors files, such as those of folds.
        name: of the ensemble's folder; the members' names where there is none.

    Raises:
        UserError: a model is not there, or is not one for the packed pictures, or there is one only.
    """
    params = config.load()
    machine.settle(devices=1)
    store = Store(paths.prepared(params.data.name))
    members = gather(nets, store)
    title = "+".join(member.name for member in members)
    folder = FOLDER / _folder_name(name, title)
    store.verify()
    judged = judge(params, store, members)
    tracked = _begin(params, store, members, model=f"ensemble({title})", name=folder.name)
    with tracking.ending(tracked):
        _write(folder, store, judged, title=title, run=tracked)
        tracked.log_metrics(metrics.flat(judged.together), step=0)
        tracked.log_artifact(folder)
    print(f"ensemble of {len(members)} on {store.meta.dataset}: {evaluate.told(judged.together)}")
    print(f"MLflow's run: {tracked.name} ({tracked.id}); files: {folder}")


def gather(nets: Sequence[str], store: Store) -> list[Member]:
    """The members by name or path, once it is sure that they are for these pictures.

    Raises:
        UserError: as `run`.
    """
    if len(nets) < 2:
        raise UserError("an ensemble has two members or more: name nets, or paths of model.safetensors files")
    members = [_member(word) for word in nets]
    for member in members:
        if member.card.classes != store.meta.classes:
            raise UserError(f"{member.name}: its classes are not those of {store.folder}; leave it out")
        if member.card.pack_px != store.meta.px:
            raise UserError(
                f"{member.name}: takes pictures packed at {member.card.pack_px} px, and {store.folder} has "
                f"{store.meta.px}; leave it out, or train it on these"
            )
    return members


def judge(params: Config, store: Store, members: Sequence[Member]) -> Judged:
    """Judges each member, printing a line for it, and all together; one net is in memory at a time.

    Raises:
        UserError: a member gives logits that are not finite.
    """
    trial = _is_trial(members)
    alone, outputs = [], []
    for member in members:
        net, card = weights.load_model(member.path)
        logits, targets = evaluate.test_logits(store, net, card, batch_size=params.evaluate.batch_size, trial=trial)
        try:
            alone.append(evaluate.judge(params.evaluate, logits, targets, classes=card.classes))
        except UserError as error:
            raise UserError(f"{member.name}: {error}") from None
        outputs.append(logits)
        print(f"{member.name}: {evaluate.told(alone[-1])}", flush=True)
    averaged = average(outputs)
    together = evaluate.judge(params.evaluate, averaged, targets, classes=store.meta.classes)
    return Judged(members=members, alone=alone, together=together, logits=averaged, targets=targets)


def average(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the mean of the models' probabilities, [N, C] float64, which are logits in their turn.

    In logarithms throughout, so that a probability too small for a float is not taken for 0.

    Args:
        logits: of each model, [N, C].
    """
    each = torch.stack([one.double().log_softmax(dim=1) for one in logits])
    return each.logsumexp(dim=0) - math.log(len(each))


def _member(word: str) -> Member:
    path = Path(word)
    if not word.endswith(".safetensors"):
        path = paths.trained(word) / FILE
        if not path.is_file():
            trained = [found.parents[1].as_posix() for found in Path("models").rglob(f"train/{FILE}")]
            raise UserError(
                f"{word}: no trained model of that name{nearest(word, [n.removeprefix('models/') for n in trained])}"
            )
    card = weights.read_card(path)
    run = Record.read(path.parent).run_id if (path.parent / record.NAME).exists() else ""
    return Member(name=word.removeprefix("models/").removesuffix(f"/{FILE}"), path=path, card=card, run=run)


def _folder_name(name: str, title: str) -> str:
    """The name asked for, or the members' names.

    Raises:
        UserError: it is no folder's name.
    """
    if not name and len(title) > LONGEST:
        raise UserError("the members' names are too long for a folder; name the ensemble: --name NAME")
    if name and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
        raise UserError(f"--name {name}: use letters, digits, and _ . + - within")
    return name or re.sub(r"[^\w.+-]", "-", title).strip("-")


def _is_trial(members: Sequence[Member]) -> bool:
    return any(member.card.fast_dev_run for member in members)


def _begin(params: Config, store: Store, members: Sequence[Member], *, model: str, name: str) -> tracking.Run:
    run = tracking.Run.start(
        experiment=params.tracking.experiment,
        name=f"ensemble-{name}-{datetime.now():%Y%m%d-%H%M%S}",
        tags={
            **provenance.run_tags(dataset=store.meta.dataset, model=model),
            "weights": f"{len(members)} trained models",
            "data.sha256": store.meta.sha256,
            "fast_dev_run": str(_is_trial(members)).lower(),
            "members": ", ".join(member.name for member in members),
            "members.runs": ", ".join(member.run or "unknown" for member in members),
        },
        spool=paths.progress(f"ensemble-{name}") / "metrics.spool",
    )
    judging = {f"evaluate.{key}": value for key, value in params.evaluate}
    run.log_params({"data.name": store.meta.dataset, "model.name": model, "members": len(members), **judging})
    return run


def _write(folder: Path, store: Store, judged: Judged, *, title: str, run: tracking.Run) -> None:
    content = {
        "test": _figures(judged.together),
        "members": [
            {"name": member.name, "path": str(member.path), "run": member.run, "test": _figures(evaluation)}
            for member, evaluation in zip(judged.members, judged.alone, strict=True)
        ],
        "run": {"name": run.name, "id": run.id},
        "fast_dev_run": _is_trial(judged.members),
    }
    with fresh_folder(folder) as fresh:
        evaluate.write_files(fresh, store, judged.together, logits=judged.logits, targets=judged.targets)
        (fresh / "metrics.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (fresh / "report.md").write_text(_report(store, judged, title=title, run=run), encoding="utf-8")


def _figures(evaluation: Evaluation) -> dict[str, float]:
    return {name.removeprefix("test/"): value for name, value in metrics.flat(evaluation).items()}


def _report(store: Store, judged: Judged, *, title: str, run: tracking.Run) -> str:
    together = judged.together
    rows = [
        *((f"`{member.name}`", found) for member, found in zip(judged.members, judged.alone, strict=True)),
        ("**together**", together),
    ]
    lines = [
        f"# Ensemble `{title}` on `{store.meta.dataset}`",
        "",
        *(
            ["> **The figures mean NOTHING: a member is a trial of one batch.**", ""]
            if _is_trial(judged.members)
            else []
        ),
        f"The probabilities of {len(judged.members)} models are averaged, each with the same weight, on "
        f"{together.pictures:,} test pictures (data fingerprint `{store.meta.sha256[:12]}`).",
        "",
        f"| model | top-1 accuracy | {100 * together.confidence:g}% interval | top-5 accuracy | loss | macro F1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {found.top1:.4f} | {found.top1_low:.4f} to {found.top1_high:.4f} | {found.top5:.4f} | "
            f"{found.loss:.4f} | {found.macro_f1:.4f} |"
            for name, found in rows
        ),
        "",
        "All are judged on the same pictures, so that two of these intervals may overlap where the difference is real.",
        "",
        *(f"- {note}\n" for note in together.notes),
        "![Confusion matrix: each row shows where one class's pictures went](confusion.png)",
        "",
        f"per_class.csv has each class, predictions.parquet each picture. MLflow run `{run.id}` holds these files.",
    ]
    return "\n".join(lines) + "\n"
