"""The memory that making batches takes does not follow the number of pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench/memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fifty_times_the_pictures_take_no_more_memory() -> None:
    """At 64 px, 49,000 pictures more are 191 MiB; their labels, splits and places, and an epoch's order, are 2."""
    code = (
        f"import json, runpy; print(json.dumps([runpy.run_path({str(BENCH)!r})['measure'](n) for n in (1000, 50_000)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    few, many = json.loads(done.stdout)
    assert few["peak"] > 0
    assert many["peak"] - few["peak"] < 8 * 2**20
