"""Every random transform: its shape, its seed and its rate."""

import numpy as np
import pytest

from pipeline.data import transforms
from pipeline.data.transforms import TRANSFORMS, Augmenter
from pipeline.errors import ValueAtError

PX = 32


def _picture(channels: int, height: int = 40, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_shape_and_type(name: str, channels: int) -> None:
    result = Augmenter({name: {"p": 1.0}}, px=PX)(_picture(channels), seed=(0, 0, 0))
    assert result.shape == (PX, PX, channels)
    assert result.dtype == np.uint8


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_seed_gives_the_same_picture_whatever_came_before(name: str) -> None:
    picture = _picture(3)
    one, two = (Augmenter({name: {"p": 1.0}}, px=PX) for _ in range(2))
    two(picture, seed=(9, 9, 9))
    assert np.array_equal(one(picture, seed=(1, 2, 3)), two(picture, seed=(1, 2, 3)))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if "flip" not in name])
def test_another_seed_gives_another_picture(name: str) -> None:
    picture, augment = _picture(3), Augmenter({name: {"p": 1.0}}, px=PX)
    assert len({augment(picture, seed=(0, epoch, 0)).tobytes() for epoch in range(8)}) >= 7


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "random_crop"])
def test_the_rate(name: str) -> None:
    """At p = 0.3, 300 draws change 90 pictures on average, with a standard deviation of 7.9."""
    picture = _picture(3, PX, PX)
    augment = Augmenter({name: {"p": 0.3}}, px=PX)
    changed = sum(not np.array_equal(augment(picture, seed=(0, 0, i)), picture) for i in range(300))
    assert 58 <= changed <= 122


def test_flips_flip() -> None:
    picture = _picture(3, PX, PX)
    assert np.array_equal(Augmenter({"horizontal_flip": {"p": 1}}, px=PX)(picture, seed=(0,)), picture[:, ::-1])
    assert np.array_equal(Augmenter({"vertical_flip": {"p": 1}}, px=PX)(picture, seed=(0,)), picture[::-1])


def test_the_order_is_the_files_order() -> None:
    picture = _picture(3, PX, PX)
    erased_then_blurred = Augmenter({"random_erasing": {"p": 1}, "gaussian_blur": {"p": 1}}, px=PX)
    blurred_then_erased = Augmenter({"gaussian_blur": {"p": 1}, "random_erasing": {"p": 1}}, px=PX)
    assert not np.array_equal(erased_then_blurred(picture, seed=(0,)), blurred_then_erased(picture, seed=(0,)))


def test_an_offline_copy_keeps_its_shape() -> None:
    result = Augmenter({"rotate": {"p": 1}}, px=PX, square=False)(_picture(3), seed=(0,))
    assert result.shape == (40, 48, 3)


@pytest.mark.parametrize(
    ("chosen", "at", "message"),
    [
        ({"rotat": {}}, ("rotat",), "did you mean rotate"),
        ({"rotate": {"limits": 3}}, ("rotate", "limits"), "did you mean limit"),
        ({"rotate": {"limit": -3}}, ("rotate", "limit"), "greater than 0"),
        ({"random_resized_crop": {"scale": [0.9, 0.1]}}, ("random_resized_crop", "scale"), "runs backwards"),
    ],
)
def test_a_wrong_entry_is_refused(chosen: dict[str, dict[str, object]], at: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueAtError, match=message) as caught:
        transforms.check(chosen)
    assert caught.value.at == at


def test_center_crop_takes_the_middle() -> None:
    picture = _picture(3, 40, 48)
    assert np.array_equal(transforms.center_crop(picture, 32), picture[4:36, 8:40])


def test_channels() -> None:
    grey, colour = _picture(1), _picture(3)
    assert np.array_equal(transforms.to_channels(grey, 3), np.concatenate([grey] * 3, axis=2))
    assert transforms.to_channels(colour, 3) is colour
    # a grey picture survives the way to colour and back
    assert np.array_equal(transforms.to_channels(transforms.to_channels(grey, 3), 1), grey)
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    assert (transforms.to_channels(red, 1) == 76).all()
