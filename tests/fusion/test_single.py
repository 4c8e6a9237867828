import pytest
import torch

from freqfusion.fusion import create_fusion, list_fusions
from freqfusion.fusion.catalog import SCALES, is_guided
from freqfusion.fusion.single import SingleInput


@pytest.mark.parametrize("name", [name for name in list_fusions() if not is_guided(name)])
@pytest.mark.parametrize("scale", [1, 2, 3])
@torch.no_grad()
def test_same_as_the_method_with_a_fine_map(name: str, scale: int) -> None:
    layer = SingleInput(name, 72, scale).eval()
    x = torch.randn(2, 72, 5, 3)
    fine = torch.randn(2, 1, 5 * scale, 3 * scale)
    assert torch.equal(layer(x), layer.fusion(fine, x).lr_feat)
    assert layer(x[:0]).shape == (0, 72, 5 * scale, 3 * scale)
    half = layer.bfloat16()(x.bfloat16().to(memory_format=torch.channels_last))
    assert (half.dtype, half.shape) == (torch.bfloat16, (2, 72, 5 * scale, 3 * scale))


@pytest.mark.parametrize("name", ["pixel_shuffle", "carafe", "dysample", "dysample-s+"])
def test_each_sub_pixel_has_a_prediction_of_its_own(name: str) -> None:
    layer, method = SingleInput(name, 16, 4), create_fusion(name, 1, 16, **{SCALES[name]: 4})
    layer.fusion.load_state_dict(method.state_dict())  # as wide as the authors' for this scale
    x = torch.randn(1, 16, 5, 3)
    with torch.no_grad():
        upsampled = layer(x)
        assert torch.equal(upsampled, method(torch.zeros(1, 1, 20, 12), x).lr_feat)
    assert (
        len(upsampled[0, 0, 8:12, 4:8].unique()) > 4
    )  # a coarse pixel's sub-pixels, which x2 would give in pairs


def test_options_reach_the_method() -> None:
    layer = SingleInput("carafe", 8, up_kernel=3)
    assert layer.fusion.up_kernel == 3
    assert layer.state_dict().keys() == {
        f"fusion.{key}" for key in create_fusion("carafe", 8, 8).state_dict()
    }


def test_refusals() -> None:
    with pytest.raises(ValueError, match="guided by a fine map"):
        SingleInput("freqfusion", 8)
    with pytest.raises(ValueError, match="unknown fusion"):
        SingleInput("nobody", 8)
    with pytest.raises(ValueError, match="positive whole number"):
        SingleInput("carafe", 8, 0)
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        SingleInput("carafe", 8)(torch.rand(8, 5, 3))
