"""The augment stage: splits, packs and previews the pictures, with offline-augmented copies when asked for."""

from collections import defaultdict

from pipeline import paths
from pipeline.analysis import plots
from pipeline.data import catalog, packing
from pipeline.data.store import Store
from pipeline.files import fresh_folder
from pipeline.parameters import Config

PREVIEW_CLASSES, PREVIEW_COLUMNS = 12, 8


def run(config: Config) -> None:
    """Writes data/prepared/NAME: pictures.bin, manifest.csv, meta.json and preview.png."""
    dataset = catalog.get(config.data.name)
    pictures = dataset.open(paths.raw(config.data.name))
    with fresh_folder(paths.prepared(config.data.name)) as folder:
        packing.pack(folder, pictures, dataset=config.data.name, channels=dataset.channels, params=config.augment)
        store = Store(folder)
        _preview(store)
    print(_summary(store))


def _preview(store: Store) -> None:
    """A row per class: training pictures as packed, each followed by its offline copies."""
    per_class: dict[int, list[int]] = defaultdict(list)
    for index in store.indices("train"):
        chosen = per_class[store.rows[index].label]
        if len(chosen) < PREVIEW_COLUMNS:
            chosen.append(int(index))
    shown = [index for label in sorted(per_class)[:PREVIEW_CLASSES] for index in per_class[label]]
    titles = [
        store.meta.classes[row.label] + (f" (copy {row.copy})" if row.copy else "")
        for row in (store.rows[index] for index in shown)
    ]
    plots.grid([store[index] for index in shown], titles, store.folder / "preview.png", columns=PREVIEW_COLUMNS)


def _summary(store: Store) -> str:
    meta, counts = store.meta, store.counts()
    copies = sum(row.copy > 0 for row in store.rows)
    parts = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    kind = "grey" if meta.channels == 1 else "colour"
    lines = [f"{meta.dataset}: {len(meta.classes)} classes, {kind}, {meta.px} px; {parts}"]
    if copies:
        lines.append(f"of the training pictures {copies:,} are offline-augmented copies")
    lines += [f"left out: {reason}" for reason in meta.skipped]
    return "\n".join(lines)
