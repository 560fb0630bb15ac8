"""A training from start to files: the net, its phases, its MLflow run; gone on with where it was stopped.

The train stage is one job; cross-validation and tuning are several.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from filelock import FileLock, Timeout
from lightning.fabric.utilities.apply_func import move_data_to_device
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from pipeline import machine, nets, paths, provenance, tracking
from pipeline.analysis import finder_plot, schedule_view
from pipeline.config import flat
from pipeline.data.datamodule import Batch, PictureData
from pipeline.data.store import Store
from pipeline.errors import UserError, blaming
from pipeline.outbox import warn
from pipeline.parameters import Config, TrainParams, operational
from pipeline.training import finder, frozen, objective, results, schedule, tuning, weights
from pipeline.training.checkpoints import load_weights, whole
from pipeline.training.checks import check
from pipeline.training.classifier import Classifier
from pipeline.training.distillation import Teacher
from pipeline.training.fit import Log, ends_together, fit, rank
from pipeline.training.pretrained import Origin
from pipeline.training.progress import SWEEPS, Outcome, Progress
from pipeline.training.schedule import Phase
from pipeline.training.weights import ModelCard

SWEPT = 8
"""Batches that the learning-rate finder reads."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, and where it goes."""

    config: Config
    store: Store
    out: Path
    """The model's folder: made whole, or not at all."""
    progress: Path
    """Folder for what a resumed training needs."""
    name: str
    """Of the run, before the date."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of the run, beside what every run has."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the weights follow from beside configuration, data and first weights."""
    watch: Log | None = None
    """Hears every point of the run's metrics; what it raises ends the training."""


def run(job: Job) -> pd.DataFrame | None:
    """Trains phase by phase; writes the last one's best weights, with checkpoints, curves and the run's id.

    Gives back a row per epoch; None off the leading rank, which writes nothing.
    """
    config = job.config
    machine.settle(devices=config.train.devices)
    leader = rank() == 0
    L.seed_everything(config.train.seed, workers=True, verbose=False)
    origin = Origin.read(paths.pretrained(config.model.name))
    net, card = build(config, job.store, origin)
    phases = schedule.plan(config.train, net, px=config.px, random_start=origin.start == "random")
    if leader:
        with _locked(job):
            processes = check(config, job.store, net, card, phases)
            net = _synchronised(net, config.train, processes=processes)
            return _lead(job, net, card, phases, origin, processes=processes)
    processes = check(config, job.store, net, card, phases)
    net = _synchronised(net, config.train, processes=processes)
    progress = Progress(job.progress, facts=_facts(job, origin), leader=False)
    with ends_together(config.train):
        plans = _plans(job, net, phases)
        _train(job, net, card, phases, plans, progress, processes=processes, log=_another_ranks, sync=_nothing)
    return None


def _synchronised(net: nn.Module, params: TrainParams, *, processes: int) -> nn.Module:
    """The net, with batch norms over the pictures of all processes where that is asked for."""
    if not params.sync_bn or processes == 1:
        return net
    # timm's, before anything looks at the layers: Lightning's would drop the activation of a norm that has one.
    found: nn.Module = convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
    return found


def build(config: Config, store: Store, origin: Origin) -> tuple[nn.Module, ModelCard]:
    """The net with the weights that training starts from, and the card of what it will be."""
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
    if origin.start != "random":
        state = weights.read_state(paths.pretrained(model.name) / "weights.safetensors")
        other = bool(origin.classes) and origin.classes != store.meta.classes
        weights.load_pretrained(net, state, other_classes=other)
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


def _lead(
    job: Job, net: nn.Module, card: ModelCard, phases: list[Phase], origin: Origin, *, processes: int
) -> pd.DataFrame:
    if origin.start == "random":
        print(f"{card.name} starts from RANDOM weights ({origin.source}): every layer learns from the start")
    progress = Progress(job.progress, facts=_facts(job, origin), leader=True)
    if progress.difference:
        print(f"starting anew, not from the checkpoints of an earlier training: {progress.difference}")
    with _tracked(job, card, progress) as tracked:

        def log(metrics: Mapping[str, float], *, step: int) -> None:
            # Once: what a resumed training does over again has been logged before.
            tracked.log_metrics(metrics, step=step, once=True)
            if job.watch is not None:
                job.watch(metrics, step=step)

        counts = job.store.counts()
        print(f"{card.name}: {counts['train']:,} pictures to train on, {counts['val']:,} to validate on", flush=True)
        plans = _plans(job, net, phases)
        print(schedule_view.text(phases, net, pictures=counts["train"], frozen=[plan.told for plan in plans]))
        cached = [phase.name for phase, plan in zip(phases, plans, strict=True) if plan.cut is not None]
        with ends_together(job.config.train):
            train = tuning.tuned(job.config, job.store, net, card, phases=phases, cached=cached, progress=progress)
            if progress.tuned:
                choice = progress.tuned["choice"]
                if progress.tuned["table"]:
                    tracked.set_tags({f"auto_tune.{key}": str(value) for key, value in choice.items()})
                tracked.log_params({f"train.{key}": value for key, value in choice.items()})
                job = replace(job, config=job.config.model_copy(update={"train": train}))
            outcomes = _train(job, net, card, phases, plans, progress, processes=processes, log=log, sync=tracked.sync)
        rows = results.write(
            job.out, net, card, phases, outcomes, progress, config=job.config, store=job.store, run=tracked
        )
    progress.clear()
    return rows


def facts(config: Config, store: Store, origin: Origin) -> dict[str, Any]:
    """What a training's weights follow from, by dotted names."""
    known = {key: value for key, value in flat(config).items() if key.split(".")[0] in ("model", "train")}
    return {
        **{key: value for key, value in known.items() if key not in operational()},
        "data.sha256": store.meta.sha256,
        "weights.sha256": origin.sha256,
    }


def _facts(job: Job, origin: Origin) -> dict[str, Any]:
    return {**facts(job.config, job.store, origin), **job.facts}


def _plans(job: Job, net: nn.Module, phases: list[Phase]) -> list[frozen.Plan]:
    counts = job.store.counts()
    pictures = counts["train"] + counts["val"]
    return frozen.plans(phases, net, params=job.config.train, in_chans=job.config.model.in_chans, pictures=pictures)


def _train(
    job: Job,
    net: nn.Module,
    card: ModelCard,
    phases: list[Phase],
    plans: list[frozen.Plan],
    progress: Progress,
    *,
    processes: int,
    log: Log,
    sync: Callable[[], None],
) -> list[Outcome]:
    params, store = job.config.train, job.store
    train = store.indices("train")
    balanced = params.class_weights == "balanced"
    class_weights = objective.class_weights(store.labels[train], num_classes=len(card.classes)) if balanced else None
    teacher = _teacher(params.teacher, card)
    outcomes: list[Outcome] = []
    for phase, plan in zip(phases, plans, strict=True):
        epochs, steps = sum(len(o.rows) for o in outcomes), sum(o.steps for o in outcomes)
        if done := _done(progress, phase):
            load_weights(net, done.best)
            outcomes.append(done)
            continue
        kept = None
        if plan.cut is not None:
            kept = frozen.computed(
                plan.cut,
                net,
                store,
                phase=phase,
                params=params,
                px=card.px,
                mean=card.mean,
                std=card.std,
                processes=processes,
            )
        module = Classifier(
            net,
            phase=phase,
            params=params,
            pictures=len(train),
            num_classes=len(card.classes),
            mean=card.mean,
            std=card.std,
            first_epoch=epochs,
            class_weights=class_weights,
            teacher=teacher,
            cut=plan.cut,
        )
        data = PictureData(
            store,
            px=card.px,
            in_chans=card.in_chans,
            batch_size=phase.batch_size,
            parts=phase.accumulate,
            chosen=params.transforms,
            strength=phase.strength,
            balanced=params.sampling == "balanced",
            seed=params.seed,
            workers=params.workers,
            views=phase.views,
            first_epoch=epochs,
            cached=kept,
        )
        if phase.lr == "find" and rank() == 0:
            module.rates = _found(module, data, phase, job, progress)
        outcome = fit(
            module,
            data,
            params=params,
            folder=progress.phase_folder(phase.name),
            first_epoch=epochs,
            first_step=steps,
            log=log,
            sync=sync,
        )
        module.close()
        progress.finish(phase.name, outcome)
        outcomes.append(outcome)
        if rank() == 0 and (told := results.worse(outcomes, monitor=params.monitor)):
            warn(told)
    return outcomes


def _done(progress: Progress, phase: Phase) -> Outcome | None:
    """What a phase that is over came to; None where it is not, or its checkpoints are there no more."""
    outcome = progress.outcome(phase.name)
    if outcome is not None and not (whole(outcome.best) and whole(outcome.last)):
        progress.forget(phase.name)
        return None
    return outcome


def _found(module: Classifier, data: PictureData, phase: Phase, job: Job, progress: Progress) -> list[float]:
    """The learning rates for a phase whose lr is `find`: those found before a stop, or new ones."""
    if phase.name in progress.rates:
        return progress.rates[phase.name]
    params = job.config.train
    module.to(machine.device(params.accelerator))
    batches = [
        move_data_to_device(batch, module.device) for batch in islice(data.train_dataloader(), SWEPT * phase.accumulate)
    ]

    def step(net: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.autocast(module.device.type, torch.bfloat16, enabled=params.precision == "bf16-mixed"):
            return module.losses(net, batch)[0]

    with blaming("train.phases"):
        found = finder.find(
            step,
            module.net,
            batches,
            optimizer=phase.optimizer,
            weight_decay=phase.weight_decay,
            layer_decay=phase.layer_decay,
            clip=phase.clip,
            accumulate=phase.accumulate,
            seed=params.seed,
        )
    folder = progress.phase_folder(phase.name)
    folder.mkdir(parents=True, exist_ok=True)
    finder_plot.draw(found.sweeps, folder / SWEEPS)
    progress.found(phase.name, found.rates)
    low, high = min(found.rates), max(found.rates)
    print(f"{phase.name}: found a learning rate of {high:.2g}" + (f" to {low:.2g}" if low < high else ""), flush=True)
    return found.rates


def _teacher(path: str, card: ModelCard) -> Teacher | None:
    if Path(path) == paths.NO_WEIGHTS:
        return None
    with blaming("train.teacher"):
        return Teacher(Path(path), classes=card.classes, in_chans=card.in_chans)


def _another_ranks(metrics: Mapping[str, float], *, step: int) -> None:
    """The leader logs what all ranks found together."""


def _nothing() -> None:
    """Nor does a rank that logs nothing have anything to put on disk."""


@contextmanager
def _tracked(job: Job, card: ModelCard, progress: Progress) -> Iterator[tracking.Run]:
    config, store = job.config, job.store
    spool = job.progress / "metrics.spool"
    run = tracking.Run.resume(progress.run_id, spool=spool) if progress.resumes else None
    if run is None:
        if progress.resumes:
            warn(f"run {progress.run_id}, which this training began as, is not in this store; it goes on as a new one")
        run = tracking.Run.start(
            experiment=config.tracking.experiment,
            name=f"{job.name}-{datetime.now():%Y%m%d-%H%M%S}",
            tags={
                **provenance.run_tags(dataset=store.meta.dataset, model=card.name),
                "weights": card.start_source if card.start != "random" else "random",
                "start": card.start,
                "data.sha256": store.meta.sha256,
                "fast_dev_run": str(card.fast_dev_run).lower(),
                **job.tags,
            },
            spool=spool,
        )
    else:
        print(f"going on with run {run.name} ({run.id})", flush=True)
    progress.begin(run.id)
    with tracking.ending(run):
        awaited = {f"train.{choice.name}" for choice in fields(tuning.Choice)} if config.train.auto_tune else set()
        run.log_params({key: value for key, value in flat(config).items() if key not in awaited})
        run.log_artifact(paths.PARAMS)
        if config.tracking.system_metrics:
            run.start_system_metrics()
        yield run


@contextmanager
def _locked(job: Job) -> Iterator[None]:
    """One training per folder: stopping dvc alone leaves its stage running, and two would mix their checkpoints."""
    job.progress.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.progress / "lock", timeout=0):
            yield
    except Timeout:
        name = job.config.model.name
        raise UserError(f"{name} is being trained by another process; wait for it, or stop it") from None
