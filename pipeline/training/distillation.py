"""Distillation: a net that learns from the logits of a trained one (Hinton et al. 2015)."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.training.normalize import Normalize, resized
from pipeline.training.weights import ModelCard, load_model, read_card


class Teacher:
    """A trained model of Thaw's, to learn from; on the CPU until it is moved.

    It is no module, so that neither the state, nor the optimiser, nor DDP of the module that holds it takes it in.

    Args:
        path: the model's .safetensors, as the train stage writes it.
        classes: of the pupil, in the order of its logits.
        in_chans: channels that the pupil sees.

    Raises:
        UserError: It cannot be read, or has other classes or another number of channels than the pupil.
    """

    def __init__(self, path: Path, *, classes: tuple[str, ...], in_chans: int) -> None:
        _check(read_card(path), path, classes=classes, in_chans=in_chans)
        net, card = load_model(path)
        self._net = net.requires_grad_(False)
        self._normalize = Normalize(card.mean, card.std)
        self._px = card.px

    def to(self, device: torch.device | str) -> "Teacher":
        """Moves it to a device."""
        self._net.to(device)
        self._normalize.to(device)
        return self

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits [B, K], without a graph.

        Args:
            pixels_BCHW: float or uint8, 0 to 255, on the teacher's device, as the pupil sees them; resized (bilinear,
                antialiased) where the teacher was trained on another size.
        """
        # Not inference_mode: no backward pass could use such logits.
        with torch.no_grad():
            logits_BK: Tensor = self._net(self._normalize(resized(pixels_BCHW, self._px)))
        return logits_BK


def distance(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of the softmaxes of logits / T, the mean over the pictures, in nats; float32 [].

    T^2 keeps the gradients of the same size whatever the temperature (Hinton et al., "Distilling the Knowledge in a
    Neural Network", 2015, section 2).

    Args:
        temperature: T, above 0; the higher, the more the unlikely classes count.
    """
    student = F.log_softmax(student_BK.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_BK.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _check(card: ModelCard, path: Path, *, classes: tuple[str, ...], in_chans: int) -> None:
    for number, (own, pupils) in enumerate(zip(card.classes, classes, strict=False)):
        if own != pupils:
            raise UserError(
                f"{path}: class number {number} is {own!r} to the teacher and {pupils!r} to the data; "
                "train the teacher on the same classes"
            )
    if len(card.classes) != len(classes):
        raise UserError(
            f"{path}: the teacher has {len(card.classes)} classes and the data {len(classes)}; "
            "train the teacher on the same classes"
        )
    if card.in_chans != in_chans:
        raise UserError(
            f"{path}: the teacher sees {card.in_chans} channels and the net {in_chans}; "
            f"set model.in_chans to {card.in_chans}, or take another teacher"
        )
