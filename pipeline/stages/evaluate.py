"""The evaluate stage: judges the trained model on the test split, on one device, and files everything on its run."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from torch import Tensor, nn

from pipeline import machine, paths, provenance, tracking
from pipeline.analysis import inference, metrics, plots, report
from pipeline.analysis.metrics import Evaluation
from pipeline.data import datamodule
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.files import fresh_file, fresh_folder
from pipeline.parameters import Config, EvaluateParams
from pipeline.training import weights
from pipeline.training.record import Record
from pipeline.training.weights import ModelCard


def run(config: Config) -> None:
    """Writes models/NAME/evaluate, models/metrics.json and models/confusion.csv, and logs them."""
    machine.settle(devices=1)
    store = Store(paths.prepared(config.data.name))
    store.verify()
    trained = paths.trained(config.model.name)
    net, card = weights.load_model(trained / "model.safetensors")
    record = Record.read(trained)
    if card.classes != store.meta.classes or card.pack_px != store.meta.px:
        raise UserError(f"{trained}: trained on other pictures than data/prepared holds; run `dvc repro`")

    logits, targets = test_logits(store, net, card, batch_size=config.evaluate.batch_size, trial=card.fast_dev_run)
    evaluation = judge(config.evaluate, logits, targets, classes=card.classes)
    with _tracked(config, card, record) as tracked:
        _write(store, card, record, evaluation, logits, targets, run=tracked)
        # One figure a run: at step 0 MLflow compares runs by bars.
        tracked.log_metrics(metrics.flat(evaluation), step=0)
        tracked.log_artifact(paths.evaluated(card.name))
    print(
        f"{card.name} on {store.meta.dataset}: {told(evaluation)}"
        f"{', started from RANDOM weights' if card.start == 'random' else ''}; run {tracked.name} ({tracked.id})"
    )


def test_logits(
    store: Store, net: nn.Module, card: ModelCard, *, batch_size: int, trial: bool
) -> tuple[Tensor, Tensor]:
    """Float32 logits [N, C] and labels [N] of the test split in the manifest's order; of one batch for a trial."""
    loader = datamodule.test_loader(store, px=card.px, in_chans=card.in_chans, batch_size=batch_size, workers=0)
    return inference.logits(net, card, islice(loader, 1 if trial else None))


def judge(params: EvaluateParams, logits: Tensor, targets: Tensor, *, classes: Sequence[str]) -> Evaluation:
    """The figures of logits [N, C] against labels [N], which must be finite: else a UserError is raised."""
    return metrics.evaluate(
        logits,
        targets,
        classes=classes,
        bootstrap=params.bootstrap,
        confidence=params.confidence,
        seed=params.seed,
    )


def told(evaluation: Evaluation) -> str:
    """The figures that a line has room for."""
    return (
        f"test top-1 {evaluation.top1:.4f} ({evaluation.top1_low:.4f} to {evaluation.top1_high:.4f}), "
        f"top-5 {evaluation.top5:.4f}, {evaluation.pictures:,} pictures"
    )


def write_files(folder: Path, store: Store, evaluation: Evaluation, *, logits: Tensor, targets: Tensor) -> None:
    """Writes predictions.parquet, per_class.csv and confusion.png for logits [N, C] of the test split's first N."""
    classes = store.meta.classes
    keys = [store.rows[index].key for index in store.indices("test")[: len(targets)]]
    metrics.write_parquet(metrics.predictions(keys, targets, logits, classes), folder / "predictions.parquet")
    metrics.write_csv(evaluation.per_class, folder / "per_class.csv")
    plots.confusion(evaluation.confusion, classes, folder / "confusion.png")


def _write(
    store: Store,
    card: ModelCard,
    record: Record,
    evaluation: Evaluation,
    logits: Tensor,
    targets: Tensor,
    *,
    run: tracking.Run,
) -> None:
    facts = report.Facts(
        model=card.name,
        random_start=card.start == "random",
        started_from=card.start_source,
        fast_dev_run=card.fast_dev_run,
        dataset=store.meta.dataset,
        pictures=store.counts(),
        data_hash=store.meta.sha256[:12],
        monitor=record.monitor,
        phases=record.phases,
        evaluation=evaluation,
        run_id=run.id,
    )
    with fresh_folder(paths.evaluated(card.name)) as folder:
        write_files(folder, store, evaluation, logits=logits, targets=targets)
        shutil.copyfile(paths.trained(card.name) / "curves.png", folder / "curves.png")
        report.write(folder / "report.md", facts=facts)
    metrics.write_csv(metrics.confusion_rows(targets, logits.argmax(dim=1), card.classes), paths.CONFUSION)
    with fresh_file(paths.METRICS) as path:
        path.write_text(json.dumps(_summary(card, record, evaluation, run), indent=2) + "\n", encoding="utf-8")


def _summary(card: ModelCard, record: Record, evaluation: Evaluation, run: tracking.Run) -> dict[str, object]:
    """models/metrics.json, which DVC shows and compares."""
    return {
        "test": {name.removeprefix("test/"): value for name, value in metrics.flat(evaluation).items()},
        "run": {
            "name": run.name,
            "id": run.id,
            "model": card.name,
            "start": card.start,
            "weights": card.start_source,
            "fast_dev_run": card.fast_dev_run,
            "train_minutes": record.minutes,
        },
    }


@contextmanager
def _tracked(config: Config, card: ModelCard, record: Record) -> Iterator[tracking.Run]:
    """The run that trained the model, or a new one where this store has never seen it."""
    spool = paths.progress(card.name) / "metrics.spool"
    run = tracking.Run.resume(record.run_id, spool=spool)
    if run is None:
        print(f"run {record.run_id}, which trained this model, is not in this store: evaluated as a run of its own")
        run = tracking.Run.start(
            experiment=config.tracking.experiment,
            name=f"{record.run_name}-evaluated",
            tags={**provenance.run_tags(dataset=config.data.name, model=card.name), "trained_by": record.run_id},
            spool=spool,
        )
    with tracking.ending(run):
        yield run
