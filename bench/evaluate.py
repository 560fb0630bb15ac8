"""The evaluate stage's pass over the test split against a bare forward pass over the same pictures.

Thaw's side is what the stage does: batches out of the packed store, through preprocessing and net, logits gathered. The
bare side holds the very batches in memory as tensors, in the memory format that the stage gives them, and calls the
same model under `inference_mode`; nothing else. Both in one process, in turn, after a pass of each that does not count;
it keeps the memory that tensors free, as the stage's does. A turn of LeNet-5 is ten passes: one takes less than a
second, and tells more about the moment than about either side. On two cores 12 minutes.

    python bench/evaluate.py [--net NET ...] [--quick] [--json FILE]
"""

import time
from collections.abc import Callable

import torch

import common
from pipeline import machine, nets, paths
from pipeline.analysis import inference
from pipeline.data import datamodule
from pipeline.data.store import Store
from pipeline.stages import evaluate
from pipeline.training.pretrained import Origin
from pipeline.training.weights import ModelCard
from project import Project

NETS = {"tf_efficientnet_lite0": 64, "resnet18": 64, "scratch/lenet5": 32}
"""Nets, each with the side of the pictures in pixels; their weights are random, which costs the same."""
PASSES = {"scratch/lenet5": 10}
"""Passes of a turn, where one is too short to be timed."""
TARGET = common.Target(at_least=0.95)


def main() -> None:
    """Runs the bench."""
    made = common.parser(__doc__, pairs=9)
    made.add_argument("--net", nargs="+", choices=NETS, default=list(NETS), help="those to measure")
    asked = made.parse_args()
    machine.keep_memory()  # as the stage does
    bench = common.Bench("evaluate", asked)
    for name in asked.net:
        px = NETS[name]
        data = {"data.name": "digits" if asked.quick else "fashion_mnist", "augment.px": px, "augment.train_size": 1000}
        project = Project({**data, "model.name": name, "model.pretrained": False})
        store = Store(project.folder / paths.prepared(project.config.data.name))
        thaw, bare = _sides(store, name, px=px, batch_size=project.config.evaluate.batch_size)
        thaw(), bare()
        count = 1 if asked.quick else PASSES.get(name, 1)
        turns = {"thaw": _repeated(thaw, count), "bare": _repeated(bare, count)}
        seconds = common.rounds(turns, number=asked.pairs)
        bench.comparisons.append(
            common.Comparison(
                name=f"evaluate, {name} at {px} px, {store.counts()['test']:,} pictures",
                ratio_of="time of a bare forward pass / time of the stage's pass",
                ratios=common.ratios(seconds["bare"], seconds["thaw"]),
                target=TARGET,
                sides=seconds,
            )
        )
    bench.write()


def _repeated(once: Callable[[], float], count: int) -> Callable[[], float]:
    return lambda: sum(once() for _ in range(count))


def _sides(store: Store, name: str, *, px: int, batch_size: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Each a function that passes over the test split once and gives back the seconds."""
    torch.manual_seed(0)
    net = nets.build(name, num_classes=len(store.meta.classes)).eval()
    mean, std = nets.normalization(net, in_chans=3)
    origin = Origin(start="random", source="a bench")
    card = ModelCard(
        name=name,
        in_chans=3,
        stem=nets.DEFAULT_STEM,
        classes=store.meta.classes,
        px=px,
        pack_px=store.meta.px,
        mean=mean,
        std=std,
        start=origin.start,
        start_source=origin.source,
        fast_dev_run=False,
    )
    place = machine.device("auto")
    model = inference.with_preprocessing(net, card).to(place).to(memory_format=torch.channels_last)
    loader = datamodule.test_loader(store, px=px, in_chans=3, batch_size=batch_size, workers=0)
    held = [pixels.to(place, memory_format=torch.channels_last) for pixels, _ in loader]

    def bare() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            logits = [model(pixels) for pixels in held]
        logits[-1].sum().item()  # on a GPU the work ends here
        return time.perf_counter() - began

    def thaw() -> float:
        began = time.perf_counter()
        evaluate.test_logits(store, net, card, batch_size=batch_size, trial=False)
        return time.perf_counter() - began

    return thaw, bare


if __name__ == "__main__":
    main()
