import json
import math
import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from freqfusion.analysis.explorer import (
    MAX_CELLS,
    MAX_DIMS,
    Scene,
    build_explorer,
    cosine_map,
    pack_features,
    thin,
)

PALETTE = [(70, 130, 180), (20, 140, 20), (200, 180, 90)]


def random_values(height, width, channels, seed=0):
    return np.random.default_rng(seed).normal(size=(height, width, channels)).astype(np.float32)


def true_cosines(values, row, column):
    unit = values / np.linalg.norm(values.astype(np.float64), axis=-1, keepdims=True)
    return unit @ unit[row, column]


@pytest.mark.parametrize("channels", [1, 3, 40, MAX_DIMS])
def test_rounding_to_8_bits_moves_a_cosine_less_than_its_bound(channels):
    values = random_values(7, 9, channels) * np.logspace(-20, 15, 63, dtype=np.float32).reshape(7, 9, 1)
    packed = pack_features(values, channels)
    assert packed.vectors.dtype == np.int8
    assert packed.vectors.shape == (7, 9, channels)
    assert packed.kept == 1.0
    unit = values / np.linalg.norm(values.astype(np.float64), axis=-1, keepdims=True)
    angle = np.arcsin(0.5 * math.sqrt(channels) * np.abs(unit).max(-1) / 127)
    for row, column in ((0, 0), (3, 8), (6, 4)):
        error = np.abs(cosine_map(packed, row, column) - true_cosines(values, row, column))
        assert (error <= angle + angle[row, column] + 1e-6).all()
        assert error[row, column] < 1e-6  # of a pixel with itself


def test_few_axes_keep_what_they_say():
    mixing = random_values(1, 5, 60, seed=1)[0]
    low_rank = random_values(8, 10, 5) @ mixing
    packed = pack_features(low_rank, 5)
    assert packed.kept == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(cosine_map(packed, 2, 3), true_cosines(low_rank, 2, 3), atol=0.02)

    values = low_rank + 0.5 * random_values(8, 10, 60, seed=2)
    packed = pack_features(values, 5)
    unit = (values / np.linalg.norm(values, axis=-1, keepdims=True)).reshape(-1, 60)
    strengths = np.linalg.svd(unit, compute_uv=False) ** 2
    assert packed.kept == pytest.approx(strengths[:5].sum() / strengths.sum(), rel=1e-5)
    assert 0.5 < packed.kept < 0.999


def test_similarity_with_a_zero_vector_is_zero():
    values = random_values(2, 3, 4)
    values[1, 2] = 0
    for dims in (2, 4):
        packed = pack_features(values, dims)
        assert (cosine_map(packed, 1, 2) == 0).all()
        assert cosine_map(packed, 0, 0)[1, 2] == 0
        assert cosine_map(packed, 0, 0)[0, 0] == pytest.approx(1)
    nothing = pack_features(np.zeros((2, 2, 3)), 2)
    assert (cosine_map(nothing, 0, 1) == 0).all()
    assert nothing.kept == 1.0


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (5, 7), (96, 96), (97, 96), (300, 211)])
def test_thin_picks_pixels_evenly(size):
    rows, columns = torch.arange(size[0]).float(), torch.arange(size[1]).float()
    picked = thin(torch.stack(torch.meshgrid(rows, columns, indexing="ij")))
    height, width, channels = picked.shape
    assert channels == 2
    assert height * width <= MAX_CELLS
    if size[0] * size[1] <= MAX_CELLS:
        assert (height, width) == size
    else:
        assert height * width > 0.9 * MAX_CELLS
    for axis, length, cells in ((0, size[0], height), (1, size[1], width)):
        places = picked[:, 0, 0] if axis == 0 else picked[0, :, 1]
        middles = (np.arange(cells) + 0.5) * length / cells
        assert (np.abs(places + 0.5 - middles) <= 0.5).all()


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.zeros(3, 4), "shape"),
        (torch.zeros(0, 4, 4), "shape"),
        (torch.zeros(2, 4, 4, dtype=torch.int64), "floating-point"),
        (torch.full((2, 4, 4), math.nan), "not finite"),
        (torch.full((2, 4, 4), math.inf), "not finite"),
    ],
)
def test_features_without_similarity_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        thin(features)


def scene(name="a", size=(24, 32), channels=12, variants=("before", "after"), levels=("coarse", "fine")):
    seed = sum(map(ord, name))
    labels = np.zeros(size, np.int64)
    labels[size[0] // 2 :] = 1
    labels[:2] = 255
    maps = {
        level: {
            variant: random_values(size[0] // (4 - 2 * place), size[1] // (4 - 2 * place), channels, seed)
            for variant in variants
        }
        for place, level in enumerate(levels)
    }
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Scene(name, maps, labels, image, {"": labels % 2})


def build(scenes, **options):
    return build_explorer(scenes, ["sky", "tree", "path"], PALETTE, ("before", "after"), **options)


def test_page_holds_the_packed_maps_and_labels():
    explorer = build([scene("a"), scene("b")])
    data = json.loads(re.search(r'id="explorer-data">(.*?)</script>', explorer.html, re.DOTALL)[1])
    assert [entry["name"] for entry in data["scenes"]] == ["a", "b"]
    assert data["levels"] == ["coarse", "fine"]
    assert data["sides"] == [0, 1]
    assert data["scenes"][0]["labels"] == [-1, 64, 0, 320, 1, 384]
    assert data["scenes"][0]["maps"][1][0]["size"] == [12, 16, 12]
    assert len(re.findall(r'id="explorer-map-\d-\d-\d"', explorer.html)) == 8


def test_nothing_from_outside_and_no_text_that_acts():
    nasty = '</script><script>alert("x")</script>'
    explorer = build_explorer(
        [scene(nasty, levels=(nasty,))], [nasty, "tree", "<b>"], PALETTE, ("before", "after")
    )
    assert "alert" in explorer.html
    assert "<script>alert" not in explorer.html
    assert "<b>" not in explorer.html
    for word in ("http:", "https:", "//cdn", "url(", "import ", "fetch("):
        assert word not in explorer.html
    assert len(re.findall(r"<script", explorer.html)) == len(re.findall(r"</script>", explorer.html))


def test_ten_large_images_stay_under_15_megabytes():
    noise = random_values(96, 96, 128)
    labels = np.random.default_rng(0).integers(0, 3, (64, 48)).repeat(16, 0).repeat(20, 1)
    image = np.random.default_rng(0).integers(0, 256, (1024, 960, 3), dtype=np.uint8)
    maps = {level: {"before": noise, "after": noise} for level in ("coarse", "fine")}
    explorer = build([Scene(str(index), maps, labels, image, {"": labels}) for index in range(10)])
    assert len(explorer.html.encode()) < 13.5e6  # leaves room for the figures
    assert 20 <= explorer.dims < MAX_DIMS
    assert 0.15 < explorer.packed["0", "fine", "after"].kept < 0.9


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="different names"):
        build([])
    with pytest.raises(ValueError, match="different names"):
        build([scene("a"), scene("a")])
    with pytest.raises(ValueError, match="same variants"):
        build([scene("a"), scene("b", levels=("fine",))])
    with pytest.raises(ValueError, match="show fewer pictures"):
        build([scene("a")], budget=7 * 2 * (6 * 8 + 12 * 16))
    wrong = Scene("a", scene().maps, np.zeros((4, 4), np.int64), None, {"": np.zeros((4, 5), np.int64)})
    with pytest.raises(ValueError, match="differ in size"):
        build([wrong])
