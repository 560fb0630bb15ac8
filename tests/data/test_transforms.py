"""Every random transform: its shape, its seed and its rate, and that the batch makes no difference."""

import albumentations as A
import cv2
import numpy as np
import pytest
from scipy import stats

from pipeline.data import transforms
from pipeline.data.draws import keys
from pipeline.data.pixels import Pixels
from pipeline.data.transforms import TRANSFORMS, Augmenter
from pipeline.errors import ValueAtError

PX = 32


def _picture(channels: int, height: int = 40, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _one(augment: Augmenter, picture: np.ndarray, *, seed: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """A version of one picture by (seed, epoch, index)."""
    return augment([picture], keys=keys(seed[0], seed[1], np.array([seed[2]])))[0]


def _many(name: str, picture: np.ndarray, *, count: int, **arguments: object) -> np.ndarray:
    """Versions of one picture as so many pictures of a batch."""
    augment = Augmenter({name: {"p": 1.0, **arguments}}, px=PX)
    return np.asarray(augment(np.stack([picture] * count), keys=keys(0, 0, np.arange(count))))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_shape_and_type(name: str, channels: int) -> None:
    augment = Augmenter({name: {"p": 1.0}}, px=PX)
    pictures = [_picture(channels), _picture(channels, 50, 32), _picture(channels)]
    for batch in (pictures, np.stack([pictures[0]] * 3)):
        result = augment(batch, keys=keys(0, 0, np.arange(3)))
        assert isinstance(result, np.ndarray)
        assert result.shape == (3, PX, PX, channels)
        assert result.dtype == np.uint8


@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_version_is_the_same_whatever_batch_its_picture_is_in(name: str, p: float) -> None:
    """Batches of one shape, of several, and of one picture, at the packed size or above it."""
    augment = Augmenter({name: {"p": p}, "shift": {"p": p}}, px=PX)
    for height, width in ((PX, PX), (40, 48)):
        same = [_picture(3, height, width) + np.uint8(i) for i in range(6)]
        made = keys(1, 2, np.arange(6))
        whole = augment(np.stack(same), keys=made)
        ragged: Pixels = [*same[:3], _picture(3, 33, 60), *same[3:]]
        among_others = augment(ragged, keys=keys(1, 2, np.array([0, 1, 2, 77, 3, 4, 5])))
        for index, picture in enumerate(same):
            assert np.array_equal(augment([picture], keys=made[[index]])[0], whole[index])
            assert np.array_equal(among_others[index + (index > 2)], whole[index])
            assert np.array_equal(picture, _picture(3, height, width) + np.uint8(index))  # left as it was


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_seed_gives_the_same_picture_whatever_came_before(name: str) -> None:
    picture = _picture(3)
    one, two = (Augmenter({name: {"p": 1.0}}, px=PX) for _ in range(2))
    _one(two, picture, seed=(9, 9, 9))
    assert np.array_equal(_one(one, picture, seed=(1, 2, 3)), _one(two, picture, seed=(1, 2, 3)))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if "flip" not in name])
def test_another_seed_gives_another_picture(name: str) -> None:
    picture, augment = _picture(3), Augmenter({name: {"p": 1.0}}, px=PX)
    versions = {_one(augment, picture, seed=(0, epoch, 0)).tobytes() for epoch in range(30)}
    assert len(versions) >= 20  # a shift has 81 ways here, so that some meet


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "random_crop"])
def test_the_rate(name: str) -> None:
    """At p = 0.3, 300 draws change 90 pictures on average, with a standard deviation of 7.9."""
    picture = _picture(3, PX, PX)
    augment = Augmenter({name: {"p": 0.3}}, px=PX)
    changed = sum(not np.array_equal(_one(augment, picture, seed=(0, 0, i)), picture) for i in range(300))
    assert 58 <= changed <= 122


def test_flips_flip() -> None:
    picture = _picture(3, PX, PX)
    assert np.array_equal(_one(Augmenter({"horizontal_flip": {"p": 1}}, px=PX), picture), picture[:, ::-1])
    assert np.array_equal(_one(Augmenter({"vertical_flip": {"p": 1}}, px=PX), picture), picture[::-1])


def test_the_order_is_the_files_order() -> None:
    picture = _picture(3, PX, PX)
    erased_then_blurred = Augmenter({"random_erasing": {"p": 1}, "gaussian_blur": {"p": 1}}, px=PX)
    blurred_then_erased = Augmenter({"gaussian_blur": {"p": 1}, "random_erasing": {"p": 1}}, px=PX)
    assert not np.array_equal(_one(erased_then_blurred, picture), _one(blurred_then_erased, picture))


def test_an_offline_copy_keeps_its_shape() -> None:
    result = _one(Augmenter({"rotate": {"p": 1}}, px=PX, square=False), _picture(3))
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


def test_shifts_are_whole_pixels_each_as_likely_and_mirrored() -> None:
    picture = _picture(3, PX, PX)
    padded = np.pad(picture, ((3, 3), (3, 3), (0, 0)), mode="reflect")
    seen = np.zeros((7, 7), dtype=int)
    for version in _many("shift", picture, count=2000, limit=0.1):  # 3 of 32 pixels
        corners = list(np.ndindex(7, 7))
        places = [(y, x) for y, x in corners if np.array_equal(padded[y : y + PX, x : x + PX], version)]
        seen[places[0]] += 1
        assert len(places) == 1
    assert stats.chisquare(seen.ravel()).pvalue > 0.01
    assert _many("shift", picture, count=4, limit=1.0).shape == (4, PX, PX, 3)


def test_random_crops_are_slices_of_the_padded_picture_each_as_likely() -> None:
    picture = _picture(1, 33, 34)
    padded = np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    slices = {padded[y : y + PX, x : x + PX].tobytes(): (y, x) for y, x in np.ndindex(6, 7)}
    seen = np.zeros((6, 7), dtype=int)
    for version in _many("random_crop", picture, count=2000, padding=2):
        seen[slices[version.tobytes()]] += 1
    assert stats.chisquare(seen.ravel()).pvalue > 0.01


def test_random_parts_have_the_area_the_ratio_and_the_places_that_are_asked_for() -> None:
    count = 4000
    entry = TRANSFORMS["random_resized_crop"]()
    assert isinstance(entry, transforms.RandomResizedCrop)
    drawn = transforms.Draws(keys(0, 0, np.arange(count)), "x").uniform(2 * 10 + 2)
    top, left, height, width = entry.boxes(np.full((count, 2), 1000), drawn).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 1000).all()
    assert (left + width <= 1000).all()
    # against albumentations' own: the two samples are of one distribution
    theirs = A.RandomResizedCrop(size=(PX, PX), scale=(0.35, 1.0), p=1.0)
    theirs.set_random_seed(0)
    boxes = [theirs.get_params_dependent_on_data({"shape": (1000, 1000)}, {})["crop_coords"] for _ in range(count)]
    x1, y1, x2, y2 = np.array(boxes).T
    for mine, other in ((height * width, (y2 - y1) * (x2 - x1)), (width / height, (x2 - x1) / (y2 - y1))):
        assert stats.ks_2samp(mine, other).pvalue > 0.01
    for mine, other in ((top, y1), (left, x1)):
        assert stats.ks_2samp(mine, other).pvalue > 0.01


def test_a_part_that_never_fits_is_the_largest_of_that_ratio_in_the_middle() -> None:
    entry = transforms.RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    box = entry.boxes(np.array([[40, 80]]), np.full((22, 1), 0.3))
    assert box.tolist() == [[0, 20, 40, 40]]


def test_random_parts_are_resized_by_area() -> None:
    picture = _picture(3, 80, 90)
    entry = transforms.RandomResizedCrop()
    drawn = transforms.Draws(keys(0, 0, np.arange(5)), "random_resized_crop")
    drawn.chosen(1.0)
    boxes = entry.boxes(np.array([[80, 90]] * 5), drawn.uniform(22))
    for version, (top, left, height, width) in zip(
        _many("random_resized_crop", picture, count=5), boxes.tolist(), strict=True
    ):
        part = picture[top : top + height, left : left + width]
        assert np.array_equal(version, cv2.resize(part, (PX, PX), interpolation=cv2.INTER_AREA))


def test_an_erased_rectangle_has_the_area_that_is_asked_for() -> None:
    picture = np.full((PX, PX, 3), 255, dtype=np.uint8)
    erased = (_many("random_erasing", picture, count=2000, scale=(0.1, 0.3))[..., 0] == 0).mean(axis=(1, 2))
    assert 0.08 < erased.min() < 0.12
    assert 0.28 < erased.max() < 0.32
    assert erased.mean() == pytest.approx(0.2, abs=0.01)
    assert (_many("random_erasing", picture, count=3, scale=(1.0, 1.0)) == 0).all()


def test_noise_has_the_strength_that_is_asked_for() -> None:
    picture = np.full((PX, PX, 3), 128, dtype=np.uint8)
    noise = _many("gaussian_noise", picture, count=200, std=(0.05, 0.05)).astype(float) - 128
    assert noise.mean() == pytest.approx(0, abs=0.1)
    assert noise.std() == pytest.approx(0.05 * 255, rel=0.01)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02


def test_adding_a_transform_changes_nothing_that_the_others_draw() -> None:
    picture = _picture(3, PX, PX)
    flipped = _one(Augmenter({"horizontal_flip": {"p": 1}, "shift": {}}, px=PX), picture)
    alone = _one(Augmenter({"shift": {}}, px=PX), np.ascontiguousarray(picture[:, ::-1]))
    assert np.array_equal(flipped, alone)
