"""What every comparison shares: sides that take turns, ratios pair by pair, facts of the machine, results as JSON.

A ratio is always (time of the other side) / (time of Thaw), or (rate of Thaw) / (rate of the other side): above 1 Thaw
is the faster. Where a comparison is of a cost, it says so. Each round runs every side once, one after another, so that
what else the machine does falls on all alike; a ratio is taken within a round, and their median, range and a bootstrap
interval of the median are reported.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pipeline.machine import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
"""The interpreter of `make bench-peers`."""
RESAMPLES, COVERAGE = 2000, 0.95
TOLD = "RESULT "
"""What the line with a worker's figures begins with."""

# The tree that this file stands in is measured, whichever is installed.
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a median ratio has to reach."""

    at_least: float | None = None
    at_most: float | None = None

    def met(self, ratio: float) -> bool:
        """Whether `ratio` reaches it."""
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One ratio, measured in several rounds."""

    name: str
    """What is compared, in a few words."""
    ratio_of: str
    """What is divided by what."""
    ratios: Sequence[float]
    """A ratio per round."""
    target: Target | None = None
    holds: bool = True
    """What has to be true beside the ratio, such as an accuracy."""
    notes: str = ""
    """What has to be known to read it."""
    sides: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The two sides' own figures, a value per round, in the unit that `ratio_of` implies; no claims."""

    def facts(self) -> dict[str, Any]:
        """As it stands in a results file."""
        ratio = statistics.median(self.ratios)
        low, high = np.quantile(self.ratios, [0.25, 0.75])
        return {
            "name": self.name,
            "ratio_of": self.ratio_of,
            "rounds": len(self.ratios),
            "median": _short(ratio),
            "min": _short(min(self.ratios)),
            "max": _short(max(self.ratios)),
            "quartiles": [_short(low), _short(high)],
            "interval": [_short(edge) for edge in interval(self.ratios)],
            "target": str(self.target) if self.target else "",
            "met": self.holds and self.target.met(ratio) if self.target else None,
            "notes": self.notes,
            "ratios": [_short(value) for value in self.ratios],
            "sides": {name: [_short(value) for value in values] for name, values in self.sides.items()},
        }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval of the median, percentile method (Efron 1979); wide where there are few values."""
    draw = np.random.default_rng(0)
    medians = np.median(draw.choice(np.asarray(values), size=(RESAMPLES, len(values))), axis=1)
    low, high = np.quantile(medians, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def ratios(dividends: Sequence[float], divisors: Sequence[float]) -> list[float]:
    """Ratio by ratio, within rounds."""
    return [dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True)]


def rounds(sides: Mapping[str, Callable[[], Any]], *, number: int) -> dict[str, list[Any]]:
    """What each side gave, a value per round; the sides take turns in their order."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for turn in range(number):
        for name, side in sides.items():
            began = time.monotonic()
            found[name].append(side())
            print(f"round {turn + 1}/{number}  {name}: {time.monotonic() - began:.1f} s in all", flush=True)
    return found


@dataclass(frozen=True)
class Done:
    """A process that has ended well."""

    seconds: float
    """From its start to its end."""
    lines: list[tuple[float, str]]
    """What it printed, each line with the seconds since the process's start."""

    @property
    def told(self) -> dict[str, Any]:
        """The figures of a worker's last RESULT line."""
        found: dict[str, Any] = json.loads(self.line(TOLD)[1].removeprefix(TOLD))
        return found

    def line(self, begin: str) -> tuple[float, str]:
        """The last line that begins so, with its time.

        Raises:
            SystemExit: there is none.
        """
        matching = [(at, line) for at, line in self.lines if line.startswith(begin)]
        if not matching:
            last = [line for _, line in self.lines[-20:]]
            raise SystemExit("\n".join([f"no line {begin!r} came; the last were:", *last]))
        return matching[-1]


def run(
    words: Sequence[str | Path],
    *,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    enough: Callable[[str], bool] | None = None,
) -> Done:
    """Runs a process to its end, in an environment that reaches no hub and keeps no telemetry.

    Args:
        enough: of a line that it prints, whether it may be told to end after it (SIGTERM).

    Raises:
        SystemExit: it failed; with the end of what it said, or, with code 2, in its own line.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    settings = {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "DVC_NO_ANALYTICS": "1",
        **(environment or {}),
    }
    lines: list[tuple[float, str]] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=folder,
            env={**kept, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        told_to_end = False
        with process:
            for line in process.stdout:
                lines.append((time.monotonic() - began, line.rstrip("\n")))
                if enough is not None and not told_to_end and enough(line):
                    process.terminate()
                    told_to_end = True
        seconds = time.monotonic() - began
        if process.returncode and not told_to_end:
            errors.seek(0)
            told = errors.read().splitlines()
            if process.returncode == 2 and told:  # a mistake of the user's, in a line
                refuse(told[-1])
            said = [line for _, line in lines[-10:]] + told[-20:]
            command = shlex.join(str(word) for word in words)
            raise SystemExit("\n".join([f"exit code {process.returncode}: {command}", *said]))
    return Done(seconds, lines)


def worker(
    file: str,
    spec: Mapping[str, Any],
    *,
    python: str | Path = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> Done:
    """Runs a file of bench/peers/ in a process of its own; it reads its spec from the command line as JSON."""
    return run([python, ROOT / "bench/peers" / file, json.dumps(spec)], folder=ROOT, environment=environment)


def later(told: Mapping[str, Any]) -> float:
    """Mean seconds of a worker's epochs after the first."""
    ends = told["ends"]
    return float(ends[-1] - ends[0]) / (len(ends) - 1)


def peers_missing(module: str) -> str:
    """Why a peer cannot run, in a line; empty where it can."""
    if not PEERS_PYTHON.exists():
        return "the peers' environment is missing: `make bench-peers` makes it"
    found = subprocess.run([PEERS_PYTHON, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    return "" if found.returncode == 0 else f"{module} does not import there: {found.stderr.strip().splitlines()[-1]}"


def machine() -> dict[str, Any]:
    """Facts that a figure depends on."""
    facts = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "usable_cores": cores(),
        "bf16": has_bf16(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "one a core"),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": datetime.now().astimezone().date().isoformat(),
    }
    for name in ("torch", "torchvision", "lightning", "timm"):
        facts[name] = metadata.version(name)
    return facts


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16() -> bool:
    """Whether the processor computes in bf16 itself, as far as it says."""
    path = Path("/proc/cpuinfo")
    return path.exists() and any(flag in path.read_text(encoding="utf-8") for flag in ("avx512_bf16", "amx_bf16"))


@dataclass
class Bench:
    """A bench's results as they grow; `write` ends it."""

    name: str
    asked: argparse.Namespace
    comparisons: list[Comparison] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    """What is drawn and not compared."""
    facts: dict[str, Any] = field(default_factory=machine)

    def lacks(self, what: str, why: str) -> None:
        """Notes, and says, what could not be measured; `what` stands in the names of the comparisons that it means."""
        self.missing.append({"what": what, "why": why})
        print(f"not measured: {what}: {why}", flush=True)

    def write(self) -> None:
        """Prints the table, and writes the JSON file where one was named or the bench was run whole."""
        command = shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *_without_folders(sys.argv[1:])])
        found = {
            "bench": self.name,
            "quick": self.asked.quick,
            "runs": [{"command": command, "commit": _commit(), "machine": self.facts, "settings": self.settings}],
            "comparisons": [{**comparison.facts(), "run": 0} for comparison in self.comparisons],
            "missing": self.missing,
            "series": {name: {**curve, "run": 0} for name, curve in self.series.items()},
        }
        path = self.asked.json or (None if self.asked.quick else RESULTS / f"{self.name}.json")
        if path is not None and self.asked.add and path.exists():
            found = together(json.loads(path.read_text(encoding="utf-8")), found)
        print(table([found]))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            print(f"written to {path}")


def together(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Results of a bench that was run in parts: those before, but for what has been measured again now.

    Raises:
        SystemExit: they are of another bench, and do not belong together.
    """
    if before["bench"] != now["bench"]:
        refuse(f"--add: the results file is of {before['bench']}, not of {now['bench']}")
    names = {comparison["name"] for comparison in now["comparisons"]}
    subjects = {lack["what"] for lack in now["missing"]}
    kept = [c for c in before["comparisons"] if c["name"] not in names]
    curves = {name: curve for name, curve in before["series"].items() if name not in now["series"]}
    still = [
        lack
        for lack in before["missing"]
        if lack["what"] not in subjects and not any(lack["what"] in name for name in names)
    ]
    used = sorted({part["run"] for part in (*kept, *curves.values())})

    def moved(parts: Mapping[str, Any], places: Callable[[int], int]) -> dict[str, Any]:
        return {**parts, "run": places(parts["run"])}

    return {
        **now,
        "quick": before["quick"] or now["quick"],
        "runs": [*(before["runs"][run] for run in used), *now["runs"]],
        "comparisons": [
            *(moved(c, used.index) for c in kept),
            *(moved(c, lambda run: run + len(used)) for c in now["comparisons"]),
        ],
        "missing": [*still, *now["missing"]],
        "series": {
            **{name: moved(curve, used.index) for name, curve in curves.items()},
            **{name: moved(curve, lambda run: run + len(used)) for name, curve in now["series"].items()},
        },
    }


def _commit() -> str:
    """What was measured, as git names it; empty outside a repository."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _without_folders(words: Sequence[str]) -> list[str]:
    """A command line without the folders of one machine."""
    return ["FOLDER" if "/" in word and Path(word).is_absolute() else word for word in words]


def letter(run: int) -> str:
    """What a run of a bench is called where a results file has several."""
    return "abcdefghijklmnopqrstuvwxyz"[run]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of every comparison in some results files; of several runs, each row says of which it is."""
    lines = [
        "| comparison | ratio | median | range | 95% interval | rounds | target | |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        for c in result["comparisons"]:
            cells = [
                c["name"]
                + (f" ({letter(c['run'])})" if len(result["runs"]) > 1 else "")
                + (f". {c['notes']}" if c["notes"] else ""),
                c["ratio_of"],
                f"{c['median']:.3g}",
                f"{c['min']:.3g} to {c['max']:.3g}",
                f"{c['interval'][0]:.3g} to {c['interval'][1]:.3g}",
                str(c["rounds"]),
                c["target"],
                _verdict(c),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(comparison: Mapping[str, Any]) -> str:
    """Of a target: what the median says, and whether its interval leaves that open."""
    if comparison["met"] is None:
        return ""
    aim, (low, high) = float(comparison["target"].split()[-1]), comparison["interval"]
    return ("met" if comparison["met"] else "**not met**") + (" (can't tell)" if low < aim < high else "")


class _Quick(argparse.Action):
    """One round, unless the command line says how many."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.quick = True
        if namespace.pairs == parser.get_default("pairs"):
            namespace.pairs = 1


def parser(
    doc: str | None, *, pairs: int = 5, pictures: bool = False, peers: bool = False, settings: bool = False
) -> argparse.ArgumentParser:
    """The arguments that every bench has, and those that it asks for."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pairs", type=positive, default=pairs, help=f"rounds; {pairs} unless said")
    made.add_argument("--quick", action=_Quick, nargs=0, default=False, help="a smoke test; its figures mean nothing")
    made.add_argument("--json", type=Path, help="file for the results, in place of bench/results/NAME.json")
    made.add_argument("--add", action="store_true", help="keep what that file has of comparisons not made this time")
    if pictures:
        made.add_argument(
            "--pictures",
            type=Path,
            default=Path("data/pictures"),
            help="folder with train/ and val/ of class folders; drawn pictures of the same shapes where there are none",
        )
    if peers:
        made.add_argument("--peers", action="store_true", help="against what stands in the peers' environment instead")
    if settings:
        made.add_argument("--set", nargs="*", default=[], help="further parameters of Thaw's, as section.key=value")
    return made


def positive(word: str) -> int:
    """A whole number of 1 or more, of a command line."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def refuse(message: str) -> NoReturn:
    """Ends with one line and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
