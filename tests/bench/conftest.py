"""The benches' files import one another by their names alone, as scripts that lie side by side do."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="session", autouse=True)
def _side_by_side() -> None:
    sys.path.insert(0, str(BENCH))


@pytest.fixture
def common() -> ModuleType:
    return importlib.import_module("common")


@pytest.fixture
def report() -> ModuleType:
    return importlib.import_module("report")


@pytest.fixture
def project() -> ModuleType:
    return importlib.import_module("project")
