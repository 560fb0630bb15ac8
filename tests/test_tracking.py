import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import tracking
from pipeline.errors import UserError

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One store for the module: MLflow takes a second or two to create one."""
    root = tmp_path_factory.mktemp("a repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield root


def start(tmp_path: Path, *, experiment: str = "thaw", tags: dict[str, str] | None = None) -> tracking.Run:
    return tracking.Run.start(experiment=experiment, name="lenet-1", tags=tags or {}, spool=tmp_path / "spool.jsonl")


def history(run_id: str, key: str) -> list[tuple[int, int, float]]:
    points = tracking._client().get_metric_history(run_id, key)
    return [(point.timestamp, point.step, point.value) for point in points]


def only(experiment: str) -> tracking.RunRow:
    (row,) = tracking.runs(experiment)
    return row


class Unsteady:
    """A client whose calls fail, while it is away, as they do when the server is gone."""

    def __init__(self, client: object) -> None:
        self.client, self.away, self.failed = client, True, 0

    def __getattr__(self, name: str):
        def call(*args: object, **named: object) -> object:
            from mlflow.exceptions import MlflowException

            if self.away:
                self.failed += 1
                raise MlflowException(f"API request to {name} failed\nsecond line")
            return getattr(self.client, name)(*args, **named)

        return call


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Unexportable(Tiny):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if x.sum().item() > 0 else 3)


def test_importing_it_imports_neither_mlflow_nor_torch() -> None:
    code = "import pipeline.tracking, sys; sys.exit(bool({'mlflow', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_the_store_is_anchored_at_the_repository(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.store_uri() == f"sqlite:///{store}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking.store_uri() == "http://tracking:5000"


@pytest.mark.slow
def test_processes_that_meet_at_a_fresh_store_all_get_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.tracking import Run\n"
        "run = Run.start(experiment='thaw', name=sys.argv[1], tags={}, spool=Path(sys.argv[1]))\n"
        "run.log_metrics({'val/loss': 0.5}, step=1); run.finish('FINISHED')"
    )
    environment = os.environ | {"DVC_ROOT": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"run-{n}"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
        )
        for n in range(4)
    ]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in processes] == [(b"", 0)] * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(tmp_path))
        rows = tracking.runs("thaw")
    assert sorted((row.name, row.status, row.metrics["val/loss"]) for row in rows) == [
        (f"run-{n}", "FINISHED", 0.5) for n in range(4)
    ]


def test_looking_for_runs_creates_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert tracking.runs() == []
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_what_is_logged(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "curves.csv").write_text("a,b\n")
    run = start(tmp_path, experiment="whole", tags={"weights": "imagenet"})
    run.log_params({"model.name": "lenet", "train.batch_size": 64, "train.transforms": "x" * 10_000})
    run.log_metrics({"val/loss": 0.5, "val/top1": 0.25}, step=1)
    run.log_metrics({"val/loss": float("nan")}, step=2)
    run.log_artifact(tmp_path / "curves.csv", folder="plots")
    run.log_text("data: {}\n", name="params.yaml")
    run.finish("FINISHED")

    row = only("whole")
    assert (row.id, row.name, row.experiment, row.status) == (run.id, "lenet-1", "whole", "FINISHED")
    assert row.params == {"model.name": "lenet", "train.batch_size": "64", "train.transforms": "x" * 6000}
    assert row.tags["weights"] == "imagenet"
    assert float(row.tags["minutes"]) < 1
    assert row.metrics["val/top1"] == 0.25
    assert [step for _, step, _ in history(run.id, "val/loss")] == [1, 2]
    artifacts = store / "mlartifacts" / run.id / "artifacts"
    assert (artifacts / "plots/curves.csv").read_text() == "a,b\n"
    assert (artifacts / "params.yaml").read_text() == "data: {}\n"
    assert capfd.readouterr().err == ""
    assert tracking.runs("nowhere") == []
    assert run.id in {row.id for row in tracking.runs()}


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    first = start(tmp_path, experiment="resumed")
    first.log_params({"train.seed": 0})
    first.finish("KILLED")
    tracking._client().set_tag(first.id, "minutes", "1.00")

    resumed = tracking.Run.resume(first.id, spool=tmp_path / "spool.jsonl")
    assert resumed is not None
    assert only("resumed").status == "RUNNING"
    resumed.log_params({"train.seed": 1, "train.workers": 2})
    resumed.finish("FINISHED")
    row = only("resumed")
    assert row.params == {"train.seed": "0", "train.workers": "2"}
    assert (row.status, row.tags["minutes"]) == ("FINISHED", "1.00")


def test_a_run_of_another_store_is_not_resumed(tmp_path: Path) -> None:
    gone = start(tmp_path, experiment="deleted run")
    tracking._client().delete_run(gone.id)
    assert tracking.Run.resume(gone.id, spool=tmp_path / "spool.jsonl") is None
    assert tracking.Run.resume("0" * 32, spool=tmp_path / "spool.jsonl") is None


def test_an_outage_loses_no_point(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path, experiment="outage")
    run.log_metrics({"val/loss": 0.9}, step=0)
    run._settle()
    client = run._client
    run._client = unsteady = Unsteady(client)
    run._next_send = 0.0
    before = int(time.time() * 1000)
    for step in range(1, 100):
        run.log_metrics({"val/loss": 0.5}, step=step)
    after = int(time.time() * 1000)
    run.log_text("text", name="report.md")
    assert unsteady.failed == 1, "the server is let alone between two tries"
    run.finish("FINISHED")
    warning, lost = capfd.readouterr().err.splitlines()
    assert warning.startswith("WARNING: MLflow at sqlite:")
    assert warning.endswith("is sent later: API request to log_batch failed")
    assert "artifact report.md, status FINISHED, 99 points of metrics, kept in" in lost
    assert len(history(run.id, "val/loss")) == 1

    time.sleep(0.01)
    resumed = tracking.Run.resume(run.id, spool=tmp_path / "spool.jsonl")
    assert resumed is not None
    points = history(run.id, "val/loss")[1:]
    assert [(step, value) for _, step, value in points] == [(step, 0.5) for step in range(1, 100)]
    assert all(before <= at <= after for at, _, _ in points)
    assert client.get_run(run.id).info.status == "RUNNING"


def test_what_waits_is_sent_at_the_end_of_an_outage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path, experiment="recovered")
    run._client = unsteady = Unsteady(run._client)
    run.log_metrics({"val/loss": 0.5}, step=1)
    run.set_tags({"weights": "imagenet"})
    unsteady.away = False
    run.finish("FINISHED")
    row = only("recovered")
    assert (row.status, row.metrics, row.tags["weights"]) == ("FINISHED", {"val/loss": 0.5}, "imagenet")
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_point_sent_twice_is_kept_once(tmp_path: Path) -> None:
    run = start(tmp_path, experiment="twice")
    for step in range(3):
        run.log_metrics({"val/loss": 0.5, "val/top1": float("nan")}, step=step)
    run.finish("FINISHED")
    spool = tmp_path / "spool.jsonl"
    lines = spool.read_text().splitlines()
    spool.write_text("\n".join(line for line in lines if "sent" not in json.loads(line)))
    assert tracking.Run.resume(run.id, spool=spool) is not None
    assert [step for _, step, _ in history(run.id, "val/loss")] == [0, 1, 2]
    assert [step for _, step, _ in history(run.id, "val/top1")] == [0, 1, 2]


def test_a_point_is_on_disk_before_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path)
    happened: list[str] = []
    send, sync = run._client.log_batch, run._spool.sync
    monkeypatch.setattr(run._client, "log_batch", lambda *a, **k: (happened.append("sent"), send(*a, **k)))
    monkeypatch.setattr(run._spool, "sync", lambda: (happened.append("synced"), sync()))
    run.log_metrics({"val/loss": 0.5}, step=1)
    run._settle()
    assert happened == ["synced", "sent"]
    run.sync()
    assert happened[2:] == ["synced"]
    run.finish("FINISHED")


def test_a_server_that_is_not_there_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    began = time.monotonic()
    for attempt in (
        lambda: start(tmp_path),
        lambda: tracking.Run.resume("0" * 32, spool=tmp_path / "s"),
        tracking.runs,
    ):
        with pytest.raises(UserError) as error:
            attempt()
        line = str(error.value)
        assert line.startswith(f"tracking store http://127.0.0.1:{port} cannot be used: ")
        assert line.endswith("; start its server, or unset MLFLOW_TRACKING_URI")
        assert "secret" not in line
        assert "\n" not in line
    assert time.monotonic() - began < 10


def test_a_deleted_experiment_is_named(tmp_path: Path) -> None:
    start(tmp_path, experiment="bin").finish("FINISHED")
    client = tracking._client()
    client.delete_experiment(client.get_experiment_by_name("bin").experiment_id)
    with pytest.raises(UserError, match=r"^tracking\.experiment: 'bin' was deleted in MLflow; restore it there"):
        start(tmp_path, experiment="bin")


def logged_model(store: Path) -> Path:
    (folder,) = (store / "mlartifacts/models").iterdir()
    return folder / "artifacts"


def test_the_model_loads_back_with_the_same_logits(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    torch.manual_seed(0)
    net = Tiny().to(memory_format=torch.channels_last)
    net(torch.rand(8, 3, 16, 16))
    run = start(tmp_path, experiment="model")
    run.log_model(net, example=torch.rand(2, 3, 16, 16), classes=["cat", "dog"])
    run.finish("FINISHED")
    assert net.training
    assert capfd.readouterr().err == ""

    folder = logged_model(store)
    model, generic = mlflow.pytorch.load_model(str(folder)), mlflow.pyfunc.load_model(str(folder))
    assert generic.metadata.metadata == {"classes": ["cat", "dog"]}
    assert generic.metadata.get_input_schema().inputs[0].shape == (-1, 3, 16, 16)
    net.eval()
    for batch in (1, 2, 5):
        pictures = torch.rand(batch, 3, 16, 16)
        with torch.no_grad():
            expected = net(pictures)
            torch.testing.assert_close(model(pictures), expected)
        np.testing.assert_allclose(generic.predict(pictures.numpy()), expected.numpy(), rtol=1e-4, atol=1e-6)
    (found,) = tracking._client().search_logged_models([run._experiment_id])
    assert (found.source_run_id, found.status, found.name) == (run.id, "READY", "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_nets_of_timm_load_back_with_the_same_logits(name: str, tmp_path: Path) -> None:
    import mlflow
    import timm

    net = timm.create_model(name, num_classes=3).eval()
    px = net.pretrained_cfg["input_size"][-1]
    tracking._export(
        net, tmp_path / "model", pictures=torch.rand(2, 3, px, px), classes=["a", "b", "c"], run_id="r", model_id="m"
    )
    model = mlflow.pytorch.load_model(str(tmp_path / "model"))
    for batch in (1, 2, 5):
        pictures = torch.rand(batch, 3, px, px)
        with torch.no_grad():
            torch.testing.assert_close(model(pictures), net(pictures), rtol=1e-4, atol=1e-3)


def test_a_net_that_cannot_be_exported_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path, experiment="unexportable")
    run.log_model(Unexportable(), example=torch.rand(2, 3, 16, 16), classes=["cat", "dog"])
    run.finish("FINISHED")
    assert only("unexportable").status == "FINISHED"
    line = capfd.readouterr().err.splitlines()[-1]  # torch prints the graph first
    assert line.startswith(f"WARNING: run {run.id}: the model is not in MLflow, torch cannot export it: ")


def test_system_metrics_end_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    run = start(tmp_path, experiment="system")
    run.start_system_metrics()
    assert "SystemMetricsMonitor" in {thread.name for thread in threading.enumerate()}
    deadline = time.monotonic() + 10
    while not only("system").metrics and time.monotonic() < deadline:
        time.sleep(0.05)
    run.finish("FINISHED")
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}
    assert "system/cpu_utilization_percentage" in only("system").metrics


def test_mlflow_reports_to_nobody(tmp_path: Path) -> None:
    start(tmp_path).finish("FINISHED")
    from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY

    assert MLFLOW_DISABLE_TELEMETRY.get() is True
    assert logging.getLogger("urllib3.connectionpool").level == logging.ERROR


def test_the_ui_serves_the_store(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot serve at 127.0.0.1:{port}: Address already in use"):
            tracking.ui(port)
    tracking.ui(port)
    assert capsys.readouterr().out == f"MLflow is at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
    (command,) = commands
    options = dict(zip(command[4:-1:2], command[5::2], strict=True))
    assert options["--backend-store-uri"] == f"sqlite:///{store}/mlflow.db"
    assert options["--default-artifact-root"] == (store / "mlartifacts").as_uri()


def test_the_ui_of_a_server_is_the_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracking:5000")
    tracking.ui(5000)
    assert capsys.readouterr().out == "The runs are at http://tracking:5000: open it in a browser.\n"
