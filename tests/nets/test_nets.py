import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from pipeline import nets
from pipeline.errors import UserError

PARAMETERS = {"scratch/lenet5": 61_706, "scratch/resnet20": 269_722}
"""At the published channels and classes."""
PUBLISHED: dict[str, dict[str, int]] = {
    "scratch/lenet5": {"in_chans": 1, "num_classes": 10},
    "scratch/resnet20": {"in_chans": 3, "num_classes": 10},
}
SCRATCH = nets.scratch_names()


def build(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return nets.build(name, **{"num_classes": 7, **arguments})


def pictures(in_chans: int, *, px: int = 32) -> torch.Tensor:
    return torch.randn(4, in_chans, px, px, generator=torch.Generator().manual_seed(1))


def test_every_net_has_its_published_size() -> None:
    assert list(PARAMETERS) == SCRATCH
    for name in SCRATCH:
        assert sum(p.numel() for p in build(name, **PUBLISHED[name]).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("px", [32, 50])
@pytest.mark.parametrize("name", SCRATCH)
def test_shapes_from_pictures_to_logits(name: str, px: int, in_chans: int) -> None:
    net = build(name, in_chans=in_chans).eval()
    x = pictures(in_chans, px=px)
    features = net.forward_features(x)
    assert features.shape[:2] == (4, net.num_features)
    assert net.forward_head(features, pre_logits=True).shape == (4, net.head_hidden_size)
    assert net.forward_head(features).shape == (4, 7)
    assert torch.equal(net(x), net.forward_head(features))
    assert torch.equal(net(x), net.get_classifier()(net.forward_head(features, pre_logits=True)))
    assert net.get_classifier().in_features == net.head_hidden_size


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", SCRATCH)
def test_every_parameter_receives_a_gradient(name: str, in_chans: int) -> None:
    net = build(name, in_chans=in_chans)
    nn.functional.cross_entropy(net(pictures(in_chans)), torch.tensor([0, 1, 2, 6])).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", SCRATCH)
def test_smallest_picture_is_taken_and_a_smaller_one_refused(name: str) -> None:
    net = build(name, in_chans=1).eval()
    px = nets.min_px(net)
    assert net(pictures(1, px=px)).isfinite().all()
    with pytest.raises(UserError, match=rf"{px} px or more, got {px - 1}; raise augment.px and train.px to {px}$"):
        net(pictures(1, px=px - 1))


@pytest.mark.parametrize("name", SCRATCH)
def test_reset_classifier_changes_the_classifier_only(name: str) -> None:
    net = build(name).double()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    net.reset_classifier(3)
    classifier = net.pretrained_cfg["classifier"] + "."
    assert net.num_classes == 3
    assert net.get_classifier().weight.dtype == torch.float64
    for key, tensor in net.state_dict().items():
        if key.startswith(classifier):
            assert tensor.shape[0] == 3
        else:
            assert torch.equal(tensor, before[key])
    assert net(pictures(3).double()).shape == (4, 3)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", SCRATCH)
def test_group_matcher_covers_every_parameter_from_input_to_classifier(name: str, coarse: bool) -> None:
    net = build(name)
    groups = group_parameters(net, net.group_matcher(coarse=coarse))
    names = [key for key, _ in net.named_parameters()]
    assert sorted(key for group in groups.values() for key in group) == sorted(names)
    # in order of depth, the classifier alone in the last group
    assert [key for index in sorted(groups) for key in groups[index]] == names
    assert all(key.startswith(net.pretrained_cfg["classifier"] + ".") for key in groups[max(groups)])
    assert groups[0][0] == net.pretrained_cfg["first_conv"] + ".weight"


@pytest.mark.parametrize("name", SCRATCH)
def test_dropout_sits_between_the_features_and_the_classifier(name: str) -> None:
    net = build(name, drop_rate=0.5).train()
    x = net.forward_features(pictures(3)).detach()
    assert torch.equal(net.forward_head(x, pre_logits=True), net.forward_head(x, pre_logits=True))
    assert not torch.equal(net.forward_head(x), net.forward_head(x))
    net.eval()
    assert torch.equal(net.forward_head(x), net.forward_head(x))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", SCRATCH)
def test_pretrained_cfg_speaks_of_the_net_it_belongs_to(name: str, in_chans: int) -> None:
    net = build(name, in_chans=in_chans)
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


@pytest.mark.parametrize("name", [*SCRATCH, "test_resnet"])
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


@pytest.mark.parametrize("name", SCRATCH)
def test_stochastic_depth_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} takes no drop_path_rate; set model.drop_path_rate=0$"):
        build(name, drop_path_rate=0.1)


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
