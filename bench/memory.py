"""Memory and start against the number of pictures.

    python bench/memory.py [--part batches training] [--pairs 3]

    batches    a process opens a packed store of grey 64 px pictures and makes 300 training batches of 64 with random
               crops, shifts and flips
    training   the whole train stage on such a store: 150 steps of LeNet-5, validation on a tenth of the pictures,
               checkpoints, tracking, the writing of the model

Counted is the process's anonymous memory (`RssAnon` of /proc/self/status): what it has allocated and nobody can take
back. The pages of the memory-mapped store are not: they are the system's file cache, which holds what memory is free
and gives it up when asked. The ratio is of the peaks, process and all, with more pictures and with the fewest: 1 is
memory that does not depend on their number. Linux only; on two cores 5 minutes.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common import ROOT, Bench, Comparison, Target, parser, ratios, rounds, run
from pipeline import paths
from pipeline.data import store
from pipeline.data.datamodule import PictureData
from pipeline.data.store import Row, Store
from project import PYTHON, Project, drawn
from watched import anonymous

PX, BATCH, BATCHES, STEPS = 64, 64, 300, 150
SIZES = (1_000, 10_000, 100_000)
CHAIN: dict[str, dict[str, object]] = {"random_resized_crop": {}, "shift": {}, "horizontal_flip": {}}
MIB = 2**20


def make(folder: Path, pictures: int) -> None:
    """A store of so many random pictures, nine of ten for training."""
    block = np.random.default_rng(0).integers(0, 256, (256, PX, PX, 1), dtype=np.uint8)
    rows = (
        (Row(f"train/{i:07d}.png", "val" if i % 10 == 9 else "train", i % 10, 0, PX, PX), block[i % 256])
        for i in range(pictures)
    )
    store.write(folder, rows, dataset="random", classes=tuple("0123456789"), px=PX, channels=1, skipped=[])


def child(folder: Path) -> None:
    """Prints what one process took: seconds to open, and bytes beyond what it had before."""
    before = anonymous()
    start = time.perf_counter()
    opened = Store(folder)
    seconds = time.perf_counter() - start
    data = PictureData(opened, px=PX, in_chans=3, batch_size=BATCH, chosen=CHAIN, seed=0, workers=0)
    loader, peak, made = data.train_dataloader(), 0, 0
    while made < BATCHES:
        for _ in loader:
            peak = max(peak, anonymous())
            made += 1
            if made == BATCHES:
                break
    print(json.dumps({"open": seconds, "before": before, "peak": peak - before}))


def measure(folder: Path) -> dict[str, float]:
    """What `child` says of a store."""
    command = [sys.executable, __file__, "--child", folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures every number of pictures."""
    made = parser(__doc__, pairs=3)
    made.add_argument("--child", type=Path, help="a store that this process is to measure itself with")
    made.add_argument("--part", nargs="+", choices=("batches", "training"), default=["batches", "training"])
    asked = made.parse_args()
    if asked.child:
        child(asked.child)
        return
    bench = Bench("memory", asked)
    sizes = (100, 1000) if asked.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        stores = {pictures: Path(folder) / str(pictures) for pictures in sizes}
        for pictures, path in stores.items():
            path.mkdir()
            make(path, pictures)
        if "batches" in asked.part:
            _batches(bench, stores, number=asked.pairs)
        if "training" in asked.part:
            _training(bench, stores, number=asked.pairs)
    bench.write()


def _batches(bench: Bench, stores: Mapping[int, Path], *, number: int) -> None:
    sides = {str(pictures): lambda path=path: measure(path) for pictures, path in stores.items()}
    found = rounds(sides, number=number)
    peaks = {size: [(one["before"] + one["peak"]) / MIB for one in found[str(size)]] for size in stores}
    notes = {}
    for size in stores:
        more = statistics.median(one["peak"] for one in found[str(size)]) / MIB
        opened = statistics.median(1000 * one["open"] for one in found[str(size)])
        notes[size] = f"{more:.1f} MiB above the start of the process; opened in {opened:.0f} ms"
    _compare(bench, "making batches", peaks, notes)


def _training(bench: Bench, stores: Mapping[int, Path], *, number: int) -> None:
    settings = {"model.name": "scratch/lenet5", "augment.px": PX, "augment.train_size": "all"}
    project = Project(settings, pictures=drawn(train=32, val=16))
    project.warm()
    packed = project.folder / paths.prepared("image_folder")
    aside = packed.with_name("aside")

    def train(path: Path) -> float:
        packed.symlink_to(path)
        try:
            project.begin_anew({"train.phases": {"all": {"trainable": "all", "steps": STEPS}}})
            return float(run([PYTHON, ROOT / "bench/watched.py"], folder=project.folder).told["peak"]) / MIB
        finally:
            packed.unlink()

    packed.rename(aside)
    try:
        sides = {str(pictures): lambda path=path: train(path) for pictures, path in stores.items()}
        found = rounds(sides, number=number)
    finally:
        aside.rename(packed)
    peaks = {size: found[str(size)] for size in stores}
    notes = {size: f"{statistics.median(peak):.0f} MiB, the process and all" for size, peak in peaks.items()}
    _compare(bench, f"a training of {STEPS} steps", peaks, notes)


def _compare(bench: Bench, what: str, peaks: Mapping[int, list[float]], notes: Mapping[int, str]) -> None:
    fewest, *more = peaks
    for size in more:
        bench.comparisons.append(
            Comparison(
                name=f"peak memory of {what}, {size:,} pictures against {fewest:,}",
                ratio_of="anonymous memory / anonymous memory (a cost)",
                ratios=ratios(peaks[size], peaks[fewest]),
                target=Target(at_most=1.05),
                notes=f"With {size:,}: {notes[size]}; with {fewest:,}: {notes[fewest]}",
                sides={f"{n:,} pictures, MiB": peaks[n] for n in (size, fewest)},
            )
        )


if __name__ == "__main__":
    main()
