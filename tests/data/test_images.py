"""Reading pictures and label maps of every kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freqfusion.data import BadSampleError, read_image, read_mask

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
