"""Every recipe parses, says where it comes from, and names a network that exists."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny_masks
from freqfusion.fusion import list_fusions
from freqfusion.integrations import build_host, list_hosts, upgrade_
from freqfusion.models import create_detector, create_model, list_detectors, list_models
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
    hosts = {
        *(f"segformer_b{size}" for size in range(6)),
        *(f"upernet_swin_{size}" for size in "tsb"),
        *(f"mask2former_{backbone}" for backbone in ("r50", "r101", "swin_t", "swin_b", "swin_l")),
    }
    assert names >= {
        f"{data}/{host}_{fusion}"
        for data in ("ade20k", "cityscapes")
        for host in hosts
        for fusion in ("bilinear", "freqfusion")
    }
    assert {name for name in names if name.startswith("coco/mask2former")} == {
        f"coco/{host}_{fusion}"
        for host in hosts
        if host.startswith("mask2former")
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
    folder = path.parent.name
    panoptic = folder == "coco" and path.stem.startswith(("panoptic", "mask2former"))
    expected = DATASETS.get(folder, f"{folder}_panoptic" if panoptic else folder)
    assert built["data"]["dataset"] == (
        "foreground" if path.stem.startswith("unet") and folder == "nuclei" else expected
    )
    network = built["model"]["network"]
    assert f"{network}_{built['model']['fusion']}" == path.stem
    assert network in [*list_models(), *list_detectors(), *list_hosts(), "unet_resnet18"]
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
        if path.parent.name != "coco" or path.stem.startswith("mask2former"):
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


SMALL_SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4]}
SMALL = {
    "mask2former_r": {
        **tiny_masks.TINY,
        "frozen_norm": False,
        "backbone_config": {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
    },
    "mask2former_s": tiny_masks.TINY,
    "segformer": {
        "hidden_sizes": [8, 16, 16, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 4],
        "decoder_hidden_size": 32,
    },
    "upernet": {"hidden_size": 16, "auxiliary_in_channels": 64, "backbone_config": SMALL_SWIN},
    "unet": {},
}
"""What makes a network small, by the beginning of its name."""


def host_recipes() -> list[Any]:
    """All of models of other libraries and of U-Nets, small; in full as well where that is asked for."""
    paths = [path for path in RECIPES if path.stem.startswith(tuple(SMALL))]
    return [
        pytest.param(path, full, id=f"{path.parent.name}-{path.stem}{'-full' * full}", marks=marks)
        for full, marks in ((False, ()), (True, pytest.mark.slow))
        for path in paths
    ]


@pytest.mark.parametrize("path, full", host_recipes())
def test_a_host_recipe_starts(path: Path, full: bool, tmp_path: Path) -> None:
    """One step and a validation on small pictures, with the recipe's own schedule, precision and augmentation."""
    pytest.importorskip("transformers")
    from freqfusion.cli.main import main

    content = yaml.safe_load(path.read_text())
    options = content["model"].get("network_options", {})
    if "frozen_norm" in options:
        options["frozen_norm"] = False  # there are no weights
    if not full:
        options |= next(small for name, small in SMALL.items() if path.stem.startswith(name))
    words = ["--config", path, "--data.batch_size", 2, "--data.workers", 0, "--out", tmp_path / "run"]
    words += ["--trainer.max_steps", 1, "--trainer.max_epochs", -1, "--trainer.accelerator", "cpu"]
    words += ["--trainer.val_check_interval", "null", "--trainer.check_val_every_n_epoch", 1]
    words += ["--data.crop_size", "[64,64]"] if "crop_size" in content["data"] else []
    if content.get("task") == "masks":
        for split in ("train", "val"):
            write_panoptic(tmp_path, split, 2)
        words += ["--data.dataset", "coco_panoptic", "--data.root", tmp_path, "--model.test_size", 64]
        words += ["--data.dataset_options", "null", "--data.train_options", "null"]
    else:
        words += ["--data.dataset", "synthetic", "--data.dataset_options", '{"length": 2, "size": [64, 80]}']
        words += ["--model.class_weights", "null"]
        words += ["--model.test_size", 64] if "test_size" in content["model"] else []
        words += ["--model.window", 64, "--model.stride", 48] if "window" in content["model"] else []
        words += ["--data.short_sides", "[64,80]"] if "short_sides" in content["data"] else []
        words += ["--data.base_size", "[64,128]"] if "base_size" in content["data"] else []
        words += ["--data.resize", "null"]
    words += ["--model.network_options", json.dumps(options)] if options else []
    assert main(["fit", *map(str, words)]) == 0
    figures = json.loads((tmp_path / "run" / "val_metrics.json").read_text())
    assert ("pq" if content.get("task") == "masks" else "miou") in figures


RELEASED = {
    "faster_rcnn_r50": 47_480_744,
    "faster_rcnn_r101": 66_680_552,
    "mask_rcnn_r50": 50_124_024,
    "mask_rcnn_r101": 69_116_152,
    "panoptic_fpn_r50": 51_753_774,
    "panoptic_fpn_r101": 70_746_926,
    "mask2former_r50": 44_301_549,
    "mask2former_swin_b": 107_235_493,
    "mask2former_swin_l": 215_802_081,
    "segnext_t": 4_520_794,
}
"""Parameters of the released networks; of SegNeXt and Mask2Former with 150 classes and 100 queries."""
IN_THE_FUSIONS = 313_302
"""Parameters that FreqFusion adds to every released Mask2Former."""


def parameters(network: torch.nn.Module) -> int:
    """Without batch norms, which are frozen buffers in the released Mask2Former, and Swin's unused last norm."""
    others = (".swin.layernorm.", ".normalization.") if "Mask2Former" in type(network).__name__ else ()
    return sum(
        x.numel() for name, x in network.named_parameters() if not any(part in name for part in others)
    )


def released_recipes() -> list[Any]:
    """Those whose head says so of the network, and not of its schedule alone."""
    found = []
    for path in RECIPES:
        if path.stem.endswith("_freqfusion"):
            head = " ".join(path.read_text().split("# Target: ")[0].replace("\n#", "").split())
            network, setting = head.split("Setting:")
            applied = setting.startswith(" released FreqFusion configuration for SegNeXt-T: ")
            if "as released" in network or applied:
                found.append(pytest.param(path, id=f"{path.parent.name}-{path.stem}"))
    return found


def test_the_recipes_as_released_are_found() -> None:
    assert len(released_recipes()) == 16


@pytest.mark.parametrize("path", released_recipes())
def test_a_recipe_as_released_builds_the_released_network(path: Path, monkeypatch) -> None:
    # parameters are counted without values, which upgrade_ refuses
    monkeypatch.setattr("freqfusion.integrations.upgrade._check_values", lambda model: None)
    model = yaml.safe_load(path.read_text())["model"]
    name, options = model["network"], model.get("network_options", {})
    with torch.device("meta"):
        if name.startswith("mask2former"):
            pytest.importorskip("transformers")
            for own in ("frozen_norm", "checkpointing"):  # of training
                options.pop(own, None)
            network = build_host(name, 150, **options).to("meta")
            plain = parameters(network)
            upgrade_(network, "freqfusion", init="paper")
            assert parameters(network) - plain == IN_THE_FUSIONS
        elif name.startswith("segnext"):
            network = create_model(name, 150, **options)
        else:
            panoptic = name.startswith("panoptic")
            things = [True] * 80 + [False] * 53 if panoptic else None
            network = create_detector(name, 133 if panoptic else 80, things=things, **options)
    if name in RELEASED:
        more_queries = 2 * 256 * (options.get("num_queries", 100) - 100)
        assert parameters(network) == RELEASED[name] + more_queries


def test_frozen_norms_need_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from freqfusion.cli.main import main

    root = write_panoptic(write_panoptic(tmp_path), "val")
    options = json.dumps({**SMALL["mask2former_r"], "frozen_norm": True})
    words = ["--config", FOLDER / "coco" / "mask2former_r50_bilinear.yaml", "--data.root", root]
    words += ["--data.batch_size", 2, "--out", tmp_path / "run", "--model.network_options", options]
    assert main(["fit", *map(str, words)]) == 1
    assert "frozen_norm is set, but no weights are given" in capsys.readouterr().err


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
