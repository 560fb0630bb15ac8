"""dvc.yaml names what a stage really depends on: a module or a parameter that is missing would go unnoticed."""

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline import parameters

ROOT = Path(__file__).parents[1]
STAGES: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def _module_path(name: str) -> Path | None:
    base = ROOT / Path(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path.relative_to(ROOT)
    return None


@cache
def _imports(path: Path) -> frozenset[Path]:
    """Modules of ours that a file imports itself, inside functions too, but not for type checking alone."""
    found: set[Path] = set()
    tree = ast.parse((ROOT / path).read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {where for name in names if name.startswith("pipeline") and (where := _module_path(name))}
    return frozenset(found)


def walk(stage: str) -> set[str]:
    """Every file of ours that a stage runs through, its command line included."""
    waiting = {Path(f"pipeline/stages/{stage}.py")}
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        waiting |= _imports(path) - seen
    # An empty package file holds nothing to depend on.
    return {path.as_posix() for path in seen if (ROOT / path).read_text().strip()}


def _code_deps(stage: str) -> set[str]:
    return {dep for dep in STAGES[stage]["deps"] if dep.startswith("pipeline/")}


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_modules_that_the_stage_imports(stage: str) -> None:
    folders = {dep for dep in _code_deps(stage) if (ROOT / dep).is_dir()}
    needed = {
        next((folder for folder in folders if path.startswith(f"{folder}/")), path)
        for path in walk(stage)
        if path != "pipeline/__init__.py"  # the guided tour
    }
    assert _code_deps(stage) == needed


def test_every_parameter_that_changes_a_result_is_some_stages_param_and_no_other_is() -> None:
    listed = {param for stage in STAGES.values() for param in stage["params"]}
    for section, field in parameters.Config.model_fields.items():
        assert field.annotation is not None
        for name, knob in field.annotation.model_fields.items():
            dotted = f"{section}.{name}"
            operational = parameters.Operational in knob.metadata
            assert (section in listed or dotted in listed) != operational, dotted


def test_a_nets_name_reruns_weights_train_and_evaluate_alone() -> None:
    reruns = {name for name, stage in STAGES.items() if {"model", "model.name"} & set(stage["params"])}
    assert reruns == {"weights", "train", "evaluate"}
