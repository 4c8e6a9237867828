"""Runs that start from networks and weights that exist already, and what their checkpoints need afterwards."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from freqfusion import create_model, save_pretrained
from freqfusion.cli.main import main
from freqfusion.tasks import SegmentationModule
from freqfusion.tasks.base import compare_classes
from freqfusion.training import load_checkpoint
from freqfusion.zoo import ModelSpec
from tiny_objects import write_coco

QUIET = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--data.workers", "0"]
SYNTHETIC = ["--data.dataset", "synthetic", "--data.dataset_options", '{"length": 2, "size": [32, 48]}']
DETECTOR: dict[str, Any] = {"channels": 32, "head_channels": 32, "min_size": 64, "max_size": 96}


def modes_in_training(monkeypatch: pytest.MonkeyPatch, module_class: Any, words: list[str]) -> list[bool]:
    """Whether each part of the network is in training mode when a step is made."""
    modes: list[bool] = []
    step = module_class.training_step

    def watched(self: Any, batch: Any, batch_idx: int) -> Any:
        modes.extend(part.training for part in self.network.modules())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(module_class, "training_step", watched)
    assert main(["fit", *words]) == 0
    assert len(modes) > 10
    return modes


def test_a_saved_segmenter_is_trained_in_training_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(create_model("fpn_small", 8, fusion="bilinear"), tmp_path / "saved")
    words = ["--model.network", str(tmp_path / "saved"), "--out", str(tmp_path / "run")]
    words += [*SYNTHETIC, *QUIET, "--data.batch_size", "2", "--data.crop_size", "[32,48]"]
    assert all(modes_in_training(monkeypatch, SegmentationModule, words))


def test_a_saved_detector_is_judged_and_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By ``--checkpoint FOLDER`` and by the name FOLDER, as the pages say."""
    data = write_coco(write_coco(tmp_path / "data"), "val")
    torch.manual_seed(0)
    network: Any = create_model("faster_rcnn_r18", 2, "freqfusion", **DETECTOR)
    save_pretrained(network, tmp_path / "saved", classes=("disc", "block"))
    words = ["--data.dataset", "coco", "--data.root", str(data), "--data.workers", "0"]
    words += ["--trainer.accelerator", "cpu"]
    name = str(tmp_path / "saved")
    results = []
    for out, given in (
        ("a", ["--checkpoint", str(tmp_path / "saved")]),
        ("b", ["--task", "detection", "--model.network", name]),
    ):
        assert main(["test", *given, *words, "--out", str(tmp_path / out)]) == 0
        results.append(json.loads((tmp_path / out / "test_metrics.json").read_text()))
    assert results[0] == results[1]
    assert 0 <= results[0]["box_ap"] < 1

    fit = ["fit", "--task", "detection", "--model.network", name, *words, "--trainer.max_steps", "1"]
    fit += ["--data.short_sides", "[64]", "--data.batch_size", "2", "--out", str(tmp_path / "run")]
    assert main(fit) == 0
    shutil.rmtree(tmp_path / "saved")
    module, classes, _ = load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert classes == ("disc", "block")
    assert not torch.equal(
        module.network.state_dict()["rpn.head.conv.0.0.weight"], network.rpn.head.conv[0][0].weight
    )

    # the same categories, numbered the other way round
    content = json.loads((data / "instances_val.json").read_text())
    content["categories"] = [{"id": 3, "name": "block"}, {"id": 7, "name": "disc"}]
    (data / "instances_val.json").write_text(json.dumps(content))
    (data / "instances_train.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["test", "--checkpoint", str(tmp_path / "run" / "last.ckpt"), "--data.workers", "0"]) == 2
    assert "class 0 is 'disc' to the network and 'block' in the data" in capsys.readouterr().err


def test_a_model_of_transformers_is_rebuilt_as_its_weights_were(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=8,
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "hub")
    words = [
        "--model.network",
        "transformers:SegformerForSemanticSegmentation",
        "--out",
        str(tmp_path / "run"),
    ]
    words += ["--model.weights", str(tmp_path / "hub"), *SYNTHETIC, *QUIET, "--data.batch_size", "2"]
    assert main(["fit", *words, "--data.crop_size", "[32,48]"]) == 0
    shutil.rmtree(tmp_path / "hub")
    module: Any = load_checkpoint(tmp_path / "run" / "last.ckpt")[0]
    built = module.network.host.config
    assert built.hidden_sizes == [8, 16, 24, 32]
    assert built.num_attention_heads == [1, 1, 2, 2]


def test_a_spec_names_no_weights() -> None:
    spec = ModelSpec.parse("smp:Unet?encoder_name=resnet18&encoder_weights=imagenet").without_outside()
    assert str(spec) == "smp:Unet?encoder_name=resnet18"
    spec = ModelSpec("torchvision:fasterrcnn_resnet50_fpn", {"weights_backbone": "DEFAULT"}).without_outside()
    assert spec.options == {}


def test_classes_of_other_names_and_orders() -> None:
    compare_classes(["a", "b"], ["a", "b"])
    with pytest.warns(UserWarning, match="class 1 is 'b' to the network and 'c' in the data; 1 of 2 names"):
        compare_classes(["a", "b"], ["a", "c"])
    with pytest.raises(ValueError, match="class 0 is 'a' to the network and 'b' in the data, and so on"):
        compare_classes(["a", "b"], ["b", "a"])


def test_a_detector_with_frozen_norms_of_its_start_weights_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the backbone decide on its norms; the checkpoint needs neither them nor a connection."""
    import torchvision
    from torchvision.models._api import WeightsEnum

    state = torchvision.models.resnet50(weights=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: state)
    data = write_coco(write_coco(tmp_path / "data"), "val")
    options = json.dumps({"weights_backbone": "DEFAULT", "min_size": 64, "max_size": 96})
    words = ["--task", "detection", "--model.network", "torchvision:fasterrcnn_resnet50_fpn"]
    words += ["--model.network_options", options, "--data.dataset", "coco", "--data.root", str(data), *QUIET]
    words += ["--data.short_sides", "[64]", "--data.batch_size", "2", "--out", str(tmp_path / "run")]
    assert main(["fit", *words]) == 0
    monkeypatch.undo()
    module: Any = load_checkpoint(tmp_path / "run" / "last.ckpt")[0]
    assert type(module.network.host.backbone.body.bn1).__name__ == "FrozenBatchNorm2d"
