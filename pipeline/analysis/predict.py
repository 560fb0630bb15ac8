"""`python -m pipeline predict photo.jpg`: what a trained model sees in pictures."""

from pathlib import Path

import numpy as np
import torch

from pipeline import paths
from pipeline.analysis import inference
from pipeline.data.decode import decode
from pipeline.training import weights


def run(pictures: list[str], *, model: str, top: int) -> None:
    """Prints the `top` most probable classes of each picture.

    Raises:
        UserError: no trained model, or a picture that cannot be read.
    """
    net, card = weights.load_model(paths.trained(model) / "model.safetensors")
    prepared = np.stack([inference.prepare(decode(Path(name)), card) for name in pictures])
    pixels = torch.from_numpy(prepared).permute(0, 3, 1, 2)
    found, _ = inference.logits(net, card, [(pixels, torch.zeros(len(pixels), dtype=torch.int64))])
    if card.start == "random":
        print(f"note: {model} started from random weights")
    for name, row in zip(pictures, found.softmax(dim=1), strict=True):
        best = row.topk(min(top, len(card.classes)))
        ranked = ", ".join(
            f"{card.classes[number]} {share:.1%}"
            for share, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        print(f"{name}: {ranked}")
