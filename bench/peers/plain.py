"""The plain PyTorch loop, as in PyTorch's tutorial "Transfer Learning for Computer Vision".

ImageFolder, RandomResizedCrop and RandomHorizontalFlip, a DataLoader with worker processes, an optimiser and StepLR(7,
0.1), train() and eval() passes with their running loss and accuracy, fp32 in the default memory format. The frozen
net's parameters have requires_grad=False, and its batch norms follow the pictures, as there, unless the spec says that
they are frozen, too. What differs: the net, with its own mean and standard deviation, the batch (the tutorial's is 4)
and the learning rate are those of the comparison; and Adam stands in place of SGD, so that a head learns in as few
epochs as elsewhere.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import datasets

from shared import Clock, build, freeze, num_classes, plain_transform, random_transform, spec, test_top1


def main() -> None:
    """Trains as the spec says."""
    asked = spec()
    net = build(asked.net, num_classes=num_classes(asked.folder), weights=asked.weights)
    transforms = {"train": random_transform(net, asked), "val": plain_transform(net, asked)}
    pictures = {split: datasets.ImageFolder(str(Path(asked.folder) / split), t) for split, t in transforms.items()}
    loaders = {
        split: torch.utils.data.DataLoader(
            found, batch_size=asked.batch, shuffle=split == "train", num_workers=asked.workers
        )
        for split, found in pictures.items()
    }
    if asked.frozen:
        net = freeze(net, batch_norms=asked.frozen_bn)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    net.to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), lr=asked.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    clock = Clock(stop_at=asked.stop_at)
    for _ in range(asked.epochs):
        accuracy = 0.0
        for split, loader in loaders.items():
            accuracy = _one_pass(net, loader, criterion, optimizer if split == "train" else None, device)
            if split == "train":
                scheduler.step()
        clock.epoch(accuracy)
    clock.end()
    clock.tell(test=test_top1(net, net, asked))


def _one_pass(net: nn.Module, loader: Any, criterion: nn.Module, optimizer: Any, device: torch.device) -> float:
    """One epoch over a split; gives back its accuracy."""
    net.train(optimizer is not None)
    running_loss, right, seen = 0.0, 0, 0
    for cpu_pixels, cpu_labels in loader:
        pixels, labels = cpu_pixels.to(device), cpu_labels.to(device)
        if optimizer is not None:
            optimizer.zero_grad()
        with torch.set_grad_enabled(optimizer is not None):
            outputs = net(pixels)
            loss = criterion(outputs, labels)
            if optimizer is not None:
                loss.backward()
                optimizer.step()
        running_loss += loss.item() * len(labels)
        right += int((outputs.argmax(1) == labels).sum())
        seen += len(labels)
    return right / seen


if __name__ == "__main__":
    main()
