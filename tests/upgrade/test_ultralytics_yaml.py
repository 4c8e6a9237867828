import subprocess
import sys
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from freqfusion.fusion import CARAFE, DySample, FreqFusion

pytest.importorskip("ultralytics")

from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.nn.tasks import DetectionModel

from freqfusion.export import export_onnx
from freqfusion.upgrade.hosts import ultralytics as host
from host_cases.ultralytics import config, write_data, yolo

pytestmark = pytest.mark.ultralytics

EXAMPLES = Path(__file__).parents[2] / "examples" / "yolo"
DETECT = [[9, 12], 1, "Detect", ["nc"]]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "parse_model", tasks.parse_model)
    host.register()
    host.register()


def test_another_package_may_wrap_the_parser_too(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = wraps(tasks.parse_model.__wrapped__)(lambda *args, **options: None)
    monkeypatch.setattr(tasks, "parse_model", theirs)
    host.register()
    assert tasks.parse_model.__wrapped__ is theirs


def described(upper: list[Any] | None = None) -> dict[str, Any]:
    """FreqFusion in the lower level, ``upper`` or nothing new in the other."""
    network = config(DETECT)
    network["head"][3:5] = [[-1, 1, "nn.Identity", []], [[-1, 1], 1, "FreqFusionUp", []]]
    if upper is not None:
        network["head"][0] = upper
    return network


def build(network: dict[str, Any]) -> Any:
    return DetectionModel(network, verbose=False).eval()


def test_channels_come_from_the_layers_before() -> None:
    carafe, joined = (build(described([-1, 1, "CARAFE", [{"up_kernel": 3}]])).model[i] for i in (4, 8))
    assert isinstance(carafe.fusion, CARAFE)
    assert (carafe.fusion.lr_channels, carafe.fusion.up_kernel) == (64, 3)
    assert isinstance(joined.fusion, FreqFusion)
    assert (joined.fusion.lr_channels, joined.fusion.hr_channels) == (32, 16)
    assert (joined.i, joined.f, joined.type) == (8, [-1, 1], "FreqFusionUp")
    assert joined.np == sum(x.numel() for x in joined.parameters())


@pytest.mark.parametrize("word", ["DySample", "dysample", "dy-sample"])
def test_spelling_is_free(word: str) -> None:
    assert isinstance(build(described([-1, 1, word, []])).model[4].fusion, DySample)


@torch.no_grad()
def test_a_fusion_is_a_concatenation_in_the_order_of_its_inputs() -> None:
    layer = build(described()).model[8]
    coarse, fine = torch.rand(2, 32, 5, 7), torch.rand(2, 16, 9, 14)
    _, fused_fine, fused_coarse = layer.fusion(fine, coarse)
    assert torch.equal(layer([coarse, fine]), torch.cat((fused_coarse, fused_fine), dim=1))


@pytest.mark.parametrize(
    "row, message",
    [
        ([-1, 2, "CARAFE", []], "layer 4, CARAFE: expected"),
        ([-1, 1, "CARAFE", [2]], "layer 4, CARAFE: expected"),
        ([-1, 1, "FreqFusion", []], r"write \[\[coarse, fine\], 1, FreqFusionUp"),
        ([[-1, 2], 1, "CARAFE", []], "CARAFEUp for"),
        ([-1, 1, "FreqFusionUp", []], "got 1 inputs"),
    ],
)
def test_wrong_rows_are_named(row: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(described(row))
    with pytest.raises(TypeError, match="layer 4, CARAFE"):
        build(described([-1, 1, "CARAFE", [{"kernel": 3}]]))


def test_rows_of_others_and_the_description_stay() -> None:
    network = described()
    model = build(network)
    assert model.yaml["head"][4] == [[-1, 1], 1, "FreqFusionUp", []]
    with pytest.raises(KeyError, match="Nobody"):
        build(described([-1, 1, "Nobody", []]))
    other = yolo()
    assert [type(x) for x in other.model] == [type(x) for x in build(config(DETECT)).model]


def test_weights_are_found_at_other_numbers() -> None:
    stock, shorter = yolo(), described()
    del shorter["head"][3]  # without the layer that keeps the numbers
    shorter["head"][3][0], shorter["head"][6][0] = [-1, 1], [-1, 6]
    shorter["head"][-1] = [[8, 11], 1, "Detect", ["nc"]]
    shorter["nc"] = 4
    model = build(shorter)
    report = host.transfer_weights(model, stock)
    left = [key for key, value in stock.model[13].state_dict().items() if value.shape[:1] == (3,)]
    assert report.left == tuple(f"13.{key}" for key in left) != ()
    assert report.total == len(stock.state_dict())
    assert str(report).startswith(f"{report.total - len(left)} of {report.total} tensors\n  left out: 13.")
    assert torch.equal(model.model[8].cv1.conv.weight, stock.model[9].cv1.conv.weight)


@pytest.mark.parametrize(
    "version, tensors", [("yolov8", 355), ("yolo11", 499), ("yolo12", 691), ("yolo26", 708)]
)
def test_examples_take_all_weights_of_the_stock_network(version: str, tensors: int) -> None:
    model, stock = YOLO(EXAMPLES / f"{version}n-freqfusion.yaml"), YOLO(f"{version}n.yaml")
    assert str(host.transfer_weights(model, stock)) == f"{tensors} of {tensors} tensors"
    own = model.model.state_dict()
    for key, value in stock.model.state_dict().items():
        assert torch.equal(own[key], value), key
    assert sum(isinstance(x, FreqFusion) for x in model.model.modules()) == 2


@pytest.mark.filterwarnings("ignore")
def test_training_validation_prediction_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "net.yaml"
    file.write_text(yaml.safe_dump(described([-1, 1, "CARAFE", []])))
    options: dict[str, Any] = {"data": write_data(tmp_path), "imgsz": 64, "device": "cpu", "plots": False}
    training = {"epochs": 1, "batch": 2, "optimizer": "SGD", "warmup_epochs": 0, "project": str(tmp_path)}
    threads = torch.get_num_threads()
    wrapper = YOLO(file)
    stock = yolo()
    for parameter in stock.parameters():
        nn.init.constant_(parameter, 0.01)
    host.transfer_weights(wrapper, stock)
    try:
        wrapper.train(**options, **training, name="first", lr0=1e-6, workers=1)
        assert (wrapper.model.model[9].cv1.conv.weight.float() - 0.01).abs().max() < 1e-4  # not built anew
        assert wrapper.val(**options, workers=0).box.maps.shape == (3,)
        assert len(wrapper.predict(torch.rand(2, 3, 64, 96), device="cpu", verbose=False)) == 2
        for kind in ("onnx", "torchscript"):
            with pytest.raises(RuntimeError, match=r"freqfusion\.export\.export_onnx") as refusal:
                wrapper.export(format=kind, imgsz=64)
            assert len(str(refusal.value).splitlines()) <= 2
        export_onnx(wrapper.model, tmp_path / "net.onnx", (64, 96))
        code = f"""
from ultralytics import YOLO
wrapper = YOLO("first/weights/last.pt")
wrapper.train(**{options}, **{training}, name="second", workers=0)
print(type(wrapper.model.model[8]).__name__, type(wrapper.model.model[4]).__name__)
"""
        again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert again.stdout.splitlines()[-1] == "FusionUp UpsampleTwice"
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
