"""The public contract checks: a good method passes, each broken promise is named."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion import FusedFeatures, Fusion
from freqfusion.fusion import catalog
from freqfusion.testing import check_fusion

PAGE = Path(__file__).parents[1] / "docs" / "add-a-fusion-method.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_METHODS", dict(catalog._METHODS))
    monkeypatch.syspath_prepend(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "own_fusion_method.py").write_text(code, encoding="utf-8")
    importlib.import_module("own_fusion_method")
    assert "guided" in catalog.list_fusions()


class Upsample(Fusion):
    def __init__(self, hr_channels: int, lr_channels: int) -> None:
        super().__init__(hr_channels, lr_channels)
        self.project = nn.Conv2d(lr_channels, lr_channels, 1)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        up = F.interpolate(self.project(lr_feat), size=hr_feat.shape[-2:], mode="nearest")
        return FusedFeatures(None, hr_feat, up)


class OnlyDoubles(Upsample):
    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        return FusedFeatures(
            None, hr_feat, F.interpolate(self.project(lr_feat), scale_factor=2.0, mode="nearest")
        )


class UnusedParameter(Upsample):
    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        up = F.interpolate(lr_feat, size=hr_feat.shape[-2:], mode="nearest")
        return FusedFeatures(None, hr_feat, up)


class NotANumber(Upsample):
    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        fused = super().fuse(hr_feat, lr_feat)
        return FusedFeatures(fused.lowpass_kernel, fused.hr_feat, fused.lr_feat / torch.zeros(()))


class ForgetsItsState(Upsample):
    def __init__(self, hr_channels: int, lr_channels: int) -> None:
        super().__init__(hr_channels, lr_channels)
        self.factor = torch.rand(())

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        fused = super().fuse(hr_feat, lr_feat)
        return FusedFeatures(fused.lowpass_kernel, fused.hr_feat, fused.lr_feat * (1 + self.factor))


class BreaksTheGraph(Upsample):
    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        torch._dynamo.graph_break()
        return super().fuse(hr_feat, lr_feat)


def test_a_good_method_passes() -> None:
    check_fusion(Upsample, 4, 6)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (OnlyDoubles, AssertionError, r"\(27, 33\) from \(14, 17\): lr_feat has shape \(2, 6, 28, 34\)"),
        (UnusedParameter, AssertionError, "the gradient of project.weight is missing"),
        (NotANumber, AssertionError, "lr_feat is not finite"),
        (ForgetsItsState, AssertionError, "load_state_dict: lr_feat differs"),
        (BreaksTheGraph, Exception, "graph_break"),
    ],
)
def test_broken_promises_are_named(method: type[Fusion], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_fusion(method, 4, 6)
