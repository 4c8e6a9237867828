import pytest
import torch

from freqfusion import fusion
from freqfusion.fusion.copied import DySample, FreqFusion
from support import GOLDEN, assert_close, load_golden

CASES = sorted(path.stem for path in GOLDEN.glob("dysample_*.npz") if path.stem != "dysample_plus_scopebias")


@pytest.mark.parametrize("case", CASES)
def test_dysample_of_the_release(case: str) -> None:
    meta, arrays = load_golden(case)
    layer = DySample(**meta["constructor"]).double()
    parameters = {key.removeprefix("param/"): x for key, x in arrays.items() if key.startswith("param/")}
    buffers = {key.removeprefix("buffer/"): x for key, x in arrays.items() if key.startswith("buffer/")}
    assert "init_pos" in buffers
    layer.load_state_dict(parameters | buffers)
    x = arrays["in/lr"].requires_grad_()
    output = layer(x)
    assert_close("output", output, arrays["out"], 1e-9)
    (output * arrays["cot"]).sum().backward()
    assert_close("gradient", x.grad, arrays["grad/in/lr"], 1e-8)


@torch.no_grad()
def test_dysample_takes_any_size_and_scale() -> None:
    layer = DySample(8, 3, "lp", 2, True)
    assert layer(torch.rand(2, 8, 1, 5)).shape == (2, 8, 3, 15)
    assert layer.half().bfloat16()(torch.rand(0, 8, 4, 5).bfloat16()).shape == (0, 8, 12, 15)


def test_freqfusion_of_the_release_has_no_offsets_unless_asked() -> None:
    plain = FreqFusion(hr_channels=8, lr_channels=12)
    assert plain.dysampler is None
    assert FreqFusion(8, 12, feature_resample=True).dysampler is not None
    same = fusion.FreqFusion(8, 12, feature_resample=False)
    same.load_state_dict(plain.state_dict())
    maps = torch.rand(1, 8, 9, 6), torch.rand(1, 12, 5, 3)
    for one, other in zip(plain(*maps), same(*maps), strict=True):
        assert torch.equal(one, other)
    assert isinstance(plain, fusion.Fusion)


def test_freqfusion_of_the_release_takes_its_arguments_by_place() -> None:
    first = 1, 3, 3, 1, 3, 1, 16, False, "nearest"
    layer = FreqFusion(8, 12, *first)
    assert (layer.lowpass_kernel, layer.dysampler) == (3, None)
    assert FreqFusion(8, 12, *first, True).dysampler is not None
    assert FreqFusion(8, 12, *first, False).dysampler is None
