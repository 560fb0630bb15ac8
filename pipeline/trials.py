"""A sweep's trials: each a training, begun by one of the processes that work on the sweep, stopped, taken up again.

Optuna's database says which trials there are. A trial shows signs of life in it; one that shows none any more, or whose
process was stopped in good order, is queued under a new number, and goes on from its checkpoints.
"""

import json
import math
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from pipeline import config, paths, tracking
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.outbox import reason, without_password
from pipeline.parameters import Config
from pipeline.search_space import Distribution, suggest

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from pipeline.training.job import Job

Pruner = Literal["median", "none"]
HEARTBEAT_S, STALE_S = 15, 60
"""Seconds between two signs of life of a trial, and without one until its process is taken for dead."""
TRIES = 5
"""Times that a trial is begun: one that takes its process with it must not do so for ever."""
FAILED = ("the loss became", "the device's memory does not hold", "train.lr find: the loss falls at no rate")
"""How the mistakes begin that are those of a trial's settings, and none of the sweep's."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep as one process works on it."""

    name: str
    trials: int
    """Over all processes together."""
    space: Mapping[str, Distribution]
    config: Config
    """What the trials have in common."""
    params: Path
    """A copy of params.yaml as it was at the start: editing it does not change the trials that come."""
    store: Store
    worker: int
    """Number of this process among all that have worked on the sweep, from 0."""

    @property
    def folder(self) -> Path:
        return folder_of(self.name)

    @property
    def figure(self) -> str:
        """What trials are judged by."""
        return self.config.train.monitor


def folder_of(name: str) -> Path:
    """Where a sweep's database lies, with the best trial's model and what unfinished trials need."""
    return paths.progress(f"tune-{name}")


def open_study(name: str, *, storage: str, monitor: str, pruner: Pruner) -> "optuna.Study":
    """A sweep in Optuna's database, new or as it was left. To be called by one process at a time.

    Raises:
        UserError: the database cannot be reached or used.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    url = storage or f"sqlite:///{folder_of(name) / 'optuna.db'}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # signs of life are called so
            database = optuna.storages.RDBStorage(
                url,
                # Other processes write, too: wait for them.
                engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
                heartbeat_interval=HEARTBEAT_S,
                grace_period=STALE_S,
                heartbeat_stale_trial_callback=_again,
            )
        return optuna.create_study(
            study_name=name,
            storage=database,
            direction="minimize" if monitor.endswith("loss") else "maximize",
            pruner=optuna.pruners.MedianPruner() if pruner == "median" else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
    except (ImportError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise UserError(without_password(f"--storage {url} cannot be used: {reason(cause)}")) from None


def work(sweep: Sweep, study: "optuna.Study", turn: FileLock) -> bool:
    """Runs trials until there are enough; whether it is this process that is to write the results."""
    from optuna.trial import TrialState

    def objective(trial: "optuna.Trial") -> float:
        turn.release()
        return _trial(sweep, trial)

    worked, deadline = False, math.inf
    while True:
        # Held until the trial stands in the database, so that two processes do not both begin the last one.
        with turn:
            _requeue_stale(study)
            trials = study.get_trials(deepcopy=False)
            waits = any(trial.state == TrialState.WAITING for trial in trials)
            if waits or sum(_counts(trial) for trial in trials) < sweep.trials:
                study.optimize(objective, n_trials=1, callbacks=[lambda study, trial: _told(sweep, study, trial)])
                worked, deadline = True, math.inf
                continue
        if not any(trial.state == TrialState.RUNNING for trial in trials):
            ended = max(filter(_counts, trials), key=lambda trial: (trial.datetime_complete, trial.number))
            return not worked or ended.user_attrs["worker"] == sweep.worker
        # By then, a trial without signs of life is known to have none.
        deadline = min(deadline, time.monotonic() + STALE_S + HEARTBEAT_S)
        if time.monotonic() > deadline:
            return False
        time.sleep(1)


def _counts(trial: "FrozenTrial") -> bool:
    """Whether a trial is one of the number asked for: one that was stopped is not, since it is begun again."""
    return trial.state.name in ("RUNNING", "COMPLETE", "PRUNED") or "failed" in trial.user_attrs


def _requeue_stale(study: "optuna.Study") -> None:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def _again(study: "optuna.Study", trial: "FrozenTrial") -> None:
    """Queues a trial whose process is dead."""
    if (tries := trial.user_attrs.get("tries", 1)) < TRIES:
        _queue(study, trial, tries=tries + 1)


def _queue(study: "optuna.Study", trial: "FrozenTrial", *, tries: int) -> None:
    """Queues a trial that was stopped; it goes on from its checkpoints, which lie under its first number."""
    from optuna.trial import TrialState, create_trial

    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={"first": trial.user_attrs.get("first", trial.number), "tries": tries},
            intermediate_values=trial.intermediate_values,
        )
    )


def _trial(sweep: Sweep, trial: "optuna.Trial") -> float:
    """One training; gives back the figure of the best epoch of its last phase, NaN where its settings failed."""
    import optuna

    from pipeline.training import job
    from pipeline.training.record import Record

    study = trial.study
    trial.set_user_attr("worker", sweep.worker)
    values = {key: suggest(distribution, trial, key) for key, distribution in sweep.space.items()}
    print(f"== {sweep.name}, trial {trial.number}: {_words(values)}", flush=True)
    one = _job(sweep, trial, values)
    try:
        rows = job.run(one)
    except optuna.TrialPruned:
        _mark_pruned(one)
        raise
    except UserError as error:
        if not str(error).startswith(FAILED):
            raise
        trial.set_user_attr("failed", str(error))
        return math.nan  # which Optuna takes for a failed trial
    except SystemExit:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        _queue(study, study.get_trials()[trial.number], tries=trial.user_attrs.get("tries", 1))
        raise
    assert rows is not None
    trial.set_user_attr("run", Record.read(one.out).run_id)
    figures = rows[rows["phase"] == rows["phase"].iloc[-1]][sweep.figure]
    return float(figures.min() if sweep.figure.endswith("loss") else figures.max())


def _job(sweep: Sweep, trial: "optuna.Trial", values: Mapping[str, Any]) -> "Job":
    from pipeline.training.job import Job

    seen = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def watch(metrics: Mapping[str, float], *, step: int) -> None:  # noqa: ARG001, of the optimiser
        import optuna

        if "epoch" not in metrics:
            return
        epoch = int(metrics["epoch"])
        if epoch not in seen:  # a training that was stopped may do an epoch over again
            trial.report(metrics[sweep.figure], epoch)
        if trial.should_prune():
            raise optuna.TrialPruned(f"{epoch}")

    # The net of every trial, as an exported graph, would fill the store.
    given = config.load(sweep.params, overrides={**values, "tracking.log_model": False})
    return Job(
        config=given,
        store=sweep.store,
        out=sweep.folder / f"trial-{trial.number}",
        progress=_working(sweep, trial),
        name=f"tune-{sweep.name}-{trial.number}",
        # Without figures on the test split, it is not to be compared with other runs.
        tags={tracking.SERVES: "tune", "tune": sweep.name, "trial": f"{trial.number}"},
        watch=watch,
    )


def _mark_pruned(one: "Job") -> None:
    """Its run ended as if it had gone wrong."""
    from pipeline.training.progress import STATE

    state = json.loads((one.progress / STATE).read_text(encoding="utf-8"))
    if run := tracking.Run.resume(state["run"], spool=one.progress / "metrics.spool"):
        run.set_tags({"pruned": "true"})
        run.finish("KILLED")


def _told(sweep: Sweep, study: "optuna.Study", trial: "FrozenTrial") -> None:
    """Says in a line what a trial came to, and keeps no model but the best."""
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best = study.best_trial if complete else None
    if trial.state == TrialState.PRUNED:
        told = f"ended after epoch {trial.last_step}: worse than the median"
    elif trial.state == TrialState.FAIL:
        told = f"failed: {trial.user_attrs['failed']}"
    else:
        told = f"{sweep.figure} {trial.value:.4f}"
    if best is not None:
        told += (
            ", the best so far" if best.number == trial.number else f" (best: {best.value:.4f}, trial {best.number})"
        )
    print(f"== {sweep.name}, trial {trial.number}: {told}", flush=True)
    shutil.rmtree(_working(sweep, trial), ignore_errors=True)
    for other in study.get_trials(deepcopy=False):
        if other.state.is_finished() and other.number != (best and best.number):
            shutil.rmtree(sweep.folder / f"trial-{other.number}", ignore_errors=True)


def _working(sweep: Sweep, trial: "optuna.Trial | FrozenTrial") -> Path:
    """What a trial needs to go on, under the number that it had first."""
    return sweep.folder / "working" / f"trial-{trial.user_attrs.get('first', trial.number)}"


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
