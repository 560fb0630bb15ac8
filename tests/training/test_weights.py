import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline import nets
from pipeline.errors import UserError
from pipeline.training.weights import (
    ModelCard,
    load_model,
    load_pretrained,
    read_card,
    read_classes,
    read_state,
    save_model,
)

TOP = Path(__file__).parents[2]
NETS = ["scratch/lenet5", "scratch/resnet20", "test_resnet", "test_vit"]
PX = {"test_vit": 160}
CARD = ModelCard(
    name="scratch/lenet5",
    in_chans=1,
    stem="default",
    classes=("ant", "bee", "Käfer"),
    px=32,
    pack_px=40,
    mean=(0.1,),
    std=(0.3,),
    start="random",
    start_source="model.pretrained is false",
    fast_dev_run=False,
)


def build(name: str, *, num_classes: int = 3, in_chans: int = 3, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nets.build(name, num_classes=num_classes, in_chans=in_chans)


def pictures(name: str, in_chans: int) -> Tensor:
    px = PX.get(name, 32)
    return torch.rand(2, in_chans, px, px, generator=torch.Generator().manual_seed(1))


def snapshot(net: Any) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in net.state_dict().items()}


@pytest.mark.parametrize("name", NETS)
def test_model_file_gives_back_net_and_card(name: str, tmp_path: Path) -> None:
    net = build(name).to(memory_format=torch.channels_last)
    card = replace(CARD, name=name, in_chans=3, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_model(tmp_path / "model.safetensors", net, card)
    loaded, loaded_card = load_model(tmp_path / "model.safetensors")
    assert loaded_card == card
    assert not loaded.training
    x = pictures(name, 3)
    net.to(memory_format=torch.contiguous_format)  # the other format sums in another order
    assert torch.equal(loaded(x), net.eval()(x))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_model_file_may_be_read_by_whom_any_new_file_may(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_model(tmp_path / "model.safetensors", build("scratch/lenet5", in_chans=1), CARD)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_failed_save_leaves_the_earlier_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, build("scratch/lenet5", in_chans=1), CARD)
    before = path.read_bytes()

    def full_disk(_: dict[str, Tensor], filename: Path, **__: object) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(path, build("scratch/lenet5", in_chans=1, seed=1), CARD)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_card_is_read_without_torch(tmp_path: Path) -> None:
    save_model(tmp_path / "model.safetensors", build("scratch/lenet5", in_chans=1), CARD)
    code = (
        "import sys; from pathlib import Path; from pipeline.training.weights import read_card;"
        "print(ascii(read_card(Path(sys.argv[1])))); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOP)
    assert (done.returncode, done.stdout.strip()) == (0, ascii(CARD))


def test_what_is_no_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no such file; train it first: make train MODEL="):
        load_model(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(UserError, match=r"notes.txt: not a Thaw model"):
        read_card(tmp_path / "notes.txt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"other.safetensors: not a Thaw model"):
        read_card(tmp_path / "other.safetensors")
    card = {key: value for key, value in asdict(CARD).items() if key != "px"}
    save_file({"a": torch.zeros(1)}, tmp_path / "old.safetensors", metadata={"thaw": json.dumps(card)})
    with pytest.raises(UserError, match=r"old.safetensors: the model's card is not of this version"):
        read_card(tmp_path / "old.safetensors")


def test_model_whose_weights_are_another_net_s_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model.safetensors", build("scratch/lenet5", num_classes=4, in_chans=1), CARD)
    with pytest.raises(UserError, match=r"does not fit scratch/lenet5; of another shape: output.weight \(4, 84\) in"):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "state_dict_ema"])
def test_state_is_read_from_checkpoints_of_every_kind(suffix: str, wrapper: str, tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
    prefixed = {f"module.{key}": tensor for key, tensor in state.items()}
    for count, content in enumerate((state, prefixed)):
        path = tmp_path / f"{count}{suffix}"
        torch.save({"epoch": 3, wrapper: content} if wrapper else content, path)
        read = read_state(path)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


def test_averaged_weights_go_before_the_last_ones(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}}, tmp_path / "both.pth")
    assert read_state(tmp_path / "both.pth")["a"] == 1


def test_unreadable_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"net": build("scratch/lenet5")}, tmp_path / "code.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    torch.save({"epoch": 1, "weights": {"a": torch.ones(1)}}, tmp_path / "nested.pth")
    (tmp_path / "empty.pth").touch()
    torch.save({"a": torch.ones(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:2000])
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "weights.npz").touch()
    for name, message in {
        "code.pth": "it may run code",
        "list.pth": "holds no state by name",
        "nested.pth": "'epoch' is no tensor",
        "empty.pth": "cannot be read",
        "cut.pth": "cannot be read",
        "junk.safetensors": "not a readable safetensors file",
        "weights.npz": "weights are .safetensors, .pth, .pt or .bin files",
        "nothing.pth": "no such file of weights",
    }.items():
        with pytest.raises(UserError) as refused:
            read_state(tmp_path / name)
        assert str(refused.value).startswith(f"{tmp_path / name}: ")
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", NETS)
def test_a_classifier_of_another_shape_starts_at_zero_and_all_else_is_placed(name: str) -> None:
    source, net = build(name, num_classes=10).state_dict(), build(name, num_classes=3, seed=1)
    before = snapshot(net)
    load_pretrained(net, source)
    classifier = net.pretrained_cfg["classifier"] + "."
    kept = [key for key in before if key.startswith(classifier)]
    assert len(kept) == 2
    for key, tensor in net.state_dict().items():
        # At zero every class is equally likely, and no random head sends noise into pretrained layers.
        assert torch.equal(tensor, torch.zeros_like(before[key]) if key in kept else source[key]), key


@pytest.mark.parametrize("name", NETS)
def test_classifier_of_the_same_shape_is_loaded_too(name: str) -> None:
    source, net = build(name).state_dict(), build(name, seed=1)
    load_pretrained(net, source)
    assert all(torch.equal(tensor, source[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_one_channel_net_sees_grey_as_the_three_channel_net_does(name: str) -> None:
    colour, grey = build(name).eval(), build(name, in_chans=1, seed=1).eval()
    load_pretrained(grey, colour.state_dict())
    x = pictures(name, 1)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_counters_may_be_missing_and_a_missing_classifier_starts_at_zero() -> None:
    net = build("scratch/resnet20", seed=1)
    source = build("scratch/resnet20").state_dict()
    load_pretrained(net, {k: v for k, v in source.items() if not k.startswith("fc.") and "num_batches" not in k})
    assert not net.state_dict()["fc.weight"].any()
    assert torch.equal(net.state_dict()["conv1.weight"], source["conv1.weight"])


def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded() -> None:
    net = build("scratch/resnet20", seed=1)
    before = snapshot(net)
    source = build("scratch/resnet20").state_dict()
    del source["conv1.weight"], source["layer1.0.bn1.bias"]
    source["extra"] = torch.ones(1)
    source["layer2.0.conv1.weight"] = torch.ones(1)
    with pytest.raises(UserError) as refused:
        load_pretrained(net, source)
    assert str(refused.value) == (
        "the weights do not fit the net; missing: conv1.weight and 1 more; unexpected: extra;"
        " of another shape: layer2.0.conv1.weight (1,) in place of (32, 16, 3, 3)"
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_one_channel_weights_do_not_fit_a_three_channel_net() -> None:
    source = build("scratch/lenet5", in_chans=1).state_dict()
    with pytest.raises(UserError, match=r"of another shape: c1.weight \(6, 1, 5, 5\) in place of \(6, 3, 5, 5\)$"):
        load_pretrained(build("scratch/lenet5"), source)


def test_a_reference_s_names_are_read_as_the_net_s_own() -> None:
    net = build("scratch/resnet20")
    state = {f"theirs.{key}": tensor for key, tensor in build("scratch/resnet20", seed=1).state_dict().items()}
    with pytest.raises(UserError, match=r"missing: conv1\.weight"):
        load_pretrained(net, state)
    net.reference_renames = ((r"^theirs\.", ""),)
    state["theirs.fc.weight"] = state["theirs.fc.weight"][..., None, None]  # a linear layer as a 1x1 convolution
    load_pretrained(net, state)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[f"theirs.{key}"].reshape(tensor.shape))


def test_a_file_for_inference_lacks_the_auxiliary_classifiers_and_loads() -> None:
    state = {key: t for key, t in build("scratch/googlenet", seed=1).state_dict().items() if not key.startswith("aux")}
    net = build("scratch/googlenet")
    before = net.aux1.fc1.weight.clone()
    load_pretrained(net, state)
    assert torch.equal(net.conv1.conv.weight, state["conv1.conv.weight"])
    assert torch.equal(net.aux1.fc1.weight, before)
    state["aux1.fc1.weight"] = before  # a part of a head is a broken file
    with pytest.raises(UserError, match=r"missing: aux1\."):
        load_pretrained(net, state)


def test_auxiliary_classifiers_of_other_classes_start_at_zero_too() -> None:
    state = build("scratch/ablation_inception_aux", num_classes=10, seed=1).state_dict()
    net = build("scratch/ablation_inception_aux")
    load_pretrained(net, state)
    assert not net.auxiliary.weight.any()
    assert not net.fc.weight.any()
    assert torch.equal(net.stem[0].weight, state["stem.0.weight"])


def test_a_model_with_another_stem_loads_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nets.build("scratch/resnet18", num_classes=3, in_chans=1, stem="cifar")
    save_model(tmp_path / "model.safetensors", net, replace(CARD, name="scratch/resnet18", stem="cifar"))
    loaded, _ = load_model(tmp_path / "model.safetensors")
    x = pictures("", 1)
    assert torch.equal(loaded(x), net.eval()(x))


def test_a_model_of_ours_keeps_its_head_for_its_own_classes_alone(tmp_path: Path) -> None:
    net = build("scratch/lenet5", in_chans=1)
    save_model(tmp_path / "model.safetensors", net, CARD)
    assert read_classes(tmp_path / "model.safetensors") == CARD.classes
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert read_classes(tmp_path / "other.safetensors") == ()
    state = read_state(tmp_path / "model.safetensors")
    for other in (False, True):
        started = build("scratch/lenet5", in_chans=1, seed=3)
        load_pretrained(started, state, other_classes=other)
        head = {name for name in state if name.startswith("output.")}
        assert head
        for name, value in started.state_dict().items():
            expected = torch.zeros_like(value) if other and name in head else state[name]
            assert torch.equal(value, expected), name
