"""Hugging Face's Trainer, set up as in its example run_image_classification.py.

torchvision's RandomResizedCrop and RandomHorizontalFlip in training, Resize and CenterCrop in validation; AdamW with
the Trainer's linear decay, evaluation after each epoch, fp32. What differs from the example: the net is timm's, wrapped
so that it gives a loss as the library's own nets do; pictures come from an ImageFolder; batch, learning rate, epochs
and workers are those of the comparison; nothing is saved or reported.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from transformers import Trainer, TrainerCallback, TrainingArguments

from shared import Clock, build, freeze, num_classes, plain_transform, random_transform, spec, test_top1


class WithLoss(nn.Module):
    """A net that gives loss and logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.net(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Noting(TrainerCallback):
    """Tells the clock of each epoch's accuracy."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:  # noqa: ARG002
        self._clock.epoch(metrics["eval_accuracy"])


def collate(examples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """Pictures and labels under the Trainer's names."""
    pixels = torch.stack([pixels for pixels, _ in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([label for _, label in examples])}


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def main() -> None:
    """Trains as the spec says."""
    asked = spec()
    net = build(asked.net, num_classes=num_classes(asked.folder), weights=asked.weights)
    train = datasets.ImageFolder(str(Path(asked.folder) / "train"), random_transform(net, asked))
    val = datasets.ImageFolder(str(Path(asked.folder) / "val"), plain_transform(net, asked))
    if asked.frozen:
        net = freeze(net, batch_norms=asked.frozen_bn)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            remove_unused_columns=False,
            num_train_epochs=asked.epochs,
            per_device_train_batch_size=asked.batch,
            per_device_eval_batch_size=asked.batch,
            learning_rate=asked.lr,
            dataloader_num_workers=asked.workers,
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        clock = Clock(stop_at=asked.stop_at)
        trainer = Trainer(
            model=WithLoss(net),
            args=arguments,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=val,
            compute_metrics=accuracy,
            callbacks=[Noting(clock)],
        )
        trainer.train()
    clock.end()
    clock.tell(test=test_top1(net, net, asked))


if __name__ == "__main__":
    main()
