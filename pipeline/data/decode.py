"""The one decoder: packing, validation, prediction and serving all see a picture through these two functions."""

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Names of the files that are read as pictures, in lower case."""

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
"""PIL's others stay closed: some hand the file to an outside program (EPS to Ghostscript), most are never pictures."""

_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    AssertionError,
    struct.error,
    zlib.error,
)
"""What PIL's format readers raise at damaged files; they have no exception of their own."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it."""

# warnings.catch_warnings swaps a global list, which threads would put back in the wrong order.
_WARNINGS_LOCK = threading.Lock()


def decode(source: Path | bytes) -> np.ndarray:
    """A picture file in full as uint8, [H, W] where it is grey and [H, W, 3] RGB otherwise.

    EXIF rotation is applied; 16-bit grey is scaled by 1/257 and rounded; transparency is laid on white; palettes,
    CMYK and other colour spaces become RGB.

    Raises:
        UserError: the file is missing, truncated, damaged, animated, of another format, of more than 8 bits a channel
            without a known range (32-bit integers, floats), or large enough to be a decompression bomb. The line
            starts with the file's name.
    """
    name, data = ("the picture", source) if isinstance(source, bytes) else (str(source), _read(source))
    try:
        image = _load(data)
        several = getattr(image, "is_animated", False) and image.format != "MPO"  # phones put a preview beside: MPO
        image = _plain(_upright(image))
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a JPEG, PNG, BMP, WebP, TIFF or PPM picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{name}: more than {Image.MAX_IMAGE_PIXELS} pixels; shrink it first") from None
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: cannot be decoded in full: {reason}") from None
    if several:
        raise UserError(f"{name}: holds several pictures (an animation or pages); save one as a file of its own")
    if image.mode.startswith("I") or image.mode == "F":
        return _grey16(image, name=name)
    return _on_white(np.asarray(image)) if image.mode in ("LA", "RGBA") else np.array(image)


def shrink(picture: np.ndarray, px: int) -> np.ndarray:
    """Resizes so that the shorter side is `px`, bicubic and antialiased, with the aspect kept; small pictures grow.

    Args:
        picture: uint8, [H, W] or [H, W, 3].
        px: the shorter side that comes out, in pixels; the longer one is rounded.
    """
    assert picture.dtype == np.uint8, picture.dtype
    height, width = picture.shape[:2]
    short = min(height, width)
    if short == px:
        return picture
    size = (max(px, round(width * px / short)), max(px, round(height * px / short)))
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """PIL warns about odd metadata; what matters it raises. Only for short work: threads take turns here."""
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _load(data: bytes) -> Image.Image:
    with _quiet():
        image = Image.open(BytesIO(data), formats=_FORMATS)
        if image.format == "TIFF":
            image.load()  # reads the tags again, warns again, and turns the picture upright by itself
    image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    with _quiet():
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _plain(image: Image.Image) -> Image.Image:
    """The same picture in mode L, LA, RGB or RGBA; more than 8 bits of grey (I;16, I, F) stay as they are."""
    if image.mode.startswith("I") or image.mode == "F":
        return image
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        return image.convert("LA" if grey else "RGBA")
    return image.convert("L" if grey else "RGB")


def _grey16(image: Image.Image, *, name: str) -> np.ndarray:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise UserError(f"{name}: 32-bit pixels have no known range; save it with 8 or 16 bits")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return grey


def _on_white(picture: np.ndarray) -> np.ndarray:
    """Composites [H, W, 1 + C] with alpha last onto white: [H, W] or [H, W, 3]."""
    alpha = picture[:, :, -1:].astype(np.uint32)
    colour = (picture[:, :, :-1] * alpha + 255 * (255 - alpha) + 127) // 255
    return np.squeeze(colour.astype(np.uint8), axis=2) if colour.shape[2] == 1 else colour.astype(np.uint8)
