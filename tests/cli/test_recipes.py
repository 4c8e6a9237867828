"""Recipes by name: found from any folder, listed, printed, and the run folders that follow from them."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

import freqfusion
from freqfusion.cli._recipes import find_recipe, list_recipes, read_recipe
from freqfusion.cli.main import main


def test_they_are_in_the_package() -> None:
    package = Path(freqfusion.__file__).parent
    recipes = list_recipes()
    assert len(recipes) > 20
    assert all(package in path.parents for path in recipes.values())


def test_the_list_has_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "task", "network", "data", "set"]
    assert [line.split()[0] for line in lines] == list(list_recipes())
    assert ["coco/mask2former", "masks", "mask2former_r50", "coco_panoptic"] in [
        line.split() for line in lines
    ]


@pytest.mark.parametrize("name", ["ade20k/segnext", "ade20k/segnext.yaml"])
def test_a_recipe_is_printed(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["recipes", name]) == 0
    text = capsys.readouterr().out
    assert text == list_recipes()["ade20k/segnext"].read_text(encoding="utf-8")
    assert yaml.safe_load(text)["model"]["network"] == "segnext_t"


def test_the_list_needs_no_torch() -> None:
    code = """
import sys
from freqfusion.cli.main import main
codes = main(["recipes"]), main(["recipes", "camvid/segnext"])
print(codes, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "(0, 0) False"


def test_without_yaml_the_install_line_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["recipes"]) == 2
    assert 'python -m pip install "freqfusion[train]"' in capsys.readouterr().err


WRONG = [
    ("ade20k/segnxt", "did you mean ade20k/segnext"),
    ("ade20k/segnext_t_freqfusion", "did you mean ade20k/segnext"),
    ("segnext", "there is no recipe segnext"),
    ("../recipes/ade20k/segnext", "there is no recipe ../recipes"),
    ("ade20k/../ade20k/segnext", "there is no recipe ade20k/.."),
    ("../cli/main", "there is no recipe ../cli/main"),
    ("ade20k", "there is no recipe ade20k"),
    ("", "there is no recipe"),
]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "compare", "recipes"])
@pytest.mark.parametrize("name, message", WRONG)
def test_an_unknown_name_gets_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, *(["--config"] if command != "recipes" else []), name]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"freqfusion {command}: error: ")
    assert err.count("\n") == 1
    assert message in err or (not name and "names nothing" in err)
    assert not list(tmp_path.iterdir())


def test_a_file_wins_over_a_name_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ade20k" / "segnext").mkdir(parents=True)
    assert find_recipe("ade20k/segnext") == list_recipes()["ade20k/segnext"]
    own = tmp_path / "ade20k" / "segnext.yaml"
    own.write_text("model: {network: fpn_small}\n")
    assert find_recipe("ade20k/segnext") == list_recipes()["ade20k/segnext"]
    assert read_recipe(find_recipe("ade20k/segnext.yaml")) == {"model": {"network": "fpn_small"}}


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch, command: str = "fit"):
    from freqfusion.cli._lightning import CommandLine

    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda line: None)
    return CommandLine(command, "", words)


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    "option", [["--config", "coco/mask_rcnn"], ["--config=coco/mask_rcnn"], ["-c", "coco/mask_rcnn"]]
)
def test_a_name_decides_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, option: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = parse(option, monkeypatch, command)
    assert line.task == "detection"
    assert line.config["model.network"] == "mask_rcnn_r50"
    assert line.out == Path("runs/coco/mask_rcnn/mask_rcnn_r50_freqfusion")


def test_a_race_finds_its_recipe_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", "compare/camvid", "--methods", "bilinear", "--data.root", "none"]
    assert main(["compare", *words]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert main(["compare", *words, "-c", "ade20k/segnext"]) == 2
    assert "-c is set for every run by the race itself" in capsys.readouterr().err


def test_pages_and_helps_name_recipes_and_folders_that_exist() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("src/freqfusion/cli/*.py")]
    recipes, found = list_recipes(), 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"--config ([\w/]+/\w+)", text):
            found += 1
            assert name in recipes, (page, name)
        for name in re.findall(r"runs/(\w+/\w+)/\w+_freqfusion/", text):
            found += 1
            assert name in recipes, (page, name)
    assert found > 20


def test_the_words_of_the_line_win_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model.network", "segformer_b5", "--data.batch_size=3", "--config", "ade20k/segformer"]
    line = parse(words, monkeypatch)
    assert line.config["model.network"] == "segformer_b5"
    assert line.config["data.batch_size"] == 3
    assert line.config["model.test_size"] == 640


VARIANTS = """\
model: {network: fpn_small, fusion: bilinear, lr: 1e-3, network_options: {channels: 8}}
data: {batch_size: 2}
variants:
  fpn_*: {model: {network_options: {fusion_options: {a: 1e-2}}}}
  "*_carafe": {data: {batch_size: 4}, seed_everything: 7}
  fpn_small_carafe: {data: {batch_size: 6, crop_size: [8, 8]}}
"""


def test_variants_come_over_the_recipe_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(VARIANTS)
    plain = parse(["--config", str(recipe)], monkeypatch).config
    assert plain["model.network_options"] == {"channels": 8, "fusion_options": {"a": 0.01}}
    assert (plain["data.batch_size"], plain["seed_everything"], plain["model.lr"]) == (2, 0, 0.001)
    carafe = parse(["--config", str(recipe), "--model.fusion", "carafe"], monkeypatch).config
    assert (carafe["data.batch_size"], carafe["seed_everything"], carafe["data.crop_size"]) == (6, 7, (8, 8))
    words = ["--model.fusion", "carafe", "--data.batch_size", "5", "--model.network_options", "null"]
    own = parse(["--config", str(recipe), *words], monkeypatch).config
    assert (own["data.batch_size"], own["model.network_options"]) == (5, None)
    other = parse(["--config", str(recipe), "--model", "{network: segnext_t, fusion: carafe}"], monkeypatch)
    assert (other.config["data.batch_size"], other.out.name) == (4, "segnext_t_carafe")


@pytest.mark.parametrize(
    "variants, message",
    [
        ("[1]", "variants is '[1]'"),
        ("{a: 1}", "variants is"),
        ("{'*': {model: 3}}", "model is '3'"),
        ("{'*': {modle: {lr: 1}}}", "modle"),
    ],
)
def test_variants_of_another_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], variants: str, message: str
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"model: {{network: fpn_small}}\nvariants: {variants}\n")
    assert main(["fit", "--config", str(recipe), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_print_config_prints_the_variant(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "ade20k/segformer", "--model.network", "segformer_b5", "--print_config"]
    assert main(["fit", *words]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["test_size"], printed["data"]["crop_size"]) == (640, [640, 640])
    assert "variants" not in printed


def test_a_folder_in_place_of_a_network_needs_to_say_which_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "freqfusion.json").write_text("{}")
    folder = ["--model.network", str(mine), "--model.network_options", "null"]
    assert main(["test", "--config", "ade20k/mask2former", *folder]) == 2
    assert f"name it first: --model.network NAME --model.network {mine}" in capsys.readouterr().err
    words = ["--config", "ade20k/mask2former", "--model.network", "mask2former_swin_b", *folder]
    line = parse(words, monkeypatch, "test")
    assert (line.config["model.network"], line.config["model.test_size"]) == (str(mine), 640)
    assert line.out == Path("runs/ade20k/mask2former/mine_freqfusion")
    # here the networks differ in their own options alone, and a folder has none
    line = parse(["--config", "coco/faster_rcnn", *folder], monkeypatch, "test")
    assert line.config["model.network_options"] is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_recipe_may_come_through_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("model: {network: fpn_small}\n",))
    writer.start()
    line = parse(["--config", str(pipe), "--out", str(tmp_path / "run")], monkeypatch)
    writer.join()
    assert line.config["model.network"] == "fpn_small"
    # every run of a race would wait for its own
    assert main(["compare", "--config", str(pipe)]) == 2
    assert "is not a file" in capsys.readouterr().err


TINY = """\
model: {network: fpn_small, fusion: bilinear, lr: 1.0e-3}
data:
  dataset_options: {length: 4, size: [32, 32]}
  crop_size: [32, 32]
  batch_size: 2
  workers: 0
trainer: {max_epochs: 1, accelerator: cpu}
variants:
  "*_carafe": {model: {lr: 2.0e-3}}
"""


def test_a_run_is_found_again_by_the_words_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tiny.yaml").write_text(TINY)
    plain = ["fit", "--config", "mine/tiny.yaml"]
    carafe = [*plain, "--model.fusion", "carafe"]
    assert main(plain) == 0
    assert main(carafe) == 0
    folder = tmp_path / "runs" / "mine" / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == ["fpn_small_bilinear", "fpn_small_carafe"]
    saved = yaml.safe_load((folder / "fpn_small_carafe" / "config.yaml").read_text())
    assert saved["model"]["lr"] == 0.002
    assert "variants" not in saved
    # the same line again is refused, with --resume it goes on in its own folder
    assert main(carafe) == 2
    assert "fpn_small_carafe already holds a run" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in (folder / "fpn_small_bilinear").iterdir()}
    (folder / "fpn_small_carafe" / "val_metrics.json").unlink()
    assert main([*carafe, "--resume"]) == 0
    assert f"run folder {Path('runs', 'mine', 'tiny', 'fpn_small_carafe')}" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "fpn_small_bilinear").iterdir()}
    run = folder / "fpn_small_carafe"
    # a checkpoint brings all settings itself
    assert main(["validate", "--checkpoint", str(run / "last.ckpt"), "--data.workers", "0"]) == 0
    # its settings come from the run, without the recipe's words too
    assert parse(["--resume", "--out", str(run)], monkeypatch).config["model.lr"] == 0.002


def test_networks_of_other_libraries_get_a_folder_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config", "camvid/segnext", "--model.network", "smp:Unet?encoder_name=resnet34"]
    out = parse(words, monkeypatch).out
    assert out == Path("runs/camvid/segnext/smp_Unet_encoder_name_resnet34_freqfusion")
    assert parse([], monkeypatch).out == Path("runs/synthetic/segnext_t_freqfusion")
