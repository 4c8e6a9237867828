import csv
import json
import os

import numpy as np
import pytest
from PIL import Image

from freqfusion.benchmarks import cost
from freqfusion.benchmarks.cost import Cost, Latency
from freqfusion.cli._benchmark_cost import run_cost
from freqfusion.cli.main import main
from freqfusion.drawing import figures
from freqfusion.drawing.figures import figure_bytes, plot_scatter

COSTS = [
    Cost(
        cost.THREE_SITES,
        "nearest",
        0,
        0,
        0,
        0,
        0,
        Latency(1.2345, 1.2, 1.3),
        Latency(86.54, 80.0, 90.0),
    ),
    Cost(
        cost.THREE_SITES,
        "freqfusion",
        314_070,
        312_576,
        13_375_706_400,
        26_751_412_800,
        3 * 2**20,
        Latency(1857.5, 1729.0, 1985.0),
        Latency(8626.3, 8409.0, 8843.0),
    ),
    Cost(cost.THREE_SITES, "[broken]", note="cannot be built: weights are missing"),
    Cost("fpn_small", "nearest", 288_198, 286_848, 7_238_320_128, 14_363_394_048, 77_074_176),
    Cost("fpn_small", "freqfusion", 359_964, 357_984, 10_097_147_904, 20_081_049_600, 193_284_960),
    Cost("fpn_small", "[broken]", note="cannot be built: weights are missing"),
    Cost("segnext_t", "nearest", 4_263_414, 4_216_560, note="FLOPs: [no] meta form"),
]
METHODS = ["nearest", "freqfusion", "[broken]"]


@pytest.fixture
def measured(monkeypatch):
    """The measurement replaced by known figures; returns what it was asked for."""
    asked = {}

    def measure(methods, device, rounds, progress):
        asked.update(methods=methods, device=device, rounds=rounds)
        progress(0, 1, "nearest: three sites")
        return COSTS

    monkeypatch.setattr(cost, "measure_costs", measure)
    monkeypatch.setenv("COLUMNS", "80")
    return asked


def test_table_and_files(measured, tmp_path, capsys):
    run_cost(METHODS, tmp_path / "new" / "out", "cpu", None, 3)
    assert (measured["methods"], measured["device"].type, measured["rounds"]) == (METHODS, "cpu", 3)
    out = tmp_path / "new" / "out"
    assert sorted(os.listdir(out)) == ["cost.csv", "cost.json", "cost.md"]

    content = json.loads((out / "cost.json").read_text())
    assert content["costs"][1]["flops_forward"] == 13_375_706_400
    assert content["costs"][1]["forward_ms"] == {"median": 1857.5, "lower": 1729.0, "upper": 1985.0}
    assert content["costs"][3]["forward_ms"] is None
    assert content["rounds"] == 3
    assert content["machine"]["threads"] >= 1

    with open(out / "cost.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["place"], row["method"]) for row in rows] == [(row.place, row.method) for row in COSTS]
    assert rows[1]["backward_ms_upper"] == "8843.0"
    assert rows[2]["parameters"] == rows[4]["forward_ms_median"] == ""
    assert rows[6]["note"] == "FLOPs: [no] meta form"

    page = (out / "cost.md").read_text()
    assert "| freqfusion | 314,070 | 13.38 | 26.75 | 3.0 | 1858 ± 128 | 8626 ± 217 |" in page
    assert "| nearest | 0 | 0.00 | 0.00 | 0.0 | 1.23 ± 0.05 | 86.5 ± 5.0 |" in page
    assert "| fpn_small | [broken] | - | - | - | - |" in page
    assert "- [broken], fpn_small: cannot be built: weights are missing" in page
    for fact in ("25x42 to 50x84", "120x120 to 240x240", "512x512", "grid_sample", "3 interleaved rounds"):
        assert fact in page

    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for cells in (
        "freqfusion",
        "314,070",
        "13.38",
        "1858 ± 128",
        "8626 ± 217",
        "[no] meta form",
        " [broken] ",
    ):
        assert cells in shown
    assert "…" not in shown


def test_quality_is_drawn_against_latency(measured, tmp_path):
    run_cost(METHODS, tmp_path, None, ("mIoU", {"freqfusion": 46.4, "nearest": 42.0, "[broken]": 41.0}), 1)
    with Image.open(tmp_path / "quality_latency.png") as picture:
        blue = np.asarray(picture.convert("RGB")) == (0, 114, 178)
    columns = np.flatnonzero(blue.all(axis=2).any(axis=0))
    # two dots far apart, and no third: a method without a latency has no place
    assert np.count_nonzero(np.diff(columns) > 1) == 1


def test_wrong_requests_are_answered_at_once(measured, tmp_path):
    with pytest.raises(
        ValueError, match="quality of 'sapa', which is not measured; the methods are nearest,"
    ):
        run_cost(METHODS, tmp_path, "cpu", ("mIoU", {"sapa": 1.0}), 1)
    with pytest.raises(ValueError, match="no device 'abacus' here"):
        run_cost(METHODS, tmp_path, "abacus", None, 1)
    assert not measured
    assert not os.listdir(tmp_path)


def write_results(path, means):
    entries = [{"method": name, "metrics": {"pq": {"mean": mean}}} for name, mean in means.items()]
    path.write_text(json.dumps({"metric": {"name": "pq", "label": "PQ"}, "methods": entries}))


def test_the_command_draws_the_results_of_a_comparison(measured, monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(
        figures, "plot_scatter", lambda points, **labels: drawn.update(points, **labels) or plot_scatter({})
    )
    write_results(tmp_path / "results.json", {"freqfusion": 46.4, "segformer, nearest": 42.0, "sapa": None})
    words = ["--methods", "freqfusion", "nearest", "sapa", "--results", str(tmp_path / "results.json")]
    assert main(["benchmark", "--cost", "--device", "cpu", "--out", str(tmp_path), *words]) == 0
    assert measured["methods"] == ["freqfusion", "nearest", "sapa"]
    assert measured["rounds"] == cost.ROUNDS
    assert drawn["freqfusion"] == (1857.5, 46.4)
    assert drawn["y_label"] == "PQ, %"
    assert "nearest" not in drawn
    assert (tmp_path / "quality_latency.png").is_file()


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["--cost", "--methods", "bicubic"], 2, "there is no method 'bicubic'; choose from: "),
        (["--cost", "--ops", "carafe"], 2, "--ops does not go with --cost"),
        (["--cost", "--explain"], 2, "--explain does not go with --cost"),
        (["--methods", "carafe"], 2, "--methods does not go without --cost"),
        (["--cost", "--results", "none.json"], 2, "none.json"),
        (["--cost", "--results", "list.json"], 2, "list.json is not the results.json of freqfusion compare"),
        (
            ["--cost", "--methods", "carafe", "--results", "other.json"],
            2,
            "none of the methods carafe, but sapa",
        ),
    ],
)
def test_wrong_lines_are_answered_at_once(measured, monkeypatch, tmp_path, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    write_results(tmp_path / "other.json", {"sapa": 1.0})
    assert main(["benchmark", *words, "--out", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err
    assert not measured
    assert not (tmp_path / "out").exists()


def test_a_real_measurement(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cost, "SITES", ((3, 4),))
    monkeypatch.setattr(cost, "LATENCY_SITE", (3, 3))
    monkeypatch.setattr(cost, "IMAGE", (64, 64))
    monkeypatch.setattr(cost, "MODELS", ["fpn_small"])
    run_cost(["carafe"], tmp_path, "cpu", ("mIoU", {"carafe": 50.0}), 1)
    at_sites, in_model = json.loads((tmp_path / "cost.json").read_text())["costs"]
    assert at_sites["parameters"] == 74_148
    assert in_model["place"] == "fpn_small"
    assert at_sites["note"] == in_model["note"] == ""
    assert "74,148" in capsys.readouterr().out
    assert (tmp_path / "quality_latency.png").stat().st_size > 0


def overlaps(figure):
    """Names that overlap another or leave the frame."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [super(type(text), text).get_window_extent() for text in axes.texts]
    inside = [axes.bbox.contains(*corner) for box in boxes for corner in box.get_points()]
    return sum(box.count_overlaps(boxes) - 1 for box in boxes), inside.count(False)


def test_names_of_a_crowd_stay_apart():
    generator = np.random.default_rng(0)
    points = {f"method {index}": tuple(50 + generator.random(2)) for index in range(14)}
    points |= {"far": (2000.0, 60.0), "twin": (50.5, 50.5), "other twin": (50.5, 50.5)}
    figure = plot_scatter(points, title="title", x_label="ms", y_label="%")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == list(points)
    assert axes.collections[0].get_offsets().tolist() == [list(point) for point in points.values()]
    assert axes.get_xscale() == "log"
    assert overlaps(figure) == (0, 0)
    assert len(figure_bytes(figure)) > 1000


def test_scatter_of_one_point_and_of_none():
    assert [text.get_text() for text in plot_scatter({"only": (3.0, 50.0)}).axes[0].texts] == ["only"]
    assert len(figure_bytes(plot_scatter({}))) > 0


@pytest.mark.parametrize("point", [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_scatter_refuses_points_without_a_place(point):
    with pytest.raises(ValueError, match="finite with x above 0"):
        plot_scatter({"a": point})
