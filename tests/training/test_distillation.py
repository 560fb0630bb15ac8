"""Distillation: the teacher sees what it was trained on, and the distance is the formula."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import nets
from pipeline.errors import UserError
from pipeline.training.distillation import Teacher, distance
from pipeline.training.weights import ModelCard, save_model

CLASSES = ("ant", "bee", "wasp")
CARD = ModelCard(
    name="scratch/resnet20",
    in_chans=3,
    stem="default",
    classes=CLASSES,
    px=32,
    pack_px=40,
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    start="random",
    start_source="model.pretrained is false",
    fast_dev_run=False,
)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made = nets.build(CARD.name, num_classes=3)
    made(torch.randn(8, 3, 32, 32))  # norms whose statistics are not those of a new one
    return made.eval()


@pytest.fixture(scope="module")
def path(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_model(file, net, CARD)
    return file


def pictures(px: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, px, px), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def expected(net: nn.Module, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CARD.mean, CARD.std))
    with torch.no_grad():
        logits: Tensor = net((pixels / 255 - mean) / std)
    return logits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_teacher_normalises_pictures_its_own_way(dtype: torch.dtype, path: Path, net: nn.Module) -> None:
    teacher = Teacher(path, classes=CLASSES, in_chans=3)
    found = teacher.logits(pictures(32).to(dtype))
    torch.testing.assert_close(found, expected(net, pictures(32)), atol=1e-4, rtol=1e-4)
    assert torch.equal(found, teacher.logits(pictures(32).to(dtype)))  # nothing random, no statistics that move


@pytest.mark.parametrize("px", [24, 80])
def test_the_teacher_sees_pictures_at_the_size_that_it_was_trained_on(px: int, path: Path, net: nn.Module) -> None:
    found = Teacher(path, classes=CLASSES, in_chans=3).logits(pictures(px))
    resized = F.interpolate(pictures(px).float(), size=(32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, expected(net, resized), atol=1e-4, rtol=1e-4)


def test_the_teacher_s_logits_have_no_graph_but_a_loss_may_keep_them(path: Path) -> None:
    teacher = Teacher(path, classes=CLASSES, in_chans=3)
    taught = teacher.logits(pictures(32).float().requires_grad_())
    assert not taught.requires_grad
    student = torch.zeros(2, 3, requires_grad=True)
    F.mse_loss(student, taught, reduction="sum").backward()
    torch.testing.assert_close(student.grad, -2 * taught)


def test_a_module_that_holds_the_teacher_does_not_take_it_in(path: Path) -> None:
    holder = nn.Linear(2, 2)
    teacher = Teacher(path, classes=CLASSES, in_chans=3)
    holder.teacher = teacher  # type: ignore[assignment]
    assert set(holder.state_dict()) == {"weight", "bias"}
    assert len(list(holder.parameters())) == 2
    assert len(list(holder.modules())) == 1


def test_the_teacher_moves_to_a_device_as_a_whole(path: Path) -> None:
    teacher = Teacher(path, classes=CLASSES, in_chans=3)
    assert teacher.to("meta") is teacher
    assert teacher.logits(pictures(24).to("meta")).shape == (2, 3)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            ("ant", "wasp", "bee"),
            r"model\.safetensors: class number 1 is 'bee' to the teacher and 'wasp' to the data;",
        ),
        (("ant", "bee"), r"the teacher has 3 classes and the data 2; train the teacher on the same classes"),
        ((*CLASSES, "fly"), r"the teacher has 3 classes and the data 4; "),
    ],
)
def test_a_teacher_of_other_classes_is_refused(classes: tuple[str, ...], message: str, path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Teacher(path, classes=classes, in_chans=3)


def test_a_teacher_of_other_channels_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"sees 3 channels and the net 1; set model\.in_chans to 3, or take another"):
        Teacher(path, classes=CLASSES, in_chans=1)


def test_what_is_no_model_is_refused_as_everywhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.safetensors: no such file"):
        Teacher(tmp_path / "nothing.safetensors", classes=CLASSES, in_chans=3)


def test_a_teacher_of_grey_pictures_teaches_a_net_of_grey_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    grey = replace(CARD, name="scratch/lenet5", in_chans=1, mean=(0.1,), std=(0.3,))
    save_model(tmp_path / "grey.safetensors", nets.build(grey.name, num_classes=3, in_chans=1), grey)
    teacher = Teacher(tmp_path / "grey.safetensors", classes=CLASSES, in_chans=1)
    assert teacher.logits(pictures(32)[:, :1]).shape == (2, 3)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_distance_is_the_formula(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    by_hand = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    found = distance(student.float(), teacher.float(), temperature=temperature)
    torch.testing.assert_close(found, by_hand.float())
    assert distance(teacher.float(), teacher.float(), temperature=temperature) == pytest.approx(0, abs=1e-6)


def test_at_high_temperatures_the_gradient_is_the_difference_of_the_logits() -> None:
    # Hinton et al. 2015, equation 4, times T^2: (z - v) / K for logits whose mean is 0.
    torch.manual_seed(0)
    student, teacher = (x - x.mean(1, keepdim=True) for x in torch.randn(2, 1, 4).unbind())
    student.requires_grad_()
    distance(student, teacher, temperature=100.0).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 4, atol=0.01, rtol=0)


def test_the_distance_is_float32_under_autocast() -> None:
    student, teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distance(student, teacher, temperature=2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, distance(student.float(), teacher.float(), temperature=2.0))
