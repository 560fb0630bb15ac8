"""MLflow: where runs are kept, and a run that no outage of the store can stop.

The only importer of mlflow, and only inside functions: commands that track nothing stay light. A metric point goes to a
local spool with its timestamp before it goes to MLflow, which keeps a point that is sent again with its own timestamp
once; so after an outage, or a kill, what was not acknowledged is sent again and nothing is lost or doubled.
"""

import copy
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

from filelock import FileLock

from pipeline import machine, paths
from pipeline.errors import UserError
from pipeline.files import fresh_file
from pipeline.outbox import Outbox, Point, Spool, reason, warn, without_password

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow import entities as mlflow_entities
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

Status = Literal["FINISHED", "FAILED", "KILLED"]

PARENT = "THAW_PARENT_RUN"
"""Environment variable with the id of the run that new runs are children of."""
PARENT_TAG = "mlflow.parentRunId"
SERVES = "serves"
"""Tag of a run that trains no classifier of its own: what it is for, such as study, crossval, tune or restore."""
SEND_EVERY = 5.0
"""Seconds between two batches of metric points."""
BATCH = 200
"""Points in one exchange with the store."""
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow's own 7 retries of 120 s hold a training up for minutes; the spool is what survives an outage.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Helper processes beside the UI, for language-model features.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
QUIET = {
    # Tells of each step in creating a store.
    "mlflow.store.db.utils": logging.WARNING,
    # Tells of its start and end, and of an outage again and again.
    "mlflow.system_metrics.system_metrics_monitor": logging.CRITICAL,
    # Warns at each retry; the outage has its one warning here.
    "urllib3.connectionpool": logging.ERROR,
}


def store_uri() -> str:
    """MLFLOW_TRACKING_URI if set, else the sqlite file in the repository, absolute wherever the process works."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.root() / 'mlflow.db'}"


def ensure_store() -> None:
    """Creates the sqlite store if there is none; any other store is its server's affair.

    MLflow's migrations, run by several processes at once, break a sqlite store for good, and a half-migrated one looks
    like a store. So one process creates it under a lock and renames it into place: what is there is whole, and is
    taken without a lock.
    """
    database = _database(store_uri())
    if database is None or database.exists():
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        if not database.exists():
            with fresh_file(database) as beside, _importing_mlflow():
                from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

                store = SqlAlchemyStore(f"sqlite:///{beside}", _artifacts(database))  # type: ignore[no-untyped-call]
                store.engine.dispose()


@contextmanager
def ending(run: "Run") -> Iterator[None]:
    """Ends a run with its block: FINISHED, KILLED where the block was stopped, FAILED where it went wrong."""
    try:
        yield
    except SystemExit as stop:
        run.finish("FAILED" if stop.code == 1 else "KILLED")
        raise
    except KeyboardInterrupt:
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


class Run:
    """An MLflow run. Only `start` and `resume` can fail for want of the store; nothing after them stops training.

    Metric points are sent by a thread beside training. Those that the store has not taken wait in the spool, for
    `finish` or for the next `resume` with the same spool. Params, tags, artifacts and the model wait in memory for
    `finish`, which names what could not be sent. The tag `minutes` adds up the time between `start` or `resume` and
    `finish`.
    """

    def __init__(self, client: "MlflowClient", run: "mlflow_entities.Run", *, spool: Path) -> None:
        self.id: str = run.info.run_id
        self.name: str = run.info.run_name
        self._client = client
        self._uri = store_uri()
        self._experiment_id: str = run.info.experiment_id
        self._params = set(run.data.params)
        self._minutes = float(run.data.tags.get("minutes", 0.0))
        self._began = time.monotonic()
        self._spool = Spool(spool, run_id=self.id)
        self._outbox = Outbox(f"MLflow at {self._uri}", failures=_failures())
        self._next_send = 0.0
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        self._sending: Future[None] | None = None
        self._monitor: SystemMetricsMonitor | None = None

    @classmethod
    def start(cls, *, experiment: str, name: str, tags: Mapping[str, str], spool: Path) -> "Run":
        """A new run, RUNNING. `spool` is the file that its metric points pass through.

        It is a child of the run that the environment variable THAW_PARENT_RUN names, if any.

        Raises:
            UserError: the store cannot be reached or used; nothing has been trained yet.
        """
        try:
            client = _client()
            experiment_id = _experiment(client, experiment)
            parent = {PARENT_TAG: os.environ[PARENT]} if os.environ.get(PARENT) else {}
            run = client.create_run(experiment_id, tags={**tags, **parent}, run_name=name)
        except _failures() as error:
            _refuse(error)
        return cls(client, run, spool=spool)

    @classmethod
    def resume(cls, run_id: str, *, spool: Path) -> "Run | None":
        """The run set RUNNING again, once what its spool still holds is sent; None if the store has no such run.

        Raises:
            UserError: the store cannot be reached or used.
        """
        try:
            client = _client()
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "deleted":
                return None
            client.update_run(run_id, status="RUNNING")
        except _failures() as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return None
            _refuse(error)
        resumed = cls(client, run, spool=spool)
        resumed._send()
        return resumed

    def log_params(self, params: Mapping[str, object]) -> None:
        """Flat params, cut at MLflow's limit. One that the run has already stays: MLflow refuses a change."""
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        new = {key: str(value)[:MAX_PARAM_VAL_LENGTH] for key, value in params.items() if key not in self._params}
        self._params |= set(new)
        entries = [Param(key, value) for key, value in new.items()]
        self._do("params", partial(self._client.log_batch, self.id, params=entries))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags, in place of those of the same name."""
        from mlflow.entities import RunTag

        entries = [RunTag(key, value) for key, value in tags.items()]
        self._do("tags", partial(self._client.log_batch, self.id, tags=entries))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int, once: bool = False) -> None:
        """Metrics of one step, stamped with the present; names as `test/top1`, since MLflow strips `@`.

        With `once`, what this run has logged of these names at this step, before a stop perhaps, is not logged again.
        """
        assert not any("@" in name for name in metrics)
        if once and self._spool.knows(step, metrics):
            return
        self._spool.add(Point(int(time.time() * 1000), step, {name: float(value) for name, value in metrics.items()}))
        if self._sending is not None and not self._sending.done():
            return  # the one on its way takes this point, or the next one does
        if not self._outbox.rests and time.monotonic() >= self._next_send:
            self._settle()
            self._sending = self._sender.submit(self._send)

    def sync(self) -> None:
        """Sees that the points so far outlast a power cut: what a checkpoint has behind it is not logged again."""
        self._spool.sync()

    def log_artifact(self, path: Path, *, folder: str = "") -> None:
        """A file or folder, under `folder` of the run's artifacts."""
        assert path.exists()
        self._do(f"artifact {path}", partial(self._client.log_artifact, self.id, str(path), folder or None))

    def log_text(self, text: str, *, name: str) -> None:
        """A text as the artifact `name`."""
        self._do(f"artifact {name}", partial(self._client.log_text, self.id, text, name))

    def log_model(self, net: "torch.nn.Module", *, example: "torch.Tensor", classes: Sequence[str]) -> None:
        """The net as an exported graph (pt2), which loads without this project's code and takes any batch size.

        `example` is a batch of two or more pictures, (N, C, H, W), since export freezes a batch of one; it is kept with
        the model, to two decimals. The names of the classes stand in the model's metadata.
        """
        import torch

        assert len(example) >= 2
        # A copy: the device, mode and memory format of training stay, and a later retry logs the net of now.
        frozen = copy.deepcopy(net).to("cpu").to(memory_format=torch.contiguous_format).eval()
        pictures = example.detach().cpu().contiguous()
        self._do("the model", partial(self._upload_model, frozen, pictures, list(classes)))

    def include(self, run_id: str, *, name: str, metrics: Mapping[str, float]) -> None:
        """Shows a run of another parent under this one: as a child that names it (tag copy_of) and has its metrics.

        A result out of DVC's cache was made by an earlier run, and MLflow gives a run one parent.
        """
        self._do(f"child {name}", partial(self._include, run_id, name, dict(metrics)))

    @contextmanager
    def adopting(self) -> Iterator[None]:
        """Runs that the block starts, in this process or in ones of its own, are children of this one."""
        os.environ[PARENT] = self.id
        try:
            yield
        finally:
            del os.environ[PARENT]

    def start_system_metrics(self) -> None:
        """Logs the use of processor, memory, disk and network every 10 s, until `finish` or until the store fails."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.id, resume_logging=True, tracking_uri=self._uri)  # type: ignore[no-untyped-call]
        monitor.start()  # type: ignore[no-untyped-call]
        self._monitor = monitor

    def finish(self, status: Status) -> None:
        """Sends what waits, then ends the run; one line names what could not be sent."""
        if self._monitor is not None:
            self._monitor.finish()  # type: ignore[no-untyped-call]
        self._settle()
        self._sender.shutdown()
        minutes = self._minutes + (time.monotonic() - self._began) / 60
        # One probe, so that a dead server costs one timeout and not one for each thing that waits.
        alive = self._outbox.attempt(partial(self._client.get_run, self.id))
        if alive:
            self._send()
            self.set_tags({"minutes": f"{minutes:.2f}"})
        lost = self._outbox.drain(alive=alive)
        if not (alive and self._outbox.attempt(partial(self._client.set_terminated, self.id, status))):
            lost.append(f"status {status}")
        if self._spool.waiting:
            lost.append(f"{len(self._spool.waiting)} points of metrics, kept in {self._spool.path} for its next resume")
        if lost:
            warn(f"run {self.id}: not sent to MLflow at {self._uri}: {', '.join(lost)}")

    def _include(self, run_id: str, name: str, metrics: dict[str, float]) -> None:
        query = f"tags.`{PARENT_TAG}` = '{self.id}'"
        children = self._client.search_runs([self._experiment_id], filter_string=query, max_results=1000)
        if any(run_id in (child.info.run_id, child.data.tags.get("copy_of")) for child in children):
            return
        tags = {PARENT_TAG: self.id, SERVES: "study", "copy_of": run_id}
        child = self._client.create_run(self._experiment_id, tags=tags, run_name=name)
        for key, value in metrics.items():
            self._client.log_metric(child.info.run_id, key, value)
        self._client.set_terminated(child.info.run_id)

    def _do(self, what: str, call: Callable[[], object]) -> None:
        self._settle()
        self._outbox.do(what, call)

    def _settle(self) -> None:
        """Waits for the points on their way: the outbox is used by one thread at a time."""
        if self._sending is not None:
            self._sending.result()
            self._sending = None

    def _send(self) -> None:
        from mlflow.entities import Metric

        while batch := self._spool.waiting[:BATCH]:
            metrics = [Metric(name, value, p.time, p.step) for p in batch for name, value in p.metrics.items()]
            # Else a power cut could leave it with the store alone, and the step that is taken again would double it.
            self._spool.sync()
            if not self._outbox.attempt(partial(self._client.log_batch, self.id, metrics=metrics)):
                return
            self._spool.acknowledge(len(batch))
        self._next_send = time.monotonic() + SEND_EVERY

    def _upload_model(self, net: "torch.nn.Module", pictures: "torch.Tensor", classes: list[str]) -> None:
        from mlflow.entities import LoggedModelOutput

        model = self._client.create_logged_model(self._experiment_id, name="model", source_run_id=self.id)
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            try:
                _export(net, folder, pictures=pictures, classes=classes, run_id=self.id, model_id=model.model_id)
            except (RuntimeError, ValueError) as error:
                self._client.finalize_logged_model(model.model_id, "FAILED")
                warn(f"run {self.id}: the model is not in MLflow, torch cannot export it: {reason(error)}")
                return
            self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.id, [LoggedModelOutput(model.model_id, step=0)])


class RunRow(NamedTuple):
    """A run as MLflow keeps it."""

    id: str
    name: str
    experiment: str
    status: str
    """RUNNING, SCHEDULED, FINISHED, FAILED or KILLED."""
    start: int
    """Milliseconds since the epoch."""
    end: int | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    """The latest value of each."""


def runs(experiment: str | None = None) -> list[RunRow]:
    """The runs of one experiment, or of all, newest first; none where the store or the experiment does not exist.

    Raises:
        UserError: the store cannot be reached or used.
    """
    database = _database(store_uri())
    if database is not None and not database.exists():
        return []
    found: list[mlflow_entities.Run] = []
    try:
        client = _client()
        names = {known.experiment_id: known.name for known in client.search_experiments()}
        wanted = [key for key, name in names.items() if experiment in (None, name)]
        token: str | None = "" if wanted else None
        while token is not None:
            page = client.search_runs(wanted, page_token=token or None)
            found += page
            token = page.token or None
    except _failures() as error:
        _refuse(error)
    rows = []
    for run in found:
        info, data = run.info, run.data
        head = (info.run_id, info.run_name or "", names[info.experiment_id], info.status)
        rows.append(RunRow(*head, info.start_time, info.end_time, data.params, data.tags, data.metrics))
    return rows


def ui(port: int = 5000, *, host: str = "127.0.0.1") -> None:
    """Becomes MLflow's web server on the local store, until stopped; for a store that is a server, says where it is.

    Raises:
        UserError: the port is taken.
    """
    uri = store_uri()
    if uri.startswith(("http://", "https://")):
        print(f"The runs are at {without_password(uri)}: open it in a browser.")
        return
    ensure_store()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot serve at {host}:{port}: {error.strerror}; name another port") from None
    os.environ.update(ENVIRONMENT | os.environ)
    print(f"MLflow is at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", host]
    command += ["--port", str(port), "--workers", "1"]
    if database := _database(uri):
        command += ["--default-artifact-root", _artifacts(database), "--no-serve-artifacts"]
    os.execv(sys.executable, command)


def _database(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _artifacts(database: Path) -> str:
    return (database.parent / "mlartifacts").as_uri()


@contextmanager
def _importing_mlflow() -> Iterator[None]:
    """MLflow takes its settings when it is imported."""
    os.environ.update(ENVIRONMENT | os.environ)
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    first = "mlflow" not in sys.modules
    with warnings.catch_warnings(), machine.large_import() if first else nullcontext():
        # Of MLflow's own tables, and of the type hints of its own classes.
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*Any type hint is inferred as AnyType", UserWarning)
        yield


def _client() -> "MlflowClient":
    ensure_store()
    with _importing_mlflow():
        from mlflow import MlflowClient

        return MlflowClient(store_uri())


def _experiment(client: "MlflowClient", name: str) -> str:
    database = _database(store_uri())
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=_artifacts(database) if database else None)
        except _failures() as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
        return _experiment(client, name)  # another process was quicker
    if found.lifecycle_stage == "deleted":
        raise UserError(f"tracking.experiment: {name!r} was deleted in MLflow; restore it there, or name another")
    return str(found.experiment_id)


def _export(
    net: "torch.nn.Module", folder: Path, *, pictures: "torch.Tensor", classes: list[str], run_id: str, model_id: str
) -> None:
    """Writes the model as MLflow keeps it, with signature, input example and requirements."""
    import numpy as np

    with _importing_mlflow():  # saving imports more of it
        from mlflow.models import Model, ModelSignature
        from mlflow.pytorch import save_model
        from mlflow.types import Schema, TensorSpec

        # Unnamed tensors: named ones reach the model as a dictionary, which MLflow's loader of torch models refuses.
        inputs = Schema([TensorSpec(np.dtype("float32"), (-1, *pictures.shape[1:]))])
        outputs = Schema([TensorSpec(np.dtype("float32"), (-1, len(classes)))])
        save_model(
            net,
            str(folder),
            mlflow_model=Model(run_id=run_id, model_uuid=model_id, model_id=model_id),
            signature=ModelSignature(inputs, outputs),
            # Kept as text: in full, two pictures of 224 px take 15 MB.
            input_example=np.round(pictures.numpy(), 2),
            # Named, since MLflow otherwise loads the model in another process to see what it imports.
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in ("mlflow", "torch", "numpy")],
            metadata={"classes": classes},
            serialization_format="pt2",
        )


def _failures() -> tuple[type[Exception], ...]:
    """What a store that is away, refuses or is broken raises; the errors of requests are OSErrors."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


def _refuse(error: Exception) -> NoReturn:
    """The one line for a store that fails before anything is at stake."""
    database = _database(store_uri())
    mend = f"see that {database} can be written" if database else "start its server, or unset MLFLOW_TRACKING_URI"
    message = f"tracking store {store_uri()} cannot be used: {reason(error)}; {mend}"
    raise UserError(without_password(message)) from None
