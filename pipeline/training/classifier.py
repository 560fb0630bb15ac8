"""The LightningModule: one net, one phase; its loss, its accuracies, its optimiser."""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.data.datamodule import Batch
from pipeline.errors import UserError
from pipeline.parameters import TrainParams
from pipeline.training import backward, optim, penalties, schedule
from pipeline.training.averaging import Average
from pipeline.training.cut import Cut
from pipeline.training.distillation import Teacher, distance
from pipeline.training.mixing import Mixer
from pipeline.training.normalize import Normalize, resized
from pipeline.training.objective import Objective
from pipeline.training.penalties import Activity
from pipeline.training.schedule import Phase
from pipeline.training.tally import Mean

LOOKED_AT = 10
"""Losses that an accelerator has in flight before they are looked at: to look is to wait for it."""


class Classifier(L.LightningModule):
    """Trains a net for one phase.

    What is random in a step (dropout, stochastic depth, mixup) is drawn from (seed, epoch, batch, rank), so it is the
    same whether or not the training was stopped on the way.

    Args:
        net: speaks timm's interface; takes normalised float32 [B, C, H, W], gives logits [B, classes].
        phase: what learns, how long, at which rate.
        pictures: for training, in an epoch.
        mean, std: per channel, of pixels scaled to 0..1.
        first_epoch: epochs trained before, in earlier phases.
        class_weights: of the loss, float [classes]; None for all alike.
        teacher: to distil from; None for none.
        cut: where a batch's tensors enter the net, in place of pictures; None for pictures.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        phase: Phase,
        params: TrainParams,
        pictures: int,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        first_epoch: int = 0,
        class_weights: torch.Tensor | None = None,
        teacher: Teacher | None = None,
        cut: Cut | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.phase = phase
        self.cut = cut
        self._modes: list[tuple[nn.Module, bool]] = []
        self.rates: Sequence[float] | None = None
        """Of the optimiser's groups, where they were looked for; else the phase's."""
        self.alone = False
        """Whether a checkpoint is being written by this rank while the others may be elsewhere."""
        self.precision = params.precision
        self.normalize = Normalize(mean, std)
        self.objective = Objective(
            loss=params.loss,
            label_smoothing=params.label_smoothing,
            focal_gamma=params.focal_gamma,
            weights=class_weights,
        )
        self.pictures = pictures
        self._params, self._first_epoch, self._teacher = params, first_epoch, teacher
        mixes = params.mixup > 0 or params.cutmix > 0
        self._mixer = Mixer(mixup=params.mixup, cutmix=params.cutmix, num_classes=num_classes) if mixes else None
        self._auxiliary_weight = float(getattr(net, "auxiliary_weight", 0.0))
        self._memory_format = torch.channels_last if params.channels_last else torch.contiguous_format
        schedule.thaw(net, phase.trainable)
        self.to(memory_format=self._memory_format)
        self.average = Average(net, kind=params.average, decay=params.ema_decay) if params.average != "none" else None
        self._activity = Activity(net) if params.activity else None
        # An epoch that was stopped half-way counts its first half, too.
        self.train_loss, self.train_top1 = Mean(persistent=True), Mean(dtype=torch.int64, persistent=True)
        self.val_loss, self.val_top1 = Mean(), Mean(dtype=torch.int64)
        self._announced: set[str] = set()
        self._unseen: list[tuple[str, torch.Tensor]] = []
        if params.compile:
            net.compile()
        self.train()
        # Under fsdp no rank holds a tensor whole.
        self._fixed = schedule.fixed(net) if params.strategy != "fsdp" else frozenset()

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(self._prepared(pixels_BCHW))
        return logits

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            # Lightning notes what it calls, some fifty times a step, and a module looks twice at what it is given.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode, in which a frozen module stays in evaluation mode all the same."""
        if mode and self._modes:
            # It is asked for in every epoch; to find it out, or to set it anew, takes as long as a step of a small net.
            for module, training in self._modes:
                if module.training != training:
                    module.training = training
            return self
        super().train(mode)
        if mode:
            schedule.set_mode(self.net, adapt_bn=self._params.frozen_bn == "adapt")
            if self.average is not None:
                self.average.eval()
            self._modes = [(module, module.training) for module in self.modules()]
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what the phase does not change; notes what the ranks have counted in this epoch so far, together.

        The phase begins with it anyway, and a checkpoint of a head alone is written in no time. None is written after a
        loss that is no number.
        """
        self._look()
        for name in [name for name in checkpoint["state_dict"] if _bare(name) in self._fixed]:
            del checkpoint["state_dict"][name]
        if self.trainer.world_size > 1 and not self.alone:
            for name, counted in self._counts(checkpoint).items():
                total = self.trainer.strategy.reduce(counted.clone().to(self.device), reduce_op="sum")
                checkpoint["state_dict"][name] = total

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts back what was left out.

        Only the leader goes on with what all had counted; nobody, with what Lightning would yet have reset.
        """
        own = self.state_dict()
        checkpoint["state_dict"].update({name: own[name] for name in own if _bare(name) in self._fixed})
        (loader,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        between_epochs = loader["batches"] == 0
        for counted in self._counts(checkpoint).values():
            if between_epochs or self.global_rank:
                counted.zero_()

    def on_train_start(self) -> None:
        if self._teacher is not None:
            self._teacher.to(self.device)

    def on_train_epoch_start(self) -> None:
        self.train()
        self._announced.clear()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002, Lightning's signature
        epoch = self._first_epoch + self.trainer.current_epoch
        keys = np.random.SeedSequence((self._params.seed, epoch, batch_idx, self.global_rank)).generate_state(2)
        if self.device.type == "cpu":
            # torch.manual_seed asks every kind of accelerator as well, which takes a tenth of a small net's step.
            torch.default_generator.manual_seed(int(keys[0]))
        else:
            torch.manual_seed(int(keys[0]))
        np.random.seed(int(keys[1]))

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        whole, loss, logits = self.losses(self.net, batch)
        if self._activity is not None:
            whole = whole + self._params.activity * self._activity.take()
        self._check_finite(whole, f"epoch {self.current_epoch + 1}, step {index + 1}")
        self._count("train", loss, logits, batch[1])  # the classes' loss alone, as in validation
        return whole

    def losses(self, net: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The whole loss of a batch on a net such as this one's, that of its classes alone, and the logits.

        The whole one has auxiliary classifiers, penalties and teacher in it, all but the activity penalty.
        """
        pixels, labels = batch
        targets = labels
        if self._mixer is not None:
            pixels, targets = self._mixer(pixels, labels)
        with backward.quick(self.device, precision=self.precision, compiled=self._params.compile):
            logits, *auxiliary_logits = self._all_logits(net, pixels)
        loss: torch.Tensor = self.objective(logits, targets)
        whole = loss + self._auxiliary_weight * sum(self.objective(extra, targets) for extra in auxiliary_logits)
        if self._params.l1:
            whole = whole + self._params.l1 * penalties.l1(net)
        if self._teacher is not None:
            share, temperature = self._params.distill_weight, self._params.distill_temperature
            taught = self._teacher.logits(pixels)
            whole = (1 - share) * whole + share * distance(logits, taught, temperature=temperature)
        return whole, loss, logits

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        # torch's own is wrapped for profilers and compilers, which takes as long as the update of a head.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Here, and not at the batch's end, where a checkpoint may already have been written.
        if self.average is not None and (self._params.average == "ema" or self._ends_an_averaged_epoch()):
            self.average.update(self.net)

    def validation_step(self, batch: Batch, index: int) -> None:  # noqa: ARG002, Lightning's signature
        pixels, labels = batch
        logits = self._logits(self._judged(), pixels)
        loss = F.cross_entropy(logits, labels)
        self._check_finite(loss, f"validation after epoch {self.current_epoch + 1}")
        self._count("val", loss, logits, labels)

    def on_validation_epoch_start(self) -> None:
        self._announced.discard("val")

    def on_validation_epoch_end(self) -> None:
        self._look()

    def on_validation_end(self) -> None:
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, optim.Rates):
            value = float(self.trainer.callback_metrics[self._params.monitor])
            scheduler.judge(value, mode="min" if self._params.monitor.endswith("loss") else "max")

    def close(self) -> None:
        """Takes off what was hung onto the net."""
        if self._activity is not None:
            self._activity.close()

    def configure_optimizers(self) -> Any:
        phase = self.phase
        # Ranks must have the same rates, and only the leader looks for them.
        rates = self.trainer.strategy.broadcast(self.rates)
        lr = phase.lr if rates is None else rates
        assert lr != "find"
        optimizer = optim.optimizer(
            self.net,
            name=phase.optimizer,
            lr=lr,
            weight_decay=phase.weight_decay,
            layer_decay=phase.layer_decay,
            # A fused one unscales the gradients of 16-mixed itself, after they would have been clipped and noted.
            fused=self._params.precision != "16-mixed",
        )
        scheduler = optim.scheduler(
            optimizer,
            name=phase.scheduler,
            total_steps=self._total_steps,
            warmup=phase.warmup,
        )
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _total_steps(self) -> int:
        """Optimiser steps of the phase, unless it ends early."""
        # Not the trainer's estimate: it sets up the loader before a checkpoint has told it where to begin.
        return 1 if self._params.fast_dev_run else self.phase.total_steps(self.pictures)

    def _ends_an_averaged_epoch(self) -> bool:
        """Whether the step that is being taken is one whose weights swa takes in.

        An epoch's last, once more than `swa_start` of the phase is over; and the phase's last, wherever in an epoch.
        """
        step = self.global_step + 1  # Lightning counts it afterwards
        if step == self._total_steps:
            return True
        return bool(self.trainer.is_last_batch) and step > self._params.swa_start * self._total_steps

    def _judged(self) -> nn.Module:
        """The net whose weights are judged and kept: the average, once there is one."""
        if self.average is not None and self.average.updates > 0:
            return self.average.net
        return self.net

    def _counts(self, checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The sums behind the training metrics of the epoch, in a checkpoint."""
        state = checkpoint["state_dict"]
        return {name: tensor for name, tensor in state.items() if name.startswith(("train_loss.", "train_top1."))}

    def _prepared(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self.normalize(resized(pixels_BCHW, self.phase.px))
        return pixels.contiguous(memory_format=self._memory_format)

    def _logits(self, net: nn.Module, inputs: Any) -> torch.Tensor:
        """Of pictures uint8 or float [B, C, H, W], or of the tensors that cross the cut."""
        if self.cut is not None:
            # Widened here, since what is kept in bf16 reaches the device in half the time.
            return self.cut.logits(net, [kept.float() for kept in inputs], compiled=self._params.compile)
        logits: torch.Tensor = net(self._prepared(inputs))
        return logits

    def _all_logits(self, net: Any, inputs: Any) -> tuple[torch.Tensor, ...]:
        """The logits, and those of the net's auxiliary classifiers while they learn (Szegedy et al. 2014)."""
        heads = net.auxiliary_heads() if hasattr(net, "auxiliary_heads") else []
        learn = [any(parameter.requires_grad for parameter in head.parameters()) for head in heads]
        if not any(learn):
            return (self._logits(net, inputs),)
        logits, *auxiliary = net.forward_with_auxiliary(self._prepared(inputs))
        return logits, *(extra for extra, learns in zip(auxiliary, learn, strict=True) if learns)

    def _check_finite(self, loss: torch.Tensor, when: str) -> None:
        """Refuses a loss that is no number: at once on a processor, else with its step's name a few steps later."""
        self._unseen.append((when, loss.detach()))
        if loss.device.type == "cpu" or len(self._unseen) >= LOOKED_AT:
            self._look()

    def _look(self) -> None:
        if not self._unseen:
            return
        unseen, self._unseen = self._unseen, []
        for (when, _), value in zip(unseen, torch.stack([loss for _, loss in unseen]).tolist(), strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"the loss became {value} in phase {self.phase.name}, {when}; "
                    "lower its lr (in train.phases, or train.lr), or use train.precision 32-true"
                )

    def _count(self, split: str, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        mean: Mean = getattr(self, f"{split}_loss")
        top1: Mean = getattr(self, f"{split}_top1")
        mean.update(loss.detach() * len(labels), len(labels))
        top1.update((logits.detach().argmax(dim=1) == labels).sum(), len(labels))
        if split not in self._announced:
            # Once an epoch: Lightning asks the metrics themselves at its end.
            self._announced.add(split)
            metrics = {f"{split}/loss": mean, f"{split}/top1": top1}
            self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))


def _bare(name: str) -> str:
    """A tensor's name within the net, or within its average."""
    return name.removeprefix("average.").removeprefix("net.")
