"""Memory and start against the number of pictures.

    python bench/memory.py

Each row is a process of its own, which opens a packed store of grey 64 px pictures and makes 300 training batches of 64
with random crops, shifts and flips. Counted is the process's anonymous memory (`RssAnon` of /proc/self/status): what it
has allocated and nobody can take back. The pages of the memory-mapped store are not: they are the system's file cache,
which holds what memory is free and gives it up when asked. The ratio is of the peaks, process and all, with the most
pictures and with the fewest: 1 is memory that does not depend on their number. Linux only; on two cores 2 minutes.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from common import Bench, Comparison, Target, parser, ratios, rounds
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
    asked = made.parse_args()
    if asked.child:
        child(asked.child)
        return
    bench = Bench("memory", asked)
    sizes = (100, 1000) if asked.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        for pictures in sizes:
            (Path(folder) / str(pictures)).mkdir()
            make(Path(folder) / str(pictures), pictures)
        sides = {str(pictures): lambda pictures=pictures: measure(Path(folder) / str(pictures)) for pictures in sizes}
        found = rounds(sides, number=asked.pairs)
    peaks = {size: [(one["before"] + one["peak"]) / MIB for one in found[str(size)]] for size in sizes}
    for size in sizes[1:]:
        opened = statistics.median(1000 * one["open"] for one in found[str(size)])
        more = [f"{statistics.median(one['peak'] for one in found[str(n)]) / MIB:.1f}" for n in (sizes[0], size)]
        bench.comparisons.append(
            Comparison(
                name=f"peak memory of making batches, {size:,} pictures against {sizes[0]:,}",
                ratio_of="anonymous memory / anonymous memory (a cost)",
                ratios=ratios(peaks[size], peaks[sizes[0]]),
                target=Target(at_most=1.05),
                notes=f"{more[1]} MiB above the start of the process against {more[0]}; opened in {opened:.0f} ms",
                sides={f"{n:,} pictures, MiB": peaks[n] for n in (size, sizes[0])},
            )
        )
    bench.write()


if __name__ == "__main__":
    main()
