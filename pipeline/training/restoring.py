"""Learning without labels: a U-Net restores damaged pictures, and a classifier then starts from its encoder.

To fill a blanked square the net must know what the rest of the picture shows, so its encoder learns about pictures
from any that there are (Pathak et al., "Context encoders", 2016; of noise: Vincent et al., "Extracting and composing
robust features with denoising autoencoders", 2008).
"""

import json
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from pipeline import machine, nets, paths, provenance, tracking
from pipeline.analysis import plots
from pipeline.data.datamodule import Batches, Pictures
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.nets.unet import MIN_PX, UNet, unet
from pipeline.training import optim, weights
from pipeline.training.fit import Log, quiet
from pipeline.training.normalize import Normalize

NET = "scratch/unet_encoder"
ENCODER, GRID = "unet_encoder.safetensors", "restored.png"
CELLS = 8
"""A picture is cut into this many squares a side, some of which are blanked."""
BLANK = 0.5
"""Of a blanked square, in pixels of 0..1."""
SHOWN = 6
"""Validation pictures drawn."""

Pair = tuple[Tensor, Tensor]
"""Damaged and clean pictures, each float32 [B, C, H, W] in 0..1 (noise may lead beyond)."""


def run(
    *,
    dataset: str,
    out: Path,
    epochs: int,
    batch_size: int,
    lr: float,
    px: int,
    in_chans: int,
    seed: int,
    noise: float,
    hole: float,
    experiment: str,
    width: int = 64,
) -> None:
    """Trains a U-Net to restore the prepared pictures of a dataset, prints a line an epoch and keeps a run in MLflow.

    Into the folder `out` go the encoder's weights of the last epoch (`unet_encoder.safetensors`, for model.weights) and
    a drawing of validation pictures (`restored.png`). Labels are not looked at, and neither is the test split.

    Args:
        dataset: Name of a packed dataset, as augment left it.
        out: Folder; files of other names in it stay.
        epochs: Passes over the training pictures.
        batch_size: Pictures per optimiser step.
        lr: Highest learning rate of a one-cycle schedule with AdamW.
        px: Side of the centre square of each picture, in pixels.
        in_chans: Channels that the net sees, 1 or 3.
        seed: Of the net, of the order of pictures and of the damage.
        noise: Standard deviation of the noise, as a share of the full range of a pixel.
        hole: Share of each picture's area that is blanked, rounded to 1/64.
        experiment: MLflow experiment.
        width: Of the U-Net's first level; a classifier takes the weights of 64 alone.

    Raises:
        UserError: A value is out of range, or there are no such pictures, or the loss is no longer a number.
    """
    settings = {key: value for key, value in locals().items() if key not in ("out", "experiment")}
    _check(counts=(epochs, batch_size, width), lr=lr, in_chans=in_chans, noise=noise, hole=hole)
    quiet()
    machine.settle(devices=1)
    store = _store(dataset, px=px)
    L.seed_everything(seed, workers=True, verbose=False)
    clean = Pictures(store, px=px, in_chans=in_chans)
    learning = DamagedPictures(clean, seed=seed, noise=noise, hole=hole, fixed=False)
    held_out = DamagedPictures(clean, seed=seed, noise=noise, hole=hole, fixed=True)
    batches = Batches(store.indices("train"), batch_size=batch_size, seed=seed, shuffle=True)
    train = DataLoader(learning, sampler=batches, batch_size=None)
    val = DataLoader(held_out, sampler=Batches(store.indices("val"), batch_size=batch_size), batch_size=None)
    tags = {
        **provenance.run_tags(dataset=dataset, model=NET),
        "data.sha256": store.meta.sha256,
        tracking.SERVES: "restore",
    }
    run = tracking.Run.start(
        experiment=experiment,
        name=f"restore-{dataset}-{datetime.now():%Y%m%d-%H%M%S}",
        tags=tags,
        spool=paths.progress("restore") / "metrics.spool",
    )
    with tracking.ending(run):
        run.log_params(settings)
        module = Restorer(unet(in_chans=in_chans, width=width), in_chans=in_chans, lr=lr, log=run.log_metrics)
        _fit(module, train, val, epochs=epochs)
        # one key: safetensors writes several in any order, and the same run should give the same file
        metadata = {"restored": json.dumps(settings)}
        weights.save_state(out / ENCODER, module.net.encoder.state_dict(), metadata=metadata)
        _draw(module, held_out, store.indices("val")[:SHOWN], path=out / GRID)
        for name in (ENCODER, GRID):
            run.log_artifact(out / name)
    print(f"wrote {out / ENCODER} and {out / GRID}; MLflow run {run.name} ({run.id})", flush=True)


def damage(
    clean_chw: npt.NDArray[np.uint8], *, noise: float, hole: float, seed: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """A damaged version of a picture, uint8 [C, H, W] to float32 [C, H, W]; the same seed gives the same, bit by bit.

    Gaussian noise of standard deviation `noise` falls on every value, in 0..1 and not clipped; then round(64 * hole)
    of the picture's 8 x 8 squares are blanked, the same in each channel.
    """
    rng = np.random.default_rng(seed)
    noise_chw = np.float32(noise) * rng.standard_normal(clean_chw.shape, dtype=np.float32)
    damaged_chw: npt.NDArray[np.float32] = clean_chw / np.float32(255) + noise_chw
    blanked = np.zeros(CELLS**2, dtype=bool)
    blanked[rng.permutation(CELLS**2)[: round(hole * CELLS**2)]] = True
    rows, columns = (np.arange(side) * CELLS // side for side in clean_chw.shape[1:])
    damaged_chw[:, blanked.reshape(CELLS, CELLS)[np.ix_(rows, columns)]] = BLANK
    return damaged_chw


def psnr(pictures_bchw: Tensor, clean_bchw: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture [B], in dB, at most 100; values beyond 0..1 are clipped."""
    squares_bchw = (pictures_bchw.clamp(0, 1) - clean_bchw).square()
    return -10 * squares_bchw.mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


class DamagedPictures(Dataset[Pair]):
    """Whole batches by their list of (epoch, index), damaged by (seed, epoch, index).

    `fixed` pictures are damaged alike in every epoch, so that figures of different epochs can be compared.
    """

    def __init__(self, pictures: Pictures, *, seed: int, noise: float, hole: float, fixed: bool) -> None:
        self._pictures = pictures
        self._seed, self._noise, self._hole, self._fixed = seed, noise, hole, fixed

    def __getitem__(self, batch: list[tuple[int, int]]) -> Pair:
        pixels_bchw, _ = self._pictures[batch]
        seeds = [(self._seed, 0 if self._fixed else epoch, index) for epoch, index in batch]
        damaged = [
            damage(pixels_chw, noise=self._noise, hole=self._hole, seed=seed)
            for pixels_chw, seed in zip(pixels_bchw.numpy(), seeds, strict=True)
        ]
        return torch.from_numpy(np.stack(damaged)), pixels_bchw.float() / 255


class Restorer(L.LightningModule):
    """Trains a U-Net to restore pictures; what it minimises is the squared error, which PSNR measures.

    The net reads pictures normalised as the classifier's encoder will, and gives pixels of 0..1.
    """

    def __init__(self, net: UNet, *, in_chans: int, lr: float, log: Log) -> None:
        super().__init__()
        self.net = net
        with torch.device("meta"):
            encoder = nets.build(NET, num_classes=1, in_chans=in_chans)
        mean, std = nets.normalization(encoder, in_chans=in_chans)
        self.normalize = Normalize(mean, std)
        self._lr, self._log = lr, log
        self.train_loss, self.val_psnr, self.val_psnr_damaged = (MeanMetric() for _ in range(3))
        self._on_sigterm = signal.getsignal(signal.SIGTERM)

    def forward(self, damaged_bchw: Tensor) -> Tensor:
        """Damaged pictures [B, C, H, W] in 0..1 to restored ones."""
        restored: Tensor = self.net(self.normalize(255 * damaged_bchw))
        return restored

    def on_train_start(self) -> None:
        # Lightning's own handler would end a stopped run with 0
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def training_step(self, batch: Pair, index: int) -> Tensor:
        damaged, clean = batch
        loss = F.mse_loss(self(damaged), clean)
        if not torch.isfinite(loss):
            when = f"in epoch {self.current_epoch + 1}, step {index + 1}"
            raise UserError(f"the loss became {loss.item()} {when}; lower the learning rate below {self._lr}")
        self.train_loss.update(loss.detach(), weight=len(clean))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(clean))
        return loss

    def validation_step(self, batch: Pair, index: int) -> None:  # noqa: ARG002, Lightning's signature
        damaged, clean = batch
        self.val_psnr.update(psnr(self(damaged), clean))
        self.val_psnr_damaged.update(psnr(damaged, clean))
        self.log_dict({"val/psnr": self.val_psnr, "val/psnr_damaged": self.val_psnr_damaged}, batch_size=len(clean))

    def on_train_epoch_end(self) -> None:
        found = self.trainer.callback_metrics
        self._log({name: float(value) for name, value in found.items() if "/" in name}, step=self.global_step)
        print(
            f"epoch {self.current_epoch + 1}/{self.trainer.max_epochs}: train loss {found['train/loss']:.5f}; "
            f"val PSNR {found['val/psnr']:.2f} dB restored, {found['val/psnr_damaged']:.2f} dB damaged",
            flush=True,
        )

    def configure_optimizers(self) -> Any:
        made = optim.optimizer(self.net, name="adamw", lr=self._lr, weight_decay=0.0, layer_decay=1.0)
        num_steps = int(self.trainer.estimated_stepping_batches)
        moves = optim.scheduler(made, name="onecycle", total_steps=num_steps, warmup="auto")
        return [made], [{"scheduler": moves, "interval": "step"}]


def _check(*, counts: tuple[int, ...], lr: float, in_chans: int, noise: float, hole: float) -> None:
    if min(counts) < 1:
        raise UserError(f"epochs, batch_size and width are 1 or more, got {', '.join(map(str, counts))}")
    if not lr > 0:
        raise UserError(f"lr {lr}: give a learning rate above 0")
    if in_chans not in (1, 3):
        raise UserError(f"in_chans {in_chans}: give 1 for grey or 3 for colour")
    num_blanked = round(hole * CELLS**2)
    if not (0 <= noise <= 1 and hole >= 0 and num_blanked < CELLS**2):
        raise UserError(f"noise {noise} and hole {hole}: give shares of 0 to 1, and leave some of the picture")
    if noise == num_blanked == 0:
        raise UserError(f"noise {noise} and hole {hole} leave the pictures whole; raise one of them")


def _store(dataset: str, *, px: int) -> Store:
    store = Store(paths.prepared(dataset))
    if px < MIN_PX:
        raise UserError(f"px {px}: a U-Net takes pictures of {MIN_PX} px or more")
    if px > store.meta.px:
        raise UserError(f"px {px}: {store.folder} is packed at {store.meta.px} px; lower px, or raise augment.px")
    if not (store.counts()["train"] and store.counts()["val"]):
        raise UserError(f"{store.folder}: no training or no validation pictures; see augment.val_fraction")
    store.verify()
    return store


def _fit(module: Restorer, train: DataLoader[Pair], val: DataLoader[Pair], *, epochs: int) -> None:
    trainer = L.Trainer(
        devices=1,
        max_epochs=epochs,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=Console().is_terminal,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, train, val)
    except torch.OutOfMemoryError:
        raise UserError("the device's memory does not hold a batch; lower batch_size, or px") from None


def _draw(module: Restorer, pictures: DamagedPictures, indices: npt.NDArray[np.int64], *, path: Path) -> None:
    damaged, clean = pictures[[(0, int(index)) for index in indices]]
    with torch.no_grad():
        restored = module.eval()(damaged.to(module.device)).cpu()
    rows = zip(damaged, restored, clean, strict=True)
    cells = [(255 * picture.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy() for row in rows for picture in row]
    levels = zip(psnr(damaged, clean).tolist(), psnr(restored, clean).tolist(), strict=True)
    titles = [(f"damaged {before:.1f} dB", f"restored {after:.1f} dB", "clean") for before, after in levels]
    plots.grid(cells, [title for row in titles for title in row], path, columns=3)
