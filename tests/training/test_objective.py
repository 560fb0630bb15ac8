"""The loss: against torch's, timm's and the formulas, with every kind of target."""

from typing import Literal, get_args

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.training.objective import Objective, class_weights

Loss = Literal["cross_entropy", "bce", "focal"]
LOSSES = get_args(Loss)
LABELS = torch.tensor([0, 2, 1, 3, 0, 2])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 4.0])


def logits(scale: float = 2.0) -> Tensor:
    return scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def mixed() -> Tensor:
    return torch.rand(6, 4, generator=torch.Generator().manual_seed(1)).softmax(1)


def made(
    loss: Loss, *, label_smoothing: float = 0.0, focal_gamma: float = 2.0, weights: Tensor | None = None
) -> Objective:
    return Objective(loss=loss, label_smoothing=label_smoothing, focal_gamma=focal_gamma, weights=weights)


def test_class_weights_are_scikit_learn_s_balanced_ones() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2, 2, 2], dtype=np.int64)
    weights = class_weights(labels, num_classes=3)
    assert weights.dtype == torch.float32
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    torch.testing.assert_close(weights, torch.from_numpy(expected).float())
    torch.testing.assert_close(weights[labels].mean(), torch.tensor(1.0))


def test_a_class_without_pictures_is_refused_by_its_number() -> None:
    with pytest.raises(
        UserError, match=r"no training picture has class number 1, 4 \(counted from 0\); raise"
    ) as error:
        class_weights(np.array([0, 2, 3]), num_classes=5)
    assert error.value.parameter == "train.class_weights"
    with pytest.raises(UserError, match=r"class number 3, 4, 5, 6, 7 and more"):
        class_weights(np.array([0, 1, 2]), num_classes=10)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [LABELS, mixed()], ids=["labels", "mixed"])
def test_cross_entropy_is_torch_s_and_focal_with_gamma_0_is_it(
    targets: Tensor, smoothing: float, weights: Tensor | None
) -> None:
    expected = F.cross_entropy(logits(), targets, weight=weights, label_smoothing=smoothing)
    assert torch.equal(made("cross_entropy", label_smoothing=smoothing, weights=weights)(logits(), targets), expected)
    focal = made("focal", label_smoothing=smoothing, focal_gamma=0.0, weights=weights)
    torch.testing.assert_close(focal(logits(), targets), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_timm_s(smoothing: float) -> None:
    timm_s = BinaryCrossEntropy(smoothing=smoothing)
    torch.testing.assert_close(
        made("bce", label_smoothing=smoothing)(logits(), LABELS), timm_s(logits(), LABELS), atol=1e-6, rtol=0
    )
    # timm expects mixed targets smoothed already
    smooth = (1 - smoothing) * mixed() + smoothing / 4
    torch.testing.assert_close(
        made("bce", label_smoothing=smoothing)(logits(), mixed()), timm_s(logits(), smooth), atol=1e-6, rtol=0
    )


def test_focal_is_the_formula() -> None:
    p = logits().double().softmax(1)
    for gamma in (0.5, 2.0, 5.0):
        expected = -(mixed() * WEIGHTS * (1 - p) ** gamma * p.log()).sum(1).mean()
        loss = made("focal", focal_gamma=gamma, weights=WEIGHTS)(logits(), mixed())
        torch.testing.assert_close(loss, expected.float())
    right = p[torch.arange(6), LABELS]
    torch.testing.assert_close(made("focal")(logits(), LABELS), (-((1 - right) ** 2) * right.log()).mean().float())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_the_net_is_certain(gamma: float) -> None:
    certain = (200 * F.one_hot(LABELS, 4).float()).requires_grad_()
    for targets in (LABELS, LABELS.roll(1)):
        loss = made("focal", focal_gamma=gamma)(certain, targets)
        (gradient,) = torch.autograd.grad(loss, certain)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_gradient_of_focal_is_that_of_the_formula(gamma: float) -> None:
    given, exact = logits(4.0).requires_grad_(), logits(4.0).double().requires_grad_()
    right = exact.softmax(1)[torch.arange(6), LABELS]
    (-((1 - right) ** gamma) * right.log()).mean().backward()
    made("focal", focal_gamma=gamma)(given, LABELS).backward()
    assert given.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(given.grad, exact.grad.float())


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_and_their_one_hot_targets_are_the_same_loss(loss: Loss) -> None:
    objective = made(loss, label_smoothing=0.1)
    torch.testing.assert_close(objective(logits(), LABELS), objective(logits(), F.one_hot(LABELS, 4).float()))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_class_of_weight_2_counts_as_if_its_pictures_were_there_twice(loss: Loss) -> None:
    weighted = made(loss, weights=torch.tensor([2.0, 1.0, 1.0, 1.0]))(logits(), LABELS)
    twice = torch.cat([torch.arange(6), torch.nonzero(LABELS == 0).flatten()])
    torch.testing.assert_close(weighted, made(loss)(logits()[twice], LABELS[twice]))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("targets", [LABELS, mixed()], ids=["labels", "mixed"])
def test_weights_of_1_change_nothing(targets: Tensor, loss: Loss) -> None:
    plain = made(loss, label_smoothing=0.1)(logits(), targets)
    torch.testing.assert_close(
        made(loss, label_smoothing=0.1, weights=torch.ones(4))(logits(), targets), plain, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("targets", [LABELS, mixed()], ids=["labels", "mixed"])
def test_the_loss_is_computed_in_float32_under_autocast(targets: Tensor, loss: Loss) -> None:
    objective = made(loss, label_smoothing=0.1, weights=WEIGHTS)
    low = logits().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(low, targets)
    assert found.dtype == torch.float32
    assert torch.equal(found, objective(low.float(), targets))


def test_weights_move_with_the_module_but_are_no_part_of_its_state() -> None:
    objective = made("focal", weights=WEIGHTS)
    assert objective.state_dict() == {}
    assert objective.to("meta").weights.device.type == "meta"  # type: ignore[union-attr]
