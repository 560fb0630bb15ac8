"""Pixels: the middle, the mirrored border, the channels, the colours."""

import albumentations as A
import albumentations.augmentations.pixel.functional as reference
import cv2
import numpy as np
import pytest

from pipeline.data import pixels


def _picture(channels: int, height: int = 40, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _batch(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def test_center_crop_takes_the_middle() -> None:
    picture = _picture(3, 40, 48)
    assert np.array_equal(pixels.center_crop(picture, 32), picture[4:36, 8:40])


def test_channels() -> None:
    grey, colour = _picture(1), _picture(3)
    assert np.array_equal(pixels.to_channels(grey, 3), np.concatenate([grey] * 3, axis=2))
    assert pixels.to_channels(colour, 3) is colour
    # a grey picture survives the way to colour and back
    assert np.array_equal(pixels.to_channels(pixels.to_channels(grey, 3), 1), grey)
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    assert (pixels.to_channels(red, 1) == 76).all()


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_batch_has_its_pictures_channels_and_middles(in_chans: int) -> None:
    for channels in (1, 3):
        batch = _batch(5, 9, 12, channels)
        expected = np.stack([pixels.center_crop(pixels.to_channels(picture, in_chans), 8) for picture in batch])
        assert np.array_equal(pixels.center_crops(pixels.to_channels(batch, in_chans), 8), expected)
        views = [pixels.to_channels(picture, in_chans) for picture in batch]
        assert np.array_equal(pixels.center_crops(views, 8), expected)


@pytest.mark.parametrize("shape", [(4, 8, 8, 1), (3, 9, 14, 3)])
@pytest.mark.parametrize("down_right", [(0, 0), (2, 3), (7, 0), (8, 20)])
def test_the_border_is_mirrored_without_the_edge(shape: tuple[int, ...], down_right: tuple[int, int]) -> None:
    batch, (down, right) = _batch(*shape), down_right
    expected = np.pad(batch, ((0, 0), (down, down), (right, right), (0, 0)), mode="reflect")
    assert np.array_equal(pixels.mirrored(batch, down, right), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_windows_are_slices(channels: int) -> None:
    batch, tops, lefts = _batch(4, 9, 12, channels), np.array([0, 4, 2, 1]), np.array([5, 0, 3, 5])
    taken = pixels.windows(batch, tops, lefts, (5, 7))
    for picture, top, left, window in zip(batch, tops, lefts, taken, strict=True):
        assert np.array_equal(window, picture[top : top + 5, left : left + 7])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("amount", [-0.5, -0.13, 0.2, 0.9])
def test_colours_change_as_in_albumentations(channels: int, amount: float) -> None:
    picture = _picture(channels)
    pairs = [
        (pixels.brighter, amount, reference.adjust_brightness_torchvision(picture, np.float32(1 + amount))),
        (pixels.more_contrast, amount, reference.adjust_contrast_torchvision(picture, 1 + amount)),
    ]
    if channels == 3:
        pairs += [
            (pixels.more_saturated, amount, reference.adjust_saturation_torchvision(picture, 1 + amount)),
            (pixels.hue_turned, amount / 2, reference.adjust_hue_torchvision(picture, amount / 2)),
        ]
    for change, by, theirs in pairs:
        mine = picture.copy()
        change(mine, by)
        assert np.abs(mine.astype(int) - theirs.reshape(picture.shape)).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("degrees", [-170.0, -11.5, 7.0, 90.0])
def test_turned_as_in_albumentations(channels: int, degrees: float) -> None:
    picture = _picture(channels)
    rotate = A.Rotate(limit=(degrees, degrees), border_mode=cv2.BORDER_REFLECT_101, p=1.0)
    theirs = rotate(image=picture)["image"].reshape(picture.shape)
    assert np.abs(pixels.turned(picture, degrees).astype(int) - theirs).max() <= 1
