"""Reading pictures and label maps of every kind."""

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from freqfusion.data import BadSampleError, read_image, read_mask
from freqfusion.data.images import decode_image, header_size
from support import png_bytes

GRADIENT = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2


def saved(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def test_rgb_is_channels_first_and_contiguous(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path / "a.png", GRADIENT))
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    np.testing.assert_array_equal(image.permute(1, 2, 0), GRADIENT)


@pytest.mark.parametrize(
    "orientation, turns, mirrored", [(1, 0, False), (2, 0, True), (3, 2, False), (6, 3, False)]
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, turns: int, mirrored: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(saved(tmp_path / "a.png", GRADIENT, exif=exif))
    expected = np.rot90(GRADIENT, turns)
    expected = expected[:, ::-1] if mirrored else expected
    np.testing.assert_array_equal(image.permute(1, 2, 0), expected)


def test_greyscale_gets_three_equal_channels(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path / "a.png", GRADIENT[..., 0]))
    assert image.shape == (3, 5, 7)
    for channel in image:
        np.testing.assert_array_equal(channel, GRADIENT[..., 0])


def test_alpha_is_dropped_without_darkening(tmp_path: Path) -> None:
    see_through = np.concatenate([GRADIENT, np.zeros((5, 7, 1), np.uint8)], axis=2)
    np.testing.assert_array_equal(
        read_image(saved(tmp_path / "a.png", see_through)).permute(1, 2, 0), GRADIENT
    )
    grey = saved(tmp_path / "b.png", see_through[..., 2:])
    assert Image.open(grey).mode == "LA"
    np.testing.assert_array_equal(read_image(grey)[0], GRADIENT[..., 2])


def test_palette_gives_colours_of_images_and_indices_of_masks(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    picture = Image.fromarray(indices, "L")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png", transparency=bytes([0, 128, 255]))
    for name in ("a.png", "b.png"):
        assert read_image(tmp_path / name)[:, 0, 1].tolist() == [40, 50, 60]
        mask = read_mask(tmp_path / name)
        assert mask.dtype == torch.int64
        np.testing.assert_array_equal(mask, indices)


def test_one_bit(tmp_path: Path) -> None:
    bits = np.array([[True, False, True]])
    path = saved(tmp_path / "a.png", bits)
    assert Image.open(path).mode == "1"
    assert read_image(path).tolist() == [[[255, 0, 255]]] * 3
    assert read_mask(path).tolist() == [[1, 0, 1]]


def test_sixteen_bits_are_scaled_in_images_and_kept_in_masks(tmp_path: Path) -> None:
    deep = np.array([[0, 128, 257], [32768, 65400, 65535]], np.uint16)
    path = saved(tmp_path / "a.png", deep)
    assert read_image(path).tolist() == [[[0, 0, 1], [128, 254, 255]]] * 3
    assert read_mask(path).tolist() == deep.tolist()


def test_thirty_two_bit_greyscale(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", np.array([[0, 65535]], np.int32))
    assert read_image(path)[0].tolist() == [[0, 255]]
    path = saved(tmp_path / "b.tif", np.array([[0, 70000]], np.int32))
    with pytest.raises(BadSampleError, match=r"b\.tif: holds values from 0 to 70000, expected 16 bits"):
        read_image(path)
    path = saved(tmp_path / "c.tif", np.array([[0.5, 1.0]], np.float32))
    with pytest.raises(BadSampleError, match=r"c\.tif: holds floating-point values"):
        read_image(path)


def test_other_colour_spaces_become_rgb(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", np.full((9, 4, 3), 200, np.uint8), "CMYK")
    image = read_image(path)
    assert image.shape == (3, 9, 4)
    assert (image.int() - 200).abs().max() <= 8


def test_very_large_pictures_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", GRADIENT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # stands for a picture beyond Pillow's limit
    assert read_image(path).shape == (3, 5, 7)
    assert Image.MAX_IMAGE_PIXELS == 4, "the limit of others must stay"


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("reader", [read_image, read_mask])
def test_truncated_file_is_named(tmp_path: Path, kind: str, reader: object) -> None:
    assert callable(reader)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    path = saved(tmp_path / f"half.{kind}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadSampleError, match=rf"half\.{kind}: cannot be read as a picture.*replace it"):
        reader(path)


def test_files_of_another_kind_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    for name in ("a.png", "empty.png"):
        with pytest.raises(BadSampleError, match=rf"{name}: cannot be read as a picture"):
            read_image(tmp_path / name)
    with pytest.raises(BadSampleError, match=r"b\.png: no such file"):
        read_mask(tmp_path / "b.png")


def test_colour_picture_is_no_mask(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=r"a\.png: is a picture of mode RGB, expected one class index"):
        read_mask(saved(tmp_path / "a.png", GRADIENT))


# orientation


@pytest.mark.parametrize(
    "ending, options", [("png", {}), ("tif", {"compression": "tiff_deflate"}), ("webp", {})]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_pixels_are_those_before_the_orientation(
    tmp_path: Path, orientation: int, ending: str, options: dict[str, object]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{ending}", GRADIENT, exif=exif, **{"lossless": True, **options})
    decoded = decode_image(path)
    assert (decoded.orientation, decoded.stored_size) == (orientation, (5, 7))
    np.testing.assert_array_equal(decoded.as_stored().permute(1, 2, 0), GRADIENT)
    upright = ImageOps.exif_transpose(Image.open(saved(tmp_path / "same.png", GRADIENT, exif=exif)))
    np.testing.assert_array_equal(decoded.pixels.permute(1, 2, 0), np.asarray(upright))
    assert header_size(path) == decoded.size == upright.size[::-1]


def test_an_uncompressed_tiff_on_its_side_is_refused(tmp_path: Path) -> None:
    """Pillow gives its pixels in a wrong order."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with pytest.raises(BadSampleError, match=r"a\.tif: Pillow mixes up .* orientation 6\. Save it upright"):
        read_image(saved(tmp_path / "a.tif", GRADIENT, exif=exif))


def test_a_strange_orientation_is_none(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    decoded = decode_image(saved(tmp_path / "a.png", GRADIENT, exif=exif))
    assert (decoded.orientation, decoded.size) == (1, (5, 7))


# depth


@pytest.mark.parametrize(
    "bits, warned", [(8, True), (10, True), (12, True), (14, True), (15, False), (16, False)]
)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_bits_that_are_not_used_are_said(tmp_path: Path, bits: int, warned: bool, ending: str) -> None:
    deep = np.array([[0, 2**bits - 1]], np.uint16)
    path = saved(tmp_path / f"a.{ending}", deep)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_image(path)[0].tolist() == [[0, round((2**bits - 1) * 255 / 65535)]]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == warned
    assert all(f"{tmp_path}: holds 16-bit pictures that use only {bits} bits" in text for text in messages)


def test_byte_order_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.frombytes("I;16B", (2, 1), np.array([0, 65535], ">u2").tobytes()).save(path)
    assert read_image(path)[0].tolist() == [[0, 255]]


def test_a_black_picture_of_16_bits_is_no_case_for_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not read_image(saved(tmp_path / "a.png", np.zeros((2, 2), np.uint16))).any()


def write_deep_png(path: Path, pixels: np.ndarray) -> Path:
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    height, width, _ = pixels.shape
    path.write_bytes(
        png_bytes(width, height, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))
    )
    return path


def test_colours_of_many_bits(tmp_path: Path) -> None:
    pixels = np.array([[[0, 2048, 4095], [4095, 0, 0]]], np.uint16)
    with pytest.warns(UserWarning, match="that use only 12 bits"):
        image = read_image(write_deep_png(tmp_path / "a.png", pixels))
    assert image[:, 0, 0].tolist() == [0, 8, 15]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(write_deep_png(tmp_path / "b.png", pixels * 16))[:, 0, 0].tolist() == [0, 128, 255]


def test_a_tiff_that_says_12_bits_is_taken_at_its_word(tmp_path: Path) -> None:
    """Pairs of pixels in three bytes; 256 = width, 257 = height, 258 = bits, 259 = compression, 262 = black is zero,
    273 = where the pixels are, 277 = channels, 278 = rows a strip, 279 = bytes (TIFF 6.0)."""
    values = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    first, second = 4095, 2048
    pixels = bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    (tmp_path / "a.tif").write_bytes(
        b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + struct.pack("<I", 0) + pixels
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.tif")[0].tolist() == [[255, 128]]


# masks in GIF


@pytest.mark.parametrize("values", [(0, 1), (0, 2), (1, 2), (3, 7, 255)])
def test_the_greys_of_a_gif_are_its_values(tmp_path: Path, values: tuple[int, ...]) -> None:
    """GIF writers number the greys anew; Pillow does."""
    mask = np.resize(np.array(values, np.uint8), (8, 8))
    np.testing.assert_array_equal(read_mask(saved(tmp_path / "a.gif", mask)), mask)


def test_the_indices_of_a_gif_in_colours_are_not_trusted(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 2]], np.uint8))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.save(tmp_path / "a.gif")
    with pytest.raises(BadSampleError, match=r"a\.gif: is a GIF in colours.*Save it as an 8-bit greyscale"):
        read_mask(tmp_path / "a.gif")


# pictures that are not what they claim


@pytest.mark.parametrize("reader", [read_image, read_mask, header_size])
def test_a_claim_of_a_billion_pixels_is_refused_at_once(tmp_path: Path, reader: Any) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(40_000, 30_000, 8, 0, b"\0" * 20))
    with pytest.raises(
        BadSampleError, match=r"a\.png: .*it claims 40000x30000 pixels, which its \d+ bytes cannot"
    ):
        reader(path)


@pytest.mark.parametrize("reader", [read_image, read_mask])
def test_a_picture_that_does_not_fit_into_memory_is_a_bad_sample(
    tmp_path: Path, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.png", GRADIENT[..., 0])

    def load(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(BadSampleError, match=r"a\.png: needs more memory than there is\. Make it smaller"):
        reader(path)


def test_memory_is_asked_for_only_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", GRADIENT)
    monkeypatch.setattr("freqfusion.data.images._LARGE_PIXELS", 30)
    assert read_image(path).shape == (3, 5, 7)
    monkeypatch.setattr("freqfusion.data.images.free_memory", lambda: 35 * 12 - 1)
    with pytest.raises(BadSampleError, match=r"a\.png: needs more memory than there is"):
        read_image(path)


@pytest.mark.parametrize("plain", [False, True])
def test_colours_of_many_bits_in_a_ppm(tmp_path: Path, plain: bool) -> None:
    def write(name: str, pixels: np.ndarray) -> Path:
        path = tmp_path / name
        body = " ".join(map(str, pixels.flat)).encode() if plain else pixels.astype(">u2").tobytes()
        path.write_bytes(b"P%d 2 1 65535\n" % (3 if plain else 6) + body + b"\n" * plain)
        return path

    pixels = np.array([0, 2048, 4095, 4095, 0, 0])
    with pytest.warns(UserWarning, match="that use only 12 bits"):
        assert int(read_image(write("a.ppm", pixels)).max()) == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(read_image(write("b.ppm", pixels * 16)).max()) == 255


@pytest.mark.parametrize("brightness", [False, True])
def test_a_jpeg_is_no_mask(tmp_path: Path, brightness: bool) -> None:
    Image.fromarray(np.array([[0, 7], [7, 0]], np.uint8)).save(tmp_path / "a.jpg")
    with pytest.raises(BadSampleError, match=r"a\.jpg: is a JPEG, which changes labels .* 8-bit PNG"):
        read_mask(tmp_path / "a.jpg", brightness=brightness)
