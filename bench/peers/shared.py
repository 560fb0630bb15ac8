"""What the other sides' workers share: the same net and first weights, the protocol with the bench, a last judgement.

A worker is started with its spec as JSON on the command line:

    folder    train/ val/ test/ of class folders
    net       timm's name, or scratch/NAME
    weights   file of pretrained weights (.safetensors); empty for none
    px, batch, epochs, workers
    lr        peak learning rate
    frozen    whether the head alone learns
    frozen_bn whether its batch norms then stay as they were pretrained
    judge     whether the test pictures are judged at the end, outside the time
    crops     smallest and largest share of a picture that is cropped at random; none for pictures that stand in their
              middle: they are flipped and not cropped
    stop_at   validation accuracy after which training ends

and prints an EPOCH line after each epoch's validation, END when it has trained, and a RESULT line with its figures.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torchvision import datasets
from torchvision import transforms as T


def spec() -> SimpleNamespace:
    """What this worker has to do."""
    return SimpleNamespace(
        **{"crops": (0.08, 1.0), "frozen_bn": False, "stop_at": None, "fast": False, **json.loads(sys.argv[1])}
    )


def build(name: str, *, num_classes: int, weights: str, in_chans: int = 3) -> Any:
    """The net on the weights that Thaw starts from, with a new head as nn.Linear makes it, as in the tutorial.

    That which timm makes for some nets is 25 times as large, and takes epochs to forget; Thaw's is zero.
    """
    torch.manual_seed(0)
    if name.startswith("scratch/"):
        from pipeline import nets

        return nets.build(name, num_classes=num_classes, in_chans=in_chans)
    import timm

    net = timm.create_model(name, num_classes=num_classes, in_chans=in_chans)
    load(net, weights)
    if weights:
        net.reset_classifier(num_classes)
    return net


def load(net: nn.Module, weights: str) -> None:
    """Pretrained weights into everything but the head.

    Raises:
        ValueError: something but the head stays as it was.
    """
    if not weights:
        return
    from safetensors.torch import load_file

    own = net.state_dict()
    read = load_file(weights)
    fitting = {name: value for name, value in read.items() if name in own and own[name].shape == value.shape}
    left = set(net.load_state_dict(fitting, strict=False).missing_keys)
    head = {f"classifier.{name}" for name in ("weight", "bias")} | {"fc.weight", "fc.bias", "head.weight", "head.bias"}
    if left - head:
        raise ValueError(f"{weights} has no {sorted(left - head)[:3]}")


def freeze(net: Any, *, batch_norms: bool) -> Any:
    """The net whose head alone learns, as in the PyTorch tutorial: by requires_grad; batch norms, too, as timm does."""
    for parameter in net.parameters():
        parameter.requires_grad = False
    for parameter in net.get_classifier().parameters():
        parameter.requires_grad = True
    if not batch_norms:
        return net
    from timm.layers import freeze_batch_norm_2d

    return freeze_batch_norm_2d(net)


def num_classes(folder: str) -> int:
    """Class folders of the training pictures."""
    return sum(path.is_dir() for path in (Path(folder) / "train").iterdir())


def normalization(net: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the net's weights were trained with."""
    config = net.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def random_transform(net: Any, asked: SimpleNamespace) -> T.Compose:
    """torchvision's usual augmentation."""
    size = T.RandomResizedCrop(asked.px, scale=asked.crops) if asked.crops else T.Resize(asked.px)
    return T.Compose([size, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(*normalization(net))])


def plain_transform(net: Any, asked: SimpleNamespace) -> T.Compose:
    """What pictures are judged through: shorter side at 8/7 of the square's, its middle; or all of it."""
    side = round(asked.px * 8 / 7) if asked.crops else asked.px
    return T.Compose([T.Resize(side), T.CenterCrop(asked.px), T.ToTensor(), T.Normalize(*normalization(net))])


@torch.inference_mode()
def test_top1(model: nn.Module, net: Any, asked: SimpleNamespace) -> float | None:
    """Top-1 of a model on the test pictures, as `net` takes them; None where it was not asked for."""
    if not asked.judge:
        return None
    pictures = datasets.ImageFolder(str(Path(asked.folder) / "test"), plain_transform(net, asked))
    loader = torch.utils.data.DataLoader(pictures, batch_size=64)
    device = next(model.parameters()).device
    model.eval()
    right = sum(int((model(pixels.to(device)).argmax(1).cpu() == labels).sum()) for pixels, labels in loader)
    return right / len(pictures)


class Clock:
    """Notes what the bench wants to know, from the moment that training begins."""

    def __init__(self, *, stop_at: float | None = None) -> None:
        self._stop_at = stop_at
        self._began = time.monotonic()
        self.ends: list[float] = []
        self.accuracies: list[float] = []

    def epoch(self, accuracy: float) -> None:
        """An epoch and its validation are over."""
        self.ends.append(time.monotonic() - self._began)
        self.accuracies.append(float(accuracy))
        print(f"EPOCH {len(self.ends)}: {accuracy:.4f} at {self.ends[-1]:.1f} s", flush=True)
        if self._stop_at is not None and accuracy >= self._stop_at:
            self.end()
            self.tell()
            raise SystemExit(0)

    def end(self) -> None:
        """Training is over: what comes after is not counted."""
        print("END", flush=True)

    def tell(self, **more: Any) -> None:
        """The RESULT line."""
        found = {"train": self.ends[-1], "ends": self.ends, "accuracies": self.accuracies, **more}
        print("RESULT " + json.dumps(found), flush=True)
