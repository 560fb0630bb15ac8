from typing import Any

import pytest
import torch
from timm.models._features import FeatureHooks, FeatureInfo
from torch import nn

from pipeline import nets
from pipeline.errors import UserError
from pipeline.nets.features import FeatureMaps
from pipeline.training import weights

UNPADDED = ("lenet5", "zfnet", "vgg_f", "vgg_m", "vgg_s")
"""Their first convolutions lose the border, and so pixels that no stride accounts for."""
RECTIFIED = [
    "alexnet_two_tower",
    "zfnet",
    "nin",
    "vgg_f",
    "vgg11",
    "googlenet",
    "googlenet_paper",
    "unet_encoder",
    "resnet18",
    "resnet20",
    "resnext50_32x4d",
    "se_resnet50",
    "mobilenet_v1_025",
    "ablation_inception_aux",
    "ablation_residual",
]
"""One a family, as far as its levels end in ReLU."""
OTHERS = ["lenet5", "preact_resnet18", "preact_resnet110", "densenet121", "densenet_bc100_k12", "efficientnet_b0"]
CIFAR_STEMS = ["resnet18", "preact_resnet18", "densenet121", "resnext50_32x4d", "se_resnet50"]


def build(name: str, *, device: str = "cpu", **arguments: Any) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return nets.build(name, **{"num_classes": 2, **arguments}).eval()


def pictures(channels: int, *, px: int) -> torch.Tensor:
    return torch.randn(2, channels, px, px, generator=torch.Generator().manual_seed(1))


def shaken(net: nn.Module) -> nn.Module:
    """Batch norms with numbers of their own: fresh ones would hide a map taken before its norm."""
    generator = torch.Generator().manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
    return net


@pytest.mark.parametrize("name", nets.scratch_names())
def test_maps_have_the_channels_and_the_sizes_that_are_said(name: str) -> None:
    encoder = build(name, device="meta", features_only=True)
    channels, px, _ = encoder.pretrained_cfg["input_size"]
    reductions = encoder.feature_info.reduction()
    assert reductions == sorted(set(reductions))
    with torch.no_grad():
        maps = encoder(torch.zeros(1, channels, px, px + reductions[-1], device="meta"))
    assert [found.shape[1] for found in maps] == encoder.feature_info.channels()
    assert maps[-1].shape[1] == encoder.net.num_features
    for found, reduction in zip(maps, reductions, strict=True):
        height, width = found.shape[2:]
        # so many pixels more of the picture are one pixel more of the map
        assert (width - height) * reduction == reductions[-1]
        if name.removeprefix("scratch/") not in UNPADDED:
            assert abs(height - px / reduction) <= 1


@pytest.mark.parametrize("name", [f"scratch/{name}" for name in RECTIFIED + OTHERS])
def test_maps_are_those_of_the_modules_that_are_named(name: str) -> None:
    encoder = build(name, features_only=True)
    net = shaken(encoder.net)
    channels, px = net.pretrained_cfg["input_size"][0], max(32, nets.min_px(net))
    x = pictures(channels, px=px)
    with torch.no_grad():
        maps = encoder(x)
        hooks = FeatureHooks(net.feature_info, net.named_modules())
        net(x)
        named = list(hooks.get_output(x.device).values())
        assert torch.equal(maps[-1], net.forward_features(x))
    assert len(maps) == len(named) == len(net.feature_info)
    assert all(torch.equal(found, expected) for found, expected in zip(maps, named, strict=True))
    assert all(found.std() > 0 for found in maps[:-1])
    if name.removeprefix("scratch/") in RECTIFIED:
        assert all((found >= 0).all() for found in maps)


@pytest.mark.parametrize("name", [f"scratch/{name}" for name in CIFAR_STEMS])
def test_cifar_stem_has_no_level_that_its_first_stage_repeats(name: str) -> None:
    encoder = build(name, device="meta", features_only=True, stem="cifar")
    maps = encoder(torch.zeros(1, 3, 32, 32, device="meta"))
    assert encoder.feature_info.reduction() == [1, 2, 4, 8]
    assert [found.shape[-1] for found in maps] == [32, 16, 8, 4]
    assert [found.shape[1] for found in maps] == encoder.feature_info.channels()


@pytest.mark.parametrize(
    ("name", "reference", "same"),
    [
        ("resnet18", "resnet18", 5),
        ("densenet121", "densenet121", 5),
        ("mobilenet_v1", "mobilenetv1_100", 5),
        # timm's last map lacks what closes the features: the last norm and ReLU; EfficientNet's last 1x1 convolution
        ("preact_resnet18", "resnetv2_18", 4),
        ("efficientnet_b0", "efficientnet_b0", 4),
    ],
)
def test_timm_s_weights_give_timm_s_maps(name: str, reference: str, same: int) -> None:
    whole: Any = shaken(build(reference)).double()
    theirs = build(reference, features_only=True).double()
    state = whole.state_dict()
    # where timm takes the layers out of a container, the container's name is joined to theirs
    flat = state | {key.replace(".", "_", 1): tensor for key, tensor in state.items()}
    theirs.load_state_dict({key: flat[key] for key in theirs.state_dict()})
    ours = build(f"scratch/{name}").double()
    weights.load_pretrained(ours, state)
    x = pictures(3, px=32).double()
    with torch.no_grad():
        found, expected = FeatureMaps(ours)(x), [*theirs(x)[:same], whole.forward_features(x)]
    assert [level["reduction"] for level in ours.feature_info] == theirs.feature_info.reduction()
    for number in range(same):
        torch.testing.assert_close(found[number], expected[number], atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(found[-1], expected[-1], atol=1e-9, rtol=1e-7)
    assert len(found) == 5


def test_levels_of_vgg_are_timm_s() -> None:
    ours = build("scratch/vgg11_bn", device="meta", features_only=True).feature_info
    theirs = build("vgg11_bn", device="meta", features_only=True).feature_info
    assert ours.get_dicts() == theirs.get_dicts()


def test_gradients_reach_the_net_through_every_map() -> None:
    encoder = build("scratch/resnet20", features_only=True)
    for number, found in enumerate(encoder(pictures(3, px=32)), start=1):
        encoder.zero_grad()
        found.sum().backward(retain_graph=True)
        reached = {key.split(".")[1] for key, p in encoder.named_parameters() if p.grad is not None}
        assert reached == {"conv1", "bn1", *(f"layer{stage}" for stage in range(1, number + 1))}


def test_timm_net_gives_maps_too_and_takes_its_rates() -> None:
    encoder = build("test_resnet", in_chans=1, drop_rate=0.25, drop_path_rate=0.1, features_only=True)
    assert isinstance(encoder.feature_info, FeatureInfo)
    maps = encoder(pictures(1, px=64))
    assert [found.shape[1] for found in maps] == encoder.feature_info.channels()
    assert [64 // found.shape[-1] for found in maps] == encoder.feature_info.reduction()
    with pytest.raises(UserError, match=r"^vgg11 takes no drop_path_rate"):
        build("vgg11", drop_path_rate=0.1, features_only=True)
