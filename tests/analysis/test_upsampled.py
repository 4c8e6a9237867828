"""Upsampled features as pictures: colours that mean the same in every map, and a page without labels."""

import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from freqfusion.analysis.explorer import MAX_CELLS
from freqfusion.analysis.upsampled import (
    COARSE,
    PrincipalColours,
    cells_of,
    draw_strip,
    observe_maps,
    write_upsampled,
)


def make_maps(channels=20, size=(6, 9)):
    torch.manual_seed(0)
    coarse = torch.randn(channels, *size) * torch.arange(1, channels + 1)[:, None, None]
    return coarse, coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)


def test_a_feature_has_one_colour_in_all_maps():
    coarse, fine = make_maps()
    colours = PrincipalColours(coarse)
    small, large = colours(coarse), colours(fine)
    assert np.array_equal(small.repeat(4, 0).repeat(4, 1), large)
    assert small.max() == 255
    assert small.min() == 0
    assert len(np.unique(small.reshape(-1, 3), axis=0)) == 54


def test_components_are_those_of_a_singular_value_decomposition():
    coarse, _ = make_maps()
    pixels = coarse.flatten(1).T.double()
    _, _, axes = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    found = PrincipalColours(coarse).axes
    torch.testing.assert_close((axes[:3] @ found).abs(), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 2), (5, 1, 1)])
def test_few_channels_or_pixels(shape):
    picture = PrincipalColours(torch.randn(shape))(torch.randn(shape[0], 7, 5))
    assert picture.shape == (7, 5, 3)
    assert picture.dtype == np.uint8


def test_half_precision():
    coarse, fine = make_maps()
    whole, half = (
        PrincipalColours(coarse.to(dtype))(fine.to(dtype)) for dtype in (torch.float32, torch.float16)
    )
    assert np.abs(whole.astype(int) - half).max() <= 2


def observe(name="a", methods=("bilinear",)):
    coarse, fine = make_maps()
    maps = [(COARSE, coarse), *((method, fine) for method in methods)]
    return observe_maps(name, torch.rand(3, 24, 36), iter(maps), cells=MAX_CELLS)


def test_strip_has_all_maps_at_one_size_in_rows_of_about_one_length():
    one = draw_strip(observe())
    assert one.shape[1] == 3 * 36 + 4 * 8
    many = draw_strip(observe(methods=("b", "c", "d")))  # image, coarse and three in two rows
    assert many.shape[1] == one.shape[1]
    assert many.shape[0] > 2 * 24
    assert (many[-24:, -36:] == 255).all()  # the place of a sixth


def test_page_says_nothing_of_labels(tmp_path):
    images = [observe("a", ("b", "c")), observe("street/b <i>", ("b", "c"))]
    write_upsampled(images, tmp_path, "vit", ["vit has random weights."], "freqfusion features a.png")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<p>vit has random weights.</p>" in page
    assert "<pre>freqfusion features a.png</pre>" in page
    assert "street/b &lt;i&gt;" in page
    shown = json.loads(re.search(r'id="explorer-data">(.*?)</script>', page, re.DOTALL)[1])
    assert shown["classes"] == []
    assert shown["levels"] == ["vit"]
    assert shown["variants"] == [COARSE, "b", "c"]
    assert shown["sides"] == [1, 2]
    assert shown["scenes"][0]["labels"] == [-1, 24 * 36]


def test_values_that_are_not_finite_are_refused():
    maps = [(COARSE, torch.full((4, 2, 2), torch.nan))]
    with pytest.raises(ValueError, match="not finite"):
        observe_maps("a", torch.rand(3, 8, 8), maps, cells=10)


def test_room_for_cells():
    assert cells_of(1, 2) == 4 * MAX_CELLS
    assert cells_of(100, 10) == MAX_CELLS
    assert MAX_CELLS < cells_of(2, 4) < 4 * MAX_CELLS
