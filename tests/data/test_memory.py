"""The memory that making batches takes does not follow the number of pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench/memory.py"


MEASURED = """
import json, memory, sys
from pathlib import Path
found = []
for pictures in (1000, 50_000):
    folder = Path(sys.argv[1]) / str(pictures)
    folder.mkdir()
    memory.make(folder, pictures)
    found.append(memory.measure(folder))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fifty_times_the_pictures_take_no_more_memory(tmp_path: Path) -> None:
    """At 64 px, 49,000 pictures more are 191 MiB; their labels, splits and places, and an epoch's order, are 2."""
    environment = {**os.environ, "PYTHONPATH": str(BENCH.parent)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], check=True, capture_output=True, text=True, env=environment
    )
    few, many = json.loads(done.stdout)
    assert few["peak"] > 0
    assert many["peak"] - few["peak"] < 8 * 2**20
