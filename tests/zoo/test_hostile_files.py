"""Files that somebody else wrote: nothing of them runs code, opens a connection or a file elsewhere, or takes long.

What a file asks for is watched with an audit hook, which sees every connection and every file that Python opens.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from freqfusion import create_model, from_pretrained, save_pretrained
from freqfusion.cli.main import main
from freqfusion.weights.backbones import load_backbone_
from freqfusion.zoo.official import convert_official

pytest.importorskip("safetensors")
pytest.importorskip("lightning")

URL = "http://127.0.0.1:9/weights.pth"
OUTSIDE = "../../../../etc/passwd"
QUICK = 20
"""Seconds, on a busy machine."""

_seen: list[str] = []
_watching: list[Path] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
        _seen.append(f"{event} {args[1:]}")
    elif event == "open" and isinstance(args[0], (str, bytes)):
        path = Path(os.fsdecode(args[0])).resolve()
        if path == Path("/etc/passwd") or "bait" in path.name:
            _seen.append(f"open {path}")


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a file beside it that is not to be opened; fails if anything outside was asked for."""
    if not _watching:
        sys.addaudithook(_audit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    torch.save({"x": torch.zeros(1)}, tmp_path / "bait.pth")
    (tmp_path / "bait.py").write_text("raise SystemExit('this ran')")
    _seen.clear()
    _watching.append(tmp_path)
    yield tmp_path
    _watching.clear()
    assert not [entry for entry in _seen if not entry.startswith("allowed")]


def full_name(source: str, name: str) -> str:
    return name if source == "freqfusion" else f"{source}:{name}"


def folder(where: Path, **spec: Any) -> Path:
    """A saved network whose JSON says that it is made otherwise."""
    _watching.clear()
    path = save_pretrained(create_model("fpn_small", 2, "bilinear", channels=16), where / "saved")
    content = json.loads((path / "freqfusion.json").read_text())
    content["spec"] |= spec
    (path / "freqfusion.json").write_text(json.dumps(content))
    _watching.append(where)
    return path


HUB_KERNEL = "kernels-community/flash-attn2"
DETECTOR = {"num_classes": 2, "things": None}
REACHING: list[tuple[str, str, dict[str, Any], str]] = [
    *(
        ("freqfusion", "segnext_t", {"num_classes": 2, "backbone_weights": place}, "backbone_weights")
        for place in (URL, OUTSIDE, "/etc/passwd", "bait.pth", "timm")
    ),
    *(
        ("freqfusion", "faster_rcnn_r18", {**DETECTOR, "backbone_weights": place}, "backbone_weights")
        for place in (URL, "bait.pth", "torchvision:IMAGENET1K_V1", "timm:resnet18.a1_in1k")
    ),
    ("freqfusion", "unet_resnet18", {"num_classes": 2, "pretrained": True}, "pretrained"),
    (
        "freqfusion",
        "unet_resnet18",
        {"num_classes": 2, "backbone_options": {"pretrained_cfg": {"url": URL}}},
        "pretrained_cfg",
    ),
    (
        "freqfusion",
        "unet_resnet18",
        {"num_classes": 2, "backbone_options": {"checkpoint_path": "bait.pth"}},
        "checkpoint_path",
    ),
    ("freqfusion", "unet_hf-hub:someone/net", {"num_classes": 2}, "code that is not run"),
    ("freqfusion", "unet_local-dir:/etc", {"num_classes": 2}, "code that is not run"),
    ("torchvision", "fasterrcnn_resnet50_fpn", {"weights": "DEFAULT"}, "weights"),
    ("torchvision", "fasterrcnn_resnet50_fpn", {"weights_backbone": "IMAGENET1K_V1"}, "weights_backbone"),
    ("torchvision", "fasterrcnn_resnet50_fpn", {"weights": 1}, "weights"),
    ("smp", "Unet", {"encoder_weights": "imagenet"}, "encoder_weights"),
    ("transformers", "SegformerForSemanticSegmentation", {"num_labels": 2_000_000}, "num_labels"),
    ("monai", "FlexibleUNet", {"in_channels": 3, "out_channels": 2, "pretrained": 1}, "pretrained"),
    ("smp", "Unet", {"encoder_name": "tu-hf-hub:someone/net"}, "encoder_name"),
    ("smp", "Unet", {"encoder_name": "tu-local-dir:/etc"}, "encoder_name"),
    *(
        ("transformers", "SegformerForSemanticSegmentation", {name: kernel}, name)
        for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
        for kernel in (HUB_KERNEL, "flash_attention_2")
    ),
    (
        "transformers",
        "Mask2FormerForUniversalSegmentation",
        {"backbone_config": {"model_type": "swin", "attn_implementation": HUB_KERNEL}},
        "attn_implementation",
    ),
    (
        "transformers",
        "UperNetForSemanticSegmentation",
        {"backbone": "microsoft/resnet-50", "use_timm_backbone": False},
        "backbone",
    ),
    (
        "transformers",
        "UperNetForSemanticSegmentation",
        {"backbone": "resnet50", "backbone_config": None},
        "backbone",
    ),
    (
        "transformers",
        "UperNetForSemanticSegmentation",
        {"backbone": "resnet50", "use_timm_backbone": True, "use_pretrained_backbone": True},
        "use_pretrained_backbone",
    ),
    (
        "transformers",
        "UperNetForSemanticSegmentation",
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:someone/net"}},
        "backbone",
    ),
    (
        "transformers",
        "SegformerForSemanticSegmentation",
        {"auto_map": {"AutoModel": "bait.Model"}},
        "auto_map",
    ),
    (
        "transformers",
        "SegformerForSemanticSegmentation",
        {"quantization_config": {"x": 1}},
        "quantization_config",
    ),
    ("monai", "FlexibleUNet", {"in_channels": 3, "out_channels": 2, "pretrained": True}, "pretrained"),
    ("ultralytics", "../bait.yaml", {}, "plain name"),
    ("os", "system", {"command": "touch bait"}, "code that is not run"),
    ("bait.py", "make", {}, "code that is not run"),
]


@pytest.mark.parametrize("source, name, arguments, named", REACHING, ids=str)
def test_a_folder_cannot_reach_out(
    watched: Path, source: str, name: str, arguments: dict[str, Any], named: str
) -> None:
    saved = folder(watched, name=full_name(source, name), options=arguments)
    with pytest.raises(ValueError, match=r"freqfusion\.json") as caught:
        from_pretrained(saved)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["FCN", "Transchex"])
def test_a_constructor_that_downloads_by_itself_cannot(watched: Path, name: str) -> None:
    pytest.importorskip("monai")
    arguments = (
        {} if name == "FCN" else {"in_channels": 3, "img_size": [32, 32], "patch_size": 32, "num_classes": 2}
    )
    if name == "Transchex":
        pytest.importorskip("transformers")
        arguments |= {"num_language_layers": 1, "num_vision_layers": 1, "num_mixed_layers": 1}
    saved = folder(watched, source="monai", name=name, arguments=arguments)
    with pytest.raises((ValueError, ImportError)):
        from_pretrained(saved)
    _seen[:] = [
        entry for entry in _seen if "socket" not in entry or "connect" in entry
    ]  # refused before it is sent


def test_a_timm_backbone_without_start_weights_is_read(watched: Path) -> None:
    """What transformers itself writes of such a model."""
    transformers = pytest.importorskip("transformers")
    _watching.clear()
    config = transformers.UperNetConfig(
        backbone_config=transformers.TimmBackboneConfig(
            backbone="resnet18", out_indices=[1, 2, 3, 4], use_pretrained_backbone=False
        ),
        num_labels=2,
        hidden_size=16,
        use_auxiliary_head=False,
    )
    model = transformers.UperNetForSemanticSegmentation(config).eval()
    saved = save_pretrained(model, watched / "saved")
    _watching.append(watched)
    image = torch.rand(1, 3, 64, 64)
    again: Any = from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(again(image).logits, model(image).logits)


HUGE: list[tuple[str, str, dict[str, Any]]] = [
    ("freqfusion", "fpn_small", {"num_classes": 2, "channels": 10**9}),
    ("freqfusion", "fpn_small", {"num_classes": 2, "channels": 100_000}),
    ("freqfusion", "fpn_small", {"num_classes": 10**12}),
    ("freqfusion", "fpn_small", {"num_classes": 2, "fusion_options": {"lowpass_kernel": 99_999}}),
    ("freqfusion", "faster_rcnn_r18", {**DETECTOR, "head_channels": 2_000_000}),
    ("torchvision", "fasterrcnn_resnet50_fpn", {"num_classes": 10**6}),
    ("smp", "Unet", {"decoder_channels": [10**6, 10**5, 64, 32, 16]}),
    ("transformers", "SegformerForSemanticSegmentation", {"depths": [10**9, 1, 1, 1]}),
    (
        "transformers",
        "SegformerForSemanticSegmentation",
        {"depths": [10**6, 1, 1, 1], "hidden_sizes": [2, 2, 2, 2]},
    ),
    ("transformers", "SegformerForSemanticSegmentation", {"depths": [10**6] * 100}),
    ("monai", "BasicUNet", {"features": [10**6, 10**6, 64, 64, 64, 64]}),
]


@pytest.mark.parametrize("source, name, arguments", HUGE, ids=str)
def test_a_network_of_absurd_size_is_refused_at_once(
    watched: Path, source: str, name: str, arguments: dict[str, Any]
) -> None:
    if source in ("smp", "transformers", "monai"):
        pytest.importorskip({"smp": "segmentation_models_pytorch"}.get(source, source))
    saved = folder(watched, name=full_name(source, name), options=arguments)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"freqfusion\.json"):
        from_pretrained(saved)
    assert time.monotonic() - start < QUICK


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"format": 1, "spec": ' + "[" * 400 + "]" * 400 + "}",
        json.dumps({"format": 1, "more": ["x"] * 2**21}),
        '{"x": "' + "x" * 2**24 + '"}',
        '{"format": ' + "9" * 10_000 + "}",
        "\ufeff{",
        "\x00",
    ],
    ids=["deep", "less deep", "many", "long", "number", "mark", "zero"],
)
def test_json_of_absurd_depth_or_length(watched: Path, text: str) -> None:
    saved = folder(watched)
    (saved / "freqfusion.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"freqfusion\.json (is|has|nests|holds)"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"attributes": {"backbone.stages.0.0.0": {"forward": "x"}}}},
        {"settings": {"attributes": {"backbone.stages.0.0.0": {"_forward_hooks": {}}}}},
        {"settings": {"attributes": {"backbone.stages.0.0.0": {"kernel_size": [10**9, 1]}}}},
        {"settings": {"attributes": {"backbone.stages.0.0.0": {"padding_mode": "/etc/passwd"}}}},
        {"settings": {"attributes": {"nowhere": {"eps": 1.0}}}},
        {"settings": {"attributes": {"": 3}}},
        {"settings": {"frozen_norms": ["backbone.stages.0.0.0"]}},
        {"settings": {"frozen_norms": [{}]}},
        {"settings": {"frozen_norms": "x"}},
        {
            "upgrade": {
                "fusion": "freqfusion",
                "init": "paper",
                "options": {"compressed_channels": 10**7},
                "sites": [],
            }
        },
        {"upgrade": {"fusion": "os.system", "init": "paper", "options": {}, "sites": []}},
        {"upgrade": {"fusion": "carafe", "init": "paper", "options": {"weights": URL}, "sites": []}},
        {"upgrade": {"fusion": "carafe", "init": "paper", "options": {}, "sites": [3], "more": 1}},
    ],
    ids=str,
)
def test_settings_and_upgrades_that_do_not_fit(watched: Path, change: dict[str, Any]) -> None:
    saved = folder(watched)
    content = json.loads((saved / "freqfusion.json").read_text())
    if "upgrade" in change:
        content["spec"] |= change
    else:
        content |= change
    (saved / "freqfusion.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"freqfusion\.json|model\.safetensors") as caught:
        from_pretrained(saved)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 100, (2**62).to_bytes(8, "little") + b"{}", (9).to_bytes(8, "little") + b'{"a": 1}}'],
    ids=["empty", "other", "huge header", "no tensors"],
)
def test_damaged_safetensors_are_named(watched: Path, data: bytes) -> None:
    import hashlib

    saved = folder(watched)
    content = json.loads((saved / "freqfusion.json").read_text())
    (saved / "model.safetensors").write_bytes(data)
    content["sha256"] = hashlib.sha256(data).hexdigest()
    (saved / "freqfusion.json").write_text(json.dumps(content))
    for read in (from_pretrained, lambda path: convert_official(path / "model.safetensors", path / "out")):
        with pytest.raises(ValueError, match=r"model\.safetensors (is damaged|cannot be read)") as caught:
            read(saved)
        assert len(str(caught.value).splitlines()) == 1


# checkpoints of training


def checkpoint(where: Path, network: str = "fpn_small", **changes: Any) -> Path:
    """What ``fit`` writes, or what somebody made of it."""
    from freqfusion.tasks import SegmentationModule

    module = SegmentationModule("fpn_small", "bilinear", num_classes=2, network_options={"channels": 16})
    own = {"num_classes": 2, "fusion": "bilinear", "channels": 16}
    options = changes.pop("options", own if network == "fpn_small" else {})
    upgrade = changes.pop("upgrade", None)
    spec = {"name": network, "options": options, "upgrade": upgrade, "classes": None}
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {**module.hparams, "network": {"spec": spec}, "network_options": None},
        "datamodule_hyper_parameters": {},
        "classes": ["a", "b"],
        "palette": [[0, 0, 0], [9, 9, 9]],
        "task": "semantic",
        "loops": {},
        "pytorch-lightning_version": "2.5.0",
        "epoch": 0,
        "global_step": 1,
    }
    content["hyper_parameters"] |= changes.pop("model", {})
    path = where / "last.ckpt"
    torch.save(content | changes, path)
    return path


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def laughs(depth: int = 30) -> list[Any]:
    inner: list[Any] = ["ha"]
    for _ in range(depth):
        inner = [inner, inner]
    return inner


OF_TRAINING: list[dict[str, Any]] = [
    {"options": {"num_classes": 2, "backbone_weights": URL}, "network": "segnext_t"},
    {"options": {"num_classes": 2, "backbone_weights": OUTSIDE}, "network": "segnext_t"},
    {"options": {"num_classes": 2, "weights": "someone/net"}, "network": "segformer_b0"},
    {"options": {"num_classes": 2, "pretrained": True}, "network": "unet_resnet18"},
    {
        "options": {"num_classes": 2, "backbone_options": {"checkpoint_path": "bait.pth"}},
        "network": "unet_resnet18",
    },
    {"options": {"encoder_weights": "imagenet"}, "network": "smp:Unet"},
    {"options": {"encoder_name": "tu-hf-hub:someone/net"}, "network": "smp:Unet"},
    {"options": {"num_classes": 2, "attn_implementation": HUB_KERNEL}, "network": "segformer_b0"},
    {"network": "someone/net"},
    {"network": "bait.py:make"},
    {"network": "bait:make"},
    {"options": {"command": "touch bait"}, "network": "os:system"},
    {"options": {"repo_or_dir": "someone/net"}, "network": "torch.hub:load"},
    {"options": {"num_classes": 2, "channels": 100_000}},
    {"options": {"num_classes": 2, "channels": nested(100)}},
    {"options": {"num_classes": 2, "channels": laughs()}},
    {"upgrade": {"fusion": "carafe", "init": "paper", "options": {"weights": URL}, "sites": []}},
    {"upgrade": {"fusion": "carafe"}},
    {"model": {"network": "fpn_small"}},
    {"model": {"network": {}}},
    {"model": {"network_options": {"weights": URL}}},
    {"model": {"weights": URL}},
    {"model": {"backbone_weights": "bait.pth"}},
    {"classes": ["x"] * 100_000, "palette": [[0, 0, 0]] * 100_000},
    {"classes": 3},
    {"palette": [1, 2]},
    {"state_dict": {"a": "b"}},
    {"state_dict": {}},
    {"hyper_parameters": []},
    {"model": {"nonsense": 1}},
    {"task": "nonsense"},
]


@pytest.mark.parametrize("changes", OF_TRAINING, ids=range(len(OF_TRAINING)))
def test_a_checkpoint_cannot_reach_out(watched: Path, changes: dict[str, Any]) -> None:
    from freqfusion.training import load_checkpoint

    path = checkpoint(watched, **changes)
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert time.monotonic() - start < QUICK
    assert len(str(caught.value).splitlines()) == 1
    assert "last.ckpt" in str(caught.value) or "nonsense" in str(caught.value)


@pytest.mark.parametrize(
    "changes", [OF_TRAINING[i] for i in (0, 9, 13, 14)], ids=["address", "code", "huge", "deep"]
)
@pytest.mark.parametrize("command", ["predict", "test", "validate", "export", "analyze", "fit"])
def test_no_command_lets_a_checkpoint_reach_out(
    watched: Path, command: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = watched / "run"
    run.mkdir()
    path = checkpoint(run, **changes)
    (watched / "photos").mkdir()
    words = {
        "predict": ["photos", "--checkpoint", path, "--out", "out"],
        "export": [path, "--to", "out.onnx", "--size", "32x32"],
        "analyze": [path, "photos", "--out", "out"],
        "fit": ["--out", run, "--resume", "--data.dataset", "synthetic", "--model.network", "fpn_small"],
    }.get(command, ["--checkpoint", path, "--data.dataset", "synthetic"])
    if command == "predict":
        from PIL import Image

        Image.new("RGB", (32, 32)).save(watched / "photos" / "a.png")
    try:
        code = main([command, *map(str, words)])
    finally:
        said = capsys.readouterr().err
    assert code != 0
    lines = [line for line in said.splitlines() if ": error: " in line]
    assert len(lines) == 1, said
    assert "Traceback" not in said


def test_a_damaged_checkpoint_is_one_line(watched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors of other shapes, to each command that fills a network with them."""
    path = checkpoint(watched)
    content = torch.load(path, weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = torch.zeros(3)
    torch.save(content, path)
    words = ["--data.dataset", "synthetic", "--model.network", "fpn_small", "--model.fusion", "bilinear"]
    words += [
        "--model.network_options",
        '{"channels": 16}',
        "--model.num_classes",
        "2",
        "--trainer.accelerator",
        "cpu",
    ]
    words += ["--data.dataset_options", '{"length": 2, "size": [32, 48]}']
    for argv in (["test", "--checkpoint", path], ["test", "--checkpoint", path, *words]):
        assert main([str(word) for word in argv]) != 0
        said = capsys.readouterr().err
        assert f"1 of another shape: {name} (3,) instead of" in said or "classes" in said, said
        assert "Traceback" not in said


def test_a_network_of_ones_own_code_needs_a_word(watched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from freqfusion.training.checkpoints import read_checkpoint

    path = checkpoint(watched, network="nets.py:make", network_options={})
    with pytest.raises(
        ValueError, match=r"made by nets\.py:make, code that is not run .* add --import nets\.py"
    ):
        read_checkpoint(path)
    monkeypatch.setenv("FREQFUSION_IMPORT", "other,nets.py")
    assert read_checkpoint(path)["classes"] == ["a", "b"]


# official files, backbones, checkpoints of transformers


def claims(count: int) -> dict[str, torch.Tensor]:
    """A SegNeXt whose tensors are views of one number."""
    state = create_model("segnext_t", 3).state_dict()
    state["decode_head.conv_seg.weight"] = torch.zeros(1).expand(count, 256, 1, 1)
    return {**state, "decode_head.conv_seg.bias": torch.zeros(1).expand(count)}


def test_an_official_file_cannot_claim_more_than_it_holds(watched: Path) -> None:
    torch.save(claims(10**9), watched / "huge.pth")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"huge\.pth claims .* numbers, more than it has bytes"):
        convert_official(watched / "huge.pth", watched / "out")
    assert time.monotonic() - start < QUICK


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("this-ran",)


def test_no_reader_of_weights_runs_code(watched: Path) -> None:
    torch.save({"state_dict": {"x": torch.zeros(1)}, "note": Payload()}, watched / "evil.pth")
    backbone = create_model("segnext_t", 2).backbone
    for read in (
        lambda path: convert_official(path, watched / "out"),
        lambda path: load_backbone_(backbone, path),
    ):
        with pytest.raises(ValueError, match="which could run code"):
            read(watched / "evil.pth")
    assert main(["convert", "evil.pth", "--to", "out"]) == 2
    assert main(["predict", "bait.py", "--checkpoint", "evil.pth", "--out", "out"]) == 2
    assert not (watched / "this-ran").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn_implementation": HUB_KERNEL}, "attn_implementation"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "bait.Model"}}, "auto_map"),
    ],
)
def test_a_checkpoint_of_transformers_cannot_reach_out(
    watched: Path, change: dict[str, Any], message: str
) -> None:
    transformers = pytest.importorskip("transformers")
    _watching.clear()
    small = {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 1, 1], "decoder_hidden_size": 16}
    config = transformers.SegformerConfig(**small, num_labels=2)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(watched / "theirs")
    _watching.append(watched)
    path = watched / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        create_model("transformers:SegformerForSemanticSegmentation", 2, weights=watched / "theirs")


@pytest.mark.parametrize("file", [OUTSIDE, "/etc/passwd", "../bait.pth", 3])
def test_an_index_names_files_of_its_folder(watched: Path, file: Any) -> None:
    transformers = pytest.importorskip("transformers")
    (watched / "theirs").mkdir()
    config = transformers.SegformerConfig(num_labels=2)
    config.save_pretrained(watched / "theirs")
    index = {"metadata": {}, "weight_map": {"decode_head.classifier.bias": file}}
    (watched / "theirs" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json names the file"):
        create_model("transformers:SegformerForSemanticSegmentation", 2, weights=watched / "theirs")
