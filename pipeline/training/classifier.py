"""The LightningModule: one net, one phase, top-1 accuracy and loss."""

from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from pipeline.data.datamodule import Batch
from pipeline.errors import UserError
from pipeline.training import optim, schedule
from pipeline.training.schedule import Phase


class Normalize(nn.Module):
    """From pixels to what the net was trained on: (pixel / 255 - mean) / std, per channel.

    Takes uint8 or float pixels 0 to 255, [B, C, H, W]; gives float32 [B, C, H, W]. Training, validation, prediction and
    the exported model all go through it.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float32))
        shift = -torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return pixels_BCHW.float() * self.scale + self.shift


class Classifier(L.LightningModule):
    """Trains a net for one phase.

    Args:
        net: speaks timm's interface; takes normalised float32 [B, C, H, W], gives logits [B, classes].
        phase: what learns, how long, at which rate.
        px: side of the pictures, in pixels.
        mean, std: per channel, of pixels scaled to 0..1.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        phase: Phase,
        num_classes: int,
        px: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        optimizer: str,
        weight_decay: float,
        label_smoothing: float,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.net = net
        self.phase = phase
        self.normalize = Normalize(mean, std)
        self._optimizer, self._weight_decay, self._label_smoothing = optimizer, weight_decay, label_smoothing
        self._auxiliary_weight = float(getattr(net, "auxiliary_weight", 0.0))
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # For the summary's sizes and FLOPs.
        self.example_input_array = torch.zeros(1, len(mean), px, px, dtype=torch.uint8)
        schedule.thaw(net, phase.trainable)
        self.to(memory_format=self._memory_format)
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.train_top1, self.val_top1 = (MulticlassAccuracy(num_classes, average="micro") for _ in range(2))
        self.train()

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(self._normalized(pixels_BCHW))
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode, in which a frozen module stays in evaluation mode all the same."""
        super().train(mode)
        if mode:
            schedule.set_mode(self.net)
        return self

    def on_train_epoch_start(self) -> None:
        self.train()

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        pixels, labels = batch
        logits, *auxiliary_logits = self._all_logits(pixels)
        loss = self._loss(logits, labels)
        whole = loss + self._auxiliary_weight * sum(self._loss(extra, labels) for extra in auxiliary_logits)
        self._check_finite(whole, f"epoch {self.current_epoch + 1}, step {index + 1}")
        self._count("train", loss, logits, labels)  # without the auxiliary part, which validation has not
        return whole

    def validation_step(self, batch: Batch, index: int) -> None:  # noqa: ARG002, Lightning's signature
        pixels, labels = batch
        logits = self(pixels)
        loss = F.cross_entropy(logits, labels)
        self._check_finite(loss, f"validation after epoch {self.current_epoch + 1}")
        self._count("val", loss, logits, labels)

    def _normalized(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self.normalize(pixels_BCHW)
        return pixels.contiguous(memory_format=self._memory_format)

    def _all_logits(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The logits, and those of the net's auxiliary classifiers while they learn (Szegedy et al. 2014)."""
        net: Any = self.net
        heads = net.auxiliary_heads() if hasattr(net, "auxiliary_heads") else []
        learn = [any(parameter.requires_grad for parameter in head.parameters()) for head in heads]
        if not any(learn):
            return (self(pixels_BCHW),)
        logits, *auxiliary = net.forward_with_auxiliary(self._normalized(pixels_BCHW))
        return logits, *(extra for extra, learns in zip(auxiliary, learn, strict=True) if learns)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        return loss

    def _check_finite(self, loss: torch.Tensor, when: str) -> None:
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} in phase {self.phase.name}, {when}; "
                f"lower train.phases.{self.phase.name}.lr, or use train.precision 32-true"
            )

    def _count(self, split: str, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        mean: MeanMetric = getattr(self, f"{split}_loss")
        top1: MulticlassAccuracy = getattr(self, f"{split}_top1")
        mean.update(loss.detach(), weight=len(labels))
        top1.update(logits.detach(), labels)
        metrics: dict[str, Metric] = {f"{split}/loss": mean, f"{split}/top1": top1}
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        made = optim.optimizer(self.net, name=self._optimizer, lr=self.phase.lr, weight_decay=self._weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        moves = optim.scheduler(made, name=self.phase.scheduler, lr=self.phase.lr, total_steps=steps)
        return made if moves is None else ([made], [{"scheduler": moves, "interval": "step"}])
