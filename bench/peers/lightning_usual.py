"""The usual Lightning loop on Fashion-MNIST: torchvision's data set and transforms, a DataLoader with workers.

A LightningModule as Lightning's documentation writes it (training_step and validation_step, self.log, torchmetrics),
torchvision.datasets.FashionMNIST, RandomAffine and RandomHorizontalFlip per picture, persistent worker processes, fp32.
The net, batch, epochs, learning rate and the sizes of the splits are those of the comparison; no progress bar is drawn.
"""

from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, random_split
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2 as T

from shared import Clock, build, normalization, spec


class LitClassifier(L.LightningModule):
    """The net, its loss and its accuracy."""

    def __init__(self, net: nn.Module, *, lr: float, clock: Clock) -> None:
        super().__init__()
        self.net, self._lr, self._clock = net, lr, clock
        self.train_accuracy, self.val_accuracy = (
            MulticlassAccuracy(10, average="micro"),
            MulticlassAccuracy(10, average="micro"),
        )

    def training_step(self, batch: Any, index: int) -> torch.Tensor:  # noqa: ARG002
        loss, logits = self._seen(batch)
        self.train_accuracy(logits, batch[1])
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", self.train_accuracy, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:  # noqa: ARG002
        loss, logits = self._seen(batch)
        self.val_accuracy(logits, batch[1])
        self.log("val_loss", loss, prog_bar=True)
        self.log("val_accuracy", self.val_accuracy, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self._clock.epoch(float(self.trainer.callback_metrics["val_accuracy"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self._lr)

    def _seen(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.net(batch[0])
        return F.cross_entropy(logits, batch[1]), logits


def main() -> None:
    """Trains as the spec says."""
    asked = spec()
    L.seed_everything(0, verbose=False)
    net = build(asked.net, num_classes=10, weights="", in_chans=1)
    pad = (asked.px - 28) // 2
    plain = [T.Pad(pad), T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize(*normalization(net))]
    random = [T.RandomAffine(0, translate=(0.1, 0.1)), T.RandomHorizontalFlip(), *plain]
    augmented, judged = (FashionMNIST(asked.root, train=True, transform=T.Compose(t)) for t in (random, plain))
    rest = len(augmented) - asked.train - asked.val
    train, val, _ = random_split(range(len(augmented)), [asked.train, asked.val, rest])  # type: ignore[arg-type]
    common: dict[str, Any] = {
        "batch_size": asked.batch,
        "num_workers": asked.workers,
        "persistent_workers": asked.workers > 0,
    }
    loaders = (
        DataLoader(Subset(augmented, list(train)), shuffle=True, **common),
        DataLoader(Subset(judged, list(val)), **common),
    )
    with TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=asked.epochs,
            logger=CSVLogger(folder),
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        clock = Clock()
        trainer.fit(LitClassifier(net, lr=asked.lr, clock=clock), *loaders)
        clock.end()
        clock.tell()


if __name__ == "__main__":
    main()
