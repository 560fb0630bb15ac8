"""What is done to the pixels of pictures, one or a whole batch, with nothing random in it."""

import numpy as np
from numpy.lib.stride_tricks import as_strided

Pixels = np.ndarray | list[np.ndarray]
"""Pictures: uint8 [B, H, W, C] where they are of one shape, else a list of uint8 [H, W, C]."""


def together(pictures: list[np.ndarray]) -> Pixels:
    """The pictures as one array if they are of one shape."""
    return np.stack(pictures) if len({picture.shape for picture in pictures}) == 1 else pictures


def mirrored(pixels_BHWC: np.ndarray, down: int, right: int) -> np.ndarray:
    """Pictures with `down` rows more above and below, and `right` columns on either side, without the edge repeated.

    Uint8 [B, H + 2 * down, W + 2 * right, C].
    """
    num, height, width, channels = pixels_BHWC.shape
    if not num or down >= height or right >= width:  # OpenCV takes no empty batch; a mirror is mirrored in its turn
        around = ((0, 0), (down, down), (right, right), (0, 0))
        return np.pad(pixels_BHWC, around, mode="reflect")
    import cv2

    # The columns of the whole batch in one call, as of a single tall picture.
    tall = pixels_BHWC.reshape(num * height, width, channels)
    wide = cv2.copyMakeBorder(tall, 0, 0, right, right, cv2.BORDER_REFLECT_101).reshape(num, height, -1, channels)
    padded = np.empty((num, height + 2 * down, *wide.shape[2:]), dtype=np.uint8)
    padded[:, down : down + height] = wide
    padded[:, :down] = wide[:, down:0:-1]
    padded[:, down + height :] = wide[:, height - 1 - down : height - 1][:, ::-1]
    return padded


def windows(pixels_BHWC: np.ndarray, tops: np.ndarray, lefts: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The part of that size (height, width) of each contiguous picture, from its own top and left, int64 [B].

    Uint8 [B, height, width, C].
    """
    num, height, width, channels = pixels_BHWC.shape
    assert pixels_BHWC.flags.c_contiguous
    assert np.all((tops >= 0) & (tops <= height - size[0]))
    assert np.all((lefts >= 0) & (lefts <= width - size[1]))
    every = as_strided(
        pixels_BHWC,
        (num, height - size[0] + 1, width - size[1] + 1, size[0], size[1] * channels),
        (height * width * channels, width * channels, channels, width * channels, 1),
        writeable=False,
    )
    taken: np.ndarray = every[np.arange(num), tops, lefts]
    return taken.reshape(num, *size, channels)


def center_crop(picture: np.ndarray, px: int) -> np.ndarray:
    """The middle square of `px` pixels of pictures [..., H, W, C] whose sides are at least that: no randomness."""
    height, width = picture.shape[-3:-1]
    top, left = (height - px) // 2, (width - px) // 2
    assert top >= 0
    assert left >= 0
    return picture[..., top : top + px, left : left + px, :]


def center_crops(pictures: Pixels, px: int) -> np.ndarray:
    """The middle squares of a batch, uint8 [B, px, px, C], contiguous."""
    if isinstance(pictures, np.ndarray):
        return np.ascontiguousarray(center_crop(pictures, px))
    crops = np.empty((len(pictures), px, px, pictures[0].shape[2]), dtype=np.uint8)
    for crop, picture in zip(crops, pictures, strict=True):
        crop[:] = center_crop(picture, px)
    return crops


def to_channels(picture: np.ndarray, in_chans: int) -> np.ndarray:
    """Pictures [..., H, W, 1 or 3] with the channels that the net sees: grey is repeated, colour becomes luma (BT.601).

    As they are where they have those channels already.
    """
    if picture.shape[-1] == in_chans:
        return picture
    if in_chans == 3:
        import cv2

        # one call for the whole batch, as a single tall picture
        tall = picture.reshape(-1, picture.shape[-2])
        return cv2.cvtColor(tall, cv2.COLOR_GRAY2RGB).reshape(*picture.shape[:-1], 3)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    grey: np.ndarray = np.rint(luma).astype(np.uint8)[..., None]
    return grey


def turned(picture: np.ndarray, degrees: float) -> np.ndarray:
    """A picture [H, W, 1 or 3] turned counter-clockwise about its middle: linear interpolation, mirrored border."""
    import cv2

    height, width = picture.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    made = cv2.warpAffine(picture, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return made.reshape(picture.shape)


# --- colours: a picture uint8 [H, W, 1 or 3], which is changed in place, and by how much ---


def brighter(picture: np.ndarray, amount: float) -> None:
    """Every value times 1 + amount."""
    _blend(picture, 1 + amount, picture, 0.0)


def more_contrast(picture: np.ndarray, amount: float) -> None:
    """Every value's distance to the mean luma times 1 + amount."""
    import cv2

    _blend(picture, 1 + amount, picture, 0.0, shift=-amount * cv2.mean(_luma(picture))[0])


def more_saturated(picture: np.ndarray, amount: float) -> None:
    """Every value's distance to its pixel's luma times 1 + amount; colour pictures alone."""
    import cv2

    _blend(picture, 1 + amount, cv2.cvtColor(_luma(picture), cv2.COLOR_GRAY2RGB), -amount)


def hue_turned(picture: np.ndarray, amount: float) -> None:
    """Hues moved by a share of the colour circle; colour pictures alone."""
    import cv2

    hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = ((np.arange(256) + 180 * amount) % 180).astype(np.uint8)[hsv[..., 0]]
    picture[:] = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _luma(picture: np.ndarray) -> np.ndarray:
    import cv2

    return picture if picture.shape[-1] == 1 else cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


def _blend(picture: np.ndarray, share: float, other: np.ndarray, rest: float, *, shift: float = 0.0) -> None:
    """share * picture + rest * other + shift, rounded and cut to 0..255."""
    import cv2

    cv2.addWeighted(picture, share, other, rest, shift, dst=picture)
