"""Nothing half-written is ever taken for whole: write beside, then rename into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A private folder that takes the place of `target` when the block ends well, and vanishes when it does not.

    What a killed process left beside is cleared by the next one.
    """
    beside = target.with_name(f".{target.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(target, ignore_errors=True)
        beside.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def fresh_file(target: Path) -> Iterator[Path]:
    """A path beside `target` that is synced and renamed to it when the block ends well."""
    make_folder(target.parent)
    beside = target.with_name(f".{target.name}.part")
    try:
        yield beside
        sync(beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Puts on disk what has been written into a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, unless they are there.

    Raises:
        UserError: it cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        place = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), folder)
        raise UserError(f"{place} must be a folder: something else is in its place; remove it") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} must be writable: change its permissions")
