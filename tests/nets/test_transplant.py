"""Each net against its reference: random weights copied over give the same logits and the same gradients.

In double precision, so that what differs is the net and not the order of additions.
"""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from pipeline import nets
from pipeline.training import weights

CASES = {
    "alexnet": "torchvision/alexnet",
    **{f"vgg{depth}{bn}": f"torchvision/vgg{depth}{bn}" for depth in (11, 13, 16, 19) for bn in ("", "_bn")},
    "googlenet": "torchvision/googlenet",
    **{f"resnet{depth}": f"torchvision/resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"densenet{depth}": f"torchvision/densenet{depth}" for depth in (121, 161, 169, 201)},
    "preact_resnet18": "timm/resnetv2_18",
    "preact_resnet50": "timm/resnetv2_50",
    "resnext50_32x4d": "torchvision/resnext50_32x4d",
    "resnext101_32x8d": "torchvision/resnext101_32x8d",
    "se_resnet50": "timm/legacy_seresnet50",
    "senet154": "timm/legacy_senet154",
    "mobilenet_v1": "timm/mobilenetv1_100",
    **{f"efficientnet_b{size}": f"torchvision/efficientnet_b{size}" for size in range(8)},
}
FAST = ("alexnet", "googlenet", "resnet18", "preact_resnet18", "densenet121", "mobilenet_v1", "efficientnet_b0")
"""One a family, as far as it is small; the others are left to `make test-all`."""


def reference(name: str) -> nn.Module:
    """A torchvision or timm net with random weights and no dropout or stochastic depth."""
    library, _, model = name.partition("/")
    if library == "timm":
        # silent residual branches would prove too little
        silent = {"zero_init_last": False} if model.startswith("resnetv2") else {}
        return timm.create_model(model, drop_rate=0.0, **silent)
    extra = {"aux_logits": True, "init_weights": False, "transform_input": False} if model == "googlenet" else {}
    net: nn.Module = torchvision.models.get_model(model, weights=None, **extra)
    return net


def shaken(net: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights of their own, as training leaves them: fresh ones prove too little."""
    generator = torch.Generator().manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.1)):
                assert tensor is not None
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator) * abs(low) * 2)
            assert module.running_mean is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
    return net


def without_dropout(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__ in ("StochasticDepth", "DropPath"):
            rate = "p" if hasattr(module, "p") else "drop_prob"
            setattr(module, rate, 0.0)
    return net


def logits_of(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Main and auxiliary logits side by side, for a net in training mode that has both."""
    if net.training and hasattr(net, "forward_with_auxiliary"):
        return torch.cat(net.forward_with_auxiliary(x), dim=1)
    found = net(x)
    if isinstance(found, torch.Tensor):
        return found
    return torch.cat((found.logits, found.aux_logits1, found.aux_logits2), dim=1)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        *((name, of) if name in FAST else pytest.param(name, of, marks=pytest.mark.slow) for name, of in CASES.items()),
        # the same net under timm's names, its linear layers written as convolutions
        pytest.param("vgg11_bn", "timm/vgg11_bn", marks=pytest.mark.slow),
    ],
)
def test_reference_s_weights_give_the_reference_s_logits_and_gradients(name: str, of: str) -> None:
    torch.manual_seed(0)
    theirs = without_dropout(shaken(reference(of))).double()
    ours: Any = without_dropout(nets.build(f"scratch/{name}", num_classes=1000)).double()
    weights.load_pretrained(ours, theirs.state_dict())
    px = max(nets.min_px(ours), 64)
    x = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    with torch.no_grad():
        expected = logits_of(theirs.eval(), x)
        found = logits_of(ours.eval(), x)
    assert expected.std() > 1e-6
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)

    direction = None
    gradients = []
    for net in (theirs.train(), ours.train()):
        out = logits_of(net, x)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        (out * direction).sum().backward()
        gradients.append(
            weights.renamed_for(ours, {key: p.grad for key, p in net.named_parameters() if p.grad is not None})
        )
    assert gradients[0].keys() == gradients[1].keys() == dict(ours.named_parameters()).keys()
    for key, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-7 * max(scale, 1e-3), rtol=1e-6, msg=key)
