"""How strongly each layer is pulled: gradient norms by layer, once an epoch.

Where signals die or blow up on their way down a deep net, this shows the layer (Glorot and Bengio, "Understanding the
difficulty of training deep feedforward neural networks", 2010).
"""

from typing import Any

import lightning as L
import torch

COLUMNS = ("epoch", "depth", "layer", "norm", "weight_norm")


class GradientNorms(L.Callback):
    """Notes each kernel's gradient at the first step of every epoch, before the optimiser uses it.

    `rows` has a row per epoch and kernel: epoch (from 1, counting on across phases), depth (kernels before it), layer
    (the parameter's name), norm and weight_norm (Euclidean, of gradient and kernel). Only what learns is there; biases
    and norms, which have one axis, are left out. Under mixed precision the gradients are unscaled, and under several
    processes averaged.
    """

    def __init__(self, *, first_epoch: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._first_epoch = first_epoch
        self._due = True

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "due": self._due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._due = state_dict["rows"], state_dict["due"]

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:  # noqa: ARG002
        self._due = True

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:  # noqa: ARG002
        if not self._due:
            return
        self._due = False
        kernels = [(name, p) for name, p in module.net.named_parameters() if p.ndim > 1]
        for depth, (name, parameter) in enumerate(kernels):
            if parameter.grad is None:
                continue
            norms = [float(torch.linalg.vector_norm(tensor.detach().float())) for tensor in (parameter.grad, parameter)]
            values = (self._first_epoch + trainer.current_epoch + 1, depth, name.removesuffix(".weight"), *norms)
            self.rows.append(dict(zip(COLUMNS, values, strict=True)))
