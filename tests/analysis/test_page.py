import base64
import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from freqfusion.analysis.measure import FREQUENCY_BINS, FeatureStudy, Internals, Observation
from freqfusion.analysis.page import write_study
from freqfusion.analysis.similarity import FeatureSimilarity
from freqfusion.analysis.spectra import Energy, high_frequency_share, kernel_spectrum
from freqfusion.analysis.tables import CLASSES_SHOWN, displacement_tables, headline, similarity_tables
from freqfusion.drawing.figures import (
    figure_bytes,
    plot_arrows,
    plot_curves,
    plot_heat,
    plot_histograms,
    plot_paired_bars,
)
from freqfusion.metrics.boundary_distance import BoundaryDistance

CLASSES = ["sky", 'wall <b>"& $ {', "tree", "absent"]
PALETTE = [(70, 130, 180), (180, 120, 60), (20, 140, 20), (0, 0, 0)]
FIGURES = [
    "intra_by_class",
    "margin_by_class",
    "margin_by_distance",
    "margin_histogram_all",
    "margin_histogram_boundary",
    "spectrum",
]


def observation(
    seed=0, name=None, labels=None, variants=("before", "after"), size=(24, 32), levels=2, **changes
):
    generator = torch.Generator().manual_seed(seed)
    if labels is None:
        labels = torch.zeros(size, dtype=torch.int64)
        labels[10:, :20] = 1
        labels[14:, 12:] = 2
        labels[:2] = 255
    maps = {
        level: {
            variant: torch.randn(6, size[0] // step, size[1] // step, generator=generator) + 0.3
            for variant in variants
        }
        for level, step in (("top", 4), ("fine", 2))[-levels:]
    }
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)
    values = {
        "name": f"image {seed}" if name is None else name,
        "maps": maps,
        "labels": labels,
        "image": image,
        "predictions": {"": labels % 255},
    }
    return Observation(**values | changes)


def run(observations, out, shown=2):
    study = FeatureStudy(CLASSES, PALETTE)
    for place, one in enumerate(observations):
        study.add(one, show=place < shown)
    write_study(study, out, "test images", "freqfusion analyze --out <here>")
    return study


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_drawing(monkeypatch):
    for page in ("analysis.page", "drawing.page_parts"):
        monkeypatch.setattr(f"freqfusion.{page}.figure_bytes", lambda *args, **options: b"drawn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    run([observation(seed) for seed in range(3)], out)
    return out


def test_numbers_are_those_of_the_measures(folder):
    expected = FeatureSimilarity(len(CLASSES))
    energy = Energy(0, 0)
    for seed in range(3):
        one = observation(seed)
        features = one.maps["fine"]["after"][None]
        expected.update(features, one.labels[None])
        more = high_frequency_share(features, one.labels[None])["boundary"]
        energy = Energy(energy.high + more.high, energy.low + more.low)
    result = expected.compute()
    mean = result.pixel_mean["boundary"]
    row = json.loads((folder / "results.json").read_text())["summary"][3]
    assert (row["level"], row["variant"]) == ("fine", "after")
    assert row["intra_boundary"] == mean.intra
    assert row["margin_boundary"] == mean.margin
    assert row["accuracy_boundary"] == mean.accuracy
    assert row["high_boundary"] == energy.share

    rows = [
        row for row in read(folder / "similarity.csv") if row["level"] == "fine" and row["variant"] == "after"
    ]
    assert [row["class"] for row in rows if row["region"] == "all"] == [
        *CLASSES[:3],
        "class mean",
        "pixel mean",
    ]
    assert float(rows[1]["margin"]) == result.per_class["all"][1].margin

    bars = read(folder / "figures" / "level2_margin_by_class.csv")
    assert [row["class"] for row in bars] == CLASSES[:3]
    assert [float(row["after"]) for row in bars] == [result.per_class["all"][k].margin for k in range(3)]
    distances = read(folder / "figures" / "level2_margin_by_distance.csv")
    assert [float(row["after"]) if row["after"] else None for row in distances] == [
        score.margin for score in result.by_distance.values()
    ]
    histogram = read(folder / "figures" / "level2_margin_histogram_all.csv")
    assert [int(row["after"]) for row in histogram] == result.margin_histogram["all"]


def test_spectrum_is_relative_to_its_mean(tmp_path, no_drawing):
    wave = torch.cos(2 * torch.pi * 0.25 * torch.arange(32.0)).expand(1, 24, 32).contiguous()
    noise = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(0))
    maps = {"fine": {"before": wave, "after": noise}}
    run([observation(maps=maps)], tmp_path)
    rows = read(tmp_path / "figures" / "level1_spectrum.csv")
    curves = {
        name: {float(row["frequency"]): float(row["power"]) for row in rows if row["variant"] == name}
        for name in ("before", "after")
    }
    assert max(curves["before"], key=curves["before"].get) == pytest.approx(0.25, abs=0.5 / FREQUENCY_BINS)
    assert np.mean(list(curves["after"].values())) == pytest.approx(1, abs=0.3)


def test_every_figure_comes_as_png_svg_and_csv(folder):
    names = {f"level{level}_{figure}" for level in (1, 2) for figure in FIGURES}
    files = {path.name for path in (folder / "figures").iterdir()}
    assert files == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg", "csv")}
    for name in names:
        assert Image.open(folder / "figures" / f"{name}.png").size[0] > 600
        assert "<svg" in (folder / "figures" / f"{name}.svg").read_text()
        assert read(folder / "figures" / f"{name}.csv")


def test_page_is_self_contained_and_escaped(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "--out &lt;here&gt;" in page
    assert not re.search(r'(?:src|srcset|href)="(?!data:)', page)
    assert not re.search(r"https?://", page)
    for text in ("SimAcc at the finest level: before", "test images", "Level 2: fine", "Explorer"):
        assert text in page
    assert page.count("<picture>") == 2 * len(FIGURES)


def no_nan(folder):
    for path in folder.rglob("*"):
        if path.suffix in (".csv", ".json"):
            assert not re.search(r"\bnan\b|\binf\b", path.read_text().lower()), path
    text = re.sub(
        r"<script.*?</script>|base64,[^\"]*", "", (folder / "report.html").read_text(), flags=re.DOTALL
    )
    assert not re.search(r">\s*-?(nan|inf)\s*<", text.lower())
    assert "nan %" not in text.lower()


def test_a_single_class_has_no_margin(tmp_path, no_drawing):
    study = run([observation(labels=torch.ones(24, 32, dtype=torch.int64), levels=1)], tmp_path)
    assert headline(study) == "No pixel could be compared with another class"
    assert similarity_tables(study)[0].rows[0][2:4] == ["-", "-"]
    assert float(similarity_tables(study)[0].rows[0][1]) > 0.2
    files = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert files == {"level1_intra_by_class", "level1_spectrum"}
    no_nan(tmp_path)


def test_all_pixels_ignored(tmp_path, no_drawing):
    with pytest.raises(ValueError, match="no pixel with a class in 1 images"):
        run([observation(labels=torch.full((24, 32), 255))], tmp_path)
    assert not list(tmp_path.iterdir())
    run(
        [observation(labels=torch.full((24, 32), 255), levels=1), observation(1, levels=1)], tmp_path, shown=1
    )
    no_nan(tmp_path)


def test_constant_and_zero_features(tmp_path, no_drawing):
    flat, zero = torch.ones(6, 6, 8), torch.zeros(6, 6, 8)
    run([observation(maps={"top": {"before": zero, "after": flat}})], tmp_path)
    rows = read(tmp_path / "similarity.csv")
    means = {row["variant"]: row for row in rows if row["class"] == "pixel mean" and row["region"] == "all"}
    assert float(means["before"]["intra"]) == 0
    assert float(means["after"]["intra"]) == pytest.approx(1)
    assert float(means["after"]["accuracy"]) == 0
    no_nan(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"maps": {"top": {"before": torch.full((6, 6, 8), math.nan)}}}, "image 0, top, before: .*NaN"),
        ({"maps": {"top": {"before": torch.ones(6, 8, 6)}}}, "are they of the same image"),
        ({"labels": torch.full((24, 32), 4)}, r"labels hold \[4\]"),
        ({"maps": {"top": {}}}, "at least one"),
        ({"maps": {}}, "at least one"),
        ({"maps": {"a": {"x": torch.ones(6, 6, 8)}, "b": {"y": torch.ones(6, 6, 8)}}}, "same variants"),
    ],
)
def test_bad_input_is_refused(changes, message):
    study = FeatureStudy(CLASSES, PALETTE)
    with pytest.raises(ValueError, match=message):
        study.add(observation(**changes))


def test_images_must_agree(tmp_path):
    study = FeatureStudy(CLASSES, PALETTE)
    with pytest.raises(ValueError, match="no image"):
        write_study(study, tmp_path, "test")
    study.add(observation())
    with pytest.raises(ValueError, match=r"image 1 has .*expected before, after at top, fine"):
        study.add(observation(1, variants=("before", "later")))


def test_pair_is_the_two_models_after_fusion():
    study = FeatureStudy(CLASSES, PALETTE)
    study.add(observation(variants=("a before", "a after", "b before", "b after")))
    assert study.pair == ("a after", "b after")
    study = FeatureStudy(CLASSES, PALETTE)
    study.add(observation(variants=("mine",)))
    assert study.pair == ("mine", "mine")


def test_pictures_are_readable(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="explorer-data">(.*?)</script>', page, re.DOTALL)[1])
    assert [scene["name"] for scene in data["scenes"]] == ["image 0", "image 1"]
    picture = data["scenes"][0]["picture"].partition(",")[2]
    shown = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert shown.size == (32, 24)
    assert shown.format == "JPEG"


def test_paired_bars_hold_the_values():
    figure = plot_paired_bars({"$a": {"before": 0.25, "after": -0.5}, "b": {"after": 1.0}}, title="t")
    (axes,) = figure.axes
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {"before": [0.25], "after": [-0.5, 1.0]}
    assert [text.get_text() for text in axes.texts] == ["0.25", "-0.50", "1.00"]
    places = [bar.get_y() + bar.get_height() / 2 for bars in axes.containers for bar in bars]
    assert [round(place) for place in places] == [0, 0, 1]
    assert len(set(places)) == 3
    figure_bytes(figure)  # a dollar sign starts no formula


def test_histograms_are_shares():
    figure = plot_histograms({"few": [1, 3], "many": [50, 50]}, [0, 0.5, 1], dark=True)
    (axes,) = figure.axes
    shares = [patch.get_data().values.tolist() for patch in axes.patches]
    assert shares == [[25, 75], [25, 75], [50, 50], [50, 50]]
    for counts in ({"none": [0, 0]}, {"short": [1]}):
        with pytest.raises(ValueError, match="needs 2 counts with a sum above 0"):
            plot_histograms(counts, [0, 0.5, 1])


def test_curves_with_a_logarithmic_axis():
    points = {"a": [(1.0, 1.0), (3.0, 0.001)]}
    (axes,) = plot_curves(points, whole_steps=False, log_y=True).axes
    assert axes.get_yscale() == "log"
    assert any(tick % 1 for tick in axes.get_xticks())
    (axes,) = plot_curves(points).axes
    assert axes.get_yscale() == "linear"
    assert not any(tick % 1 for tick in axes.get_xticks())


def internals(seed, size=(12, 16), highpass=True, offsets=True):
    """As of a site with a coarse map of half the size."""
    generator = torch.Generator().manual_seed(seed)

    def kernels(k):
        return torch.rand(1, k * k, *size, generator=generator).softmax(1)

    spectra = {"low-pass": kernel_spectrum(kernels(5), 5)}
    if highpass:
        spectra["high-pass"] = kernel_spectrum(kernels(3), 3, highpass=True)
    return Internals(
        spectra,
        torch.randn(2, *size, generator=generator) if offsets else None,
        (size[0] // 2, size[1] // 2),
        torch.rand(*size, generator=generator) if highpass else None,
    )


def test_boundary_displacement_is_that_of_the_metric(tmp_path, no_drawing):
    labels = observation().labels
    shifted = labels.roll(2, dims=1)
    predictions = [{"a": labels % 255, "b": shifted % 255}, {"a": shifted % 255, "b": shifted * 0}]
    study = run([observation(seed, predictions=predictions[seed]) for seed in range(2)], tmp_path)
    found = read(tmp_path / "boundary_displacement.csv")
    stored = json.loads((tmp_path / "results.json").read_text())["boundary_displacement"]
    assert len(found) == len(stored) == 2 * 3 * 4
    for model in "ab":
        metric = BoundaryDistance(len(CLASSES))
        for prediction in predictions:
            metric.update(prediction[model][None], labels[None])
        expected = metric.compute()
        assert [row for row in stored if row["model"] == model] == [
            {"model": model, **row} for row in expected.rows(CLASSES)
        ]
        (row,) = [
            row
            for row in found
            if (row["model"], row["direction"], row["class"]) == (model, "both", "all classes")
        ]
        score = expected.overall["both"]
        assert float(row["mean"]) == score.mean
        assert float(row["within_3"]) == score.within[3]
        assert int(row["unmatched"]) == score.unmatched
    assert score.unmatched > 0
    assert score.mean > 0
    overall, *by_class = displacement_tables(study)
    assert overall.rows[-1][:3] == ["both, b", f"{score.mean:.2f}", f"{score.percentile_95:.2f}"]
    assert [table.header[0] for table in by_class] == [
        "truth to prediction: class",
        "prediction to truth: class",
    ]
    assert [row[0] for row in by_class[0].rows[:2]] == [f"{CLASSES[0]}, a", f"{CLASSES[0]}, b"]
    assert "absent" not in str(by_class)
    no_nan(tmp_path)


def test_boundaries_that_are_not_there(tmp_path, no_drawing):
    flat = torch.ones(24, 32, dtype=torch.int64)
    study = run([observation(labels=flat, levels=1)], tmp_path)
    (overall,) = displacement_tables(study)  # of one model: without its name
    assert overall.rows[0] == ["truth to prediction", "-", "-", "-", "-", "-", "0", "0"]
    row = read(tmp_path / "boundary_displacement.csv")[0]
    assert (row["mean"], row["within_1"], row["pixels"]) == ("", "", "0")

    out = tmp_path / "without"
    assert displacement_tables(run([observation(predictions={})], out)) == []
    assert "Not measured: there are no predictions." in (out / "report.html").read_text()
    assert json.loads((out / "results.json").read_text())["boundary_displacement"] == []
    assert not (out / "boundary_displacement.csv").exists()


def test_only_the_classes_with_most_boundary_are_shown(tmp_path, no_drawing):
    count = CLASSES_SHOWN + 1
    labels = torch.arange(count).repeat_interleave(2).expand(2 * count, -1).clone()
    labels[count:, :2] = 1  # the first has the least
    maps = {"fine": {"after": torch.randn(4, count, count)}}
    study = FeatureStudy([f"kind {k}" for k in range(count)], [(0, 0, 0)] * count)
    study.add(observation(labels=labels, maps=maps, image=None, predictions={"": labels}))
    table = displacement_tables(study)[1]
    assert [row[0] for row in table.rows] == [f"kind {k}" for k in range(1, count)]
    assert "boundary_displacement.csv has all" in table.note


def test_internals_are_figures(tmp_path):
    given = [internals(seed) for seed in range(2)]
    run([observation(seed, internals={"fine": {"ours": given[seed]}}) for seed in range(2)], tmp_path)
    figures = tmp_path / "figures"
    for name in ("kernels", "offsets", "detail"):
        assert Image.open(figures / f"level2_{name}.png").size[0] > 600
        assert "<svg" in (figures / f"level2_{name}.svg").read_text()
        assert not (figures / f"level1_{name}.csv").exists()
    rows = read(figures / "level2_kernels.csv")
    for name in ("low-pass", "high-pass"):
        response = [float(row["magnitude"]) for row in rows if row["filter"] == name]
        mean = (given[0].kernels[name].magnitude + given[1].kernels[name].magnitude) / 2
        np.testing.assert_allclose(response, mean.flatten(), rtol=1e-6)
    assert [float(rows[34][name]) for name in ("vertical_frequency", "horizontal_frequency")] == [
        pytest.approx(-0.5 + 1 / 32),
        pytest.approx(-0.5 + 1 / 32),
    ]
    detail = read(figures / "level2_detail.csv")
    np.testing.assert_allclose([float(row["detail"]) for row in detail], given[0].detail.flatten(), rtol=1e-6)
    offsets = read(figures / "level2_offsets.csv")
    assert len(offsets) == 12 * 16  # few enough to show all
    for row in offsets:
        place = int(row["row"]), int(row["column"])
        assert [float(row["x"]), float(row["y"])] == pytest.approx(
            given[0].offsets[(slice(None), *place)].tolist()
        )
    page = (tmp_path / "report.html").read_text()
    assert page.count("first image, image 0") == 1
    assert "have none" not in page
    no_nan(tmp_path)


def test_what_a_module_lacks_is_left_out(tmp_path, no_drawing):
    plain = internals(0, highpass=False, offsets=False)
    level = {"before a": plain, "b": internals(1, size=(40, 60)), "c": None}
    given = observation(levels=1, internals={"fine": level})
    run([given], tmp_path)
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    inside = {"kernels_model1", "kernels_model2", "offsets_model2", "detail_model2"}
    assert names == {f"level1_{name}" for name in inside | set(FIGURES)}
    assert {row["filter"] for row in read(tmp_path / "figures" / "level1_kernels_model1.csv")} == {"low-pass"}
    offsets = read(tmp_path / "figures" / "level1_offsets_model2.csv")
    assert {int(row["column"]) for row in offsets} == set(range(1, 60, 3))
    assert {int(row["row"]) for row in offsets} == set(range(1, 40, 3))
    assert "fusions of other methods have none (c)" in (tmp_path / "report.html").read_text()
    out = tmp_path / "no image"
    run([replace(given, image=None)], out)
    assert {path.stem for path in (out / "figures").iterdir()} == {
        f"level1_{name}" for name in {"kernels_model1", "kernels_model2", *FIGURES}
    }


def test_arrows_start_and_point_where_they_should(monkeypatch, tmp_path, no_drawing):
    drawn = {}

    def plot(image, places, arrows, **options):
        drawn.update(places=places, arrows=arrows, **options)

    monkeypatch.setattr("freqfusion.analysis.page.plot_arrows", plot)
    found = replace(internals(0), offsets=torch.zeros(2, 12, 16))
    found.offsets[:, 5, 7] = torch.tensor([1.0, -0.5])  # a coarse pixel is 4 of the image
    run([observation(levels=1, internals={"fine": {"": found}})], tmp_path)
    (moved,) = np.flatnonzero(drawn["arrows"].any(1))
    assert drawn["places"][moved].tolist() == [14.5, 10.5]
    assert drawn["arrows"][moved].tolist() == [4, -2]
    assert drawn["unit"] == 4


@pytest.mark.parametrize("dark", [False, True])
def test_arrows_are_magnified_alike(dark):
    image = np.zeros((20, 40, 3), np.uint8)
    places = np.array([[5.0, 5.0], [15.0, 5.0], [25.0, 15.0]])
    arrows = np.array([[0.1, 0.0], [0.0, 0.1], [0.0, 0.0]])
    figure = plot_arrows(image, places, arrows, title="t", unit=0.5, unit_name="units", dark=dark)
    (axes,) = figure.axes
    quiver, key = axes.collections[0], axes.artists[0]
    assert quiver.get_offsets().tolist() == places.tolist()
    assert (quiver.U.tolist(), quiver.V.tolist()) == ([0.1, 0, 0], [0, 0.1, 0])
    assert 5 < 0.1 / quiver.scale < 40  # seen, and inside the image
    assert key.text.get_text() == "0.2 units"
    np.testing.assert_allclose(key.U, 0.1)
    assert axes.get_ylim() == (19.5, -0.5)  # down is positive
    figure_bytes(figure)
    figure_bytes(plot_arrows(image, places, 0 * arrows))  # nothing moves


def test_heat_has_one_scale():
    maps = {"a": np.full((4, 6), 0.5), "b": np.full((4, 6), 2.0)}
    image = np.zeros((8, 12, 3), np.uint8)
    *frames, scale = plot_heat(maps, title="t", value_label="v", image=image, dark=True).axes
    assert [axes.get_title() for axes in frames] == ["image", "a", "b"]
    assert [axes.images[0].get_clim() for axes in frames[1:]] == [(0, 2), (0, 2)]
    assert scale.get_ylabel() == "v"
    first, second, _ = plot_heat(maps, extent=(-0.5, 0.5, -0.5, 0.5), x_label="x", y_label="y").axes
    assert first.get_xticks().tolist() == second.get_xticks().tolist() == [-0.5, 0, 0.5]
    assert (first.get_ylabel(), second.get_ylabel()) == ("y", "")
    figure_bytes(plot_heat({"zero": np.zeros((4, 6))}))
