import math
from typing import Any

import pytest
import torch
from timm.models._manipulate import group_parameters
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pipeline.errors import UserError
from pipeline.nets import densenet
from pipeline.nets.densenet import DenseBlock, DenseLayer, Transition, densenet121, densenet_bc100_k12
from pipeline.training import weights

PARAMETERS = {
    ("densenet121", 1000): 7_978_856,
    ("densenet161", 1000): 28_681_000,
    ("densenet169", 1000): 14_149_480,
    ("densenet201", 1000): 20_013_928,
    ("densenet_bc100_k12", 10): 769_162,
}


def pair() -> tuple[Any, Any]:
    """The same net twice, with the same weights: as it is, and recomputing."""
    nets: list[Any] = []
    for recompute in (False, True):
        torch.manual_seed(0)
        nets.append(densenet_bc100_k12(num_classes=7, recompute=recompute))
    return nets[0], nets[1]


def pictures(px: int = 16) -> Tensor:
    return torch.randn(4, 3, px, px, generator=torch.Generator().manual_seed(1))


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Memory of what a forward pass keeps for the backward one, parameters aside, and of all layers' maps."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for layer in net.modules():
        if isinstance(layer, DenseLayer):
            layer.register_forward_hook(lambda _module, _maps, new: keep(new))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        net(x)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


@pytest.mark.parametrize(("name", "num_classes"), PARAMETERS)
def test_nets_have_the_published_sizes(name: str, num_classes: int) -> None:
    with torch.device("meta"):
        net = getattr(densenet, name)(num_classes=num_classes)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name, num_classes]


@pytest.mark.parametrize(
    ("name", "depth"), [("densenet121", 121), ("densenet161", 161), ("densenet201", 201), ("densenet_bc100_k12", 100)]
)
def test_layers_are_as_many_as_the_name_says(name: str, depth: int) -> None:
    with torch.device("meta"):
        net = getattr(densenet, name)(num_classes=10)
    assert len([m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]) == depth


def test_block_keeps_every_map_and_shows_each_layer_all_before_it() -> None:
    block = DenseBlock(8, num_layers=3, growth=4, recompute=False).eval()
    x = torch.randn(2, 8, 5, 5)
    out = block(x)
    assert out.shape == (2, 20, 5, 5)
    assert torch.equal(out[:, :8], x)
    for number, chans in ((1, 8), (2, 12), (3, 16)):
        layer = block[f"denselayer{number}"]
        torch.testing.assert_close(layer([out[:, :chans]]), out[:, chans : chans + 4])


def test_transition_halves_channels_and_side() -> None:
    transition = Transition(10).eval()
    x = torch.randn(2, 10, 7, 6)
    out = transition(x)
    assert out.shape == (2, 5, 3, 3)
    inner = transition.conv(transition.norm(x).relu())
    torch.testing.assert_close(out[:, :, 0, 0], inner[:, :, :2, :2].mean((2, 3)))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_recomputing_gives_equal_logits_gradients_and_statistics(mode: str) -> None:
    plain, recomputing = pair()
    for step in range(2):
        logits = [net.train(mode == "train")(pictures() + step) for net in (plain, recomputing)]
        assert torch.equal(logits[0], logits[1])
        for each in logits:
            nn.functional.cross_entropy(each, torch.tensor([0, 1, 2, 6])).backward()
    for (key, one), (_, other) in zip(plain.named_parameters(), recomputing.named_parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad), key
    for (key, one), (_, other) in zip(plain.named_buffers(), recomputing.named_buffers(), strict=True):
        assert torch.equal(one, other), key
    counts = {int(t) for key, t in recomputing.named_buffers() if key.endswith("num_batches_tracked")}
    assert counts == {2 if mode == "train" else 0}
    assert torch.equal(plain.eval()(pictures()), recomputing.eval()(pictures()))


def test_recomputing_in_bfloat16_with_frozen_first_layers_gives_equal_gradients() -> None:
    gradients = []
    for net in pair():
        net.features.denseblock1.requires_grad_(requires_grad=False).eval()
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(pictures())
        logits.float().square().sum().backward()
        gradients.append({key: p.grad for key, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[1][key], gradient) for key, gradient in gradients[0].items())


def test_recomputing_keeps_less_than_half() -> None:
    plain, recomputing = pair()
    assert kept_bytes(recomputing, pictures()) < kept_bytes(plain, pictures()) / 2


def test_recomputing_puts_the_statistics_back_after_an_error() -> None:
    layer = DenseLayer(8, growth=4, recompute=True)
    before = dict(layer.norm1.named_buffers())
    loss = layer([torch.randn(2, 8, 5, 5, requires_grad=True)]).sum()
    layer.norm1.weight.data = torch.ones(9)
    with pytest.raises(RuntimeError, match="weight"):
        loss.backward()
    assert all(before[name] is tensor for name, tensor in layer.norm1.named_buffers())


def test_old_names_of_torchvision_s_files_become_ours() -> None:
    torch.manual_seed(0)
    source: Any = densenet_bc100_k12(num_classes=7)
    old = {}
    for key, tensor in source.state_dict().items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in key else key
        if not key.endswith("num_batches_tracked"):
            old[key] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    net: Any = densenet_bc100_k12(num_classes=7)
    weights.load_pretrained(net, old)
    assert torch.equal(net.eval()(pictures()), source.eval()(pictures()))


@pytest.mark.parametrize(("stem", "px", "side"), [("default", 65, 2), ("default", 29, 1), ("cifar", 33, 4)])
def test_map_of_a_net_for_imagenet_follows_its_stem(stem: str, px: int, side: int) -> None:
    net: Any = densenet121(num_classes=3, stem=stem).eval()
    assert net.forward_features(torch.randn(1, 3, px, px)).shape == (1, 1024, side, side)


@pytest.mark.parametrize(("stem", "px"), [("default", 29), ("cifar", 8)])
def test_smallest_side_is_the_smallest_that_leaves_a_pixel(stem: str, px: int) -> None:
    net: Any = densenet121(num_classes=3, stem=stem)
    assert net(torch.randn(4, 3, px, px)).isfinite().all()
    with pytest.raises(
        UserError, match=rf"^scratch/densenet121 takes pictures of {px} px or more, got {px - 1}; raise"
    ):
        net(torch.randn(4, 3, px, px - 1))
    with pytest.raises(RuntimeError, match="Output size is too small"):
        net.features(torch.randn(4, 3, px - 1, px - 1))


def test_net_for_cifar_takes_4_px_and_an_unknown_stem_is_refused() -> None:
    assert densenet_bc100_k12(num_classes=3)(torch.randn(4, 3, 4, 4)).isfinite().all()
    with pytest.raises(
        UserError, match=r"^scratch/densenet121 has no stem 'deep'; set model.stem to default or cifar$"
    ):
        densenet121(num_classes=3, stem="deep")


@pytest.mark.parametrize("build", [densenet121, densenet_bc100_k12])
def test_initialisation_is_he_s(build: Any) -> None:
    torch.manual_seed(0)
    net: Any = build(num_classes=10)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            tolerance = 4 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    for _ in range(2):
        assert net.classifier.weight.abs().max() <= 1 / math.sqrt(net.num_features)
        assert (net.classifier.bias == 0).all()
        net.reset_classifier(5)


def test_what_follows_a_block_is_in_the_group_of_its_last_layer() -> None:
    with torch.device("meta"):
        net: Any = densenet121(num_classes=10)
    fine = group_parameters(net, net.group_matcher())
    assert len(fine) == 1 + 58 + 1
    assert fine[6][-3:] == [f"features.transition1.{key}" for key in ("norm.weight", "norm.bias", "conv.weight")]
    assert fine[58][-2:] == ["features.norm5.weight", "features.norm5.bias"]
    coarse = group_parameters(net, net.group_matcher(coarse=True))
    assert len(coarse) == 6
    assert coarse[1][-1] == "features.transition1.conv.weight"
