"""The only reader of params.yaml, whose sections and knobs stand in `parameters`.

A mistake in the file raises `UserError` with the file, the line, what is wrong and the nearest right name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError

from pipeline import paths
from pipeline.errors import UserError, nearest
from pipeline.files import fresh_file
from pipeline.parameters import Config, Params, PhaseParams


def load(path: Path = paths.PARAMS, *, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks params.yaml; `overrides` maps dotted keys to values set on top of the file.

    Raises:
        UserError: one line with file, line number, mistake and the nearest right name.
    """
    try:
        with path.open(encoding="utf-8") as file:
            document = YAML().load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the repository's top folder") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    if not isinstance(document, CommentedMap):
        raise UserError(f"{path}: expected the sections {', '.join(Config.model_fields)}")
    for key, value in (overrides or {}).items():
        _override(document, key, value)
    try:
        return Config.model_validate(_plain(document))
    except ValidationError as error:
        raise UserError(_explain(error, document, path, overridden=tuple(overrides or ()))) from None


def write(path: Path = paths.PARAMS, *, overrides: Mapping[str, Any]) -> None:
    """Sets dotted keys in params.yaml, which keeps its comments; a mapping replaces what stood there."""
    document = YAML().load(path.read_text(encoding="utf-8"))
    for key, value in overrides.items():
        _override(document, key, value)
    with fresh_file(path) as beside, beside.open("w", encoding="utf-8") as file:
        YAML().dump(document, file)


def where(parameter: str, path: Path = paths.PARAMS) -> str:
    """A parameter's place for an error's line: file, line and dotted name."""
    with path.open(encoding="utf-8") as file:
        line = _line(YAML().load(file), parameter.split("."))
    return f"{path}:{line}: {parameter}" if line else f"{path}: {parameter}"


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Overrides from words such as `train.batch_size=64`; values are read as YAML.

    Raises:
        UserError: a word has no `=`, or its value is not YAML.
    """
    overrides = {}
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word}: expected section.key=value, such as train.batch_size=64")
        try:
            overrides[key] = YAML(typ="safe").load(value)
        except MarkedYAMLError as error:
            raise UserError(f"{word}: not valid YAML: {error.problem}") from None
    return overrides


def flat(params: Params) -> dict[str, Any]:
    """Every parameter by its dotted name."""
    return _flatten(params.model_dump())


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
        )
    return leaves


def _override(document: CommentedMap, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = document
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            mend = "; `python -m pipeline schedule --yaml` writes its phases out" if parent == "phases" else ""
            raise UserError(f"{dotted}: no such parameter; {parent} is a single value{mend}")
    node[last] = value


def _plain(node: Any) -> Any:
    """ruamel's tree as built-in types; pydantic's strict unions do not know its float and string classes."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _explain(error: ValidationError, document: CommentedMap, path: Path, *, overridden: tuple[str, ...]) -> str:
    """The first mistake of a failed validation as one line."""
    # A misspelt key is also a missing one: the misspelling is what to mend.
    found = [problem for problem in error.errors() if not _of_another_branch(problem)]
    first = min(found, key=lambda problem: problem["type"] != "extra_forbidden")
    location = _location(first)
    keys = _document_path(document, location)
    line = _line(document, keys)
    dotted = ".".join(keys)
    where = f"{path}:{line}: " if line else f"{path}: "
    if any(f"{key}.".startswith(f"{dotted}.") or f"{dotted}.".startswith(f"{key}.") for key in overridden):
        where = ""  # what was said on the command line stands in no file
    if first["type"] == "extra_forbidden":
        return f"{where}{dotted}: no such parameter{nearest(keys[-1], _fields_at(keys[:-1]))}"
    if first["type"] == "missing":
        return f"{where}{'.'.join(location)}: missing"
    problems = [e for e in found if _document_path(document, _location(e)) == keys]
    told = _telling(problems)
    message = _not_among(told) or " or ".join(dict.fromkeys(_message(problem, dotted) for problem in told))
    return f"{where}{dotted}: {message}" if dotted else f"{where}{message}"


def _location(problem: Any) -> list[str]:
    cause = problem.get("ctx", {}).get("error")
    parts = [str(part) for part in (*problem["loc"], *getattr(cause, "at", ()))]
    return [part for part in parts if not part.startswith(("dict[", "literal["))]  # which branch of a union it was


def _of_another_branch(problem: Any) -> bool:
    """Whether a mapping is said not to be a name: its own mistakes stand beside that."""
    return problem["type"] == "literal_error" and isinstance(problem["input"], dict)


def _telling(problems: list[Any]) -> list[Any]:
    """Of what the branches of a union say, what helps: of names where a word stands there, else of numbers."""
    keys = [problem for problem in problems if "[key]" in problem["loc"]]
    if keys:
        return keys  # what stands under a wrong name is not looked at
    names = [problem for problem in problems if problem["type"] == "literal_error"]
    others = [problem for problem in problems if problem["type"] != "literal_error"]
    if not names or not others:
        return names or others
    return names if isinstance(names[0]["input"], str) else others


def _not_among(problems: list[Any]) -> str:
    """That a word is none of the names that all branches of a union know; empty where that is not what is wrong."""
    if any(problem["type"] != "literal_error" for problem in problems):
        return ""
    known = [word for problem in problems for word in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
    word = str(problems[0]["input"])
    near = nearest(word, [name.strip("'") for name in known])
    choices = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
    return f"{problems[0]['input']!r} is not {choices}{near if 'did you mean' in near else ''}"


def _message(problem: Any, dotted: str) -> str:
    if problem["type"] == "string_pattern_mismatch" and "[key]" in problem["loc"]:
        return f"{problem['input']!r} cannot be a phase's name: small letters, digits and _, a letter first"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "string_pattern_mismatch" and dotted.endswith("trainable"):
        hint = nearest(str(problem["input"]), ["head", "all", "last:1"])
        return f"{problem['input']!r} is not head, last:N, from:MODULE, params:NAME or all{hint}"
    return f"{problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"


def _document_path(document: CommentedMap, location: list[str]) -> list[str]:
    """The part of an error's location that stands in the file (pydantic appends the branches of a union)."""
    keys: list[str] = []
    node: Any = document
    for part in location:
        if not isinstance(node, dict) or part not in node:
            break
        keys.append(part)
        node = node[part]
    return keys


def _line(document: CommentedMap, keys: list[str]) -> int | None:
    node: Any = document
    line = None
    for key in keys:
        if not isinstance(node, CommentedMap) or key not in node:
            break
        if key in (node.lc.data or {}):
            line = node.lc.key(key)[0] + 1
        node = node[key]
    return line


def _fields_at(keys: list[str]) -> list[str]:
    """Names of the parameters that may stand under a path, for the nearest-name hint."""
    if not keys:
        return list(Config.model_fields)
    if keys[:2] == ["train", "phases"]:
        return list(PhaseParams.model_fields)
    section = Config.model_fields[keys[0]].annotation
    assert section is not None
    return list(section.model_fields)
