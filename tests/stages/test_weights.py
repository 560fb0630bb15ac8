import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save

from pipeline import config, nets, paths
from pipeline.errors import UserError
from pipeline.parameters import Config
from pipeline.stages import weights as stage
from pipeline.training import pretrained
from pipeline.training.pretrained import Found, Origin
from pipeline.training.weights import load_pretrained, read_state, save_state

TOP = Path(__file__).parents[2]
HUB_NET = "test_resnet"
REASONS = (("the hub", "hub.example [Errno -3] cannot be reached"), ("package p", "pip is not here"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def configured(**model: Any) -> Config:
    return config.load(TOP / "params.yaml", overrides={f"model.{key}": value for key, value in model.items()})


def sources(monkeypatch: pytest.MonkeyPatch, found: Found | None, tried: tuple[tuple[str, str], ...] = ()) -> None:
    monkeypatch.setattr(pretrained, "find", lambda _name: (found, tried))


def state_of(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return nets.build(name, num_classes=5).state_dict()


def test_file_is_taken_before_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pretrained, "find")
    state = state_of("scratch/lenet5")
    torch.save({"state_dict": state}, tmp_path / "mine.pth")
    for chosen in (True, "auto"):
        stage.run(configured(name="scratch/lenet5", weights="mine.pth", pretrained=chosen))
        folder = paths.pretrained("scratch/lenet5")
        origin = Origin.read(folder)
        written = (folder / "weights.safetensors").read_bytes()
        digest = hashlib.sha256(written).hexdigest()
        assert origin == Origin(start="file", source="mine.pth", sha256=digest)
        load_pretrained(nets.build("scratch/lenet5", num_classes=7), read_state(folder / "weights.safetensors"))
        assert all(torch.equal(t, state[k]) for k, t in read_state(folder / "weights.safetensors").items())


def test_file_that_is_missing_or_another_net_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^gone.pth: no such file of weights$"):
        stage.run(configured(name="scratch/lenet5", weights="gone.pth"))
    save_state(tmp_path / "other.safetensors", state_of("scratch/resnet20"))
    with pytest.raises(UserError, match=r"^other.safetensors, as weights of scratch/lenet5: the weights do not fit"):
        stage.run(configured(name="scratch/lenet5", weights="other.safetensors"))
    assert not paths.pretrained("scratch/lenet5").exists()


def test_file_and_pretrained_false_contradict_each_other() -> None:
    with pytest.raises(UserError, match=r"^model.pretrained is false, but model.weights is mine.pth"):
        stage.run(configured(name="scratch/lenet5", weights="mine.pth", pretrained=False))


def test_weights_of_a_source_are_written_with_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(HUB_NET)
    sources(monkeypatch, Found(state=state, source="a source"), REASONS[:1])
    stage.run(configured(name=HUB_NET))
    origin = Origin.read(paths.pretrained(HUB_NET))
    assert (origin.start, origin.source, origin.tried) == ("pretrained", "a source", REASONS[:1])
    written = read_state(paths.pretrained(HUB_NET) / "weights.safetensors")
    assert all(torch.equal(written[key], state[key]) for key in state)


def test_weights_of_a_source_that_lie_here_whole_are_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sources(monkeypatch, Found(state=state_of(HUB_NET), source="a source"))
    stage.run(configured(name=HUB_NET))
    file = paths.pretrained(HUB_NET) / "weights.safetensors"
    before = file.stat()
    with monkeypatch.context() as patch:
        patch.delattr(pretrained, "find")
        stage.run(configured(name=HUB_NET, pretrained=True))
        assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    stage.run(configured(name=HUB_NET))
    assert file.read_bytes() == whole
    stage.run(configured(name=HUB_NET, pretrained=False))
    assert not file.exists()


def test_auto_without_a_source_starts_at_random_and_says_so_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state(tmp_path / "mine.safetensors", state_of(HUB_NET))
    stage.run(configured(name=HUB_NET, weights="mine.safetensors"))
    sources(monkeypatch, None, REASONS)
    stage.run(configured(name=HUB_NET, pretrained="auto"))
    folder = paths.pretrained(HUB_NET)
    assert Origin.read(folder) == Origin(start="random", source="no source had weights", tried=REASONS)
    assert [path.name for path in folder.iterdir()] == ["origin.json"]
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "RANDOM weights" in said
    assert all(f"{source}: {reason}" in said for source, reason in REASONS)
    assert "dvc repro -f weights" in said


def test_pretrained_true_without_a_source_is_refused_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sources(monkeypatch, None, REASONS)
    with pytest.raises(UserError) as refused:
        stage.run(configured(name=HUB_NET, pretrained=True))
    message = str(refused.value)
    assert message.startswith(f"no pretrained weights for {HUB_NET}: the hub: hub.example")
    assert all(reason in message for _, reason in REASONS)
    assert "model.weights=FILE" in message
    assert "\n" not in message
    assert not paths.pretrained(HUB_NET).exists()


def test_a_net_of_ours_starts_from_its_reference_s_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    torch.manual_seed(0)
    state = timm.create_model("resnet18", num_classes=1000).state_dict()

    def from_hub(name: str) -> Found:
        asked.append(name)
        return Found(state=state, source="the hub")

    monkeypatch.setattr(pretrained, "from_hub", from_hub)
    stage.run(configured(name="scratch/resnet18", pretrained="auto"))
    assert asked == ["resnet18.tv_in1k"]
    folder = paths.pretrained("scratch/resnet18")
    assert Origin.read(folder).start == "pretrained"
    load_pretrained(nets.build("scratch/resnet18", num_classes=7), read_state(folder / "weights.safetensors"))


def test_another_stem_has_no_published_weights() -> None:
    with pytest.raises(UserError, match=r"^no source has weights for scratch/resnet18 with stem cifar; give"):
        stage.run(configured(name="scratch/resnet18", stem="cifar", pretrained=True))


def test_scratch_net_has_no_source_to_try() -> None:
    stage.run(configured(name="scratch/resnet20", pretrained="auto"))
    origin = Origin.read(paths.pretrained("scratch/resnet20"))
    assert (origin.start, origin.sha256, origin.tried) == ("random", "", ())
    with pytest.raises(UserError, match=r"^no source has weights for scratch/resnet20; give model.weights=FILE"):
        stage.run(configured(name="scratch/resnet20", pretrained=True))
    with pytest.raises(UserError, match=r"^scratch/resnet2O: no such net; did you mean .*scratch/resnet20"):
        stage.run(configured(name="scratch/resnet2O"))


def run_in_process(code: str, *, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "http", "HTTP"))}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; from pathlib import Path; from pipeline import config\n{code}"],
        env={**inherited, "PYTHONPATH": str(TOP), **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_to_fetch_loads_neither_torch_nor_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    sources(monkeypatch, Found(state=state_of(HUB_NET), source="a source"))
    stage.run(configured(name=HUB_NET))
    done = run_in_process(
        f"from pipeline.stages import weights; params = Path({str(TOP / 'params.yaml')!r})\n"
        "weights.run(config.load(params, overrides={'model.name': 'resnet50', 'model.pretrained': False}))\n"
        "weights.run(config.load(params, overrides={'model.name': 'scratch/lenet5'}))\n"
        f"weights.run(config.load(params, overrides={{'model.name': {HUB_NET!r}}}))\n"
        "print(sorted({'torch', 'timm', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    for name in ("resnet50", "scratch/lenet5"):
        assert json.loads((paths.pretrained(name) / "origin.json").read_text())["start"] == "random"


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as serves one file."""

    content = b""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        known = self.path == f"/timm/{HUB_NET}.r160_in1k/resolve/main/model.safetensors"
        content = self.content if known else b""
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@pytest.fixture
def hub_url() -> Iterator[str]:
    torch.manual_seed(3)
    Hub.content = save(nets.build(HUB_NET, num_classes=1000).state_dict())
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_weights_come_from_the_hub_and_then_from_its_cache(hub_url: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    served = nets.build(HUB_NET, num_classes=1000).state_dict()
    code = (
        "from pipeline.stages import weights\n"
        f"params = config.load(Path({str(TOP / 'params.yaml')!r}),"
        f" overrides={{'model.name': {HUB_NET!r}, 'model.pretrained': True}})\n"
        "weights.run(params)\n"
        "from pipeline import paths\n"
        "from huggingface_hub import constants\n"
        f"first = (paths.pretrained({HUB_NET!r}) / 'weights.safetensors').read_bytes()\n"
        "constants.ENDPOINT = 'http://127.0.0.1:9'\n"
        "weights.run(params)\n"
        f"assert (paths.pretrained({HUB_NET!r}) / 'weights.safetensors').read_bytes() == first\n"
    )
    environment = {"HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = run_in_process(code, environment=environment)
    assert done.returncode == 0, done.stderr
    assert f"{HUB_NET}: pretrained weights ({hub_url}/timm/{HUB_NET}.r160_in1k)" in done.stderr
    folder = paths.pretrained(HUB_NET)
    assert Origin.read(folder).start == "pretrained"
    written = read_state(folder / "weights.safetensors")
    assert written.keys() == served.keys()
    assert all(torch.equal(written[key], served[key]) for key in served)
