"""The catalogue of random transforms, offline (`augment.transforms`) and online (`train.transforms`).

Each entry is a typed set of arguments that builds one albumentations transform; adding a transform is adding an entry.
The table exists because albumentations only warns at an argument that it does not know. Every picture's randomness
comes from a seed of its own, keyed by what it is for, so that neither workers nor epochs nor ranks repeat one another.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ValueAtError, nearest

if TYPE_CHECKING:
    import albumentations


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the range {list(pair)} runs backwards")
    return pair


Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]


class Transform(BaseModel):
    """What every transform has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    p: Probability = 0.5
    """Probability that a picture is transformed."""

    def build(self, px: int) -> "albumentations.BasicTransform | albumentations.BaseCompose":
        """The albumentations transform for a net that sees squares of `px` pixels."""
        raise NotImplementedError


class HorizontalFlip(Transform):
    """Left and right swapped."""

    def build(self, px: int) -> "albumentations.BasicTransform":
        import albumentations as A

        return A.HorizontalFlip(p=self.p)


class VerticalFlip(Transform):
    """Top and bottom swapped."""

    def build(self, px: int) -> "albumentations.BasicTransform":
        import albumentations as A

        return A.VerticalFlip(p=self.p)


class Shift(Transform):
    """Moved by up to `limit` of the side in both directions; the border is mirrored."""

    limit: Share = 0.1
    """Largest shift, as a share of the side."""
    p: Probability = 1.0

    def build(self, px: int) -> "albumentations.BasicTransform":
        import albumentations as A
        import cv2

        by = {"x": (-self.limit, self.limit), "y": (-self.limit, self.limit)}
        return A.Affine(translate_percent=by, border_mode=cv2.BORDER_REFLECT_101, p=self.p)


class Rotate(Transform):
    """Turned by up to `limit` degrees; the border is mirrored."""

    limit: Annotated[float, Field(gt=0, le=180)] = 15.0
    """Largest angle, degrees."""

    def build(self, px: int) -> "albumentations.BasicTransform":
        import albumentations as A
        import cv2

        return A.Rotate(limit=(-self.limit, self.limit), border_mode=cv2.BORDER_REFLECT_101, p=self.p)


class RandomResizedCrop(Transform):
    """A random part of the picture, resized to what the net sees (Szegedy et al. 2014, section 6)."""

    scale: Annotated[tuple[Share, Share], AfterValidator(_ascending)] = (0.35, 1.0)
    """Range of the part's area, as a share of the picture's."""
    ratio: Annotated[tuple[float, float], AfterValidator(_ascending)] = (3 / 4, 4 / 3)
    """Range of the part's width over height."""
    p: Probability = 1.0

    def build(self, px: int) -> "albumentations.BasicTransform":
        import albumentations as A
        import cv2

        return A.RandomResizedCrop(
            size=(px, px), scale=self.scale, ratio=self.ratio, interpolation=cv2.INTER_AREA, p=self.p
        )


class RandomCrop(Transform):
    """A square of the side that the net sees, from a picture padded by mirroring (He et al. 2015, section 4.2)."""

    padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Pixels added on each side first."""
    p: Probability = 1.0

    def build(self, px: int) -> "albumentations.BaseCompose":
        import albumentations as A
        import cv2

        pad = A.Pad(padding=self.padding, border_mode=cv2.BORDER_REFLECT_101, p=1.0)
        return A.Sequential([pad, A.RandomCrop(height=px, width=px, p=1.0)], p=self.p)


class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue changed at random."""

    brightness: Strength = 0.2
    """Largest relative change of brightness."""
    contrast: Strength = 0.2
    """Largest relative change of contrast."""
    saturation: Strength = 0.2
    """Largest relative change of saturation (colour pictures)."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift of hue, as a share of the colour circle (colour pictures)."""

    def build(self, px: int) -> "albumentations.BasicTransform":
        import albumentations as A

        ranges = [(1 - s, 1 + s) for s in (self.brightness, self.contrast, self.saturation)]
        return A.ColorJitter(*ranges, hue=(-self.hue, self.hue), p=self.p)


class GaussianBlur(Transform):
    """Blurred by a Gaussian."""

    sigma: Annotated[tuple[float, float], AfterValidator(_ascending)] = (0.1, 2.0)
    """Range of the standard deviation, pixels."""

    def build(self, px: int) -> "albumentations.BasicTransform":
        import albumentations as A

        return A.GaussianBlur(blur_limit=0, sigma_limit=self.sigma, p=self.p)


class GaussianNoise(Transform):
    """Gaussian noise added to each channel."""

    std: Annotated[tuple[Strength, Strength], AfterValidator(_ascending)] = (0.02, 0.1)
    """Range of the standard deviation, as a share of the full scale."""

    def build(self, px: int) -> "albumentations.BasicTransform":
        import albumentations as A

        return A.GaussNoise(std_range=self.std, p=self.p)


class RandomErasing(Transform):
    """A rectangle painted black (Zhong et al. 2017)."""

    scale: Annotated[tuple[Share, Share], AfterValidator(_ascending)] = (0.02, 0.2)
    """Range of the rectangle's area, as a share of the picture's."""

    def build(self, px: int) -> "albumentations.BasicTransform":
        import albumentations as A

        return A.Erasing(scale=self.scale, p=self.p)


TRANSFORMS: dict[str, type[Transform]] = {
    "color_jitter": ColorJitter,
    "gaussian_blur": GaussianBlur,
    "gaussian_noise": GaussianNoise,
    "horizontal_flip": HorizontalFlip,
    "random_crop": RandomCrop,
    "random_erasing": RandomErasing,
    "random_resized_crop": RandomResizedCrop,
    "rotate": Rotate,
    "shift": Shift,
    "vertical_flip": VerticalFlip,
}


def check(chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Refuses unknown transforms and arguments with the nearest right name; gives back what was chosen.

    Raises:
        ValueAtError: a `ValueError` that says which entry is wrong.
    """
    for name, arguments in chosen.items():
        _parse(name, arguments)
    return {name: dict(arguments) for name, arguments in chosen.items()}


def _parse(name: str, arguments: Mapping[str, Any]) -> Transform:
    if name not in TRANSFORMS:
        raise ValueAtError(f"no such transform{nearest(name, TRANSFORMS)}", name)
    entry = TRANSFORMS[name]
    try:
        return entry.model_validate(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise ValueAtError(f"no such argument{nearest(key, entry.model_fields)}", name, key) from None
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
        raise ValueAtError(message, name, key) from None


def weakened(chosen: Mapping[str, Mapping[str, Any]], *, strength: float) -> dict[str, dict[str, Any]]:
    """The chosen transforms with every probability multiplied by `strength`; none at 0."""
    if strength == 0:
        return {}
    return {name: {**arguments, "p": _parse(name, arguments).p * strength} for name, arguments in chosen.items()}


class Augmenter:
    """A chain of chosen transforms.

    Args:
        chosen: transforms by name, in order, each with its arguments.
        px: side of the square that the net sees, in pixels.
        square: end in that square; otherwise pictures keep their shape where the transforms keep it.
    """

    def __init__(self, chosen: Mapping[str, Mapping[str, Any]], *, px: int, square: bool = True) -> None:
        import albumentations as A

        steps = [_parse(name, arguments).build(px) for name, arguments in chosen.items()]
        if square:
            steps.append(A.CenterCrop(height=px, width=px, p=1.0))
        self._compose = A.Compose(steps)

    def __call__(self, picture: np.ndarray, *, seed: tuple[int, ...]) -> np.ndarray:
        """A random version of one picture, uint8 [H, W, C]: the same seed gives the same version, bit by bit."""
        self._compose.set_random_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        result: np.ndarray = self._compose(image=picture)["image"]
        return result


def center_crop(picture: np.ndarray, px: int) -> np.ndarray:
    """The middle square of `px` pixels of a picture [H, W, C] whose sides are at least that: no randomness."""
    height, width = picture.shape[:2]
    top, left = (height - px) // 2, (width - px) // 2
    assert top >= 0
    assert left >= 0
    return picture[top : top + px, left : left + px]


def to_channels(picture: np.ndarray, in_chans: int) -> np.ndarray:
    """A picture [H, W, 1 or 3] with the channels that the net sees: grey is repeated, colour becomes luma (BT.601)."""
    if picture.shape[2] == in_chans:
        return picture
    if in_chans == 3:
        return np.repeat(picture, 3, axis=2)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    grey: np.ndarray = np.rint(luma).astype(np.uint8)[:, :, None]
    return grey
