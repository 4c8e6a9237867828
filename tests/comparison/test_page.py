"""Runs of every task, really trained, from folders to tables and pages."""

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from freqfusion.comparison.page import headline, method_table, score, write_comparison
from freqfusion.comparison.runs import compare_runs
from run_folders import write_run
from tiny_objects import tiny_detection, write_coco, write_panoptic

FUSIONS = ("bilinear", "freqfusion")


def train(task: str, folder: Path) -> list[Path]:
    """A run from Python for each of the fusion methods: without ``config.yaml``."""
    from freqfusion.tasks import SegmentationData, SegmentationModule
    from tiny_masks import mask_module, object_data, run_fit

    for fusion in FUSIONS:
        if task == "semantic":
            options = {"length": 4, "size": (48, 64)}
            data = SegmentationData(dataset_options=options, crop_size=(32, 48), batch_size=2, workers=0)
            module = SegmentationModule("fpn_small", fusion, num_classes=data.num_classes, warmup_steps=0)
        elif task == "detection":
            module, data = tiny_detection(write_coco(folder), fusion=fusion)
        else:
            pytest.importorskip("transformers")
            data = object_data(write_panoptic(folder))
            module = mask_module(data, fusion=fusion)
        run_fit(folder / fusion, module, data, max_epochs=1)
    return [folder / fusion for fusion in FUSIONS]


@pytest.mark.parametrize(
    "task, metric, pictures",
    [("semantic", "miou", 3 * 2 * 6), ("detection", "mask_ap", 3 * 3), ("masks", "pq", 3 * 3)],
)
def test_every_task_from_runs_to_a_page(tmp_path, task, metric, pictures):
    folders = train(task, tmp_path)
    comparison, out = compare_runs(folders), tmp_path / "out"
    assert comparison.headline[0] == metric
    assert comparison.differing == ["model.fusion"]
    notes = write_comparison(out, comparison, title="title", command="the command", images=False)
    assert notes == []
    with (out / "results.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    content = json.loads((out / "results.json").read_text())
    assert content["metric"]["name"] == metric
    page = (out / "report.html").read_text()
    for folder in folders:
        truth = json.loads((folder / "val_metrics.json").read_text())
        assert float(rows[folder.name][metric]) == pytest.approx(100 * truth[metric])
        (entry,) = [entry for entry in content["methods"] if entry["method"] == folder.name]
        assert entry["metrics"][metric]["mean"] == pytest.approx(100 * truth[metric])
        assert f"{100 * truth[metric]:.2f}" in page
        assert f"| {folder.name} | 1 | {100 * truth[metric]:.2f} |" in (out / "results.md").read_text()
    frames = 2 * (len(comparison.headline) * 2)  # bars and curves, light and dark
    assert page.count("data:image/png") == pictures + frames
    assert not re.search(r'(src|href)="http|<script', page)
    width, height = Image.open(out / "strip_1.png").size
    assert width > 1000
    assert height > 200
    assert (out / "curves.png").stat().st_size > 1000


def test_without_checkpoints_the_page_says_why_it_has_no_pictures(tmp_path):
    folders = [
        write_run(tmp_path / f"{fusion}{seed}", fusion, seed, miou + seed / 50)
        for fusion, miou in (("bilinear", 0.5), ("freqfusion", 0.6))
        for seed in (0, 1)
    ]
    folders.append(write_run(tmp_path / "late", "carafe", judged=20))
    comparison = compare_runs(folders)
    notes = write_comparison(tmp_path / "out", comparison, title="a <title>", command="c", lede="Said too.")
    assert [note.partition(" ")[0] for note in notes] == [str(tmp_path / "late"), "there"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "There are no pictures: there is no checkpoint at " in page
    assert "is left out: its last validation is that of step 20 of 40" in page
    for text in (
        "a &lt;title&gt;",
        "Said too.",
        "Only the fusion differs",
        "no epoch picked",
        "-10.00 (&lt;0.001)",
    ):
        assert text in page
    assert "What they see" not in page
    assert method_table(comparison).rows[0] == [
        "freqfusion",
        "2",
        "61.00 ± 1.41",
        "25.00 ± 0.00",
        "-",
        "0.00 M",
        "4 s",
    ]
    assert headline(comparison) == "freqfusion leads with 61.00 % mIoU, 10.00 points before bilinear"


def test_the_outcome_names_whoever_has_the_best_boundaries(tmp_path):
    for fusion, miou, boundary in (("a", 0.6, 0.2), ("b", 0.5, 0.3)):
        write_run(tmp_path / fusion, fusion, metrics={"miou": miou, "boundary_iou": boundary})
    comparison = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert method_table(comparison).best == {2: 0, 3: 1}
    text = headline(comparison)
    assert text == "a leads with 60.00 % mIoU, 10.00 points before b; b has the best boundary IoU (30.00 %)"


def test_the_lead_is_not_told_of_other_seeds(tmp_path):
    runs = [("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.49)]
    folders = [write_run(tmp_path / f"{name}{seed}", name, seed, score) for name, seed, score in runs]
    comparison = compare_runs(folders)
    assert headline(comparison) == "a leads with 60.00 % mIoU"
    assert method_table(comparison).rows[1][4] == "-1.00"


def test_a_tie_has_no_leader(tmp_path):
    for fusion, miou in (("a", 0.5), ("b", 0.500001)):
        write_run(tmp_path / fusion, fusion, metrics={"miou": miou, "boundary_iou": 0.1})
    comparison = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert headline(comparison) == "b and a are level with 50.00 % mIoU"
    assert method_table(comparison).best == {}


def test_one_run_alone_has_a_page_without_comparison(tmp_path):
    comparison = compare_runs([write_run(tmp_path / "run", miou=None)])
    write_comparison(tmp_path / "out", comparison, title="t", command="c")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "freqfusion has - % mIoU" in page
    assert "Difference:" not in page
    assert not (tmp_path / "out" / "bars_miou.png").exists()
    assert score(comparison.methods[0], "boundary_iou") == "25.00"


def test_what_differs_is_told(tmp_path):
    for number, settings in enumerate(({}, {"model__network": "segnext_t", "model__lr": 0.5})):
        write_run(tmp_path / str(number), **settings)
    comparison = compare_runs([tmp_path / "0", tmp_path / "1"])
    write_comparison(tmp_path / "out", comparison, title="t", command="c")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 runs that differ in model.lr, model.network." in page
    assert "Only the fusion differs" not in page
    assert '<th scope="col">model.lr</th>' in page
