"""The table of datasets. Each is fetched as published into a folder of its own and opened from there.

A new dataset is a new entry in DATASETS: how to fetch it, how to open it, its licence and its classes.
"""

import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from pipeline.data import sources
from pipeline.data.decode import SUFFIXES, decode
from pipeline.data.formats import check_labels, damaged, read_cifar10, read_groups, read_idx
from pipeline.data.sources import DebianPackage, File, Installed, Log, Publisher, Source
from pipeline.errors import UserError, nearest

Split = Literal["train", "val", "test", ""]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Item(NamedTuple):
    """One labelled picture."""

    key: str
    """Unique and stable: a number within its split, or the file's path."""
    label: int
    """Index into the classes."""
    split: Split
    """The publisher's; empty where the publisher split nothing."""
    group: str = ""
    """Patient, animal or burst, whose pictures stay on one side of every split; empty for a group of its own."""


@dataclass(frozen=True)
class Pictures:
    """An opened dataset."""

    classes: tuple[str, ...]
    items: list[Item]
    load: Callable[[int], np.ndarray]
    """The picture of an item, by index: uint8, [H, W] or [H, W, 3]. Raises UserError where it cannot be decoded."""
    skipped: tuple[str, ...] = ()
    """Files left out, each `path: reason`."""


class Fetch(Protocol):
    """Brings a dataset as published into the fresh folder `raw`; see Dataset."""

    def __call__(self, raw: Path, *, path: Path, state: Path, log: Log) -> None: ...


@dataclass(frozen=True)
class Dataset:
    """An entry of the catalogue."""

    description: str
    licence: str
    classes: tuple[str, ...]
    """Their names, in the order of their labels; empty where the folders name them."""
    channels: Literal[1, 3]
    """1 where every picture is grey, 3 where some may be in colour."""
    fetch: Fetch
    """fetch(raw, *, path, state, log): fills the fresh folder `raw`, the same bytes whichever source gave them.

    `path` is the user's folder, `state` a folder private to this dataset that keeps partial downloads across a kill,
    `log` takes one line. Raises UserError where nothing can be fetched.
    """
    open: Callable[[Path], Pictures]
    """open(raw): raises UserError where the folder does not hold what was published."""


def get(name: str) -> Dataset:
    """The dataset of that name.

    Raises:
        UserError: no such dataset; the line has the nearest names.
    """
    if name not in DATASETS:
        raise UserError(f"no dataset {name!r}{nearest(name, DATASETS)}", parameter="data.name")
    return DATASETS[name]


@dataclass(frozen=True)
class _Published:
    """Fetches fixed files from the first source that has them."""

    dataset: str
    files: tuple[File, ...]
    sources: tuple[Source, ...]

    def __call__(self, raw: Path, *, path: Path, state: Path, log: Log) -> None:  # noqa: ARG002
        sources.fetch(self.files, dataset=self.dataset, sources=self.sources, raw=raw, state=state, log=log)


# --- MNIST and its kin, CIFAR-10 --------------------------------------------------------------------------------


def _open_idx(raw: Path, *, classes: tuple[str, ...]) -> Pictures:
    pixels, labels = [], []
    for prefix in ("train", "t10k"):
        pixels.append(read_idx(raw / f"{prefix}-images-idx3-ubyte", ndim=3))
        labels.append(read_idx(raw / f"{prefix}-labels-idx1-ubyte", ndim=1))
        check_labels(labels[-1], pixels[-1], classes=classes, path=raw / f"{prefix}-labels-idx1-ubyte")
    return _in_memory(np.concatenate(pixels), np.concatenate(labels), classes=classes, train=len(labels[0]))


def _open_cifar10(raw: Path) -> Pictures:
    pixels, labels, train = read_cifar10(raw / _CIFAR10_ARCHIVE)
    check_labels(labels, pixels, classes=_CIFAR10, path=raw / _CIFAR10_ARCHIVE)
    return _in_memory(pixels, labels, classes=_CIFAR10, train=train)


# --- scikit-learn's digits --------------------------------------------------------------------------------------------


def _fetch_digits(raw: Path, *, path: Path, state: Path, log: Log) -> None:  # noqa: ARG001
    from sklearn.datasets import load_digits

    digits = load_digits()
    # As published, 0..16. savez dates every member 1980, so the bytes are the same each time.
    np.savez(raw / "digits.npz", images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
    log("digits: from scikit-learn, where they are built in")


def _open_digits(raw: Path) -> Pictures:
    path = raw / "digits.npz"
    try:
        with path.open("rb") as source, np.load(source, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise damaged(path, str(error)) from None
    check_labels(labels, images, classes=_DIGITS, path=path)
    return _in_memory(np.rint(images * (255 / 16)).astype(np.uint8), labels, classes=_DIGITS, train=None)


# --- datasets that fit in memory --------------------------------------------------------------------------------------


def _in_memory(pixels: np.ndarray, labels: np.ndarray, *, classes: tuple[str, ...], train: int | None) -> Pictures:
    """The first `train` pictures are the publisher's train split and the rest its test split; None: no split."""
    numbers = labels.tolist()
    if train is None:
        items = [Item(f"{index:05d}", label, "") for index, label in enumerate(numbers)]
    else:
        items = [Item(f"train/{index:05d}", label, "train") for index, label in enumerate(numbers[:train])]
        items += [Item(f"test/{index:05d}", label, "test") for index, label in enumerate(numbers[train:])]
    return Pictures(classes, items, load=lambda index: pixels[index].copy())


# --- a folder of the user's own ---------------------------------------------------------------------------------------

_SKIPPED = "skipped.txt"
"""Kept beside the pictures: what was left out of the copy, one `path: reason` a line."""
_GROUPS = "groups.csv"
"""The user's own, beside the class folders: which pictures belong together."""


class _File(NamedTuple):
    split: Split
    label: str
    key: str


def _fetch_folder(raw: Path, *, path: Path, state: Path, log: Log) -> None:  # noqa: ARG001
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; put class folders there or set data.path")
    if raw.resolve().is_relative_to(path.resolve()):
        raise UserError(
            f"{path}: holds the pipeline's own data; put the pictures in a folder of their own, set data.path"
        )
    files, skipped = _scan(path)
    _check_classes(path, files)
    grouped = _group_of(path, files, skipped)
    for key in [*(file.key for file in files), *([_GROUPS] if grouped else [])]:
        target = raw / key
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path / key, target)
        except PermissionError:
            raise UserError(f"{path / key}: may not be read; mend its permissions") from None
    if skipped:
        (raw / _SKIPPED).write_text("\n".join(skipped) + "\n", encoding="utf-8")
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        log(f"SKIPPED {len(skipped)} of {len(files) + len(skipped)} files: {'; '.join(skipped[:5])}{more}")


def _open_folder(raw: Path) -> Pictures:
    files, _ = _scan(raw)
    classes = _check_classes(raw, files)
    number = {name: index for index, name in enumerate(classes)}
    # train/ and val/ alone: val/ is what the publisher's figures are quoted on, so it is the test split.
    as_test: Split = "val" if not any(file.split == "test" for file in files) else "test"
    noted = raw / _SKIPPED
    skipped = noted.read_text(encoding="utf-8").splitlines() if noted.exists() else []
    group_of = _group_of(raw, files, skipped)
    items = [
        Item(key, number[label], "test" if split == as_test else split, group_of.get(key, ""))
        for split, label, key in files
    ]
    return Pictures(classes, items, load=lambda index: decode(raw / items[index].key), skipped=tuple(skipped))


def _group_of(folder: Path, files: list[_File], skipped: list[str]) -> dict[str, str]:
    """Each picture's group, by its key; nothing where the folder has no list of groups."""
    path = folder / _GROUPS
    if not path.exists():
        return {}
    return read_groups(path, pictures=[file.key for file in files], skipped=skipped)


def _scan(folder: Path) -> tuple[list[_File], list[str]]:
    """The folder's pictures in order of their path, and what is left out with the reason."""
    files, skipped = [], []
    tops = _layout(folder)
    for path in {path for top in (folder, *tops.values()) for path in _visible(top)}:
        if not path.is_dir() and path.suffix.lower() in SUFFIXES:
            skipped.append(f"{path.relative_to(folder).as_posix()}: in no class folder")
    for split, top in tops.items():
        for class_folder in filter(Path.is_dir, _visible(top)):
            for path in _walk(class_folder):
                key = path.relative_to(folder).as_posix()
                reason = _why_not(path, key)
                if reason:
                    skipped.append(f"{key if key.isprintable() else ascii(key)}: {reason}")
                else:
                    files.append(_File(split, class_folder.name, key))
    return sorted(files, key=lambda file: file.key), sorted(skipped)


def _layout(folder: Path) -> dict[Split, Path]:
    """The folders of class folders, by split; the folder itself where it is not split."""
    inside = [path.name for path in _visible(folder) if path.is_dir()]
    split = [name for name in SPLITS if name in inside and any(path.is_dir() for path in _visible(folder / name))]
    if "train" not in split:
        if split:
            raise UserError(f"{folder}: has {split[0]}/ of class folders but no train/; add it")
        return {"": folder}
    for name in inside:
        if name not in SPLITS:
            raise UserError(f"{folder / name}: stands beside train/ but is no split{nearest(name, SPLITS)}")
    return {name: folder / name for name in split}


def _walk(folder: Path) -> Iterator[Path]:
    for path in _visible(folder):
        if path.is_dir() and not path.is_symlink():  # a linked folder may lead back here
            yield from _walk(path)
        else:
            yield path


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from None


def _why_not(path: Path, key: str) -> str:
    if path.is_dir():
        return "a link to a folder"
    if not path.is_file():
        return "a broken link or no file"
    if path.suffix.lower() not in SUFFIXES:
        return "not of a picture format that is read"
    return "" if key.isprintable() else "a name with unprintable characters"


def _check_classes(folder: Path, files: list[_File]) -> tuple[str, ...]:
    """The class names in the order of their labels."""
    tops = _layout(folder)
    base: Split = "train" if "train" in tops else ""
    classes = sorted(path.name for path in _visible(tops[base]) if path.is_dir())
    if not classes:
        raise UserError(f"{folder}: no class folders; put a folder of pictures per class there or set data.path")
    counts = Counter(file.label for file in files if file.split == base)
    for name in classes:
        if not counts[name]:
            raise UserError(f"{tops[base] / name}: no pictures ({', '.join(SUFFIXES)}); add some or remove the folder")
    if len(classes) == 1:
        raise UserError(f"{tops[base]}: one class only, {classes[0]}; a classifier needs two class folders or more")
    for file in files:
        if file.label not in counts:
            where = folder / file.split / file.label
            raise UserError(f"{where}: no such class in train/{nearest(file.label, classes)}")
    return tuple(classes)


# --- the table --------------------------------------------------------------------------------------------------------

_DIGITS = tuple("0123456789")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def _idx_files(*, content: tuple[str, ...] = (), published: tuple[str, ...] = ()) -> tuple[File, ...]:
    """The four files of MNIST and its kin: train images and labels, test images and labels."""
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    return tuple(
        File(f"{name}.gz", kept=name, content=one, published=other)
        for name, one, other in zip(names, content or [""] * 4, published or [""] * 4, strict=True)
    )


DATASETS: dict[str, Dataset] = {
    # Xiao, Rasul, Vollgraf 2017, https://arxiv.org/abs/1708.07747
    "fashion_mnist": Dataset(
        description="70 000 grey 28 px pictures of clothes, 10 classes, split 60 000 / 10 000",
        licence="MIT",
        classes=_FASHION,
        channels=1,
        fetch=_Published(
            "fashion_mnist",
            files=_idx_files(
                content=(
                    "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                    "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                    "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                    "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                )
            ),
            sources=(
                Publisher("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
                Installed("dataset-fashion-mnist", folder=Path("/usr/share/datasets/fashion-mnist")),
                DebianPackage("dataset-fashion-mnist", folder="usr/share/datasets/fashion-mnist"),
            ),
        ),
        open=partial(_open_idx, classes=_FASHION),
    ),
    # LeCun, Cortes, Burges 1998, http://yann.lecun.com/exdb/mnist/; digests as in torchvision
    "mnist": Dataset(
        description="70 000 grey 28 px handwritten digits, 10 classes, split 60 000 / 10 000",
        licence="CC BY-SA 3.0",
        classes=_DIGITS,
        channels=1,
        fetch=_Published(
            "mnist",
            files=_idx_files(
                published=(
                    "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
                    "md5:d53e105ee54ea40749a09fcbcd1e9432",
                    "md5:9fb629c4189551a2d022fa330f9573f3",
                    "md5:ec29112dd5afa0611ce80d1b7f02629c",
                )
            ),
            sources=(
                Publisher("https://ossci-datasets.s3.amazonaws.com/mnist/"),
                Publisher("http://yann.lecun.com/exdb/mnist/"),
            ),
        ),
        open=partial(_open_idx, classes=_DIGITS),
    ),
    # Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
    "cifar10": Dataset(
        description="60 000 colour 32 px pictures of animals and vehicles, 10 classes, split 50 000 / 10 000",
        licence="none stated; cite Krizhevsky 2009",
        classes=_CIFAR10,
        channels=3,
        fetch=_Published(
            "cifar10",
            files=(File(_CIFAR10_ARCHIVE, kept=_CIFAR10_ARCHIVE, published="md5:c58f30108f718f92721af3b95e74349a"),),
            sources=(Publisher("https://www.cs.toronto.edu/~kriz/"),),
        ),
        open=_open_cifar10,
    ),
    # Alpaydin and Kaynak 1998, UCI; the copy of its test set in scikit-learn
    "digits": Dataset(
        description="1 797 grey 8 px handwritten digits, 10 classes, not split; needs no network",
        licence="CC BY 4.0",
        classes=_DIGITS,
        channels=1,
        fetch=_fetch_digits,
        open=_open_digits,
    ),
    "image_folder": Dataset(
        description="pictures of your own at data.path, a folder per class, in train/ val/ test/ or not",
        licence="yours",
        classes=(),
        channels=3,
        fetch=_fetch_folder,
        open=_open_folder,
    ),
}
