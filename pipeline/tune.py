"""Sweeps: Optuna looks for the settings with which a training comes out best on the validation split.

A sweep is a name, a file that says which parameters may vary and how far, and a number of trials. Each trial is a
training of its own and a child of the sweep's run in MLflow. Several processes may work on one sweep at once, each
started with the same command; what was stopped goes on where it was. The test split is judged once, at the end, for
the best trial's settings alone.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from filelock import FileLock

from pipeline import config, experiment, paths, tracking
from pipeline.data.store import Store
from pipeline.errors import UserError, nearest
from pipeline.files import fresh_file
from pipeline.parameters import Config, operational
from pipeline.search_space import SPACE, Distribution, ends, read
from pipeline.training.pretrained import Origin
from pipeline.trials import Pruner, Sweep, folder_of, open_study, work

if TYPE_CHECKING:
    import optuna


def run(
    *,
    trials: int,
    name: str = "",
    space: Path = SPACE,
    storage: str = "",
    pruner: Pruner = "median",
    as_experiment: bool = True,
    apply: bool = False,
) -> None:
    """Runs trials until there are as many as asked for, over all processes; the last one writes what came out.

    A trial is judged by train.monitor in the best epoch of its last phase. The first ten are drawn at random, the
    others by a tree-structured Parzen estimator (Bergstra et al. 2011). With the median pruner, a trial ends early when
    its best epoch so far is worse than the median of the finished trials at that epoch; five of them come first. A
    trial whose loss is no longer finite, or that memory does not hold, has failed; the sweep goes on.

    Writes models/tune/NAME: best.yaml, trials.csv and history.png, and the best settings as the DVC experiment
    tune-NAME-best, whose training is the usual chain's and which is the only one judged on the test split.

    Args:
        trials: 1 or more. A larger number than before goes on with a finished sweep.
        name: of the sweep; empty for that of the net and the data.
        storage: URL of Optuna's database; empty for a file of the sweep's own. Processes on one machine take turns in
            beginning a trial, so there are never too many; those that share a database alone may begin one more each.
        as_experiment: whether to train the best settings once more, as a DVC experiment.
        apply: leave that experiment's settings and results in the workspace, as `dvc exp apply` would.

    Raises:
        UserError: Optuna is missing; the space, the name or a parameter is wrong; the stages weights and augment have
            not been run; the sweep was begun with another space or configuration; no trial came to a figure.
    """
    optuna = _optuna()
    loaded = config.load()
    _check(loaded, trials=trials, pruner=pruner, as_experiment=as_experiment, apply=apply)
    experiment.check_names(loaded)
    experiment.check_net(loaded)
    distributions = read(space, given=loaded)
    sweep_name = _name(name, loaded)
    store, weights = _inputs(loaded, distributions)
    facts = _facts(loaded, distributions, store, weights)
    folder_of(sweep_name).mkdir(parents=True, exist_ok=True)
    turn = FileLock(folder_of(sweep_name) / "lock")
    with turn:
        study = open_study(sweep_name, storage=storage, monitor=loaded.train.monitor, pruner=pruner)
        _agree(study, facts)
        worker = int(study.user_attrs.get("workers", 0))
        study.set_user_attr("workers", worker + 1)
        # Of one seed, two processes would draw the same settings, and so would a second start.
        study.sampler = optuna.samplers.TPESampler(seed=(loaded.train.seed + worker) % 2**32)
        sweep = Sweep(
            name=sweep_name,
            trials=trials,
            space=distributions,
            config=loaded,
            params=_copy(folder_of(sweep_name) / f"worker-{worker}.yaml"),
            store=store,
            worker=worker,
        )
        parent = _parent(sweep, study)
    with parent.adopting():
        try:
            last = work(sweep, study, turn)
        except BaseException:
            with tracking.ending(parent):
                raise
        if not last:
            print(f"== {sweep.name}: other processes are at its last trials, and will write the results")
            return
        with tracking.ending(parent), FileLock(sweep.folder / "end.lock"):
            _end(sweep, study, parent, as_experiment=as_experiment, apply=apply)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("tune needs optuna: pip install 'thaw[tune]'") from None
    # One line a trial is ours; a failed trial's would come with a traceback.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _check(given: Config, *, trials: int, pruner: str, as_experiment: bool, apply: bool) -> None:
    if trials < 1:
        raise UserError(f"--trials {trials}: it must be 1 or more")
    if pruner not in get_args(Pruner):
        raise UserError(f"--pruner {pruner}: it is median or none{nearest(pruner, get_args(Pruner))}")
    if apply and not as_experiment:
        raise UserError("--apply applies the best trial's experiment; leave --no-experiment out")
    if given.train.devices != 1 or given.train.num_nodes != 1:
        raise UserError(
            "a trial trains on one device; set it to 1 (and num_nodes), and start the same command once per device",
            parameter="train.devices",
        )
    if as_experiment:
        try:
            experiment.check_repository()
        except UserError:
            raise UserError(
                "the best trial becomes a DVC experiment, which needs a git repository with a commit; "
                "without one, say --no-experiment"
            ) from None


def _name(name: str, given: Config) -> str:
    if not name:
        return re.sub(r"[^A-Za-z0-9]+", "-", f"{given.model.name}-{given.data.name}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"--name {name}: letters, digits, - and _ alone, such as {_name('', given)}")
    return name


def _inputs(given: Config, space: Mapping[str, Distribution]) -> tuple[Store, dict[str, str]]:
    """The packed pictures, and by net the hash of the weights that trials start from."""
    nets = ends(space["model.name"]) if "model.name" in space else (given.model.name,)
    weights = {}
    for net in map(str, nets):
        folder = paths.pretrained(net)
        try:
            weights[net] = Origin.read(folder).sha256
        except FileNotFoundError:
            raise UserError(f"{folder}: no weights to start from here; run `dvc repro weights` for {net}") from None
    store = Store(paths.prepared(given.data.name))
    if store.meta.px != given.augment.px:
        raise UserError(
            f"{store.folder}: packed at {store.meta.px} px where augment.px is {given.augment.px}; "
            "run `dvc repro augment`"
        )
    store.verify()
    return store, weights


def _facts(
    given: Config, space: Mapping[str, Distribution], store: Store, weights: Mapping[str, str]
) -> dict[str, Any]:
    """What a sweep's trials follow from, by dotted names; plain values."""
    facts = {
        key: value
        for key, value in config.flat(given).items()
        if key.split(".")[0] in ("model", "train") and key not in operational()
        if not any(f"{key}.".startswith(f"{varied}.") for varied in space)
    }
    facts |= {f"space {key}": distribution.model_dump() for key, distribution in space.items()}
    facts |= {f"weights of {net}": sha256 for net, sha256 in weights.items()}
    plain: dict[str, Any] = json.loads(json.dumps({**facts, "data.sha256": store.meta.sha256}))
    return plain


def _agree(study: "optuna.Study", facts: Mapping[str, Any]) -> None:
    """Notes what the trials follow from, or refuses what is not as it was when the sweep was begun."""
    known = study.user_attrs.get("facts", facts)
    if differs := [key for key in {**known, **facts} if known.get(key) != facts.get(key)]:
        key, more = differs[0], f" (and {len(differs) - 1} more)" if differs[1:] else ""
        raise UserError(
            f"the sweep {study.study_name} was begun otherwise: {key} was {known.get(key, 'unset')} and is "
            f"{facts.get(key, 'unset')}{more}; take another --name, or put it back"
        )
    study.set_user_attr("facts", dict(facts))


def _copy(path: Path) -> Path:
    with fresh_file(path) as beside:
        shutil.copyfile(paths.PARAMS, beside)
    return path


def _parent(sweep: Sweep, study: "optuna.Study") -> tracking.Run:
    """The sweep's run in MLflow: a new one, or the one that another process or an earlier start began."""
    spool = sweep.folder / f"worker-{sweep.worker}.spool"
    known = study.user_attrs.get("run")
    if known and (resumed := tracking.Run.resume(known, spool=spool)):
        return resumed
    parent = tracking.Run.start(
        experiment=sweep.config.tracking.experiment,
        name=f"tune-{sweep.name}",
        tags={tracking.SERVES: "tune", "tune": sweep.name, "data.sha256": sweep.store.meta.sha256},
        spool=spool,
    )
    space = {f"tune.{key}": json.dumps(distribution.model_dump()) for key, distribution in sweep.space.items()}
    for params in (config.flat(sweep.config), space):  # MLflow takes a hundred at a time
        parent.log_params(params)
    study.set_user_attr("run", parent.id)
    return parent


def _end(sweep: Sweep, study: "optuna.Study", parent: tracking.Run, *, as_experiment: bool, apply: bool) -> None:
    """Writes, logs and prints what came out; trains the best settings as an experiment where that is asked for."""
    from optuna.trial import TrialState

    from pipeline.analysis import tune_report

    folder = Path("models") / "tune" / sweep.name
    tune_report.write(study, folder, figure=sweep.figure, space=sweep.space)
    for path in sorted(folder.iterdir()):
        parent.log_artifact(path)
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        raise UserError(f"no trial came to a figure (see {folder / tune_report.TRIALS}); narrow the space")
    best = study.best_trial
    parent.log_metrics({f"best/{sweep.figure}": study.best_value, "best/trial": best.number}, step=0)
    tune_report.tell(study, figure=sweep.figure, space=sweep.space)
    print(f"best trial: {best.number}, its model: {sweep.folder / f'trial-{best.number}'}; files: {folder}")
    print(f"MLflow's parent run: {parent.name} ({parent.id})")
    if sweep.config.train.fast_dev_run:
        print("A TRIAL of one batch of everything: the figures mean nothing, and there is no experiment of the best")
    elif as_experiment:
        print(_experiment(sweep, best.params, apply=apply))


def _experiment(sweep: Sweep, best: Mapping[str, Any], *, apply: bool) -> str:
    """Trains the best settings by the usual chain, as a DVC experiment; says what came of it."""
    label = f"tune-{sweep.name}-best"
    with ExitStack() as stack:
        for path in (paths.PARAMS, Path("dvc.lock"), paths.METRICS, paths.CURVES, paths.CONFUSION):
            stack.enter_context(experiment.restored(path, always=not apply))
        shutil.copyfile(sweep.params, paths.PARAMS)
        # Rewritten rather than passed as -S, which merges a mapping such as the phases with what stands there.
        config.write(overrides=best)
        if _exists(label):
            experiment.dvc(["exp", "remove", "--quiet", label])
        if experiment.dvc(["exp", "run", "evaluate", "--quiet", "--name", label]):
            raise SystemExit(1)
        metrics = json.loads(paths.METRICS.read_text(encoding="utf-8"))
    test, run_name = metrics["test"], metrics["run"]["name"]
    return (
        f"trained by the chain with the best settings ({run_name}): test top-1 {test['top1']:.4f} "
        f"({test['top1_low']:.4f} to {test['top1_high']:.4f})\n"
        + ("params.yaml has them now" if apply else f"take them into the workspace: dvc exp apply {label}")
    )


def _exists(label: str) -> bool:
    listed = subprocess.run(["git", "for-each-ref", "refs/exps"], capture_output=True, text=True, check=True).stdout
    return any(line.endswith(f"/{label}") for line in listed.splitlines())
