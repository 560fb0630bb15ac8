"""The train stage: phases of freezing and thawing, from what `weights` fetched to models/NAME/train."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path

import lightning as L
import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import nn

from pipeline import nets, paths, provenance, tracking
from pipeline.analysis import inference, metrics, plots
from pipeline.config import Config, flat
from pipeline.data.datamodule import Batches, PictureData, Pictures
from pipeline.data.store import Store
from pipeline.errors import UserError, blaming
from pipeline.files import fresh_folder
from pipeline.training import schedule, weights
from pipeline.training.classifier import Classifier
from pipeline.training.fit import Log, Outcome, fit, rank
from pipeline.training.pretrained import Origin
from pipeline.training.record import PhaseRecord, Record
from pipeline.training.schedule import Phase
from pipeline.training.weights import ModelCard

SHOWN = 32
"""Pictures drawn of the first training batch."""


def run(config: Config) -> None:
    """Trains phase by phase; writes the last one's best weights, with checkpoints, curves and the run's id."""
    leader = rank() == 0
    progress = paths.progress(config.model.name)
    with _locked(config.model.name) if leader else nullcontext():
        store = Store(paths.prepared(config.data.name))
        if leader:
            store.verify()
        L.seed_everything(config.train.seed, workers=True, verbose=False)
        origin = Origin.read(paths.pretrained(config.model.name))
        net, card = _build(config, store, origin)
        if leader and origin.start == "random":
            print(f"{card.name} starts from RANDOM weights ({origin.source}): every layer learns from the start")
        phases = schedule.plan(
            config.train.phases, random_start=origin.start == "random", fast_dev_run=config.train.fast_dev_run
        )
        if not leader:
            _train(net, card, phases, config, store, log=_another_ranks, progress=progress)
            return
        with _tracked(config, store, card) as run:
            began = time.monotonic()
            outcomes = _train(net, card, phases, config, store, log=run.log_metrics, progress=progress)
            _write(net, card, config, store, phases, outcomes, run=run, minutes=(time.monotonic() - began) / 60)
        shutil.rmtree(progress / "phases")


def _build(config: Config, store: Store, origin: Origin) -> tuple[nn.Module, ModelCard]:
    model = config.model
    with blaming("model.name"):
        net = nets.build(
            model.name,
            num_classes=len(store.meta.classes),
            in_chans=model.in_chans,
            drop_rate=model.drop_rate,
            drop_path_rate=model.drop_path_rate,
            stem=model.stem,
            recompute=model.recompute,
        )
        nets.check_px(net, config.px, name=model.name)
    if origin.start != "random":
        weights.load_pretrained(net, weights.read_state(paths.pretrained(model.name) / "weights.safetensors"))
    mean, std = nets.normalization(net, in_chans=model.in_chans)
    card = ModelCard(
        name=model.name,
        in_chans=model.in_chans,
        stem=model.stem,
        classes=store.meta.classes,
        px=config.px,
        pack_px=store.meta.px,
        mean=mean,
        std=std,
        start=origin.start,
        start_source=origin.source,
        fast_dev_run=config.train.fast_dev_run,
    )
    return net, card


def _train(
    net: nn.Module, card: ModelCard, phases: list[Phase], config: Config, store: Store, *, log: Log, progress: Path
) -> list[Outcome]:
    params = config.train
    outcomes: list[Outcome] = []
    for phase in phases:
        epochs, steps = sum(len(o.rows) for o in outcomes), sum(o.steps for o in outcomes)
        module = Classifier(
            net,
            phase=phase,
            num_classes=len(card.classes),
            px=card.px,
            mean=card.mean,
            std=card.std,
            optimizer=params.optimizer,
            weight_decay=params.weight_decay,
            label_smoothing=params.label_smoothing,
            channels_last=params.channels_last,
        )
        data = PictureData(
            store,
            px=card.px,
            in_chans=card.in_chans,
            batch_size=params.batch_size,
            chosen=params.transforms,
            seed=params.seed,
            workers=params.workers,
            first_epoch=epochs,
        )
        folder = progress / "phases" / phase.name
        outcomes.append(fit(module, data, params=params, folder=folder, first_epoch=epochs, first_step=steps, log=log))
    return outcomes


def _write(
    net: nn.Module,
    card: ModelCard,
    config: Config,
    store: Store,
    phases: list[Phase],
    outcomes: list[Outcome],
    *,
    run: tracking.Run,
    minutes: float,
) -> None:
    record = Record(
        run_id=run.id,
        run_name=run.name,
        minutes=minutes,
        steps=sum(o.steps for o in outcomes),
        monitor=config.train.monitor,
        phases=tuple(
            PhaseRecord(name=p.name, trainable=p.trainable, epochs=len(o.rows), best_epoch=o.best_epoch, lr=p.lr)
            for p, o in zip(phases, outcomes, strict=True)
        ),
    )
    rows = pd.DataFrame([{**row, "best": row["epoch"] == o.best_epoch} for o in outcomes for row in o.rows])
    for phase, outcome in zip(phases, outcomes, strict=True):
        best = next(row for row in outcome.rows if row["epoch"] == outcome.best_epoch)
        run.log_metrics({f"phase/{phase.name}/{key}": best[key] for key in ("val/loss", "val/top1")}, step=0)
    with fresh_folder(paths.trained(card.name)) as folder:
        weights.save_model(folder / "model.safetensors", net, card)
        shutil.copyfile(outcomes[-1].best, folder / "best.ckpt")
        shutil.copyfile(outcomes[-1].last, folder / "last.ckpt")
        record.write(folder)
        plots.curves(rows, folder / "curves.png")
        if config.train.gradient_norms:
            gradients = pd.DataFrame([row for o in outcomes for row in o.gradients])
            metrics.write_csv(gradients, folder / "gradients.csv")
            run.log_artifact(folder / "gradients.csv", folder="train")
        pixels = _first_batch(config, store, card, folder / "first_batch.png")
        for name in ("model.safetensors", "best.ckpt", "curves.png", "first_batch.png"):
            run.log_artifact(folder / name, folder="train")
    if config.tracking.log_model:
        run.log_model(inference.with_preprocessing(net, card), example=pixels[:2].float(), classes=card.classes)
    metrics.write_csv(rows.drop(columns="best"), paths.CURVES)


def _first_batch(config: Config, store: Store, card: ModelCard, path: Path) -> torch.Tensor:
    """Draws the first training batch as the net saw it, augmentation included; gives back its pixels."""
    pictures = Pictures(
        store, px=card.px, in_chans=card.in_chans, seed=config.train.seed, chosen=config.train.transforms
    )
    batches = Batches(store.indices("train"), batch_size=SHOWN, seed=config.train.seed, shuffle=True)
    pixels, labels = pictures[next(iter(batches))]
    shown = [picture.permute(1, 2, 0).numpy() for picture in pixels]
    plots.grid(shown, [card.classes[label] for label in labels], path, columns=8)
    return pixels


def _another_ranks(metrics: Mapping[str, float], *, step: int) -> None:
    """The leader logs what all ranks found together."""


@contextmanager
def _tracked(config: Config, store: Store, card: ModelCard) -> Iterator[tracking.Run]:
    tags = {
        **provenance.run_tags(dataset=store.meta.dataset, model=card.name),
        "weights": card.start_source if card.start != "random" else "random",
        "start": card.start,
        "data.sha256": store.meta.sha256,
        "fast_dev_run": str(card.fast_dev_run).lower(),
    }
    run = tracking.Run.start(
        experiment=config.tracking.experiment,
        name=f"{card.name}-{store.meta.dataset}-{datetime.now():%Y%m%d-%H%M%S}",
        tags=tags,
        spool=paths.progress(card.name) / "metrics.spool",
    )
    with tracking.ending(run):
        run.log_params(flat(config))
        run.log_artifact(paths.PARAMS)
        if config.tracking.system_metrics:
            run.start_system_metrics()
        yield run


@contextmanager
def _locked(model: str) -> Iterator[None]:
    """One training per model: stopping dvc alone leaves its stage running, and two would mix their checkpoints."""
    paths.progress(model).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(paths.progress(model) / "lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{model} is being trained by another process; wait for it, or stop it") from None
