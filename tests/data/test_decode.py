import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from pipeline.data.decode import decode, shrink
from pipeline.errors import UserError

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
QUARTERS = np.array([[RED, GREEN], [BLUE, YELLOW]], np.uint8)


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    return block


def noise(height: int = 64, width: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("orientation", "corners"),
    [
        (1, [[RED, GREEN], [BLUE, YELLOW]]),
        (2, [[GREEN, RED], [YELLOW, BLUE]]),
        (3, [[YELLOW, BLUE], [GREEN, RED]]),
        (4, [[BLUE, YELLOW], [RED, GREEN]]),
        (5, [[RED, BLUE], [GREEN, YELLOW]]),
        (6, [[BLUE, RED], [YELLOW, GREEN]]),
        (7, [[YELLOW, GREEN], [BLUE, RED]]),
        (8, [[GREEN, YELLOW], [RED, BLUE]]),
    ],
)
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_once(format_: str, orientation: int, corners: object) -> None:
    blocks = Image.fromarray(np.kron(QUARTERS, np.ones((32, 16, 1), np.uint8)))
    picture = decode(encoded(blocks, format_, exif=exif(orientation)))
    assert picture.shape == ((64, 32, 3) if orientation < 5 else (32, 64, 3))
    found = picture[picture.shape[0] // 4 :: picture.shape[0] // 2, picture.shape[1] // 4 :: picture.shape[1] // 2]
    np.testing.assert_allclose(found.astype(int), corners, atol=8)  # JPEG and WebP are not exact


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_saturated(format_: str) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 40000, 65406, 65535]], np.uint16)
    picture = decode(encoded(Image.fromarray(values), format_))
    np.testing.assert_array_equal(picture, [[0, 0, 1, 1], [128, 156, 254, 255]])
    assert picture.dtype == np.uint8


def test_16_bit_grey_is_rotated() -> None:
    values = np.array([[0, 25700], [51400, 65535]], np.uint16)
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(values), "TIFF", exif=exif(6))), [[200, 0], [255, 100]]
    )


def test_alpha_is_laid_on_white() -> None:
    rgba = np.array([[(10, 20, 30, 255), (10, 20, 30, 0), (0, 100, 200, 128)]], np.uint8)
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(rgba), "PNG")), [[(10, 20, 30), (255, 255, 255), (127, 177, 227)]]
    )


def test_grey_with_alpha_stays_grey() -> None:
    la = Image.merge("LA", [Image.fromarray(np.array([[10, 10, 0]], np.uint8)) for _ in range(2)])
    la.putalpha(Image.fromarray(np.array([[255, 0, 128]], np.uint8)))
    np.testing.assert_array_equal(decode(encoded(la, "PNG")), [[10, 255, 127]])


def test_palette_with_transparency_is_laid_on_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.putdata([0, 1, 2])
    expected = [[(200, 0, 0), (255, 255, 255), (127, 127, 227)]]
    np.testing.assert_array_equal(decode(encoded(image, "PNG", transparency=bytes([255, 0, 128]))), expected)


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_the_transparent_colour_becomes_white(mode: str) -> None:
    values = {
        "L": np.array([[7, 9]], np.uint8),
        "RGB": np.array([[(7, 7, 7), (9, 9, 9)]], np.uint8),
        "I;16": np.array([[7 * 257, 9 * 257]], np.uint16),
    }[mode]
    colour: object = {"L": 7, "RGB": (7, 7, 7), "I;16": 7 * 257}[mode]
    picture = decode(encoded(Image.fromarray(values), "PNG", transparency=colour))
    np.testing.assert_array_equal(picture.reshape(2, -1)[:, 0], [255, 9])
    assert picture.ndim == (3 if mode == "RGB" else 2)


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for data in (encoded(image, "TIFF"), encoded(image, "JPEG", quality=100)):
        picture = decode(data)
        assert picture.shape == (16, 16, 3)
        np.testing.assert_allclose(picture[8, 8].astype(int), (0, 255, 255), atol=2)


def test_one_bit_is_black_and_white_grey() -> None:
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(decode(encoded(image, "PNG")), [[0, 255]])


def test_a_jpeg_with_a_preview_beside_it_is_one_picture() -> None:
    data = encoded(noise(), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    np.testing.assert_array_equal(decode(data), decode(encoded(noise(), "JPEG")))


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_an_error(tmp_path: Path, format_: str, share: float) -> None:
    data = encoded(noise(), format_)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"cut\.jpg: "):
        decode(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("page.jpg", b"<html>not found</html>", "not a JPEG"),
        ("empty.png", b"", "not a JPEG"),
        ("disguised.jpg", encoded(noise(), "GIF"), "not a JPEG"),
        ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not a JPEG"),
        ("moving.png", encoded(noise(), "PNG", save_all=True, append_images=[noise(64, 48).rotate(90)]), "several"),
        ("pages.tif", encoded(noise(), "TIFF", save_all=True, append_images=[noise()]), "several"),
        ("float.tif", encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "no known range"),
        ("wide.tif", encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"), "no known range"),
    ],
)
def test_what_is_not_one_picture_is_refused_by_name(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        decode(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jpg: cannot be read: No such file"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        decode(tmp_path)


@pytest.mark.parametrize("limit", [64 * 48 - 1, 64 * 48 // 3])  # PIL warns above its limit and raises above twice that
def test_a_decompression_bomb_is_a_user_error(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=f"more than {limit} pixels"):
        decode(encoded(noise(), "PNG"))


def test_pil_warnings_stay_inside_also_under_threads() -> None:
    block = exif(6)
    block[ExifTags.Base.ImageDescription] = "x" * 40
    damaged = encoded(noise(), "JPEG", exif=block).replace((41).to_bytes(4, "big"), (60_000).to_bytes(4, "big"))
    with pytest.warns(UserWarning, match="Skipping tag"):
        Image.open(BytesIO(damaged)).getexif().get(1)
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        assert {picture.shape for picture in pool.map(decode, [damaged] * 32)} == {(48, 64, 3)}
    assert warnings.filters == before


def test_decoded_pixels_can_be_written() -> None:
    for mode in ("L", "RGB", "RGBA", "LA", "P", "1"):
        assert decode(encoded(noise().convert(mode), "PNG")).flags.writeable


@pytest.mark.parametrize(
    ("shape", "px", "expected"),
    [
        ((100, 50, 3), 20, (40, 20, 3)),
        ((50, 101, 3), 20, (20, 40, 3)),
        ((50, 50), 20, (20, 20)),
        ((8, 8), 32, (32, 32)),
        ((7, 1000), 7, (7, 1000)),
        ((641, 640, 3), 64, (64, 64, 3)),
    ],
)
def test_shrink_sets_the_shorter_side(shape: tuple[int, ...], px: int, expected: tuple[int, ...]) -> None:
    small = shrink(np.full(shape, 77, np.uint8), px)
    assert small.shape == expected
    assert small.dtype == np.uint8
    assert (small == 77).all()


def test_shrink_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    np.testing.assert_allclose(shrink(stripes, 8).astype(int), 128, atol=12)


def test_shrink_leaves_a_fitting_picture_alone() -> None:
    picture = np.asarray(noise())
    assert shrink(picture, 48) is picture
