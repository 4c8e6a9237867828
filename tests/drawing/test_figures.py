import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from freqfusion._files import write_atomically
from freqfusion.drawing import figures
from freqfusion.drawing.figures import (
    CORRECT_COLOUR,
    IGNORED_COLOUR,
    WRONG_COLOUR,
    colour_mask,
    densest_window,
    draw_box,
    error_map,
    format_share,
    learning_curve,
    legend,
    overlay,
    picture_strip,
    plot_curves,
    save_index_png,
    save_png,
    zoom,
)

PALETTE = ((255, 0, 0), (0, 200, 0), (0, 0, 90))


def has_colour(picture, colour):
    return bool((picture == np.array(colour, dtype=np.uint8)).all(axis=-1).any())


def test_colour_mask_paints_each_class_and_greys_the_rest():
    mask = torch.tensor([[0, 1, 2], [255, -1, 3]])
    expected = np.array([[PALETTE[0], PALETTE[1], PALETTE[2]], [IGNORED_COLOUR] * 3], dtype=np.uint8)
    np.testing.assert_array_equal(colour_mask(mask, PALETTE), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_colour_mask_takes_any_integer_dtype(dtype):
    picture = colour_mask(np.array([[2]], dtype=dtype), PALETTE)
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[[0, 0, 90]]]


@pytest.mark.parametrize("mask", [np.zeros((2, 2)), np.zeros((1, 2, 2), dtype=np.uint8)])
def test_colour_mask_refuses_what_is_no_mask(mask):
    with pytest.raises(ValueError, match=r"\(H, W\) with integer class indices, got shape"):
        colour_mask(mask, PALETTE)


def test_overlay_blends_and_keeps_ignored_pixels():
    image = np.array([[[100, 100, 100], [10, 20, 30]]], dtype=np.uint8)
    mask = np.array([[0, 255]])
    half = overlay(image, mask, PALETTE, alpha=0.5)
    assert half.tolist() == [[[178, 50, 50], [10, 20, 30]]]
    np.testing.assert_array_equal(overlay(image, mask, PALETTE, alpha=0), image)
    assert overlay(image, mask, PALETTE, alpha=1).tolist() == [[[255, 0, 0], [10, 20, 30]]]
    white = np.full((1, 1, 3), 255, dtype=np.uint8)
    assert overlay(white, np.zeros((1, 1), int), [(255, 255, 255)]).tolist() == [[[255] * 3]]


def test_overlay_refuses_wrong_alpha_size_and_layout():
    image = np.zeros((4, 5, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 2"):
        overlay(image, np.zeros((4, 5), int), PALETTE, alpha=2)
    with pytest.raises(ValueError, match=r"image and mask differ in size: \(4, 5\) and \(5, 4\)"):
        overlay(image, np.zeros((5, 4), int), PALETTE)
    with pytest.raises(ValueError, match="permute"):
        overlay(torch.zeros(3, 4, 5, dtype=torch.uint8), np.zeros((4, 5), int), PALETTE)


def test_error_map_marks_wrong_and_ignored():
    pred = np.array([[0, 1, 1]])
    target = np.array([[0, 0, 255]])
    assert error_map(pred, target).tolist() == [
        [list(CORRECT_COLOUR), list(WRONG_COLOUR), list(IGNORED_COLOUR)]
    ]
    image = np.full((1, 3, 3), 200, dtype=np.uint8)
    shown = error_map(pred, target, image=image)
    ground = shown[0, 0]
    assert len(set(ground.tolist())) == 1
    assert CORRECT_COLOUR[0] < ground[0] < 128
    assert shown[0, 1:].tolist() == [list(WRONG_COLOUR), list(IGNORED_COLOUR)]


def test_legend_has_a_swatch_and_ink_for_each_class():
    names = ["sky", "Straße", "a rather long class name"]
    picture = legend(names, PALETTE, [0.5, 0.49999, 0.00001])
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    for colour in PALETTE:
        assert has_colour(picture, colour)
    assert has_colour(picture, (20, 20, 20))
    assert has_colour(picture, (90, 90, 90))
    assert legend(names, PALETTE).shape[1] < picture.shape[1]
    np.testing.assert_array_equal(picture[:, -3:], 255)  # the longest entry is not cut off


@pytest.mark.parametrize("height", [1, 97, 400])
@pytest.mark.parametrize("count", [1, 9, 40])
def test_legend_opens_columns_to_fill_a_height(count, height):
    colours = [(index, 255 - index, 7) for index in range(count)]
    picture = legend([f"class {index}" for index in range(count)], colours, height=height)
    assert picture.shape[0] >= height
    if height == 400:
        assert picture.shape[0] == 400
    assert all(has_colour(picture, colour) for colour in colours)


def test_legend_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="got 2, 3 and none"):
        legend(["a", "b"], PALETTE)


def test_format_share():
    assert [format_share(x) for x in (0, 0.0004, 0.0005, 1)] == ["0.0%", "<0.1%", "0.1%", "100.0%"]


def test_zoom_and_box():
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = zoom(picture, 3)
    assert large.shape == (6, 6, 3)
    np.testing.assert_array_equal(large[::3, ::3], picture)
    np.testing.assert_array_equal(large[2, 2], picture[0, 0])
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        zoom(picture, 0)
    framed = draw_box(np.zeros((6, 7, 3), dtype=np.uint8), (1, 2, 3, 4))
    expected = np.zeros((6, 7), dtype=bool)
    expected[1:4, 2:6] = True
    expected[2, 3:5] = False
    np.testing.assert_array_equal(framed.any(axis=-1), expected)


def test_picture_strip_places_pictures_under_titles():
    row = [np.full((20, 60, 3), value, dtype=np.uint8) for value in (10, 90)]
    low = [np.full((5, 60, 3), value, dtype=np.uint8) for value in (50, 130)]
    strip = picture_strip([row, low], ["image", "a title too wide for its column"], gap=4)
    assert strip.shape[1] == 4 + 2 * (60 + 4)
    np.testing.assert_array_equal(strip[-4 - 5 - 4 - 20 : -4 - 5 - 4, 4:64], 10)
    np.testing.assert_array_equal(strip[-4 - 5 : -4, 68:128], 130)
    header = strip[: -4 - 5 - 4 - 20 - 4]
    assert header.min() < 128
    np.testing.assert_array_equal(strip[:, :4], 255)
    with pytest.raises(ValueError, match="one picture for each of the 1 titles"):
        picture_strip([row], ["image"])
    with pytest.raises(ValueError, match=r"row 1, column 1 has size \(20, 60\)"):
        picture_strip([row, [low[0], row[1]]], ["a", "b"])


def test_save_png_keeps_pixels_and_leaves_no_temporary(tmp_path):
    rng = np.random.default_rng(0)
    for name, picture in {
        "rgb": rng.integers(0, 256, (5, 7, 3), dtype=np.uint8),
        "grey": rng.integers(0, 256, (5, 7), dtype=np.uint8),
        "deep": rng.integers(0, 65536, (5, 7), dtype=np.uint16),
    }.items():
        save_png(tmp_path / "new" / f"{name}.png", picture)
        with Image.open(tmp_path / "new" / f"{name}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), picture)
    assert len(list((tmp_path / "new").iterdir())) == 3
    with pytest.raises(ValueError, match="float64"):
        save_png(tmp_path / "bad.png", np.zeros((5, 7)))


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(
        "freqfusion._files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_index_png_small_has_indices_and_palette(tmp_path):
    mask = torch.tensor([[0, 1, 2, 255]])
    save_index_png(tmp_path / "mask.png", mask, PALETTE)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert np.asarray(image).tolist() == [[0, 1, 2, 255]]
        rgb = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(rgb, colour_mask(mask, PALETTE))


def test_index_png_goes_to_16_bits_past_255_classes(tmp_path):
    mask = np.array([[0, 299]])
    save_index_png(tmp_path / "mask.png", mask, [(0, 0, 0)] * 300)
    with Image.open(tmp_path / "mask.png") as image:
        assert np.asarray(image).dtype == np.uint16
        assert np.asarray(image).tolist() == [[0, 299]]
    with pytest.raises(ValueError, match="indices must be 0 to 255, got 0 to 299"):
        save_index_png(tmp_path / "other.png", mask, PALETTE)


def test_learning_curve_writes_the_format_of_the_suffix(tmp_path):
    histories = {"bilinear": [(0, 0.1), (10, 0.5)], "freqfusion": [(0, 0.2), (10, 0.6)]}
    learning_curve(histories, tmp_path / "curve.png", title="mIoU", y_label="mIoU")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size[0] > 400
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    learning_curve(histories, tmp_path / "curve.svg")
    assert b"<svg" in (tmp_path / "curve.svg").read_bytes()


def test_learning_curve_of_nothing_is_an_empty_frame(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learning_curve({}, tmp_path / "none.png")
        learning_curve({"empty": []}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_curves_draw_their_points_in_their_colours():
    histories = {"a": [(0, 1.0), (2, 3.0)], "b": [(1, 2.0)]}
    light, dark = plot_curves(histories), plot_curves(histories, dark=True)
    lines = light.axes[0].lines
    assert [line.get_xydata().tolist() for line in lines] == [[[0, 1], [2, 3]], [[1, 2]]]
    assert lines[0].get_color() != lines[1].get_color()
    assert [text.get_text() for text in light.axes[0].get_legend().get_texts()] == ["a", "b"]
    assert dark.axes[0].xaxis.label.get_color() != light.axes[0].xaxis.label.get_color()
    png = np.asarray(Image.open(io.BytesIO(figures.figure_bytes(dark, transparent=True))))
    assert png[0, 0, 3] == 0


@pytest.mark.parametrize("shape, size", [((9, 7), 3), ((5, 5), 5), ((4, 8), 1)])
def test_densest_window_has_the_largest_sum(shape, size):
    errors = np.random.default_rng(0).integers(0, 3, shape)
    sums = {
        (top, left): errors[top : top + size, left : left + size].sum()
        for top in range(shape[0] - size + 1)
        for left in range(shape[1] - size + 1)
    }
    assert sums[densest_window(errors, size)] == max(sums.values())


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "\x1b[31m", "\ud800", "x" * 10_000, "$\\frac{$"])
def test_names_that_cannot_be_drawn(name):
    assert figures.legend([name, "b"], [(1, 2, 3)] * 2, [0.5, 0.5], height=100).shape[1] < 2000
    assert figures.figure_bytes(figures.plot_paired_bars({name: {"a": 0.5}})).startswith(b"\x89PNG")


def test_long_names_are_cut_and_others_stay():
    assert np.array_equal(
        figures.legend(["x" * 59 + "…"], [(1, 2, 3)]), figures.legend(["x" * 99], [(1, 2, 3)])
    )
    assert not np.array_equal(
        figures.legend(["x" * 60], [(1, 2, 3)]), figures.legend(["x" * 99], [(1, 2, 3)])
    )
