"""Images are normalised as the network's backbone says, wherever a network meets them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from freqfusion import create_model, from_pretrained, save_pretrained
from freqfusion.cli.main import main
from freqfusion.data.normalisation import IMAGENET, Normalisation
from freqfusion.export import export_onnx
from freqfusion.models import TimmEncoder
from freqfusion.models.base import normalisation_of
from freqfusion.training import load_checkpoint
from freqfusion.weights.files import load_plain

timm = pytest.importorskip("timm")
pytest.importorskip("lightning")

HALF = Normalisation((0.5,) * 3, (0.5,) * 3)
COLOUR = (255, 0, 51)
"""Of every pixel of the pictures, so that whatever is cropped, flipped or resized keeps it."""
VIT = "fpn_vit_tiny_patch16_224"
OPTIONS: dict[str, Any] = {"channels": 8, "backbone_options": {"depth": 1, "embed_dim": 32, "num_heads": 2}}


def entering(normalisation: Normalisation) -> list[float]:
    """What a pixel of the pictures is to a network."""
    return [(value / 255 - mean) / std for value, mean, std in zip(COLOUR, *normalisation, strict=True)]


@pytest.fixture
def seen() -> Iterator[list[Tensor]]:
    """The images that encoders of timm get from here on."""
    images: list[Tensor] = []

    def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, TimmEncoder):
            images.append(arguments[0].detach())

    hook = register_module_forward_pre_hook(watch)
    yield images
    hook.remove()


def check(seen: list[Tensor], normalisation: Normalisation = HALF) -> None:
    assert seen
    expected = torch.tensor(entering(normalisation))[:, None, None]
    for images in seen:
        torch.testing.assert_close(images, expected.expand_as(images), atol=1e-6, rtol=0)
    seen.clear()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "classes.txt").write_text("left\nright\n")
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 24:] = 1
    for name in "abc":
        Image.new("RGB", (48, 32), COLOUR).save(root / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    return root


def fit(out: Path, root: Path, network: str, *words: str) -> None:
    options = [f"--model.network_options={json.dumps(OPTIONS)}"] if "vit_" in network else []
    settings = "--model.fusion=bilinear --model.warmup_steps=0 --data.dataset=folder --data.crop_size=[16,24]"
    loading = f"--data.photometric=false --data.batch_size=2 --data.workers=0 --data.root={root}"
    trainer = "--trainer.accelerator=cpu --trainer.enable_progress_bar=false"
    line = [
        f"--model.network={network}",
        *options,
        *f"{settings} {loading} {trainer}".split(),
        f"--out={out}",
    ]
    assert main(["fit", *line, *words]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    out = tmp_path_factory.mktemp("run") / "vit"
    fit(out, root, VIT, "--trainer.max_steps=1")
    return out


@pytest.mark.filterwarnings("ignore:.*split")
def test_training_and_judging(root: Path, tmp_path: Path, seen: list[Tensor]) -> None:
    fit(tmp_path, root, "unet_tf_efficientnet_lite0", "--trainer.max_steps=1")
    assert {len(images) for images in seen} == {2, 1}  # a training batch, and images that are judged
    check(seen)
    for command in ("validate", "test"):
        assert (
            main([command, "--checkpoint", str(tmp_path / "best.ckpt"), "--out", str(tmp_path / command)])
            == 0
        )
        check(seen)


def test_prediction(run: Path, root: Path, tmp_path: Path, seen: list[Tensor]) -> None:
    words = ["--checkpoint", str(run / "best.ckpt"), "--out", str(tmp_path)]
    assert main(["predict", str(root / "images"), *words]) == 0
    check(seen)


def test_prediction_in_tiles(run: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Tensor]) -> None:
    from freqfusion.prediction import pixels

    for name, value in (("LARGE_PIXELS", 100), ("TILE", 32), ("MARGIN", 8)):
        monkeypatch.setattr(pixels, name, value)
    image = torch.tensor(COLOUR, dtype=torch.uint8)[:, None, None].expand(3, 40, 70)
    pixels.predict_mask(load_checkpoint(run / "best.ckpt")[0].network, image)
    assert len(seen) == 6
    check(seen)


def test_analysis_of_a_checkpoint_and_of_a_folder(
    run: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Tensor]
) -> None:
    for page in ("analysis.page", "drawing.page_parts"):
        monkeypatch.setattr(f"freqfusion.{page}.figure_bytes", lambda *args, **options: b"drawn")
    save_pretrained(load_checkpoint(run / "best.ckpt")[0].network, tmp_path / "saved")
    words = ["--data.root", str(root), "--out", str(tmp_path / "out"), "--limit", "2"]
    for path in (run / "best.ckpt", tmp_path / "saved"):
        assert main(["analyze", "--checkpoint", str(path), *words]) == 0
        check(seen)


def test_pages_that_compare_networks_of_different_normalisations(
    run: Path, root: Path, tmp_path: Path, seen: list[Tensor]
) -> None:
    from freqfusion.comparison.pictures import draw_pictures
    from freqfusion.comparison.runs import compare_runs

    fit(tmp_path / "small", root, "fpn_mobilenetv3_small_050", "--trainer.max_steps=1")
    check(seen, IMAGENET)
    draw_pictures(compare_runs([run, tmp_path / "small"]))
    images = len(seen) // 2
    of_one = {"vit": seen[:images], "small": seen[images:]}
    means = {name: float(images[0][0, 0].mean()) for name, images in of_one.items()}
    assert sorted(means.values()) == pytest.approx(sorted(entering(x)[0] for x in (HALF, IMAGENET)))
    first = HALF if float(seen[0][0, 0].mean()) == pytest.approx(1) else IMAGENET
    rest = seen[images:]
    check(seen[:images], first)
    check(rest, IMAGENET if first == HALF else HALF)


def test_exported_files_say_it(run: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    report = export_onnx(load_checkpoint(run / "best.ckpt")[0].network, tmp_path / "m.onnx", (32, 48))
    (entry,) = onnx.load(tmp_path / "m.onnx").metadata_props
    assert json.loads(entry.value)["normalisation"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert "images in [0, 1], minus the mean 0.5, 0.5, 0.5, divided by the deviation 0.5, 0.5, 0.5" in str(
        report
    )


def test_a_checkpoint_keeps_it_and_without_one_means_imagenet(
    run: Path, root: Path, tmp_path: Path, seen: list[Tensor]
) -> None:
    """Judged, predicted with, started from and gone on with, as before networks had a normalisation of their own."""
    content = load_plain(run / "last.ckpt")
    network = content["hyper_parameters"]["network"]
    assert network["settings"] == {"normalisation": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    assert load_checkpoint(run / "last.ckpt")[0].network.normalisation == HALF
    assert create_model(VIT, 2, "bilinear", weights=run / "last.ckpt", **OPTIONS).normalisation == HALF

    del network["settings"]
    old = tmp_path / "run" / "last.ckpt"
    old.parent.mkdir()
    torch.save(content, old)
    assert load_checkpoint(old)[0].network.normalisation == IMAGENET
    assert create_model(VIT, 2, "bilinear", weights=old, **OPTIONS).normalisation == IMAGENET
    assert main(["validate", "--checkpoint", str(old), "--out", str(tmp_path / "val")]) == 0
    check(seen, IMAGENET)
    fit(old.parent, root, VIT, "--trainer.max_steps=2", f"--checkpoint={old}")
    check(seen, IMAGENET)
    assert load_checkpoint(old)[0].network.normalisation == IMAGENET

    network["settings"] = {"normalisation": {"mean": [0.5] * 3, "std": [0.5, 0.5, 0.0]}}
    torch.save(content, old)
    with pytest.raises(ValueError, match=r"normalisation\.std is \[0\.5, 0\.5, 0\.0\]"):
        load_checkpoint(old)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (VIT, OPTIONS),
        ("smp:Unet?encoder_name=tu-tf_efficientnet_lite0", {}),
        ("faster_rcnn_tf_efficientnet_lite0", {"channels": 32, "fusion_options": {}}),
    ],
)
def test_saved_folders_keep_it_and_without_one_mean_imagenet(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    if name.startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch")
    model = create_model(name, 2, "bilinear", **options)
    assert model.normalisation == HALF
    folder = save_pretrained(model, tmp_path)
    assert normalisation_of(from_pretrained(folder)) == create_model(folder).normalisation == HALF
    file = folder / "freqfusion.json"
    content = json.loads(file.read_text())
    del content["settings"]["normalisation"]
    file.write_text(json.dumps(content))
    assert normalisation_of(from_pretrained(folder)) == create_model(folder).normalisation == IMAGENET
    started = create_model(name, 2, "bilinear", weights=folder, **options)
    assert started.normalisation == IMAGENET
    for wrong in (
        {"mean": [0.5] * 3},
        {"mean": [0.5] * 2, "std": [0.5] * 2},
        {"mean": ["0.5"] * 3, "std": [1] * 3},
    ):
        file.write_text(json.dumps(content | {"settings": {"normalisation": wrong}}))
        with pytest.raises(ValueError, match="was changed: normalisation is"):
            from_pretrained(folder)


def test_detectors_normalise_images_themselves(seen: list[Tensor]) -> None:
    model = create_model("faster_rcnn_tf_efficientnet_lite0", 2, "bilinear", channels=32, min_size=64).eval()
    image = (torch.tensor(COLOUR) / 255)[:, None, None].expand(3, 64, 64)
    model.find([image])
    check(seen)


def test_mask_classifiers_normalise_objects_images_themselves() -> None:
    pytest.importorskip("transformers")
    from tiny_masks import TINY

    model = create_model("mask2former_swin_t", 2, "bilinear", **TINY).eval()
    images: list[Tensor] = []
    model.host.register_forward_pre_hook(lambda module, args: images.append(args[0]))
    embed = model.host.model.pixel_level_module.encoder
    embed.register_forward_pre_hook(
        lambda module, args, kwargs: images.append((args or [*kwargs.values()])[0]), with_kwargs=True
    )
    image = (torch.tensor(COLOUR) / 255)[:, None, None].expand(3, 64, 64)
    for normalisation in (IMAGENET, HALF):
        model.normalisation = normalisation
        model.find([image])
        check(images, normalisation)


def test_the_weights_that_a_network_starts_from_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag of timm whose weights want other images than the network's first ones."""
    create = timm.create_model
    asked = []

    def stand_in(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append(name) if pretrained else None
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", stand_in)
    name = "fpn_vit_small_patch16_224"
    assert create_model(name, 2, "bilinear").normalisation == HALF
    assert create_model(name, 2, "bilinear", backbone_weights="timm").normalisation == HALF
    assert create_model(name, 2, "bilinear", backbone_weights="timm:dino").normalisation == IMAGENET
    assert asked == ["vit_small_patch16_224", "vit_small_patch16_224.dino"]
    torch.save(create_model(VIT, 2, "bilinear", **OPTIONS).state_dict(), tmp_path / "bare.pth")
    assert create_model(VIT, 2, "bilinear", weights=tmp_path / "bare.pth", **OPTIONS).normalisation == HALF


def test_a_folder_of_transformers_says_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=2
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    name = "transformers:SegformerForSemanticSegmentation"
    assert create_model(name, 2, "bilinear", weights=tmp_path).normalisation == IMAGENET
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    model = create_model(name, 2, "bilinear", weights=tmp_path)
    assert model.normalisation == HALF
    assert create_model(save_pretrained(model, tmp_path / "again")).normalisation == HALF


@pytest.mark.parametrize(
    "name", ["fpn_small", "fpn_resnet18", "unet_convnext_atto", "segnext_t", "faster_rcnn_r18"]
)
def test_most_networks_want_imagenet(name: str) -> None:
    model = create_model(name, 2, "bilinear")
    assert model.normalisation == IMAGENET
