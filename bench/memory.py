"""Memory and start against the number of pictures: `python bench/memory.py`, alone.

Each row is a process of its own, which opens a packed store of grey 64 px pictures and makes 300 training batches of 64
with random crops, shifts and flips. Counted is the process's anonymous memory (`RssAnon` of /proc/self/status): what it
has allocated and nobody can take back. The pages of the memory-mapped store are not: they are the system's file cache,
which holds what memory is free and gives it up when asked. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data import store
from pipeline.data.datamodule import PictureData
from pipeline.data.store import Row, Store

PX, BATCH, BATCHES = 64, 64, 300
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


def anonymous() -> int:
    """Bytes that this process has allocated, now."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


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


def measure(pictures: int) -> dict[str, float]:
    """What `child` says of a store of so many pictures."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), pictures)
        command = [sys.executable, __file__, "--child", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """A row per number of pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    print("| pictures | store opened in, ms | anonymous memory before, MiB | peak while making batches, MiB more |")
    print("| ---: | ---: | ---: | ---: |")
    for pictures in arguments.sizes:
        found = measure(pictures)
        opened, before, peak = 1000 * found["open"], found["before"] / MIB, found["peak"] / MIB
        print(f"| {pictures:,} | {opened:.0f} | {before:.0f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
