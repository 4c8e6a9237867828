"""Every recipe parses, says where it comes from, and names a network that exists."""

from pathlib import Path

import pytest
import torch
import yaml

from freqfusion.fusion import list_fusions
from freqfusion.models import list_models

FOLDER = Path(__file__).parents[2] / "recipes"
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


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe(path, monkeypatch):
    from freqfusion.cli._lightning import CommandLine

    built = {}
    # parse with all checks, but open no data and build no network
    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda line: built.update(line.config.as_dict()))
    line = CommandLine("fit", "", ["--config", str(path)])
    assert line.out == Path("runs") / path.parent.name / path.stem
    assert built["data"]["dataset"] == path.parent.name
    assert f"{built['model']['network']}_{built['model']['fusion']}" == path.stem
    assert built["model"]["network"] in list_models()
    assert built["model"]["fusion"] in list_fusions()
    text = path.read_text()
    for words in ("# Setting: ", "# Target: "):
        assert words in text
    trainer = built["trainer"]
    assert trainer["max_epochs"] or trainer["max_steps"] > 0


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
