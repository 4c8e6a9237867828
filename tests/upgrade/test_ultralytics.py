from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from freqfusion import find_sites, upgrade_
from freqfusion.fusion import CARAFE, FreqFusion
from freqfusion.upgrade import FusionSlot, Gate

pytest.importorskip("ultralytics")

from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.modules import Concat

from freqfusion.upgrade.hosts.ultralytics import UpgradeTrainer
from host_cases.ultralytics import config, write_data, yolo

pytestmark = pytest.mark.ultralytics

DETECT = [[9, 12], 1, "Detect", ["nc"]]


def network() -> nn.Module:
    return yolo().eval()


def fusions_of(model: nn.Module) -> list[nn.Module]:
    return [module.fusion for module in model.modules() if isinstance(module, FusionSlot)]


def test_only_a_concat_after_an_upsample_is_a_site() -> None:
    sites = find_sites(network())
    assert [(site.path, site.hr_channels, site.lr_channels) for site in sites] == [
        ("model.5.fusions.0", 32, 64),
        ("model.8.fusions.1", 16, 32),
    ]
    assert find_sites(nn.Sequential(Concat(), nn.Upsample(scale_factor=2))) == []
    assert find_sites(Concat()) == []


@pytest.mark.parametrize(
    "enlarger, reason",
    [
        (nn.Upsample(scale_factor=2, mode="bilinear"), "cannot recover the coarse map"),
        (nn.Upsample(scale_factor=4), "cannot recover the coarse map"),
        (nn.ConvTranspose2d(64, 64, 2, 2), "learned weights"),
    ],
)
def test_other_ways_to_enlarge_are_skipped(enlarger: Any, reason: str) -> None:
    model = network()
    enlarger.i, enlarger.f, enlarger.type = 4, -1, "of a test"
    model.model[4] = enlarger
    assert reason in find_sites(model)[0].skipped


def test_what_comes_after_an_unknown_layer_is_skipped() -> None:
    class Guided(nn.Module):
        def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return x * text

    model = network()
    guided = Guided()
    guided.i, guided.f, guided.type = 6, -1, "Guided"
    model.model[6] = guided
    first, second = find_sites(model)
    assert not first.skipped
    assert "layer 6 (Guided)" in second.skipped


def test_finding_sites_changes_nothing() -> None:
    model = network().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_sites(model)
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@torch.no_grad()
def test_fused_convolutions_before_or_after() -> None:
    image = torch.rand(1, 3, 64, 64)
    model = network()
    expected = model.fuse(verbose=False)(image)[0]
    torch.testing.assert_close(upgrade_(model)(image)[0], expected)
    model = upgrade_(network())
    model.load_state_dict(network().state_dict(), strict=False)
    assert len(fusions_of(model.fuse(verbose=False))) == 2
    assert torch.isfinite(model(image)[0]).all()


def test_the_wrapper_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "net.yaml"
    file.write_text(yaml.safe_dump(config(DETECT)))
    wrapper = YOLO(str(file))
    with pytest.raises(ValueError, match="its attribute model"):
        upgrade_(wrapper)
    assert len(fusions_of(upgrade_(wrapper.model))) == 2


class _Trainer:
    """What a trainer of ultralytics does when it makes its network."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        model = yolo()
        if weights:
            model.load(weights, verbose=False)
        return model


def test_the_trainer_upgrades_what_it_builds() -> None:
    class Trainer(UpgradeTrainer, _Trainer):
        fusion = "carafe"
        options = {"up_kernel": 3}  # noqa: RUF012

    model = Trainer().get_model(cfg={}, weights=None)
    assert all(isinstance(fusion, CARAFE) and fusion.up_kernel == 3 for fusion in fusions_of(model))
    assert len(fusions_of(model)) == 2


@torch.no_grad()
def test_the_trainer_keeps_an_upgrade_and_its_weights() -> None:
    class Trainer(UpgradeTrainer, _Trainer):
        fusion = "carafe"

    start = upgrade_(yolo(), init="paper", filter_fn=lambda site: site.path.startswith("model.8.")).eval()
    for parameter in start.parameters():
        parameter.add_(0.01)
    model = Trainer().get_model(weights=start).eval()
    assert [type(fusion) for fusion in fusions_of(model)] == [FreqFusion]
    assert model.freqfusion_upgrade == start.freqfusion_upgrade
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(image)[0], start(image)[0])


class Trainer(UpgradeTrainer, DetectionTrainer):
    """At the top of the module, since a checkpoint names it."""


@pytest.fixture
def _settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_settings")
def test_training_for_an_epoch(tmp_path: Path) -> None:
    file = tmp_path / "net.yaml"
    file.write_text(yaml.safe_dump(config(DETECT)))
    options: dict[str, Any] = {
        "data": write_data(tmp_path),
        "epochs": 1,
        "imgsz": 64,
        "batch": 2,
        "workers": 0,
        "device": "cpu",
        "project": str(tmp_path),
        "plots": False,
        "optimizer": "SGD",
        "lr0": 0.1,
        "warmup_epochs": 0,
        "verbose": False,
    }
    wrapper = YOLO(str(file))
    wrapper.train(trainer=Trainer, name="first", **options)
    trained = YOLO(tmp_path / "first/weights/last.pt").model
    gates = [module.weight for module in trained.modules() if isinstance(module, Gate)]
    assert len(gates) == 4
    assert all(gate.abs().max() > 0 for gate in gates)
    assert wrapper.predict(torch.rand(1, 3, 64, 64), device="cpu", verbose=False)

    again = YOLO(tmp_path / "first/weights/last.pt")  # the trainer goes on with what is there
    again.train(trainer=Trainer, name="second", **options | {"lr0": 0.0, "optimizer": "SGD"})
    for key, value in again.model.state_dict().items():
        if ".fusions." in key:
            torch.testing.assert_close(value, trained.state_dict()[key], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_export_through_torchscript_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrapper = YOLO("yolo11n.yaml")
    upgrade_(wrapper.model)
    with pytest.raises(RuntimeError, match=r"freqfusion\.export"):
        wrapper.export(format="torchscript", imgsz=64)
