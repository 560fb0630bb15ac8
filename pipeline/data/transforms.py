"""The catalogue of random transforms, offline (`augment.transforms`) and online (`train.transforms`).

Each entry is a typed set of arguments and the one way in which it is carried out; to add a transform, add an entry.
Most work on all pictures of a batch at once; what has no such form goes through albumentations, picture by picture.
Every picture's randomness comes from a key of its own (`pipeline/data/draws.py`), so that neither the batch that it is
in nor workers or ranks make a difference, and no epoch repeats another.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.data.draws import Draws, Keys
from pipeline.data.pixels import (
    Pixels,
    brighter,
    center_crops,
    hue_turned,
    mirrored,
    more_contrast,
    more_saturated,
    together,
    turned,
    windows,
)
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
Positive = Annotated[float, Field(gt=0)]

_TRIES = 10
"""Of a random part to fit into the picture."""


class Transform(BaseModel):
    """What every transform has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    p: Probability = 0.5
    """Probability that a picture is transformed."""

    def __call__(self, pictures: Pixels, draws: Draws, *, px: int) -> Pixels:
        """Random versions for a net that sees squares of `px` pixels; an array that comes in may be overwritten."""
        if isinstance(pictures, np.ndarray):
            return self.batch(pictures, draws, px=px)
        shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, picture in enumerate(pictures):
            shapes[picture.shape].append(index)
        if len(shapes) == 1:
            return self.batch(np.stack(pictures), draws, px=px)
        made = list(pictures)
        for members in shapes.values():
            versions = self.batch(np.stack([pictures[i] for i in members]), draws.of(np.array(members)), px=px)
            for index, version in zip(members, versions, strict=True):
                made[index] = version
        return together(made)

    def batch(self, pixels_BHWC: np.ndarray, draws: Draws, *, px: int) -> Pixels:
        """The same for pictures of one shape, which it may overwrite."""
        raise NotImplementedError

    def load(self) -> None:
        """Makes what else the first picture would make."""


class ByAlbumentations(Transform):
    """A transform of albumentations that keeps a picture's shape, carried out picture by picture."""

    def build(self) -> "albumentations.BasicTransform":
        """The transform, always carried out: which pictures it is for is drawn here."""
        raise NotImplementedError

    @cached_property
    def built(self) -> "albumentations.BasicTransform":
        """What `build` gave, made once."""
        return self.build()

    def load(self) -> None:
        _ = self.built

    def __call__(self, pictures: Pixels, draws: Draws, *, px: int) -> Pixels:
        chosen = draws.chosen(self.p)
        seeds = draws.words(1)[0] >> np.uint64(32)
        for index, seed in zip(chosen.tolist(), seeds[chosen].tolist(), strict=True):
            self.built.set_random_seed(seed)
            pictures[index] = self.built(image=pictures[index])["image"]
        return pictures


class HorizontalFlip(Transform):
    """Left and right swapped."""

    def batch(self, pixels_BHWC: np.ndarray, draws: Draws, *, px: int) -> Pixels:
        import cv2

        chosen = draws.chosen(self.p)
        if pixels_BHWC.shape[3] == 1 and len(chosen):
            taken = pixels_BHWC[chosen]
            pixels_BHWC[chosen] = cv2.flip(taken.reshape(-1, taken.shape[2]), 1).reshape(taken.shape)
        else:
            # numpy reverses a pixel at a time, OpenCV a register
            for index in chosen.tolist():
                cv2.flip(pixels_BHWC[index], 1, dst=pixels_BHWC[index])
        return pixels_BHWC


class VerticalFlip(Transform):
    """Top and bottom swapped."""

    def batch(self, pixels_BHWC: np.ndarray, draws: Draws, *, px: int) -> Pixels:
        chosen = draws.chosen(self.p)
        pixels_BHWC[chosen] = pixels_BHWC[chosen][:, ::-1]
        return pixels_BHWC


class Shift(Transform):
    """Moved by whole pixels, each as likely, up to `limit` of the side in both directions; the border is mirrored."""

    limit: Share = 0.1
    """Largest shift, as a share of the side."""
    p: Probability = 1.0

    def batch(self, pixels_BHWC: np.ndarray, draws: Draws, *, px: int) -> Pixels:
        height, width = pixels_BHWC.shape[1:3]
        # the mirror has no more than the picture without its edge
        down, right = (min(int(self.limit * side), side - 1) for side in (height, width))
        chosen, places = draws.chosen(self.p), draws.uniform(2)
        tops, lefts = np.full(len(draws), down), np.full(len(draws), right)
        tops[chosen] = places[0, chosen] * (2 * down + 1)
        lefts[chosen] = places[1, chosen] * (2 * right + 1)
        return windows(mirrored(pixels_BHWC, down, right), tops, lefts, (height, width))


class Rotate(Transform):
    """Turned by up to `limit` degrees; the border is mirrored."""

    limit: Annotated[float, Field(gt=0, le=180)] = 15.0
    """Largest angle, degrees."""

    def batch(self, pixels_BHWC: np.ndarray, draws: Draws, *, px: int) -> Pixels:
        chosen, angles = draws.chosen(self.p), self.limit * (2 * draws.uniform(1)[0] - 1)
        for index, angle in zip(chosen.tolist(), angles[chosen].tolist(), strict=True):
            pixels_BHWC[index] = turned(pixels_BHWC[index], angle)
        return pixels_BHWC


class RandomResizedCrop(Transform):
    """A random part of the picture, resized to what the net sees (Szegedy et al. 2014, section 6)."""

    scale: Annotated[tuple[Share, Share], AfterValidator(_ascending)] = (0.35, 1.0)
    """Range of the part's area, as a share of the picture's."""
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(_ascending)] = (3 / 4, 4 / 3)
    """Range of the part's width over height."""
    p: Probability = 1.0

    def __call__(self, pictures: Pixels, draws: Draws, *, px: int) -> Pixels:
        import cv2

        chosen = draws.chosen(self.p)
        sides = np.array([picture.shape[:2] for picture in pictures])[chosen]
        boxes = self.boxes(sides, draws.uniform(2 * _TRIES + 2)[:, chosen])
        resized = np.empty((len(chosen), px, px, pictures[0].shape[2]), dtype=np.uint8)
        for index, (top, left, height, width), out in zip(chosen.tolist(), boxes.tolist(), resized, strict=True):
            part = pictures[index][top : top + height, left : left + width]
            cv2.resize(part, (px, px), dst=out, interpolation=cv2.INTER_AREA)
        if len(chosen) == len(pictures):
            return resized
        made = list(pictures)
        for index, picture in zip(chosen.tolist(), resized, strict=True):
            made[index] = picture
        return together(made)

    def boxes(self, sides: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """The parts, int64 [B, (top, left, height, width)], of pictures of those sides, int64 [B, (height, width)].

        Area and ratio are drawn until the part fits, at most ten times; else it is the largest part in the middle of a
        ratio within the range, as in torchvision and albumentations.

        Args:
            drawn: uniform numbers, [2 * 10 + 2, B].
        """
        heights, widths = sides.T
        low, high = self.scale
        areas = (low + (high - low) * drawn[:_TRIES]) * heights * widths
        low, high = (math.log(ratio) for ratio in self.ratio)
        ratios = np.exp(low + (high - low) * drawn[_TRIES : 2 * _TRIES])
        wide, tall = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
        fits = (wide > 0) & (wide <= widths) & (tall > 0) & (tall <= heights)
        first, ever = np.argmax(fits, axis=0), fits.any(axis=0)
        each = np.arange(len(sides))
        tall = np.where(ever, tall[first, each], np.minimum(heights, np.rint(widths / self.ratio[0])))
        wide = np.where(ever, wide[first, each], np.minimum(widths, np.rint(heights * self.ratio[1])))
        places = np.where(ever, drawn[2 * _TRIES :], 0.5)
        tops, lefts = places[0] * (heights - tall + 1), places[1] * (widths - wide + 1)
        return np.stack([tops, lefts, tall, wide], axis=1).astype(np.int64)


class RandomCrop(Transform):
    """A square of the side that the net sees, from a picture padded by mirroring (He et al. 2015, section 4.2)."""

    padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Pixels added on each side first."""
    p: Probability = 1.0

    def batch(self, pixels_BHWC: np.ndarray, draws: Draws, *, px: int) -> Pixels:
        chosen, places = draws.chosen(self.p), draws.uniform(2)
        padded = mirrored(pixels_BHWC[chosen], self.padding, self.padding)
        height, width = padded.shape[1:3]
        tops = (places[0, chosen] * (height - px + 1)).astype(np.int64)
        lefts = (places[1, chosen] * (width - px + 1)).astype(np.int64)
        crops = windows(padded, tops, lefts, (px, px))
        if len(chosen) == len(pixels_BHWC):
            return crops
        made = list(pixels_BHWC)
        for index, crop in zip(chosen.tolist(), crops, strict=True):
            made[index] = crop
        return together(made)


class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue changed at random, in random order."""

    brightness: Strength = 0.2
    """Largest relative change of brightness."""
    contrast: Strength = 0.2
    """Largest relative change of contrast."""
    saturation: Strength = 0.2
    """Largest relative change of saturation (colour pictures)."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift of hue, as a share of the colour circle (colour pictures)."""

    def batch(self, pixels_BHWC: np.ndarray, draws: Draws, *, px: int) -> Pixels:
        limits = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        chosen, drawn, ranks = draws.chosen(self.p), draws.uniform(4), draws.uniform(4)
        changes = (limits[:, None] * (2 * drawn - 1))[:, chosen].T.tolist()
        orders = np.argsort(ranks, axis=0)[:, chosen].T.tolist()
        changers, colour = (brighter, more_contrast, more_saturated, hue_turned), pixels_BHWC.shape[3] == 3
        for index, amounts, order in zip(chosen.tolist(), changes, orders, strict=True):
            for number in order:
                if limits[number] and (colour or number < 2):
                    changers[number](pixels_BHWC[index], amounts[number])
        return pixels_BHWC


class GaussianBlur(ByAlbumentations):
    """Blurred by a Gaussian."""

    sigma: Annotated[tuple[float, float], AfterValidator(_ascending)] = (0.1, 2.0)
    """Range of the standard deviation, pixels."""

    def build(self) -> "albumentations.BasicTransform":
        import albumentations as A

        return A.GaussianBlur(blur_limit=0, sigma_limit=self.sigma, p=1.0)


class GaussianNoise(Transform):
    """Gaussian noise added to each channel."""

    std: Annotated[tuple[Strength, Strength], AfterValidator(_ascending)] = (0.02, 0.1)
    """Range of the standard deviation, as a share of the full scale."""

    def batch(self, pixels_BHWC: np.ndarray, draws: Draws, *, px: int) -> Pixels:
        import cv2

        chosen, strength, words = draws.chosen(self.p), draws.uniform(1)[0], draws.words(1)[0]
        stds = 255 * (self.std[0] + (self.std[1] - self.std[0]) * strength)
        num, height = pixels_BHWC.shape[:2]
        rows_BHR = pixels_BHWC.reshape(num, height, -1)
        for index, std, word in zip(chosen.tolist(), stds[chosen].tolist(), words[chosen].tolist(), strict=True):
            # a counter-based generator (Salmon et al. 2011), whose key costs nothing to set
            noise = np.random.Generator(np.random.Philox(key=word)).standard_normal(rows_BHR.shape[1:], np.float32)
            rows_BHR[index] = cv2.add(rows_BHR[index], noise * np.float32(std), dtype=cv2.CV_8U)
        return pixels_BHWC


class RandomErasing(Transform):
    """A rectangle painted black (Zhong et al. 2017)."""

    scale: Annotated[tuple[Share, Share], AfterValidator(_ascending)] = (0.02, 0.2)
    """Range of the rectangle's area, as a share of the picture's."""

    def batch(self, pixels_BHWC: np.ndarray, draws: Draws, *, px: int) -> Pixels:
        chosen, drawn = draws.chosen(self.p), draws.uniform(4)
        height, width = pixels_BHWC.shape[1:3]
        areas = (self.scale[0] + (self.scale[1] - self.scale[0]) * drawn[0]) * height * width
        # width over height is 0.3 to 3.3, or as near to that as the area fits into the picture
        low, high = areas / height**2, width**2 / areas
        low, high = np.clip(_ERASED[0], low, high), np.clip(_ERASED[1], low, high)
        ratios = low + (high - low) * drawn[1]
        tall, wide = (np.rint(np.sqrt(side)).astype(np.int64) for side in (areas / ratios, areas * ratios))
        tops = (drawn[2] * (height - tall + 1)).astype(np.int64)
        lefts = (drawn[3] * (width - wide + 1)).astype(np.int64)
        boxes = np.stack([tops, tops + tall, lefts, lefts + wide])[:, chosen].T.tolist()
        for index, (top, bottom, left, right) in zip(chosen.tolist(), boxes, strict=True):
            pixels_BHWC[index, top:bottom, left:right] = 0
        return pixels_BHWC


_ERASED = (0.3, 3.3)
"""Range of an erased rectangle's width over its height."""


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
        self._steps = {name: _parse(name, arguments) for name, arguments in chosen.items()}
        self._px, self._square = px, square

    def load(self) -> None:
        """Makes what else the first picture would make: forks of this process then need not."""
        for step in self._steps.values():
            step.load()

    def __call__(self, pictures: Pixels, *, keys: Keys) -> Pixels:
        """A random version of each picture: the same key gives the same version, bit by bit, whatever the batch.

        Args:
            pictures: an array may be overwritten, the pictures in a list stay as they are.
            keys: of the pictures, uint64 [B] (`draws.keys`).
        """
        for name, step in self._steps.items():
            pictures = step(pictures, Draws(keys, name), px=self._px)
        return center_crops(pictures, self._px) if self._square else pictures
