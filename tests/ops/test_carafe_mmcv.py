import pytest
import torch
from torch import nn

from freqfusion.ops import carafe_mmcv, carafe_naive
from freqfusion.ops.carafe_mmcv import CARAFE, CARAFEPack, carafe
from support import GOLDEN, assert_close, load_golden

CASES = sorted(path.stem for path in GOLDEN.glob("carafe_k*.npz"))


@pytest.mark.parametrize("case", CASES)
def test_pack_of_mmcv(case: str) -> None:
    meta, arrays = load_golden(case)
    pack = CARAFEPack(**meta["constructor"]).double()
    pack.load_state_dict(
        {key.removeprefix("param/"): x for key, x in arrays.items() if key.startswith("param/")}
    )
    x = arrays["in/lr"].requires_grad_()
    output = pack(x)
    assert_close("output", output, arrays["out"], 1e-9)
    (output * arrays["cot"]).sum().backward()
    assert_close("gradient", x.grad, arrays["grad/in/lr"], 1e-8)
    for key, parameter in pack.named_parameters():
        assert_close(key, parameter.grad, arrays[f"grad/param/{key}"], 1e-8)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_function_and_module(batch: int) -> None:
    features = torch.randn(batch, 6, 5, 3, dtype=torch.float64)
    masks = torch.randn(batch, 2 * 9, 15, 9, dtype=torch.float64).softmax(1)
    output = carafe(features, masks, 3, 2, 3)
    torch.testing.assert_close(output, carafe_naive(features, masks, 3, 2))
    assert torch.equal(CARAFE(3, 2, 3)(features, masks), output)


def test_first_weights() -> None:
    pack = CARAFEPack(64, 2)
    assert 0.0005 < float(pack.content_encoder.weight.detach().std()) < 0.0015
    assert all(not layer.bias.any() for layer in pack.children() if isinstance(layer, nn.Conv2d))


def test_refusals() -> None:
    features, masks = torch.rand(1, 4, 5, 7), torch.rand(1, 9, 10, 13)
    with pytest.raises(ValueError, match="masks must have the sides 10x14"):
        carafe_mmcv.carafe(features, masks, 3, 1, 2)
    with pytest.raises(ValueError, match="up_kernel"):
        CARAFEPack(4, 2, up_kernel=4)
    with pytest.raises(ValueError, match="groups must divide"):
        CARAFEPack(4, 2, up_group=3)
    with pytest.raises(ValueError, match="scale_factor must be at least 1"):
        CARAFEPack(4, 0)
    volume = torch.rand(1, 4, 2, 5, 7)
    with pytest.raises(ValueError, match="features must have 4 dimensions"):
        carafe(volume, torch.rand(1, 9, 4, 10, 14), 3, 1, 2)
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        CARAFEPack(4, 2)(volume)
    with pytest.raises(RuntimeError, match=r"freqfusion\.export"):
        torch.jit.trace(CARAFEPack(4, 2), features)
