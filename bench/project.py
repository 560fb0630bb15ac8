"""A working folder that Thaw is driven in from outside, as a user does, and the same pictures for the other sides.

Its stages before train run once; what they make is kept under data/cache/bench/ (git-ignored, safe to delete) by the
hash of everything that it follows from, the code of pipeline/data/ included.
"""

import csv
import hashlib
import json
import math
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import ROOT, Done, has_bf16, later, refuse, run
from pipeline import config, paths
from pipeline.data import catalog
from pipeline.errors import UserError
from pipeline.parameters import Config

KEPT = ROOT / "data/cache/bench"
PYTHON = sys.executable
BF16_FROM_PX = 64
"""Smaller pictures are trained faster in fp32 on the processors that were tried."""
EPOCH_LINE = re.compile(r"\S+ \d+/\d+: train loss .*; val loss \S+, top-1 ([\d.]+);")
"""What the train stage prints after an epoch, with its validation top-1."""
STANDS = re.compile(r": [\d,]+ pictures to train on, ")
"""What it prints first of all, when the net stands."""
DRAWN_SIDES = (500, 375)
"""Width and height of a drawn picture: those of most photographs of data sets from the web."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run of the train stage took, in seconds."""

    stage: float
    """From the start of the process to its end."""
    phases: float
    """From the line that the net stands to the last epoch's: the search for a cut, caches, trials, validation."""
    ends: list[float]
    """Of each epoch's line, counted as `phases` is."""
    accuracies: list[float]
    """Validation top-1 after each epoch."""
    waits: list[float]
    """Share of each epoch that was spent waiting for data, as the run's curves say; none where it was told to stop."""
    output: list[str]

    @property
    def later(self) -> float:
        """Mean of the epochs after the first, from line to line: with validation, checkpoints and what is between."""
        return later({"ends": self.ends})


class Project:
    """Thaw's working folder.

    Args:
        settings: parameters that differ from params.yaml's, by dotted name; those of `train` are given to `train`.
        pictures: folder that `data.path` names, for image_folder.
    """

    def __init__(self, settings: Mapping[str, Any], *, pictures: Path | None = None) -> None:
        self.settings = dict(settings)
        if pictures is not None:
            self.settings |= {"data.name": "image_folder", "data.path": str(pictures.resolve())}
        self.folder = KEPT / _key(self.settings, pictures)
        done = self.folder / "prepared"
        if not done.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self._prepare()
            done.touch()
        self._write(self.settings)
        self.config = checked(self.folder / "params.yaml")

    def _prepare(self) -> None:
        (self.folder / "models").mkdir(parents=True)
        (self.folder / "data/raw").mkdir(parents=True)
        shutil.copyfile(ROOT / paths.NO_WEIGHTS, self.folder / paths.NO_WEIGHTS)
        self._write(self.settings)
        name = checked(self.folder / "params.yaml").data.name
        if name == "image_folder":
            self.stage("download")
        else:
            (self.folder / paths.raw(name)).symlink_to(published(name))
        self.stage("weights")
        self.stage("augment")

    def _write(self, settings: Mapping[str, Any]) -> None:
        shutil.copyfile(ROOT / paths.PARAMS, self.folder / "params.yaml")
        config.write(self.folder / "params.yaml", overrides=settings)

    def stage(
        self,
        name: str,
        *,
        environment: Mapping[str, str] | None = None,
        enough: Callable[[str], bool] | None = None,
    ) -> Done:
        """Runs one command of Thaw's."""
        return run([PYTHON, "-m", "pipeline", name], folder=self.folder, environment=environment, enough=enough)

    def knows(self, parameter: str) -> bool:
        """Whether this tree has a parameter of `train`, by its name."""
        return parameter in type(self.config.train).model_fields

    def begin_anew(self, settings: Mapping[str, Any]) -> None:
        """Makes the next training one with these settings and nothing to go on from."""
        self._write({**self.settings, **settings})
        for left in (self.folder / "data/cache", self.folder / "models/progress"):
            shutil.rmtree(left, ignore_errors=True)

    def train(
        self,
        settings: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        stop_at: float = math.inf,
    ) -> Training:
        """Runs the train stage as if for the first time: without checkpoints or caches of an earlier run.

        Args:
            stop_at: validation top-1 after which it is told to stop, where an epoch reaches it.
        """
        self.begin_anew(settings)

        done = self.stage("train", environment=environment, enough=lambda line: (_top1(line) or 0.0) >= stop_at)
        (began, *_) = [at for at, line in done.lines if STANDS.search(line)]
        epochs = [(at - began, top1) for at, line in done.lines if (top1 := _top1(line)) is not None]
        ends, accuracies = [end for end, _ in epochs], [top1 for _, top1 in epochs]
        waits: list[float] = []
        if max(accuracies, default=0.0) < stop_at:  # whole, so it has written its curves
            with (self.folder / paths.CURVES).open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            assert len(ends) == len(rows), (self.config.model.name, done.lines)
            waits = [float(row["data_wait"]) for row in rows]
        return Training(
            stage=done.seconds,
            phases=ends[-1],
            ends=ends,
            accuracies=accuracies,
            waits=waits,
            output=[line for _, line in done.lines],
        )

    def fast(self, *, px: int) -> dict[str, Any]:
        """The settings that a user who wants speed comes to: what the trial finds on processors that were tried."""
        return {"train.precision": "bf16-mixed"} if has_bf16() and px >= BF16_FROM_PX else {}

    def warm(self) -> None:
        """Makes the tracking store, once, which would else fall on the first training that is measured."""
        if not (self.folder / "mlflow.db").exists():
            self.train({"train.fast_dev_run": True})

    def judged(self) -> dict[str, float]:
        """Runs the evaluate stage; gives back the test figures of models/metrics.json."""
        self.stage("evaluate")
        found: dict[str, float] = json.loads((self.folder / paths.METRICS).read_text(encoding="utf-8"))["test"]
        return found

    def weights(self) -> str:
        """The file of pretrained weights; empty where the net starts from random ones."""
        path = self.folder / paths.pretrained(self.config.model.name) / "weights.safetensors"
        return str(path) if path.exists() else ""

    def shared(self, *, suffix: str = ".png") -> Path:
        """The very pictures of each split, as published, in train/ val/ test/ of class folders, for the other sides."""
        target = self.folder / "shared"
        if target.exists():
            return target
        name = self.config.data.name
        pictures = catalog.get(name).open(self.folder / paths.raw(name))
        with (self.folder / paths.prepared(name) / "manifest.csv").open(encoding="utf-8", newline="") as file:
            split_of = {row["key"]: row["split"] for row in csv.DictReader(file) if row["copy"] == "0"}
        beside = self.folder / "shared.part"
        shutil.rmtree(beside, ignore_errors=True)
        for index, item in enumerate(pictures.items):
            if item.key not in split_of:
                continue
            label = pictures.classes[item.label].replace("/", "-")
            folder = beside / split_of[item.key] / label
            folder.mkdir(parents=True, exist_ok=True)
            source = self.folder / paths.raw(name) / item.key
            if source.exists():
                (folder / item.key.replace("/", "-")).symlink_to(source)
            else:
                _save(pictures.load(index), folder / f"{index}{suffix}")
        beside.rename(target)
        return target

    @property
    def sizes(self) -> dict[str, int]:
        """Pictures of each split."""
        with (self.folder / paths.prepared(self.config.data.name) / "manifest.csv").open(encoding="utf-8") as file:
            splits = [row["split"] for row in csv.DictReader(file)]
        return {split: splits.count(split) for split in ("train", "val", "test")}


def _top1(line: str) -> float | None:
    found = EPOCH_LINE.match(line)
    return float(found[1]) if found else None


def checked(path: Path, *, overrides: Mapping[str, Any] | None = None) -> Config:
    """The parameters of a file.

    Raises:
        SystemExit: 2, with one line, where they are not right.
    """
    try:
        return config.load(path, overrides=overrides)
    except UserError as error:
        refuse(str(error))


def chosen(asked: Namespace) -> dict[str, Any]:
    """The parameters of a bench's --set.

    Raises:
        SystemExit: 2, with one line, where they cannot be read.
    """
    try:
        return config.parse_settings(asked.set)
    except UserError as error:
        refuse(str(error))


def published(name: str) -> Path:
    """A data set of the catalogue, downloaded once for all benches."""
    here = ROOT / paths.raw(name)
    if here.exists():
        return here
    folder = KEPT / "published"
    if not (folder / paths.raw(name)).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / paths.PARAMS, folder / "params.yaml")
        config.write(folder / "params.yaml", overrides={"data.name": name})
        run([PYTHON, "-m", "pipeline", "download"], folder=folder)
    return folder / paths.raw(name)


def pictures_or_drawn(folder: Path, *, train: int = 244, val: int = 153) -> tuple[Path, bool]:
    """The user's pictures, or drawn ones where `folder` has none; and whether they are the user's."""
    if any((folder / "train").glob("*/*")):
        return folder, True
    print(f"{folder} has no train/ of class folders: pictures are drawn, and accuracies mean nothing", flush=True)
    return drawn(train=train, val=val), False


def drawn(*, train: int, val: int) -> Path:
    """Two classes of JPEGs as large as photographs and about as costly to decode."""
    target = KEPT / f"drawn-{train}-{val}"
    if target.exists():
        return target
    draw = np.random.default_rng(0)
    beside = target.with_suffix(".part")
    shutil.rmtree(beside, ignore_errors=True)
    for split, number in (("train", train), ("val", val)):
        for index in range(number):
            label = index % 2
            folder = beside / split / ("warm", "cold")[label]
            folder.mkdir(parents=True, exist_ok=True)
            _save(_one(draw, label), folder / f"{index:05}.jpg")
    beside.rename(target)
    return target


def both_ways(folder: Path) -> Path:
    """A folder whose val/ Thaw validates on after each epoch, as the other sides do, and tests on as well."""
    target = KEPT / f"both-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
    if not target.exists():
        target.mkdir(parents=True)
        for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
            (target / split).symlink_to((folder / source).resolve())
    return target


def _one(draw: np.random.Generator, label: int) -> np.ndarray:
    from PIL import Image

    width, height = DRAWN_SIDES
    coarse = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    tint = np.array([30, 0, -30] if label == 0 else [-30, 0, 30], dtype=np.float32)
    return np.clip(smooth + tint + draw.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def _save(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture.squeeze()).save(path, quality=90)


def _key(settings: Mapping[str, Any], pictures: Path | None) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path in sorted(pictures.glob("*/*/*")) if pictures is not None else ():
        digest.update(f"{path.relative_to(pictures)} {path.stat().st_size}".encode())
    for path in (ROOT / paths.PARAMS, *sorted((ROOT / "pipeline/data").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
