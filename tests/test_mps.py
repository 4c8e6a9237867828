"""What runs in plain PyTorch, in float32 on a device against float64 on the CPU: on the CPU, and on Apple's GPU.

MPS has no float64 and, before PyTorch 2.13, no sampler with repeated borders. The tests were not run on a Mac; the
last one asks PyTorch's own table whether MPS has a kernel for everything that is called.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from freqfusion.features import create_upsampler, list_upsamplers
from freqfusion.fusion import create_fusion, list_fusions
from freqfusion.ops import (
    carafe,
    carafe_naive,
    local_similarity,
    local_similarity_naive,
    normalize_kernels,
    normalize_kernels_naive,
    resample,
    resample_naive,
    use_backend,
    window_similarity,
    window_similarity_naive,
)
from support import assert_close

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
MPS = [
    pytest.mark.mps,
    pytest.mark.skipif(
        not torch.backends.mps.is_available() or VERSION < (2, 13),
        reason="needs an Apple GPU and PyTorch 2.13",
    ),
]
FINE, COARSE = (7, 9, 11), (4, 5, 6)
METHODS = [(name, dims) for dims in (2, 3) for name in list_fusions(spatial_dims=dims)]


@pytest.fixture(params=["cpu", pytest.param("mps", marks=MPS)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend("torch"):
        yield request.param


def map_of(channels: int, size: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def check(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor, device: str
) -> None:
    """Results and gradients of a function on a device, and of its reference in float64."""
    found = [x.to(device, copy=True).requires_grad_() for x in inputs]
    expected = [x.double().requires_grad_() for x in inputs]
    out, truth = function(*found), reference(*expected)
    weights = map_of(truth.shape[1], tuple(truth.shape[2:]), 9)
    (out * weights.to(device)).sum().backward()
    (truth * weights.double()).sum().backward()
    assert (out.dtype, out.device.type) == (torch.float32, device)
    assert_close("result", out.cpu(), truth, 1e-4)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.grad is not None
        assert other.grad is not None
        assert_close(f"gradient of input {i}", one.grad.cpu(), other.grad, 1e-3)


@pytest.mark.parametrize("dims", [2, 3])
def test_operators(dims: int, device: str) -> None:
    fine, coarse = FINE[-dims:], COARSE[-dims:]
    x, kernels = map_of(8, coarse, 0), map_of(2 * 3**dims, fine, 1)
    for padding in ("zeros", "reflect"):
        options: dict[str, Any] = {"kernel_size": 3, "groups": 2, "padding_mode": padding}
        check(partial(carafe, **options), partial(carafe_naive, **options), x, kernels, device=device)
    check(
        partial(normalize_kernels, kernel_size=3, groups=2),
        partial(normalize_kernels_naive, kernel_size=3, groups=2),
        kernels,
        device=device,
    )
    check(local_similarity, local_similarity_naive, x, device=device)
    moves = map_of(2 * dims, fine, 2)
    check(partial(resample, groups=2), partial(resample_naive, groups=2), x, moves, device=device)
    if dims == 2:
        query = map_of(8, fine, 3)
        check(
            partial(window_similarity, kernel_size=3),
            partial(window_similarity_naive, kernel_size=3),
            query,
            x,
            device=device,
        )


@pytest.mark.parametrize("name, dims", METHODS)
def test_methods(name: str, dims: int, device: str) -> None:
    torch.manual_seed(0)
    with torch.device(device):
        module = create_fusion(name, 8, 16, spatial_dims=dims)
    reference = copy.deepcopy(module).cpu().double()

    def both(fusion: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda hr, lr: torch.cat([*fusion(hr, lr)[1:]], dim=1)

    check(
        both(module),
        both(reference),
        map_of(8, FINE[-dims:], 0),
        map_of(16, COARSE[-dims:], 1),
        device=device,
    )
    pairs = zip(module.named_parameters(), reference.parameters(), strict=True)
    for (key, one), other in pairs:
        if other.grad is not None and float(other.grad.abs().max()) > 1e-9:
            assert one.grad is not None
            assert_close(f"gradient of {key}", one.grad.cpu(), other.grad, 1e-3)


@pytest.mark.parametrize("name", list_upsamplers())
def test_upsamplers_of_features(name: str, device: str) -> None:
    torch.manual_seed(0)
    with torch.device(device):
        upsampler = create_upsampler(name, 8).eval()
    reference = copy.deepcopy(upsampler).cpu().double()
    features, image = map_of(8, (9, 10), 0), map_of(3, (36, 40), 1).sigmoid()
    with torch.no_grad():
        sharp = upsampler(features.to(device), image.to(device), chunk=8)
        assert_close(name, sharp.cpu(), reference(features.double(), image.double(), chunk=8), 2e-3)


def test_what_counts_in_doubles_elsewhere(device: str) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("torchmetrics")
    from freqfusion.metrics import BinaryMetrics, FeatureMetrics
    from freqfusion.prediction.pixels import enlarged_argmax
    from freqfusion.upgrade.core import _difference

    one = torch.rand(3, device=device)
    assert _difference([one], [one], exact=True) == ""
    assert "differ" in _difference([one], [one + 1], exact=True)
    logits = map_of(3, (5, 7), 0)[0].to(device)
    enlarged = enlarged_argmax(logits, (11, 23))
    expected = F.interpolate(logits[None], (11, 23), mode="bilinear").argmax(1)[0]
    assert enlarged.device.type == device
    assert torch.equal(enlarged, expected)
    error = FeatureMetrics().to(device)
    error.update(torch.full((1, 2, 3, 3), 2.0, device=device), torch.ones(1, 2, 3, 3, device=device))
    assert error.compute()["relative_mse"].item() == 1.0
    scores = BinaryMetrics().to(device)
    truth = torch.tensor([[[0, 0, 1, 1]]], device=device)
    scores.update(torch.tensor([[[0.1, 0.4, 0.35, 0.8]]], device=device), truth)
    assert scores.compute()["auc"].item() == 0.75


class Called(TorchDispatchMode):
    """Notes the names of PyTorch's own operators, those within ours included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "freqfusion":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        self.names.add(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(VERSION < (2, 14), reason="older tables of PyTorch lack some")
def test_mps_has_a_kernel_for_every_operator() -> None:
    yaml, torchgen = pytest.importorskip("yaml"), pytest.importorskip("torchgen")
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {entry["func"].partition("(")[0]: entry for entry in yaml.safe_load(path.read_text())}

    def served(name: str) -> bool:
        entry = entries[name]
        if "structured_delegate" in entry:
            return served(entry["structured_delegate"])
        keys = ", ".join(entry.get("dispatch", {"Composite": ""})).split(", ")
        return any(key == "MPS" or key.startswith("Composite") for key in keys)

    with use_backend("torch"), Called() as called:
        for name, dims in METHODS:
            maps = map_of(8, FINE[-dims:], 0), map_of(8, COARSE[-dims:], 1)
            hr, lr = (x.requires_grad_() for x in maps)
            fused = create_fusion(name, 8, 8, spatial_dims=dims)(hr, lr)
            (fused.hr_feat.sum() + fused.lr_feat.square().sum()).backward()
    assert {"grid_sampler_2d_backward", "grid_sampler_3d_backward", "convolution"} <= called.names
    assert not served("slow_conv_transpose3d")
    assert {name for name in called.names if not served(name)} == set()
