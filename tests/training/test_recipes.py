"""Every recipe parses with every network that it offers, says where it comes from, and starts."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import tiny_masks
from freqfusion import create_model, list_models
from freqfusion.cli._recipes import choose_variant, list_recipes, read_recipe
from freqfusion.features import list_upsamplers
from freqfusion.fusion import list_fusions
from freqfusion.upgrade import upgrade_
from support import build_host
from tiny_objects import write_panoptic

DATASETS = {"bccd": "coco", "nuclei": "coco", "synthetic": "synthetic_panoptic"}
"""The readers of those folders that are not called after one."""
RECIPES = list_recipes()
RACES = [name for name in RECIPES if name.startswith("compare/")]
OF_FEATURES = [name for name in RECIPES if name.startswith("features/")]


class Case(NamedTuple):
    """One network and fusion method in a recipe."""

    recipe: str
    network: str
    fusion: str

    def __str__(self) -> str:
        return "-".join(self).replace("/", "-")

    @property
    def words(self) -> list[str]:
        return [
            *("--config", self.recipe),
            *("--model.network", self.network),
            *("--model.fusion", self.fusion),
        ]

    @property
    def settings(self) -> dict[str, Any]:
        return choose_variant(read_recipe(RECIPES[self.recipe]), f"{self.network}_{self.fusion}")


def offered(recipe: str) -> list[str]:
    """The networks of a recipe: all sizes and backbones where it is of a published data set."""
    data, system = recipe.split("/")
    if (
        data not in ("ade20k", "cityscapes", "coco") or system == "vit_freqfusion"
    ):  # of timm, too many to list
        return [read_recipe(RECIPES[recipe])["model"]["network"]]
    return [name for name in [*list_models()] if name.startswith(f"{system}_")]


CASES = [
    Case(recipe, network, fusion)
    for recipe in RECIPES
    if recipe not in (*RACES, *OF_FEATURES)
    for network in offered(recipe)
    for fusion in ("nearest" if "rcnn" in recipe or "fpn" in recipe else "bilinear", "freqfusion")
]


def test_all_are_there():
    assert set(RECIPES) == {
        *(f"ade20k/{system}" for system in ("segnext", "segformer", "upernet", "mask2former")),
        *(f"cityscapes/{system}" for system in ("segnext", "segformer", "upernet", "mask2former")),
        *("ade20k/vit_freqfusion", "camvid/vit_freqfusion"),
        *(f"camvid/{system}" for system in ("segnext", "segformer", "upernet", "mask2former")),
        *(f"coco/{system}" for system in ("faster_rcnn", "mask_rcnn", "panoptic_fpn", "mask2former")),
        *("bccd/faster_rcnn", "drive/unet", "nuclei/mask_rcnn", "nuclei/unet"),
        *("synthetic/mask2former", "synthetic/panoptic_fpn", "compare/camvid", "compare/nuclei"),
        *("bccd/faster_rcnn_lite0", "nuclei/mask_rcnn_lite0", "nuclei/unet_lite0"),
        *("features/naf", "features/jafar"),
    }
    networks = {case.network for case in CASES if case.recipe.startswith(("ade20k", "coco"))}
    assert networks >= {
        *(f"segnext_{size}" for size in "tsbl"),
        *(f"segformer_b{size}" for size in range(6)),
        *(f"upernet_swin_{size}" for size in "tsb"),
        *(f"mask2former_{backbone}" for backbone in ("r50", "r101", "swin_t", "swin_b", "swin_l")),
        *(f"{kind}_{r}" for kind in ("faster_rcnn", "mask_rcnn", "panoptic_fpn") for r in ("r50", "r101")),
    }


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Path]:
    """The settings and the run folder, with all checks, but without data and network."""
    from freqfusion.cli._lightning import CommandLine

    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda line: None)
    line = CommandLine("fit", "", words)
    return json.loads(json.dumps(line.config.as_dict(), default=str)), line.out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recipe(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    built, out = parse(case.words, monkeypatch)
    assert out == Path("runs") / case.recipe / f"{case.network}_{case.fusion}"
    folder, system = case.recipe.split("/")
    panoptic = folder == "coco" and system in ("panoptic_fpn", "mask2former")
    expected = DATASETS.get(folder, f"{folder}_panoptic" if panoptic else folder)
    assert built["data"]["dataset"] == ("foreground" if "nuclei/unet" in case.recipe else expected)
    assert (built["model"]["network"], built["model"]["fusion"]) == (case.network, case.fusion)
    of_timm = case.network.startswith("fpn_vit_") or case.network.endswith("_tf_efficientnet_lite0")
    assert of_timm or case.network in [*list_models(), "unet_resnet18"]
    assert case.fusion in list_fusions()
    assert built["trainer"]["max_epochs"] or built["trainer"]["max_steps"] > 0


@pytest.mark.parametrize("recipe", OF_FEATURES)
def test_recipe_of_features(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built, out = parse(["--config", recipe], monkeypatch)
    upsampler = recipe.split("/")[1]
    assert (built["model"]["encoder"], built["model"]["upsampler"]) == ("vit_small_patch14_dinov2", upsampler)
    assert out == Path("runs") / recipe / f"vit_small_patch14_dinov2_{upsampler}"
    assert upsampler in list_upsamplers()
    assert all(side % 28 == 0 for side in built["data"]["crop_size"])  # patches of 14, of half the image too
    assert built["trainer"]["max_steps"] > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_where_it_comes_from(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = RECIPES[recipe]
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if "#" in line]
    assert len(comments) <= 3
    text = " ".join(line.removeprefix("# ") for line in comments)
    assert "Settings of " in text
    pages = re.findall(r"docs/[\w/-]+\.md", text)
    assert pages
    assert all((DOCS.parent / page).is_file() for page in pages)
    if recipe not in (*RACES, *OF_FEATURES):
        assert read_recipe(path)["model"]["fusion"] == "freqfusion"


SIXTEEN = [320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024, 1088, 1152, 1216, 1280]


@pytest.mark.parametrize(
    "recipe, network, fusion, expected",
    [
        (
            "ade20k/segformer",
            "segformer_b4",
            "bilinear",
            {"data.crop_size": [512, 512], "model.test_size": 512},
        ),
        (
            *("ade20k/segformer", "segformer_b5", "bilinear"),
            {"data.crop_size": [640, 640], "data.base_size": [640, 2048], "model.test_size": 640},
        ),
        (
            *("ade20k/mask2former", "mask2former_r50", "freqfusion"),
            {"model.network_options": {"frozen_norm": True}, "trainer.sync_batchnorm": False},
        ),
        (
            *("ade20k/mask2former", "mask2former_r101", "bilinear"),
            {"model.network_options": None, "trainer.sync_batchnorm": True, "model.test_size": 512},
        ),
        (
            *("ade20k/mask2former", "mask2former_swin_t", "freqfusion"),
            {"model.network_options": None, "trainer.sync_batchnorm": False, "data.max_size": 2048},
        ),
        (
            *("ade20k/mask2former", "mask2former_swin_b", "freqfusion"),
            {"data.crop_size": [640, 640], "data.short_sides": SIXTEEN, "data.max_size": 2560},
        ),
        (
            *("ade20k/mask2former", "mask2former_swin_l", "bilinear"),
            {"model.test_size": 640, "model.test_max_size": 2560, "trainer.sync_batchnorm": False},
        ),
        ("cityscapes/mask2former", "mask2former_r101", "bilinear", {"trainer.sync_batchnorm": True}),
        ("cityscapes/mask2former", "mask2former_swin_t", "bilinear", {"trainer.sync_batchnorm": False}),
        (
            *("coco/mask2former", "mask2former_r101", "freqfusion"),
            {"model.network_options": {"frozen_norm": True}, "trainer.max_steps": 368750},
        ),
        (
            *("coco/mask2former", "mask2former_swin_b", "freqfusion"),
            {"model.network_options": None, "trainer.max_steps": 368750},
        ),
        (
            *("coco/mask2former", "mask2former_swin_l", "bilinear"),
            {"model.network_options": {"num_queries": 200}, "trainer.max_steps": 737500},
        ),
    ],
)
def test_what_differs_between_networks(
    recipe: str, network: str, fusion: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, _ = parse(Case(recipe, network, fusion).words, monkeypatch)
    assert {key: built[key.split(".")[0]][key.split(".")[1]] for key in expected} == expected


def test_every_variant_is_of_some_network() -> None:
    for recipe, path in RECIPES.items():
        names = [f"{case.network}_{case.fusion}" for case in CASES if case.recipe == recipe]
        for pattern in read_recipe(path).get("variants", {}):
            assert any(fnmatchcase(name, pattern) for name in names), (recipe, pattern)


FROZEN = {"frozen_stages": 1, "norm_eval": True}


@pytest.mark.parametrize(
    "recipe, network, fusion, expected",
    [
        ("coco/faster_rcnn", "faster_rcnn_r50", "nearest", {}),
        ("coco/faster_rcnn", "faster_rcnn_r101", "dysample+", {}),
        ("coco/faster_rcnn", "faster_rcnn_r50", "freqfusion", {"top_level": "fused"}),
        (
            *("coco/faster_rcnn", "faster_rcnn_r101", "freqfusion"),
            {"top_level": "fused", "fusion_options": {"feature_resample_group": 8}},
        ),
        ("coco/mask_rcnn", "mask_rcnn_r101", "nearest", {}),
        ("coco/mask_rcnn", "mask_rcnn_r101", "freqfusion", {"top_level": "fused"}),
        (
            *("coco/panoptic_fpn", "panoptic_fpn_r50", "freqfusion"),
            {"top_level": "fused", "fusion_options": {"feature_resample_norm": False}},
        ),
        ("coco/panoptic_fpn", "panoptic_fpn_r50", "nearest", {}),
        ("coco/panoptic_fpn", "panoptic_fpn_r101", "freqfusion", {"top_level": "fused"}),
    ],
)
def test_pyramids_as_released_come_with_freqfusion_alone(
    recipe: str, network: str, fusion: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, _ = parse(Case(recipe, network, fusion).words, monkeypatch)
    assert built["model"]["network_options"] == {"backbone_options": FROZEN, **expected}


DOCS = Path(__file__).parents[2] / "docs"


class Row(NamedTuple):
    """A row of the page of published figures."""

    recipe: str
    network: str
    plain: str
    freqfusion: str
    released: str


def published() -> list[Row]:
    """The table of figures, a row per network of a recipe."""
    text = (DOCS / "published.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+/\w+)` \| `(\w+)` \|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)
    return [Row(*(cell.strip() for cell in row)) for row in rows]


def test_every_network_of_a_recipe_has_a_row_of_published_figures() -> None:
    rows = [(row.recipe, row.network) for row in published()]
    assert len(rows) == len(set(rows))
    assert set(rows) == {(case.recipe, case.network) for case in CASES}
    for recipe in (recipe for recipe in RECIPES if recipe.startswith(("ade20k", "cityscapes", "coco"))):
        assert (DOCS / "published.md").read_text(encoding="utf-8").count(f"`{recipe}`") > len(offered(recipe))


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
    """Every row of those tables."""
    rows = []
    for kind in ("faster_rcnn", "mask_rcnn", "panoptic_fpn"):
        for backbone, others in (("r50", PUBLISHED), ("r101", ("dysample+",))):
            for fusion in ("nearest", "freqfusion", *others):
                common = backbone == "r50" and fusion not in others
                case = Case(f"coco/{kind}", f"{kind}_{backbone}", fusion)
                rows.append(pytest.param(case, id=str(case), marks=[] if common else [pytest.mark.slow]))
    return rows


@pytest.mark.parametrize("case", coco_rows())
def test_a_row_of_the_papers_tables_starts(case: Case, tmp_path: Path) -> None:
    """One step and a validation, at the network's full width, on small pictures in COCO's layout."""
    from freqfusion.cli.main import main

    for split in ("train", "val"):
        write_panoptic(tmp_path, split, 2)
    options = case.settings["model"]["network_options"]
    options |= {"min_size": 64, "max_size": 96, "backbone_options": {}}
    words = [*case.words, "--model.network_options", json.dumps(options)]
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
    assert ("pq" in figures) == case.network.startswith("panoptic")
    assert ("mask_ap" in figures) == case.network.startswith("mask")


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
    "upernet_convnext": {
        "hidden_size": 16,
        "auxiliary_in_channels": 64,
        "backbone_config": {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]},
    },
    "upernet": {"hidden_size": 16, "auxiliary_in_channels": 64, "backbone_config": SMALL_SWIN},
    "unet": {},
}
"""What makes a network small, by the beginning of its name."""


def host_cases() -> list[Any]:
    """All of models of other libraries and of U-Nets, small; in full as well where that is asked for."""
    cases = [case for case in CASES if case.network.startswith(tuple(SMALL))]
    return [
        pytest.param(case, full, id=f"{case}{'-full' * full}", marks=marks)
        for full, marks in ((False, ()), (True, pytest.mark.slow))
        for case in cases
    ]


@pytest.mark.parametrize("case, full", host_cases())
def test_a_host_recipe_starts(case: Case, full: bool, tmp_path: Path) -> None:
    """One step and a validation on small pictures, with the recipe's own schedule, precision and augmentation."""
    pytest.importorskip("transformers")
    from freqfusion.cli.main import main

    content = case.settings
    options = content["model"].get("network_options", {})
    if "frozen_norm" in options:
        options["frozen_norm"] = False  # there are no weights
    if not full:
        options |= next(small for name, small in SMALL.items() if case.network.startswith(name))
    words = [*case.words, "--data.batch_size", 2, "--data.workers", 0, "--out", tmp_path / "run"]
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


def released_cases() -> list[Any]:
    """Those that the page of published figures says so of."""
    cases = [
        (Case(row.recipe, row.network, "freqfusion"), row.released) for row in published() if row.released
    ]
    return [pytest.param(case, released, id=str(case)) for case, released in cases]


def test_the_recipes_as_released_are_found() -> None:
    assert len(released_cases()) == 16
    counts = [row.released.removeprefix("yes").lstrip(", ") for row in published() if row.released]
    assert sum(map(bool, counts)) == 9


@pytest.mark.parametrize("case, released", released_cases())
def test_a_recipe_as_released_builds_the_released_network(case: Case, released: str, monkeypatch) -> None:
    # parameters are counted without values, which upgrade_ refuses
    monkeypatch.setattr("freqfusion.upgrade.core._check_values", lambda model: None)
    model = {**case.settings["model"], "network": case.network}
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
            network = create_model(name, 133 if panoptic else 80, things=things, **options)
    if name in RELEASED:
        more_queries = 2 * 256 * (options.get("num_queries", 100) - 100)
        assert parameters(network) == RELEASED[name] + more_queries
    assert released in ("yes", f"yes, {RELEASED.get(name, 0):,}")


def test_frozen_norms_need_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from freqfusion.cli.main import main

    root = write_panoptic(write_panoptic(tmp_path), "val")
    options = json.dumps({**SMALL["mask2former_r"], "frozen_norm": True})
    words = [*Case("coco/mask2former", "mask2former_r50", "bilinear").words, "--data.root", root]
    words += ["--data.batch_size", 2, "--out", tmp_path / "run", "--model.network_options", options]
    assert main(["fit", *map(str, words)]) == 2
    assert "frozen_norm is set, but no weights are given" in capsys.readouterr().err


def test_frozen_stages_need_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from freqfusion.cli.main import main

    root = write_panoptic(write_panoptic(tmp_path), "val")
    words = [*Case("coco/faster_rcnn", "faster_rcnn_r50", "nearest").words]
    words += ["--data.root", root, "--out", tmp_path]
    assert main(["fit", *map(str, words), "--data.batch_size", "2"]) == 2
    assert "no weights are given, so random ones would be kept" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RACES)
def test_race(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built, _ = parse(["--config", recipe, "--model.fusion", "carafe"], monkeypatch)
    assert built["model"]["fusion"] == "carafe"
    assert "fusion" not in read_recipe(RECIPES[recipe])["model"]
    # a race counts the last validation, so that must come at the end
    assert built["trainer"]["max_epochs"] % built["trainer"]["check_val_every_n_epoch"] == 0


@pytest.mark.parametrize("fusion", ["bilinear", "freqfusion"])
def test_the_small_recipe_builds(fusion):
    from freqfusion.tasks import SegmentationModule

    options = {**Case("camvid/segnext", "segnext_t", fusion).settings["model"], "fusion": fusion}
    module = SegmentationModule(num_classes=11, **options).eval()
    assert module.predict(torch.zeros(1, 3, 45, 60)).shape == (1, 11, 45, 60)
