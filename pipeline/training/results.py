"""What a training leaves behind: the model's folder, and the same on its run."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from pipeline import tracking
from pipeline.analysis import inference, metrics, plots, schedule_view
from pipeline.data.datamodule import Batches, Pictures
from pipeline.data.store import Store
from pipeline.files import fresh_folder
from pipeline.parameters import Config
from pipeline.training import weights
from pipeline.training.checkpoints import write_whole
from pipeline.training.profiling import TRACE
from pipeline.training.progress import SWEEPS, Outcome, Progress
from pipeline.training.record import PhaseRecord, Record
from pipeline.training.schedule import Phase
from pipeline.training.weights import ModelCard

SHOWN = 32
"""Pictures drawn of the first training batch."""


def write(
    out: Path,
    net: nn.Module,
    card: ModelCard,
    phases: list[Phase],
    outcomes: list[Outcome],
    progress: Progress,
    *,
    config: Config,
    store: Store,
    run: tracking.Run,
) -> pd.DataFrame:
    """Writes the model's folder and files it on the run; gives back a row per epoch.

    Args:
        out: the folder: made whole, or not at all.
        net: with the best weights of the last phase.
    """
    rows = pd.DataFrame([row for o in outcomes for row in o.rows])
    record = Record(
        run_id=run.id,
        run_name=run.name,
        minutes=float(rows["seconds"].sum()) / 60,
        steps=sum(o.steps for o in outcomes),
        monitor=config.train.monitor,
        phases=tuple(_record(p, o, progress.rates) for p, o in zip(phases, outcomes, strict=True)),
    )
    for phase, outcome in zip(phases, outcomes, strict=True):
        row = next(row for row in outcome.rows if row["epoch"] == outcome.best_epoch)
        points = {f"phase/{phase.name}/{key}": row[key] for key in ("val/loss", "val/top1")}
        run.log_metrics(points, step=0, once=True)
    with fresh_folder(out) as folder:
        weights.save_model(folder / "model.safetensors", net, card)
        write_whole(outcomes[-1].best, net, folder / "best.ckpt")
        write_whole(outcomes[-1].last, net, folder / "last.ckpt")
        record.write(folder)
        best = rows["epoch"].isin([o.best_epoch for o in outcomes])
        plots.curves(rows.assign(best=best), folder / "curves.png")
        pictures = len(store.indices("train"))
        schedule_view.draw(phases, net, folder / "schedule.png", pictures=pictures, rates=progress.rates)
        if config.train.gradient_norms:
            gradients = pd.DataFrame([row for o in outcomes for row in o.gradients])
            metrics.write_csv(gradients, folder / "gradients.csv")
        if progress.tuned.get("table"):
            metrics.write_csv(pd.DataFrame(progress.tuned["table"]), folder / "auto_tune.csv")
        for phase in phases:
            for name, kept in ((SWEEPS, f"lr_find_{phase.name}.png"), (TRACE, f"trace_{phase.name}.json.gz")):
                if (made := progress.phase_folder(phase.name) / name).exists():
                    shutil.copyfile(made, folder / kept)
        pixels = _first_batch(config, store, card, folder / "first_batch.png")
        for path in sorted(folder.iterdir()):
            if path.name not in ("last.ckpt", "record.json"):
                run.log_artifact(path, folder="train")
    if config.tracking.log_model:
        run.log_model(inference.with_preprocessing(net, card), example=pixels[:2].float(), classes=card.classes)
    return rows


def _record(phase: Phase, outcome: Outcome, rates: Mapping[str, list[float]]) -> PhaseRecord:
    return PhaseRecord(
        name=phase.name,
        trainable=phase.trainable,
        epochs=len(outcome.rows),
        best_epoch=outcome.best_epoch,
        lr=max(rates[phase.name]) if phase.lr == "find" else phase.lr,
    )


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


def worse(outcomes: Sequence[Outcome], *, monitor: str) -> str:
    """What is to be said where the last of these phases has not come to what the one before had; else nothing."""
    if len(outcomes) < 2:
        return ""
    rows = [next(row for row in o.rows if row["epoch"] == o.best_epoch) for o in outcomes[-2:]]
    before, now = (float(row[monitor]) for row in rows)
    if now <= before if monitor.endswith("loss") else now >= before:
        return ""
    return (
        f"phase {rows[1]['phase']} ends at {monitor} {now:.4f}, worse than phase {rows[0]['phase']} before it "
        f"({before:.4f}): try a lower lr or more epochs there, or leave it out"
    )
