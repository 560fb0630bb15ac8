"""The documents and the code name the same things."""

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from ruamel.yaml import YAML

from pipeline import config, parameters, study
from pipeline.__main__ import COMMANDS
from pipeline.data.catalog import DATASETS
from pipeline.data.transforms import TRANSFORMS

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING, PARAMETERS, TRAINING = (
    (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/parameters.md", "docs/training.md")
)


DOCS = ("parameters", "summary", "experiments", "training", "performance")


def _parameters() -> list[str]:
    """A row of docs/parameters.md for every parameter: name, what params.yaml says, meaning."""
    shipped = YAML(typ="safe").load(ROOT / "params.yaml")
    rows = []
    for section, field in parameters.Config.model_fields.items():
        assert field.annotation is not None
        for name, knob in field.annotation.model_fields.items():
            value = "see below" if name == "phases" else f"`{_plain(shipped[section][name])}`"
            rows.append(f"| `{section}.{name}` | {value} | {_meaning(knob)} |")
    return rows + [f"| `{name}` | {_default(knob)} | {_meaning(knob)} |" for name, knob in _phase().items()]


def _transforms() -> list[str]:
    """A row for every argument of every transform: name, default, meaning."""
    rows = []
    for name, entry in TRANSFORMS.items():
        rows.append(f"| `{name}` | | {entry.__doc__} |")
        for argument, field in entry.model_fields.items():
            if argument != "p" or field.default != 0.5:
                meaning = _meaning(field) if field.description else "Probability that a picture is transformed."
                rows.append(f"| `{name}.{argument}` | `{_plain(field.default)}` | {meaning} |")
    return rows


def _phase() -> dict[str, Any]:
    return dict(parameters.PhaseParams.model_fields)


def _default(field: Any) -> str:
    return "needed" if field.is_required() else f"`{_plain(field.default)}`"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _meaning(field: Any) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    listed = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    return " ".join(field.description.split()) + listed


@pytest.mark.parametrize("row", [*_parameters(), *_transforms()])
def test_every_parameter_stands_in_the_table_as_its_docstring_has_it(row: str) -> None:
    assert row in PARAMETERS.splitlines()


def test_the_table_has_no_parameter_that_is_gone() -> None:
    rows = [line for line in PARAMETERS.splitlines() if line.startswith("| `")]
    schedules = [row for row in rows if row.split("`")[1] in get_args(parameters.ScheduleName)]
    assert len(schedules) == len(get_args(parameters.ScheduleName))
    assert sorted(set(rows) - set(schedules)) == sorted([*_parameters(), *_transforms()])


def test_the_readme_names_every_dataset_and_command() -> None:
    assert all(f"`{name}`" in README for name in DATASETS)
    assert all(name in README for name in COMMANDS)


def test_the_readme_names_every_study() -> None:
    assert all(name in README for name in study.names())


@pytest.mark.parametrize("text", [README, CONTRIBUTING, PARAMETERS, TRAINING])
def test_what_the_documents_set_can_be_set(text: str) -> None:
    text = "\n".join(line for line in text.splitlines() if "--queue" not in line)  # which takes several values
    settings = re.findall(r"\b((?:data|augment|model|train|evaluate|tracking)\.[a-z_.]+=[^\s\"`]+)", text)
    words = [word for word in settings if "weights=" not in word and "teacher=" not in word]
    # Beside a ready-made schedule no phase can be set, and beside auto_tune no second device.
    alone = [word for word in words if word.startswith(("train.phases=", "train.auto_tune="))]
    for together in ([word for word in words if word not in alone], *([word] for word in alone)):
        config.load(ROOT / "params.yaml", overrides=config.parse_settings(together))


def test_every_file_that_the_documents_name_is_there() -> None:
    documents = ("README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in DOCS))
    for path in (ROOT / name for name in documents):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"
    for name in re.findall(r"`((?:pipeline|tests|docs)/[\w/.]+)`", README + CONTRIBUTING):
        assert (ROOT / name).exists(), name
