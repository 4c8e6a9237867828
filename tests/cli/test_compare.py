"""Runs compared, and the race from end to end, with a method of the user's own."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from freqfusion.cli.main import main
from freqfusion.comparison import race
from freqfusion.fusion import catalog
from run_folders import write_run
from tiny_objects import SMALL_DETECTOR, write_coco
from tiny_training import RunHere

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


def test_a_method_of_ones_own_from_registration_to_page(extension, tmp_path, capsys, monkeypatch):
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
    monkeypatch.setattr(race.subprocess, "Popen", RunHere)
    stamp = (tmp_path / "race" / "doubled" / "seed_0" / "metrics.csv").stat().st_mtime_ns
    assert main([*line, "--seeds", "2", "--leaders", "1", "--no-images"]) == 0
    assert (tmp_path / "race" / "doubled" / "seed_0" / "metrics.csv").stat().st_mtime_ns == stamp
    content = json.loads((tmp_path / "race" / "results.json").read_text())
    first = content["methods"][0]["method"]
    seeds = {entry["method"]: entry["seeds"] for entry in content["methods"]}
    assert sorted(seeds.values(), key=len) == [[0], [0, 1]]
    leader = max(runs, key=lambda run: float(run["miou"]))["method"]
    assert seeds[leader] == [0, 1]
    assert f"{first} leads with" in capsys.readouterr().out
    assert "partly the luck of that seed" in (tmp_path / "race" / "report.html").read_text()

    # its folders are runs like any others
    runs = [str(tmp_path / "race" / name / "seed_0") for name in ("bilinear", "doubled")]
    assert main(["compare", *runs, "--baseline", "bilinear", "--out", str(tmp_path / "again")]) == 0
    assert "doubled" in capsys.readouterr().out
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert {entry["method"]: entry["seeds"] for entry in again["methods"]} == {
        "bilinear": [0],
        "doubled": [0],
    }
    assert (tmp_path / "again" / "strip_1.png").is_file()

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
        (
            ["--methods", "bilinear"],
            "name run folders to compare, or a race with --config RECIPE or --preset",
        ),
        ([], "name run folders to compare, or a race"),
        (["runs/a", "--preset", "tiny"], "and not both"),
        (["--config", "compare/camvid", "--preset", "tiny"], "not allowed with argument --config"),
        (["runs/a", "--seeds", "2"], "--seeds is for a race only"),
        (["runs/a", "--minutes", "8"], "--minutes is for a race only"),
        (["runs/a", "--trainer.max_epochs", "3"], "there is no option --trainer.max_epochs for runs"),
        (["--preset", "tiny", "--split", "test"], "--split is for runs that are there only"),
        (
            ["--preset", "tiny", "--methods", "carafe", "--baseline", "sapa"],
            "--baseline sapa is none of the methods",
        ),
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
    assert main(["compare", *words, "--out", str(tmp_path / "race")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "race").exists()


def test_a_race_of_another_task(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(race.subprocess, "Popen", RunHere)
    root = write_coco(tmp_path)
    options = {**SMALL_DETECTOR, "rpn_pre_nms_top_n": [200, 200], "rpn_post_nms_top_n": [64, 64]}
    recipe = {
        "task": "detection",
        "model": {"network": "faster_rcnn_r18", "network_options": options, "warmup_steps": 0, "lr": 1e-3},
        "data": {
            "dataset": "coco",
            "root": str(root),
            "val_split": "train",
            "short_sides": [64],
            "max_size": 96,
            "batch_size": 4,
            "flip": 0.0,
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--config", str(tmp_path / "recipe.yaml"), "--methods", "nearest", "bilinear", "--seeds", "1"]
    assert main(["compare", *words, "--out", str(tmp_path / "race")]) == 0
    assert "nearest, seed 0: done box AP" in capsys.readouterr().out
    content = json.loads((tmp_path / "race" / "results.json").read_text())
    assert content["metric"] == {"name": "box_ap", "label": "box AP"}
    assert (tmp_path / "race" / "strip_3.png").is_file()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "detection"}, "task is semantic and detection"),
        ({"data__dataset": "camvid"}, "data.dataset is synthetic and camvid"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_in_one_line(tmp_path, capsys, settings, message):
    runs = [str(write_run(tmp_path / "a", "a")), str(write_run(tmp_path / "b", "b", **settings))]
    assert main(["compare", *runs, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert main(["compare", *runs, str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path} is no run: it has no run.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_left_out_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    runs = [str(write_run(tmp_path / "a", "a")), str(write_run(tmp_path / "b", "b", judged=20))]
    assert main(["compare", *runs, "--out", str(tmp_path / "out")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "is left out: its last validation is that of step 20 of 40" in out
    assert "a has 50.00 % mIoU." in out


def test_a_race_that_is_out_of_time_says_what_is_left(tmp_path, capsys):
    words = ["compare", "--preset", "tiny", "--seeds", "2", *SHORT, "--out", str(tmp_path / "race")]
    assert main([*words, "--minutes", "0.0001"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "left after 0.0001 minutes: bilinear, seed 0; freqfusion, seed 0; carafe, seed 0; dysample+, seed 0;"
        in printed
    )
    assert "The same line goes on with them." in printed
    assert not (tmp_path / "race" / "report.html").exists()


def test_ctrl_c_ends_the_runs_and_the_line_goes_on(tmp_path, monkeypatch):
    words = ["compare", "--preset", "tiny", "--methods", "bilinear", "--seeds", "1", *SHORT]
    command = [sys.executable, "-m", "freqfusion", *words, "--out", str(tmp_path / "race")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "race" / "bilinear" / "seed_0" / "log.txt"
    while not (log.exists() and log.stat().st_size):  # the run has begun to speak, so it listens too
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr is not None
    assert process.stderr.read().strip() == "freqfusion compare: stopped"
    with pytest.raises(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, 0)
    monkeypatch.setattr(race.subprocess, "Popen", RunHere)
    assert main(command[3:]) == 0
    assert (tmp_path / "race" / "report.html").is_file()
