"""The race from end to end, with a method of the user's own."""

import csv
import json
import re

import pytest

from freqfusion.cli.main import main
from freqfusion.fusion import catalog

METHOD = """
import torch.nn.functional as F
from freqfusion import FusedFeatures, Fusion, register_fusion


class Doubled(Fusion):
    def fuse(self, hr_feat, lr_feat):
        return FusedFeatures(None, hr_feat, 2 * F.interpolate(lr_feat, hr_feat.shape[-2:]))


register_fusion("doubled", Doubled)
"""
SHORT = [
    *("--data.dataset_options.length", "40"),
    *("--trainer.val_check_interval", "5"),
    *("--trainer.limit_val_batches", "1"),
]


@pytest.fixture
def extension(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(catalog, "_METHODS", dict(catalog._METHODS))
    monkeypatch.setenv("FREQFUSION_IMPORT", "")
    monkeypatch.setenv("COLUMNS", "100")
    path = tmp_path_factory.mktemp("method") / "doubled_fusion.py"
    path.write_text(METHOD)
    return path


def test_a_method_of_ones_own_from_registration_to_page(extension, tmp_path, capsys):
    line = ["compare", "--import", str(extension), "--preset", "tiny", "--methods", "bilinear", "doubled"]
    line += ["--out", str(tmp_path / "race"), *SHORT]
    assert main([*line, "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "doubled, seed 0: done mIoU" in printed
    with (tmp_path / "race" / "results.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert sorted(run["method"] for run in runs) == ["bilinear", "doubled"]
    assert all(0 < float(run["miou"]) < 100 and float(run["seconds"]) > 0 for run in runs)
    assert runs[0]["miou"] != runs[1]["miou"]
    page = (tmp_path / "race" / "report.html").read_text()
    assert "doubled" in page
    assert page.count("data:image/png") > 20
    assert not re.search(r'(src|href)="http', page)
    for name in ("bars_miou.png", "bars_boundary_iou.png", "curves.png", "strip_1.png", "results.md"):
        assert (tmp_path / "race" / name).stat().st_size > 100

    # another seed: the first is kept as it is
    stamp = (tmp_path / "race" / "doubled" / "seed_0" / "metrics.csv").stat().st_mtime_ns
    assert main([*line, "--seeds", "2", "--leaders", "1", "--no-images"]) == 0
    assert (tmp_path / "race" / "doubled" / "seed_0" / "metrics.csv").stat().st_mtime_ns == stamp
    content = json.loads((tmp_path / "race" / "results.json").read_text())
    first = content["standings"][0]["method"]
    seeds = {entry["method"]: entry["seeds"] for entry in content["standings"]}
    assert sorted(seeds.values(), key=len) == [[0], [0, 1]]
    leader = max(runs, key=lambda run: float(run["miou"]))["method"]
    assert seeds[leader] == [0, 1]
    assert f"{first} leads with" in capsys.readouterr().out

    # other settings do not mix with these
    assert main([*line, "--seeds", "1", "--model.lr", "0.5"]) == 2
    assert "holds a race with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset", "tiny", "--methods", "bicubic"], "there is no method 'bicubic'"),
        (["--preset", "tiny", "--seeds", "0"], "--seeds is 0, expected a whole number of at least 1"),
        (["--preset", "tiny", "--seed", "3"], "--seed is set for every run by the race itself"),
        (["--config", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
        (["--preset", "tiny", "--methods", "bilinear", "--trainer.max_eggs", "3"], "max_eggs"),
        (["--methods", "bilinear"], "--config --preset --cost"),
    ],
)
def test_what_is_asked_wrongly_is_said_at_once(tmp_path, capsys, words, message):
    assert main(["compare", *words, "--out", str(tmp_path / "race")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "race").exists()


def test_missing_data_is_said_before_any_run(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model:\n  network: fpn_small\ndata:\n  dataset: camvid\n")
    words = ["--config", str(recipe), "--methods", "bilinear", "--data.root", str(tmp_path / "none")]
    assert main(["compare", *words, "--out", str(tmp_path / "race")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "race").exists()


def test_other_tasks_are_refused(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: detection\nmodel:\n  network: faster_rcnn_r18\n")
    words = ["--config", str(recipe), "--methods", "bilinear", "--out", str(tmp_path / "race")]
    assert main(["compare", *words]) == 2
    assert "is of the task detection, but a race ranks semantic segmentation" in capsys.readouterr().err
    assert not (tmp_path / "race").exists()
