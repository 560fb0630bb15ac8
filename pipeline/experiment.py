"""`make train`: the chain with other parameters, as a targeted DVC experiment that leaves earlier results alone."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import config, nets, paths
from pipeline.data import catalog
from pipeline.errors import UserError, blaming
from pipeline.files import fresh_file
from pipeline.parameters import Config


def run(*, model: str, epochs: int | None, settings: list[str]) -> None:
    """Runs `dvc exp run evaluate` with what was asked for, and says what came of it.

    The target is named because an untargeted experiment checks every stage out first and so deletes the outs of
    earlier nets.

    Raises:
        UserError: a setting or the net's name is wrong, or there is no git repository for DVC's experiments.
    """
    before = config.load()
    overrides = _overrides(before, model=model, epochs=epochs, settings=settings)
    after = config.load(overrides=overrides)
    check_repository()
    try:
        check_names(after)
        check_net(after)
    except UserError as error:
        if error.parameter not in overrides:
            raise
        raise UserError(f"{error.parameter}: {error}") from None  # it stands in no file
    with restored(paths.PARAMS, always=after.train.fast_dev_run):
        if dvc(["exp", "run", "evaluate", *(part for word in words(overrides) for part in ("-S", word))]):
            raise SystemExit(1)
    print(_summary(before, after))


def check_names(wanted: Config) -> None:
    """Refuses a dataset, a net or a path that does not exist, before DVC stumbles over it.

    Raises:
        UserError: with the nearest names, or what to do.
    """
    catalog.get(wanted.data.name)
    if not Path(wanted.data.path).exists():
        raise UserError(f"{wanted.data.path}: no such folder; put class folders there", parameter="data.path")
    if not Path(wanted.train.teacher).exists():
        raise UserError(f"{wanted.train.teacher}: no such model", parameter="train.teacher")
    if not Path(wanted.model.weights).exists():
        raise UserError(f"{wanted.model.weights}: no such file of weights", parameter="model.weights")
    _check_inputs(wanted)
    # What the weights stage has been through is known; asking timm takes seconds.
    if not paths.pretrained(wanted.model.name).exists():
        with blaming("model.name"):
            nets.check(wanted.model.name)


def _check_inputs(wanted: Config) -> None:
    """Refuses to start from what the stages are about to make anew: in DVC a file is input or output, never both."""
    name = wanted.model.name
    made = [folder.resolve() for folder in (paths.pretrained(name), paths.trained(name), paths.evaluated(name))]
    for parameter, given in (("model.weights", wanted.model.weights), ("train.teacher", wanted.train.teacher)):
        path = Path(given)
        place = path.parent.resolve() / path.name  # not where it links to, which may be DVC's cache
        if any(place.is_relative_to(folder) for folder in made):
            copy = paths.WARM / f"{name.replace('/', '-')}{path.suffix}"
            raise UserError(
                f"{given}: this experiment makes it anew, so it cannot start from it; copy it first: "
                f"mkdir -p {copy.parent} && cp {given} {copy}, then {parameter}={copy}",
                parameter=parameter,
            )


def check_net(wanted: Config) -> None:
    """Refuses a net of ours that does not take what is set, before the stages that come first have taken minutes.

    Raises:
        UserError: it does not take an argument, or pictures of that side.
    """
    if not nets.is_scratch(wanted.model.name):
        return
    import torch

    model = wanted.model
    with torch.device("meta"), blaming("model.name"):
        net = nets.build(
            model.name,
            num_classes=2,
            in_chans=model.in_chans,
            drop_rate=model.drop_rate,
            drop_path_rate=model.drop_path_rate,
            stem=model.stem,
            recompute=model.recompute,
        )
        nets.check_px(net, wanted.px, name=model.name)


def check_repository() -> None:
    """Refuses a folder in which DVC can keep no experiments.

    Raises:
        UserError: It has no git repository with a commit.
    """
    if subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, check=False).returncode:
        raise UserError("experiments need a git repository with a commit, where DVC keeps them; `make repro` does not")


@contextmanager
def restored(path: Path, *, always: bool) -> Iterator[None]:
    """Puts a file back as it was unless the block ends well: DVC leaves the settings of a failed experiment in it.

    `always` is for a trial, whose settings must not stay behind for the next training.
    """
    kept = path.read_bytes() if path.exists() else None
    done = False
    try:
        yield
        done = True
    finally:
        if kept is None and (always or not done):
            path.unlink(missing_ok=True)
        elif kept is not None and (always or not done):
            with fresh_file(path) as beside:
                beside.write_bytes(kept)


def dvc(arguments: list[str]) -> int:
    """DVC's exit code. What stops this process stops the stage alone: DVC then ends by itself, its files in order."""
    command = [sys.executable, "-m", "dvc", *arguments]
    process = subprocess.Popen(command, env=_environment(), process_group=0)
    try:
        return process.wait()
    except SystemExit:
        os.killpg(process.pid, signal.SIGINT)  # which DVC leaves to the stage that it runs
        process.wait()
        raise


def words(overrides: dict[str, Any]) -> list[str]:
    """The values of `-S` for what is set, in Hydra's syntax: two pluses take keys that params.yaml has not yet, too."""
    return [f"++{key}={_hydra(value)}" for key, value in overrides.items()]


def _overrides(before: Config, *, model: str, epochs: int | None, settings: list[str]) -> dict[str, Any]:
    overrides = config.parse_settings(settings)
    for key, value in overrides.items():
        # -S merges mappings where a setting would replace one, and keeps the old order.
        if isinstance(value, dict):
            raise UserError(f"{key}: set one value of it, as {key}.NAME=VALUE, or edit params.yaml")
    if model:
        overrides["model.name"] = model
    if epochs is not None:
        phases = overrides.get("train.phases", before.train.phases)
        last = "train" if isinstance(phases, str) else f"train.phases.{list(phases)[-1]}"
        overrides[f"{last}.epochs"] = epochs
    return overrides


def _hydra(value: Any) -> str:
    if isinstance(value, str):
        # Backslashes stand for themselves unless a quote follows.
        escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
        return f"'{escaped}'"
    if isinstance(value, list):
        return f"[{','.join(_hydra(item) for item in value)}]"
    return json.dumps(value)


def _environment() -> dict[str, str]:
    """The environment with a git identity where the user has none: DVC keeps an experiment as a commit."""
    environment = dict(os.environ)
    # The interpreter that runs this has the packages: DVC does not put its environment on PATH.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    for variable, setting, stand_in in (("NAME", "user.name", "Thaw"), ("EMAIL", "user.email", "thaw@localhost")):
        known = subprocess.run(["git", "config", setting], capture_output=True, check=False).returncode == 0
        for role in ("AUTHOR", "COMMITTER"):
            if not known:
                environment.setdefault(f"GIT_{role}_{variable}", stand_in)
    return environment


def _summary(before: Config, after: Config) -> str:
    metrics = json.loads(paths.METRICS.read_text(encoding="utf-8"))
    test, run = metrics["test"], metrics["run"]
    old, new = config.flat(before), config.flat(after)
    trial = run["fast_dev_run"]
    changed = (
        []
        if trial
        else [f"{key}: {old.get(key, 'unset')} -> {value}" for key, value in new.items() if old.get(key) != value]
    )
    lines = [
        "",
        f"{after.model.name} on {after.data.name}: test top-1 {test['top1']:.4f} "
        f"({test['top1_low']:.4f} to {test['top1_high']:.4f}), started from {run['start']} weights",
        f"MLflow run: {run['name']} ({run['id']})",
        *(f"params.yaml now has {line}" for line in changed),
        *(["back to the committed parameters: git checkout params.yaml"] if changed else []),
        "see it: make ui, make compare, or dvc exp show",
    ]
    if run["start"] == "random":
        again = after.model.pretrained and not nets.is_scratch(after.model.name)
        lines.insert(
            1,
            f"WARNING: this net started from RANDOM weights ({run['weights']})"
            + ("; `dvc repro -f weights` tries the sources again" if again else ""),
        )
    if trial:
        lines.insert(1, "A TRIAL of one batch of everything: the figures mean nothing; params.yaml is as it was")
    return "\n".join(lines)
