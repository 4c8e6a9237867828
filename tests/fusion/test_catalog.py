"""Fusions by name, and the contract that every one of them keeps."""

import pytest
import torch
import torch.nn.functional as F

from freqfusion import FusedFeatures, create_fusion, list_fusions


@pytest.mark.parametrize("name", list_fusions())
@pytest.mark.parametrize(("hr_size", "lr_size"), [((8, 10), (4, 5)), ((27, 33), (14, 17)), ((4, 4), (4, 4))])
def test_contract(name: str, hr_size: tuple[int, int], lr_size: tuple[int, int]) -> None:
    fusion = create_fusion(name, 8, 12)
    hr, lr = torch.randn(2, 8, *hr_size), torch.randn(2, 12, *lr_size)
    fused = fusion(hr_feat=hr, lr_feat=lr)
    assert isinstance(fused, FusedFeatures)
    _, fused_hr, fused_lr = fused
    assert fused_hr.shape == hr.shape
    assert fused_lr.shape == (2, 12, *hr_size)


@pytest.mark.parametrize("name", ["nearest", "bilinear"])
def test_interpolations_leave_the_fine_map_alone(name: str) -> None:
    hr, lr = torch.randn(1, 3, 9, 7), torch.randn(1, 5, 4, 3)
    kernel, fused_hr, fused_lr = create_fusion(name, 3, 5)(hr, lr)
    assert kernel is None
    assert fused_hr is hr
    assert torch.equal(fused_lr, F.interpolate(lr, size=(9, 7), mode=name))


def test_unknown_name_and_option() -> None:
    with pytest.raises(
        ValueError, match="unknown fusion 'carrafe'; choose one of: nearest, bilinear, freqfusion"
    ):
        create_fusion("carrafe", 8, 8)
    with pytest.raises(TypeError, match="groups"):
        create_fusion("bilinear", 8, 8, groups=2)
