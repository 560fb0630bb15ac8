"""Mixup and CutMix: shapes, seeds and rates, and that pictures and targets are mixed alike."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from pipeline.training.mixing import Mixer

ALPHAS = [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 2])


def pictures(number: int, *, px: int = 8) -> Tensor:
    return torch.randint(0, 256, (number, 3, px, px), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def lambdas(mixer: Mixer, *, draws: int, px: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each draw: lambda as the targets tell it, and as the pictures do, whose first is all 1 and second all 0."""
    np.random.seed(0)
    pair, labels = torch.stack([torch.ones(1, px, px), torch.zeros(1, px, px)]), torch.tensor([0, 1])
    drawn = [mixer(pair, labels) for _ in range(draws)]
    return (
        np.array([targets[0, 0].item() for _, targets in drawn]),
        np.array([pixels[0].mean().item() for pixels, _ in drawn]),
    )


@pytest.mark.parametrize(("mixup", "cutmix"), ALPHAS)
@pytest.mark.parametrize("number", [1, 2, 6, 7])
def test_any_batch_gives_float_pictures_and_probabilities(number: int, mixup: float, cutmix: float) -> None:
    np.random.seed(0)
    pixels, targets = Mixer(mixup=mixup, cutmix=cutmix, num_classes=4)(pictures(number), LABELS[:number])
    assert (pixels.shape, pixels.dtype) == ((number, 3, 8, 8), torch.float32)
    assert (targets.shape, targets.dtype) == ((number, 4), torch.float32)
    torch.testing.assert_close(targets.sum(1), torch.ones(number))
    assert pixels.min() >= 0
    assert pixels.max() <= 255


@pytest.mark.parametrize(("mixup", "cutmix"), ALPHAS)
def test_the_last_picture_of_an_odd_batch_stays_as_it_is(mixup: float, cutmix: float) -> None:
    mixer = Mixer(mixup=mixup, cutmix=cutmix, num_classes=3)
    np.random.seed(2)
    pixels, targets = mixer(pictures(7), LABELS)
    assert torch.equal(pixels[-1], pictures(7)[-1].float())
    assert torch.equal(targets[-1], F.one_hot(LABELS, 3).float()[-1])
    assert not torch.equal(pixels[:-1], pictures(7)[:-1].float())
    np.random.seed(2)
    even_pixels, even_targets = mixer(pictures(7)[:6], LABELS[:6])
    assert torch.equal(pixels[:-1], even_pixels)
    assert torch.equal(targets[:-1], even_targets)


@pytest.mark.parametrize(("mixup", "cutmix"), ALPHAS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(mixup: float, cutmix: float) -> None:
    mixer = Mixer(mixup=mixup, cutmix=cutmix, num_classes=3)
    drawn = []
    for seed in (5, 5, 6):
        np.random.seed(seed)
        drawn.append([mixer(pictures(4), LABELS[:4]) for _ in range(3)])
    for (pixels, targets), (same_pixels, same_targets), (other_pixels, _) in zip(*drawn, strict=True):
        assert torch.equal(pixels, same_pixels)
        assert torch.equal(targets, same_targets)
        assert not torch.equal(pixels, other_pixels)


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_mixup_s_lambda_is_drawn_from_beta(alpha: float) -> None:
    told, shown = lambdas(Mixer(mixup=alpha, cutmix=0.0, num_classes=2), draws=2000, px=1)
    np.testing.assert_allclose(told, shown, atol=1e-6)
    assert told.mean() == pytest.approx(0.5, abs=0.03)
    assert stats.kstest(told, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_s_lambda_is_the_share_of_the_picture_that_is_left() -> None:
    told, shown = lambdas(Mixer(mixup=0.0, cutmix=1.0, num_classes=2), draws=500, px=16)
    np.testing.assert_allclose(told, shown, atol=1e-6)
    assert len(np.unique(told)) > 50


def test_with_both_every_batch_is_mixed_and_half_of_them_by_cutmix() -> None:
    np.random.seed(0)
    mixer = Mixer(mixup=1.0, cutmix=1.0, num_classes=2)
    pair = torch.stack([torch.ones(1, 32, 32), torch.zeros(1, 32, 32)])
    drawn = [mixer(pair, torch.tensor([0, 1]))[0] for _ in range(1000)]
    blended = np.mean([bool(((pixels > 0) & (pixels < 1)).any()) for pixels in drawn])
    same = np.mean([torch.equal(pixels, pair) for pixels in drawn])
    assert blended == pytest.approx(0.5, abs=0.05)
    assert same < 0.02  # a rectangle of less than a pixel


def test_uint8_pictures_are_blended_without_rounding() -> None:
    mixer = Mixer(mixup=1.0, cutmix=0.0, num_classes=3)
    np.random.seed(3)
    pixels, targets = mixer(pictures(2), LABELS[:2])
    np.random.seed(3)
    of_floats, _ = mixer(pictures(2).float(), LABELS[:2])
    assert torch.equal(pixels, of_floats)
    first, last = pictures(2).double()
    share = targets[0, 0].double()
    torch.testing.assert_close(pixels[0].double(), share * first + (1 - share) * last, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("mixup", "cutmix"), ALPHAS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_caller_s_batch_is_left_as_it_is(dtype: torch.dtype, mixup: float, cutmix: float) -> None:
    given, labels = pictures(7).to(dtype), LABELS.clone()
    mixer = Mixer(mixup=mixup, cutmix=cutmix, num_classes=3)
    np.random.seed(0)
    for _ in range(4):
        pixels, _ = mixer(given, labels)
        pixels.zero_()
    assert torch.equal(given, pictures(7).to(dtype))
    assert torch.equal(labels, LABELS)


def test_a_mixer_that_mixes_nothing_is_not_made() -> None:
    with pytest.raises(AssertionError):
        Mixer(mixup=0.0, cutmix=0.0, num_classes=3)
