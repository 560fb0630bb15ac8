import subprocess
import sys
import warnings
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline import nets
from pipeline.errors import UserError

PARAMETERS = {
    "lenet5": 61_706,
    "alexnet": 61_100_840,
    "alexnet_two_tower": 60_965_224,
    "zfnet": 62_357_608,
    "nin": 966_986,
    "vgg_f": 60_834_536,
    "vgg_m": 102_908_520,
    "vgg_s": 102_908_520,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "googlenet": 13_004_888,
    "googlenet_paper": 13_378_280,
    "unet_encoder": 19_868_200,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "plain18": 11_515_688,
    "plain34": 21_623_848,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "plain20": 269_722,
    "plain32": 464_154,
    "plain44": 658_586,
    "plain56": 853_018,
    "plain110": 1_727_962,
    "preact_resnet18": 11_687_720,
    "preact_resnet50": 25_549_352,
    "preact_resnet110": 1_730_522,
    "preact_resnet164": 1_703_258,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet_bc100_k12": 769_162,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext29_8x64d": 34_426_698,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v1_075": 2_585_560,
    "mobilenet_v1_050": 1_331_592,
    "mobilenet_v1_025": 470_072,
    "se_resnet50": 28_088_024,
    "senet154": 115_088_984,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "efficientnet_b5": 30_389_784,
    "efficientnet_b6": 43_040_704,
    "efficientnet_b7": 66_347_960,
    "ablation_conv": 292_954,
    "ablation_conv_no_bn": 292_490,
    "ablation_separable": 38_602,
    "ablation_stack_3x3": 1_068_890,
    "ablation_kernel_7x7": 1_583_194,
    "ablation_inception": 53_890,
    "ablation_inception_naive": 292_954,
    "ablation_inception_aux": 54_540,
    "ablation_residual": 691_674,
    "ablation_residual_se": 697_526,
}
"""At the channels and classes of `published`, auxiliary classifiers included."""
FAST = [
    "lenet5",
    "nin",
    "googlenet",
    "googlenet_paper",
    "unet_encoder",
    "resnet18",
    "plain18",
    "resnet20",
    "plain20",
    "preact_resnet18",
    "preact_resnet110",
    "densenet121",
    "densenet_bc100_k12",
    "resnext50_32x4d",
    "se_resnet50",
    "mobilenet_v1_025",
    "efficientnet_b0",
    "ablation_conv",
    "ablation_inception_aux",
    "ablation_residual_se",
]
"""One a class or way of building it; the rest is left to `make test-all`."""
FAMILIES = [
    "lenet5",
    "alexnet",
    "zfnet",
    "nin",
    "vgg_f",
    "vgg11_bn",
    "googlenet",
    "unet_encoder",
    "resnet18",
    "preact_resnet18",
    "densenet121",
    "resnext50_32x4d",
    "mobilenet_v1",
    "se_resnet50",
    "efficientnet_b0",
    "ablation_conv",
]
"""One a file."""
CIFAR_STEMS = [
    "resnet18",
    "resnet50",
    "preact_resnet18",
    "preact_resnet50",
    "densenet121",
    "resnext50_32x4d",
    "se_resnet50",
]
RECIPES = {"alexnet": (64, 3e-4), "zfnet": (64, 3e-4), "vgg_f": (64, 3e-4), "vgg11_bn": (32, 1e-4)}
"""Side of the pictures and learning rate at which a net with large linear layers learns 64 of them by heart."""
DROPPED_BELOW = ("alexnet", "alexnet_two_tower", "zfnet", "vgg")
"""Beginnings of names of nets with dropout before their last hidden layer too."""
SCRATCH = nets.scratch_names()


def bare(name: str) -> str:
    return name.removeprefix("scratch/")


def published(name: str) -> dict[str, int]:
    """Channels and classes of the paper's own data: MNIST, CIFAR-10 or ImageNet."""
    own = build(name, device="meta").pretrained_cfg["input_size"][1]
    return {"in_chans": 1 if name == "scratch/lenet5" else 3, "num_classes": 10 if own <= 32 else 1000}


def marked(names: Iterable[str], *, fast: Container[str] = FAST) -> list[Any]:
    """Nets as parameters of a test, the slow ones marked."""
    return [f"scratch/{n}" if n in fast else pytest.param(f"scratch/{n}", marks=pytest.mark.slow) for n in names]


EVERY = marked(PARAMETERS)


def build(name: str, *, device: str = "cpu", **arguments: Any) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return nets.build(name, **{"num_classes": 7, **arguments})


def pictures(in_chans: int, *, px: int = 32, count: int = 4) -> torch.Tensor:
    return torch.randn(count, in_chans, px, px, generator=torch.Generator().manual_seed(1))


def small_px(net: Any) -> int:
    """A side at which nothing is cut short and little is computed."""
    return max(32, nets.min_px(net))


def all_logits(net: Any, x: torch.Tensor) -> torch.Tensor:
    """The logits, after them those of auxiliary classifiers."""
    return torch.cat(net.forward_with_auxiliary(x)) if hasattr(net, "forward_with_auxiliary") else net(x)


def test_every_net_has_its_published_size() -> None:
    assert sorted(f"scratch/{name}" for name in PARAMETERS) == SCRATCH
    for name in SCRATCH:
        net = build(name, device="meta", **published(name))
        assert sum(p.numel() for p in net.parameters()) == PARAMETERS[bare(name)], name


@pytest.mark.parametrize("name", ["scratch/googlenet", "scratch/googlenet_paper"])
def test_auxiliary_classifiers_are_a_known_part(name: str) -> None:
    net = build(name, device="meta", num_classes=1000)
    extra = sum(p.numel() for head in net.auxiliary_heads() for p in head.parameters())
    without = {"scratch/googlenet": 6_624_904, "scratch/googlenet_paper": 6_998_552}
    assert PARAMETERS[bare(name)] - extra == without[name]


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("larger", [0, 18])
@pytest.mark.parametrize("name", EVERY)
def test_shapes_from_pictures_to_logits(name: str, larger: int, in_chans: int) -> None:
    net = build(name, in_chans=in_chans).eval()
    x = pictures(in_chans, px=small_px(net) + larger)
    features = net.forward_features(x)
    assert features.shape[:2] == (4, net.num_features)
    assert net.forward_head(features, pre_logits=True).shape == (4, net.head_hidden_size)
    assert net.forward_head(features).shape == (4, 7)
    assert torch.equal(net(x), net.forward_head(features))
    torch.testing.assert_close(net.get_classifier()(net.forward_head(features, pre_logits=True)), net(x))
    assert net.get_classifier().in_features == net.head_hidden_size


def _assert_gradients(net: Any, x: torch.Tensor) -> None:
    logits = all_logits(net, x)
    labels = torch.arange(len(logits)) % net.num_classes
    nn.functional.cross_entropy(logits, labels).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_receives_a_gradient(name: str, in_chans: int) -> None:
    net = build(name, in_chans=in_chans)
    _assert_gradients(net, pictures(in_chans, px=small_px(net)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRATCH)
def test_every_parameter_receives_a_gradient_at_the_net_s_own_size(name: str) -> None:
    net = build(name, drop_path_rate=0.0)
    channels, px, _ = net.pretrained_cfg["input_size"]
    _assert_gradients(net, pictures(channels, px=px, count=2 if px < 300 else 1))


@pytest.mark.parametrize("stem", ["cifar"])
@pytest.mark.parametrize("name", marked(CIFAR_STEMS, fast=("resnet18", "preact_resnet18", "densenet121")))
def test_cifar_stem_keeps_small_pictures_whole(name: str, stem: str) -> None:
    whole, own = build(name, stem=stem), build(name)
    x = pictures(3)
    side = whole.eval().forward_features(x).shape[-1]
    assert side == 4
    assert own.eval().forward_features(x).shape[-1] == 1
    _assert_gradients(whole.train(), x)
    with pytest.raises(UserError, match="default"):
        build(name, stem="small")


@pytest.mark.parametrize("name", ["scratch/lenet5", "resnet18"])
def test_stem_is_refused_where_there_is_one_only(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} takes no stem; set model.stem=default$"):
        build(name, stem="cifar")


@pytest.mark.parametrize("name", EVERY)
def test_a_step_in_bfloat16_moves_every_parameter_and_stays_finite(name: str) -> None:
    net = build(name).train().to(memory_format=torch.channels_last)
    before = {key: parameter.detach().clone() for key, parameter in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = all_logits(net, pictures(3, px=small_px(net)).contiguous(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits.float(), torch.arange(len(logits)) % 7)
    loss.backward()
    optimizer.step()
    for key, parameter in net.named_parameters():
        assert torch.isfinite(parameter).all(), key
        assert not torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("name", marked(FAMILIES, fast=("lenet5", "resnet18", "ablation_conv")))
def test_onnx_export_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = build(name, in_chans=1).eval()
    x = pictures(1, px=small_px(net), count=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about its own parts
        torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_can_overfit_64_pictures(name: str) -> None:
    net = build(f"scratch/{name}", num_classes=10, in_chans=1)
    digits = load_digits()
    px, lr = RECIPES.get(name, (max(16, nets.min_px(net)), 1e-3))
    x = nn.functional.interpolate(torch.tensor(digits.images[:64] / 8 - 1, dtype=torch.float32)[:, None], size=(px, px))
    labels = torch.tensor(digits.target[:64])
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    top1 = 0.0
    for step in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net.train()(x), labels).backward()
        optimizer.step()
        if step % 10 == 9:
            with torch.no_grad():
                top1 = (net.eval()(x).argmax(1) == labels).float().mean().item()
            if top1 >= 0.95:
                break
    assert top1 >= 0.95


@pytest.mark.parametrize("name", EVERY)
def test_smallest_picture_is_taken_and_a_smaller_one_refused(name: str) -> None:
    net = build(name, in_chans=1).eval()
    px = nets.min_px(net)
    assert net(pictures(1, px=px)).isfinite().all()
    with pytest.raises(
        UserError,
        match=rf"{px} px or more, got {px - 1}; raise augment.px and train.px to {px}(, or set model.stem=cifar)?$",
    ):
        net(pictures(1, px=px - 1))


@pytest.mark.parametrize("name", EVERY)
def test_reset_classifier_changes_the_classifier_only(name: str) -> None:
    net = build(name).double()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    net.reset_classifier(3)
    config = net.pretrained_cfg
    classifiers = tuple(f"{key}." for key in (config["classifier"], *config.get("auxiliary_classifiers", ())))
    assert net.num_classes == 3
    assert net.get_classifier().weight.dtype == torch.float64
    for key, tensor in net.state_dict().items():
        if key.startswith(classifiers):
            assert tensor.shape[0] == 3
        else:
            assert torch.equal(tensor, before[key])
    x = pictures(3, px=small_px(net)).double()
    assert net(x).shape == (4, 3)
    assert all_logits(net, x).shape[1] == 3


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", SCRATCH)
def test_group_matcher_covers_every_parameter_from_input_to_classifier(name: str, coarse: bool) -> None:
    net = build(name, device="meta")
    groups = group_parameters(net, net.group_matcher(coarse=coarse))
    names = [key for key, _ in net.named_parameters()]
    assert sorted(key for group in groups.values() for key in group) == sorted(names)
    # in order of depth, the classifier alone in the last group
    assert [key for index in sorted(groups) for key in groups[index]] == names
    assert all(key.startswith(net.pretrained_cfg["classifier"] + ".") for key in groups[max(groups)])
    assert groups[0][0] == net.pretrained_cfg["first_conv"] + ".weight"


@pytest.mark.parametrize("name", EVERY)
def test_dropout_sits_between_the_features_and_the_classifier(name: str) -> None:
    net = build(name, drop_rate=0.5).train()
    x = net.forward_features(pictures(3, px=small_px(net))).detach()
    if not bare(name).startswith(DROPPED_BELOW):
        assert torch.equal(net.forward_head(x, pre_logits=True), net.forward_head(x, pre_logits=True))
    assert not torch.equal(net.forward_head(x), net.forward_head(x))
    net.eval()
    assert torch.equal(net.forward_head(x), net.forward_head(x))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", SCRATCH)
def test_pretrained_cfg_speaks_of_the_net_it_belongs_to(name: str, in_chans: int) -> None:
    net = build(name, in_chans=in_chans, device="meta")
    config = net.pretrained_cfg
    assert config["input_size"][0] == config["min_input_size"][0] == in_chans
    assert len(config["mean"]) == len(config["std"]) == in_chans
    assert net.get_submodule(config["first_conv"]).in_channels == in_chans
    assert net.get_submodule(config["classifier"]) is net.get_classifier()
    assert config["num_classes"] == net.num_classes == 7


@pytest.mark.parametrize(
    ("name", "px", "message"),
    [
        ("vit_tiny_patch16_224", 64, "takes pictures of 224 px only, got 64; set augment.px=224 and train.px=auto"),
        ("scratch/lenet5", 28, "takes pictures of 32 px or more, got 28; raise augment.px and train.px"),
        ("inception_v3", 32, r"does not take pictures of 32 px; raise augment.px and train.px \(Calculated padded"),
    ],
)
def test_side_that_a_net_does_not_take_is_refused(name: str, px: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{name} {message}"):
        nets.check_px(build(name), px, name=name)


@pytest.mark.parametrize("name", ["scratch/lenet5", "scratch/resnet18", "test_resnet"])
def test_checking_a_side_that_fits_leaves_the_net_as_it_was(name: str) -> None:
    net = build(name, in_chans=1).train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    nets.check_px(net, 32, name=name)
    assert net.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_normalization_is_the_net_s_with_one_value_a_channel() -> None:
    assert nets.normalization(build("tf_efficientnet_lite0"), in_chans=3) == ((0.5,) * 3, (0.5,) * 3)
    mean, std = nets.normalization(build("resnet18", in_chans=1), in_chans=1)
    assert mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert std == pytest.approx([(0.229 + 0.224 + 0.225) / 3])
    assert nets.normalization(build("scratch/lenet5", in_chans=1), in_chans=1) == ((0.0784,), (0.7843,))


@pytest.mark.parametrize("name", [name for name in SCRATCH if "efficientnet" not in name])
def test_stochastic_depth_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} takes no drop_path_rate; set model.drop_path_rate=auto$"):
        build(name, drop_path_rate=0.1)


@pytest.mark.parametrize(
    "name", ["scratch/vgg_f", "scratch/alexnet", "scratch/efficientnet_b0", "scratch/lenet5", "vgg11"]
)
def test_a_rate_of_zero_is_none_and_auto_is_the_net_s_own(name: str) -> None:
    def rates(**given: Any) -> set[float]:
        modules = build(name, device="meta", **given).modules()
        return {float(getattr(m, "p", getattr(m, "rate", 0.0))) for m in modules if "rop" in type(m).__name__}

    assert rates(drop_rate=0.0, drop_path_rate=0.0) <= {0.0}
    own = {"scratch/vgg_f": 0.5, "scratch/alexnet": 0.5, "scratch/efficientnet_b0": 0.2}
    assert max(rates(), default=0.0) == own.get(name, 0.0)


def test_timm_net_takes_what_it_is_given() -> None:
    net = build("test_resnet", in_chans=1, drop_rate=0.25, drop_path_rate=0.1)
    assert net(pictures(1)).shape == (4, 7)
    assert net.drop_rate == 0.25
    tagged = build("test_resnet.r160_in1k")
    assert tagged.pretrained_cfg["tag"] == "r160_in1k"
    assert nets.min_px(tagged) == 1
    with pytest.raises(UserError, match=r"^vgg11 takes no drop_path_rate"):
        build("vgg11", drop_path_rate=0.1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "resnet5O: no such net; did you mean .*resnet50"),
        ("resnet50.a1_in1", r"resnet50.a1_in1: timm has no such weights for resnet50; did you mean resnet50.a1_in1k"),
        ("lenet5", "lenet5: no such net; did you mean scratch/lenet5"),
        ("scratch/lenet", "scratch/lenet: no such net; did you mean scratch/lenet5"),
        ("hf-hub:timm/resnet50", "hf-hub:timm/resnet50: nets are named as timm names them"),
        ("zzzzzzzzzz", "zzzzzzzzzz: no such net; list them: make models"),
    ],
)
def test_unknown_net_is_refused_with_the_nearest_name(name: str, message: str) -> None:
    with pytest.raises(UserError, match="^" + message):
        nets.build(name, num_classes=2)


def test_names_are_ours_then_timm_s_by_shell_pattern() -> None:
    assert nets.names("scratch/*") == SCRATCH
    assert nets.names("*resnet20*")[0] == "scratch/resnet20"
    assert nets.names("resnet1[08]") == ["resnet18"]
    assert nets.names()[: len(SCRATCH)] == SCRATCH
    assert nets.names("no-such-*") == []


def test_listing_our_names_loads_neither_torch_nor_timm() -> None:
    code = (
        "import sys; from pipeline import nets; nets.scratch_names(); nets.is_scratch('scratch/lenet5');"
        "sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    )
    top = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=top).returncode == 0
