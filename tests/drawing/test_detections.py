"""Pictures of objects and segments, and precision-recall curves: what is drawn where, and what is refused."""

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageDraw

from freqfusion.drawing.detections import (
    colour_segments,
    draw_objects,
    instance_colours,
    plot_precision_recall,
)
from freqfusion.drawing.figures import IGNORED_COLOUR, figure_bytes

PALETTE = ((200, 30, 60), (0, 114, 178), (0, 0, 142), (128, 128, 128))
NAMES = ("person", "car", "a rather long class name", "thing")


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 120, np.uint8)


def is_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.array(colour, np.uint8)).all(axis=-1)


def test_first_object_has_the_colour_of_its_class_and_the_next_ones_differ() -> None:
    colours = instance_colours([1, 0, 1, 2, *[0] * 40], PALETTE)
    assert (colours[0], colours[1], colours[3]) == (PALETTE[1], PALETTE[0], PALETTE[2])
    assert colours[2] != PALETTE[1]
    people = [colours[1], *colours[4:]]
    for left, right in pairwise(people):
        assert np.abs(np.subtract(left, right)).sum() > 30
    assert len(set(people)) == len(people)


@pytest.mark.parametrize("label", range(4))
def test_shades_differ_also_where_the_class_is_dark_or_grey(label: int) -> None:
    colours = np.array(instance_colours([label] * 12, PALETTE))
    brightness = colours[1:].max(1) + colours[1:].min(1).astype(int)
    assert np.ptp(brightness) > 150
    assert brightness.min() > 130  # none so dark that it sinks into a dark picture
    assert (colours[1:] <= 255).all()


def test_boxes_of_a_small_picture() -> None:
    """One pixel wide just inside the box; nothing else changes but a tag above it."""
    image = grey(64, 90)
    picture = draw_objects(image, [[20.0, 30.0, 50.0, 60.0]], [0], NAMES, PALETTE)
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    frame = np.zeros((64, 90), bool)
    frame[30:60, 20:50] = True
    frame[31:59, 21:49] = False
    assert is_colour(picture, PALETTE[0])[frame].all()
    assert (picture[31:, :][~frame[31:, :]] == 120).all()
    tag = (picture[:30] != 120).any(-1)
    rows, columns = np.flatnonzero(tag.any(1)), np.flatnonzero(tag.any(0))
    assert tag[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert (rows[-1], columns[0]) == (29, 20)
    assert (image == 120).all()


def test_lines_and_letters_grow_with_the_picture() -> None:
    lines, tags = [], []
    for side in (64, 600, 2000):
        box = np.array([[0.2, 0.5, 0.8, 0.9]]) * side
        picture = draw_objects(grey(side, side), box, [0], ["i"], PALETTE)
        drawn = (picture != 120).any(-1)
        lines.append(int(drawn[int(0.7 * side), : side // 2].sum()))
        tags.append(int(drawn[: side // 2].any(1).sum()))
    assert lines == [1, 2, 6]
    assert 10 <= tags[0] < tags[1] < tags[2] <= 48


@pytest.mark.parametrize("size", [(1, 1), (5, 200), (13, 13), (40, 61), (300, 47), (200, 300)])
@pytest.mark.parametrize("scored", [True, False])
def test_tags_stay_in_the_picture_and_apart(
    size: tuple[int, int], scored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = size
    placed = []
    original = ImageDraw.ImageDraw.rectangle

    def spy(self: ImageDraw.ImageDraw, xy: Any, *args: Any, **options: Any) -> None:
        if options.get("fill") is not None:
            placed.append(xy)
        original(self, xy, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", spy)
    rng = np.random.default_rng(0)
    count = 12
    corners = rng.uniform(-0.3, 1.3, (count, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    scores = rng.random(count) if scored else None
    picture = draw_objects(grey(height, width), boxes, rng.integers(0, 4, count), NAMES, PALETTE, scores)
    assert picture.shape == (height, width, 3)
    for left, top, right, bottom in placed:
        assert 0 <= left <= right < width
        assert 0 <= top <= bottom < height
    for one, other in combinations(placed, 2):
        assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
    if width * height > 10_000:
        assert placed
    if height < 10 or width < 10:  # lower, or narrower, than any tag
        assert not placed


def test_the_best_object_gets_its_tag_first() -> None:
    boxes = np.array([[10, 40, 30, 60], [12, 42, 29, 59]])
    for best in (0, 1):
        scores = np.array([0.3, 0.3])
        scores[best] = 0.9
        picture = draw_objects(grey(100, 100), boxes, [0, 1], NAMES, PALETTE, scores)
        above = picture[25:39]
        assert is_colour(above, PALETTE[best]).sum() > 100
        assert not is_colour(above, PALETTE[1 - best]).any()


def test_many_objects_of_one_class_have_no_names() -> None:
    """A hundred boxes with tags would hide one another; with scores these are all that the tags say."""
    grid = np.array(
        [
            [30 * (n % 10) + 5, 30 * (n // 10) + 12, 30 * (n % 10) + 23, 30 * (n // 10) + 29]
            for n in range(100)
        ]
    )
    plain = draw_objects(grey(310, 310), grid, [0] * 100, NAMES, PALETTE)
    outside = np.ones((310, 310), bool)
    for left, top, right, bottom in grid:
        outside[top:bottom, left:right] = False
    assert (plain[outside] == 120).all()
    scored = draw_objects(grey(310, 310), grid, [0] * 100, NAMES, PALETTE, np.linspace(1, 0.5, 100))
    covered = (scored[outside] != 120).any(-1).mean()
    assert 0.02 < covered < 0.2


def test_masks_are_blended_with_a_contour() -> None:
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 10:50, 10:50] = True
    masks[1, 0:20, 60:80] = True
    boxes = [[10, 10, 50, 50], [60, 0, 80, 20]]
    picture = draw_objects(grey(60, 80), boxes, [0, 1], ["", ""], PALETTE, masks=masks)
    inner = np.zeros((60, 80), bool)
    inner[11:49, 11:49] = True
    weight = round(0.45 * 256)
    blended = [(c * weight + 120 * (256 - weight) + 128) >> 8 for c in PALETTE[0]]
    assert (picture[inner] == blended).all()
    assert is_colour(picture, PALETTE[0])[masks[0] & ~inner].all()
    assert is_colour(picture, PALETTE[1])[0, 60:80].all()  # the border of the picture is a contour too
    assert (picture[~masks.any(0)] == 120).all()
    np.testing.assert_array_equal(
        picture,
        draw_objects(
            torch.from_numpy(grey(60, 80)),
            torch.tensor(boxes),
            torch.tensor([0, 1]),
            ["", ""],
            PALETTE,
            masks=torch.from_numpy(masks).to(torch.uint8) * 255,
        ),
    )


def test_small_objects_lie_over_large_ones() -> None:
    masks = np.zeros((2, 40, 40), bool)
    masks[0, 15:25, 15:25] = True
    masks[1] = True
    boxes = [[15, 15, 25, 25], [0, 0, 40, 40]]
    picture = draw_objects(grey(40, 40), boxes, [0, 1], ["", ""], PALETTE, masks=masks)
    assert is_colour(picture, PALETTE[0])[15, 15:25].all()


def test_nothing_to_draw_and_empty_masks() -> None:
    image = grey(20, 31)
    empty = np.zeros((0, 4))
    np.testing.assert_array_equal(draw_objects(image, empty, [], NAMES, PALETTE), image)
    found = {"scores": np.zeros(0), "masks": np.zeros((0, 20, 31), bool)}
    np.testing.assert_array_equal(draw_objects(image, empty, [], NAMES, PALETTE, **found), image)
    outside = [[40, 5, 60, 9], [-9, -9, -1, -1], [5, 5, 5, 9]]
    nothing = np.zeros((3, 20, 31), bool)
    np.testing.assert_array_equal(
        draw_objects(image, outside, [0, 1, 2], NAMES, PALETTE, masks=nothing), image
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image": np.zeros((3, 9, 9), np.uint8)}, r"shape \(H, W, 3\)"),
        ({"boxes": [[1, 2, 3]]}, r"boxes must have the shape \(1, 4\), got \(1, 3\)"),
        ({"boxes": [[1, 2, 0, 4]]}, "x1 <= x2"),
        ({"boxes": [[1, 2, np.nan, 4]]}, "finite corners"),
        ({"labels": [0, 1]}, r"labels must have the shape \(1,\), got \(2,\)"),
        ({"labels": [4]}, r"labels must be 0\.\.3, places in names and palette, got 4 to 4"),
        ({"labels": [-1]}, "got -1 to -1"),
        ({"labels": [0.0]}, r"labels must be integers of the shape \(N,\), got .* float64"),
        ({"names": ["a"], "labels": [1]}, r"labels must be 0\.\.0"),
        ({"scores": np.zeros(2)}, r"scores must have the shape \(1,\), got \(2,\)"),
        ({"masks": np.zeros((1, 8, 9))}, r"masks must have the shape \(1, 9, 9\), got \(1, 8, 9\)"),
    ],
)
def test_wrong_objects_are_refused(change: dict, words: str) -> None:
    args = {"image": grey(9, 9), "boxes": [[1, 2, 3, 4]], "labels": [0], "names": NAMES, "palette": PALETTE}
    with pytest.raises(ValueError, match=words):
        draw_objects(**{**args, **change})


SEGMENTS = np.zeros((12, 20), np.int64)
SEGMENTS[:, 4:8], SEGMENTS[:, 8:12], SEGMENTS[:, 12:16] = 1, 2, 3


def test_segments_in_their_colours() -> None:
    picture = colour_segments(SEGMENTS, [2, 0, 0], PALETTE, [True, False, False, False])
    things = instance_colours([0, 0], PALETTE)
    # the last column of each segment is the line to the next one
    for columns, colour in ((0, IGNORED_COLOUR), (4, PALETTE[2]), (8, things[0]), (12, things[1])):
        assert is_colour(picture, colour)[:, columns : columns + 3].all()
    assert (picture[:, [3, 7, 11, 15]] == 255).all()
    assert is_colour(picture, IGNORED_COLOUR)[:, 16:].all()
    stuff = colour_segments(SEGMENTS, [2, 0, 0], PALETTE, [False] * 4)
    assert is_colour(stuff, PALETTE[0])[:, [8, 9, 10, 12, 13, 14]].all()


def test_line_is_black_between_light_colours() -> None:
    light = ((250, 240, 200), (200, 250, 240))
    halves = np.repeat([[1, 2]], 4, axis=0).repeat(4, axis=1)
    picture = colour_segments(halves, [0, 1], light, [False, False])
    assert (picture[:, 3] < 20).all()
    assert (picture[:, [2, 4]] >= 200).all()
    void = colour_segments(halves - 1, [1], light, [False, False])
    assert (void[:, 3] == 255).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_what_is_no_segment_is_void(dtype: type) -> None:
    for segments in (np.zeros((3, 5), dtype), np.full((1, 1), 9, dtype)):
        picture = colour_segments(segments, [], PALETTE, [True] * 4)
        assert is_colour(picture, IGNORED_COLOUR).all()
    tensor = torch.from_numpy(SEGMENTS.astype(dtype))
    np.testing.assert_array_equal(
        colour_segments(tensor, torch.tensor([2, 0, 0]), PALETTE, [True] * 4),
        colour_segments(SEGMENTS, [2, 0, 0], PALETTE, [True] * 4),
    )


def test_segments_over_an_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    picture = colour_segments(SEGMENTS, [2, 0, 0], PALETTE, [True] * 4, image, alpha=0.5)
    np.testing.assert_array_equal(picture[:, :3], image[:, :3])
    expected = (image[:, 4:7].astype(int) * 128 + np.array(PALETTE[2]) * 128 + 128) >> 8
    np.testing.assert_array_equal(picture[:, 4:7], expected)
    assert (picture[:, [3, 7, 11, 15]] == 255).all()


@pytest.mark.parametrize(
    "args, words",
    [
        ((np.zeros((2, 2)), [0], PALETTE, [True] * 4), r"mask of shape \(H, W\) with integer"),
        (
            (SEGMENTS, [0, 4, 1], PALETTE, [True] * 4),
            r"labels must be 0\.\.3, places in palette and is_thing",
        ),
        ((SEGMENTS, [0, 1, 1], PALETTE, [True]), r"labels must be 0\.\.0"),
        ((SEGMENTS, [0], PALETTE, [True] * 4, grey(3, 3)), "image and mask differ in size"),
    ],
)
def test_wrong_segments_are_refused(args: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        colour_segments(*args)


@pytest.mark.parametrize("dark", [False, True])
def test_precision_recall(dark: bool) -> None:
    curves = {
        "boxes": torch.linspace(1, 0, 101).double(),
        "masks": [0.25] * 101,
        "none": np.full(101, np.nan),
    }
    figure = plot_precision_recall(curves, title="All classes", dark=dark)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "boxes, AP 0.500",
        "masks, AP 0.250",
        "none, no objects",
    ]
    recalls, precisions = axes.lines[0].get_data()
    assert recalls[[0, 37, 100]].tolist() == pytest.approx([0, 0.37, 1])
    assert precisions[[0, 37, 100]].tolist() == pytest.approx([1, 0.63, 0])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("recall", "precision")
    assert axes.get_xlim() == (0, 1)
    assert axes.get_ylim()[0] == 0
    assert figure_bytes(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("curve", [[0.5] * 100, [0.5] * 100 + [1.2], [-1] * 101, []])
def test_wrong_curves_are_refused(curve: list[float]) -> None:
    with pytest.raises(ValueError, match="the curve 'boxes' must have 101 precisions from 0 to 1"):
        plot_precision_recall({"boxes": curve})


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "\x1b[31m", "\ud800", "x" * 10_000, ""])
def test_names_that_cannot_be_drawn(name: str) -> None:
    image = np.zeros((80, 100, 3), np.uint8)
    drawn = draw_objects(image, np.array([[5.0, 25, 60, 60]]), [0], [name], [(200, 3, 4)], [0.5])
    assert drawn.shape == image.shape
