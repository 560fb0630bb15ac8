"""download: the dataset as published, into data/raw/NAME."""

import shutil
from collections import Counter
from pathlib import Path

from filelock import FileLock

from pipeline import paths
from pipeline.data import catalog
from pipeline.data.catalog import Pictures
from pipeline.files import fresh_folder, make_folder
from pipeline.parameters import Config


def run(config: Config) -> None:
    """Fetches, checks and puts in place; what was there before stays until that has succeeded.

    Raises:
        UserError: no such dataset, no source that has it, or a folder of pictures that cannot be used.
    """
    name = config.data.name
    dataset = catalog.get(name)
    raw = paths.raw(name)
    state = paths.cache() / "downloads" / name
    make_folder(state.parent)
    with FileLock(state.with_suffix(".lock")):  # copies of the repository share the partial downloads
        state.mkdir(exist_ok=True)
        with fresh_folder(raw) as fresh:
            dataset.fetch(fresh, path=Path(config.data.path), state=state, log=_say)
            summary = _summary(dataset.open(fresh))
        shutil.rmtree(state)
    _say(f"{name}: {summary} -> {raw}")


def _summary(pictures: Pictures) -> str:
    counts = Counter(item.split or "not split" for item in pictures.items)
    splits = ", ".join(f"{split} {count}" for split, count in counts.items())
    return (
        f"{len(pictures.classes)} classes, {len(pictures.items)} pictures ({splits}), {len(pictures.skipped)} skipped"
    )


def _say(line: str) -> None:
    print(line, flush=True)
