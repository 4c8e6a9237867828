"""Every recipe parses, says where it comes from, and names a network that exists."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from freqfusion.fusion import list_fusions
from freqfusion.models import list_detectors, list_models
from tiny_objects import write_panoptic

FOLDER = Path(__file__).parents[2] / "recipes"
DATASETS = {"bccd": "coco", "nuclei": "coco", "synthetic": "synthetic_panoptic"}
"""The readers of those folders that are not called after one."""
RACES = sorted(FOLDER.glob("compare/*.yaml"))
RECIPES = sorted(set(FOLDER.glob("*/*.yaml")) - set(RACES))


def test_all_are_there():
    names = {str(path.relative_to(FOLDER).with_suffix("")) for path in RECIPES}
    assert names >= {
        f"{data}/segnext_{size}_{fusion}"
        for data, sizes in (("ade20k", "tsbl"), ("cityscapes", "tsbl"), ("camvid", "t"))
        for size in sizes
        for fusion in ("bilinear", "freqfusion")
    }
    assert names >= {
        f"coco/{kind}_{backbone}_{fusion}"
        for kind in ("faster_rcnn", "mask_rcnn", "panoptic_fpn")
        for backbone in ("r50", "r101")
        for fusion in ("nearest", "freqfusion")
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe(path, monkeypatch):
    from freqfusion.cli._lightning import CommandLine

    built = {}
    # parse with all checks, but open no data and build no network
    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda line: built.update(line.config.as_dict()))
    line = CommandLine("fit", "", ["--config", str(path)])
    assert line.out == Path("runs") / path.parent.name / path.stem
    folder = path.parent.name
    panoptic = folder == "coco" and path.stem.startswith("panoptic")
    expected = DATASETS.get(folder, f"{folder}_panoptic" if panoptic else folder)
    assert built["data"]["dataset"] == (
        "foreground" if path.stem.startswith("unet") and folder == "nuclei" else expected
    )
    network = built["model"]["network"]
    assert f"{network}_{built['model']['fusion']}" == path.stem
    assert network in [*list_models(), *list_detectors(), "unet_resnet18"]
    assert built["model"]["fusion"] in list_fusions()
    text = path.read_text()
    assert "# Setting: " in text
    assert "# Target: " in text or "Result: docs/results/" in text
    trainer = built["trainer"]
    assert trainer["max_epochs"] or trainer["max_steps"] > 0


PUBLISHED = (
    "deconv",
    "pixel_shuffle",
    "carafe",
    "indexnet",
    "a2u",
    "fade",
    "sapa",
    "dysample-s+",
    "dysample+",
)
"""The other methods of the paper's tables on COCO."""


def coco_rows() -> list[Any]:
    """Every row of those tables: recipe and method."""
    rows = []
    for path in RECIPES:
        if path.parent.name != "coco":
            continue
        own = path.stem.rpartition("_")[2]
        others = (
            PUBLISHED
            if own == "nearest" and "r50" in path.stem
            else ("dysample+",)
            if own == "nearest"
            else ()
        )
        for fusion in (own, *others):
            common = fusion == own and "r50" in path.stem
            rows.append(
                pytest.param(
                    path, fusion, id=f"{path.stem}-{fusion}", marks=[] if common else [pytest.mark.slow]
                )
            )
    return rows


@pytest.mark.parametrize("path, fusion", coco_rows())
def test_a_row_of_the_papers_tables_starts(path: Path, fusion: str, tmp_path: Path) -> None:
    """One step and a validation, at the network's full width, on small pictures in COCO's layout."""
    from freqfusion.cli.main import main

    for split in ("train", "val"):
        write_panoptic(tmp_path, split, 2)
    options = yaml.safe_load(path.read_text())["model"]["network_options"]
    options |= {"min_size": 64, "max_size": 96, "backbone_options": {}}
    words = ["--config", path, "--model.fusion", fusion, "--model.network_options", json.dumps(options)]
    words += [
        "--data.root",
        tmp_path,
        "--data.short_sides",
        "[64]",
        "--data.batch_size",
        2,
        "--data.workers",
        0,
    ]
    words += ["--trainer.max_steps", 1, "--trainer.accelerator", "cpu", "--out", tmp_path / "run"]
    assert main(["fit", *map(str, words)]) == 0
    figures = json.loads((tmp_path / "run" / "val_metrics.json").read_text())
    assert ("pq" in figures) == path.stem.startswith("panoptic")
    assert ("mask_ap" in figures) == path.stem.startswith("mask")


def test_frozen_stages_need_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from freqfusion.cli.main import main

    root = write_panoptic(write_panoptic(tmp_path), "val")
    words = [
        "--config",
        FOLDER / "coco" / "faster_rcnn_r50_nearest.yaml",
        "--data.root",
        root,
        "--out",
        tmp_path,
    ]
    assert main(["fit", *map(str, words), "--data.batch_size", "2"]) == 1
    assert "no weights are given, so random ones would be kept" in capsys.readouterr().err


@pytest.mark.parametrize("path", RACES, ids=lambda path: path.stem)
def test_race(path, monkeypatch):
    from freqfusion.cli._lightning import CommandLine

    built = {}
    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda line: built.update(line.config.as_dict()))
    CommandLine("fit", "", ["--config", str(path), "--model.fusion", "carafe"])
    assert built["model"]["fusion"] == "carafe"
    assert "fusion" not in yaml.safe_load(path.read_text())["model"]
    assert "# Setting: " in path.read_text()
    # a race counts the last validation, so that must come at the end
    assert built["trainer"]["max_epochs"] % built["trainer"]["check_val_every_n_epoch"] == 0


@pytest.mark.parametrize("fusion", ["bilinear", "freqfusion"])
def test_the_small_recipe_builds(fusion):
    from freqfusion.training import SegmentationModule

    options = yaml.safe_load((FOLDER / "camvid" / f"segnext_t_{fusion}.yaml").read_text())
    module = SegmentationModule(num_classes=11, **options["model"]).eval()
    assert module.predict(torch.zeros(1, 3, 45, 60)).shape == (1, 11, 45, 60)
