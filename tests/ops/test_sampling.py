"""The guarded sampler: coordinates that are not finite, in a process of its own, for a crash ends the process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import freqfusion
from freqfusion.ops import _native, resample, resample_naive
from freqfusion.ops._sampling import grid_sample

SOURCES = Path(freqfusion.__file__).parent


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", "import torch\n" + code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"ended with {result.returncode}: {result.stderr[-2000:]}"
    return result.stdout


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_backward_of_resample_survives(dtype: str) -> None:
    run(f"""
from freqfusion.ops import resample
torch.manual_seed(0)
for value in ("nan", "inf", "-inf", "1e30"):
    for size in (1, 7, 64):
        x = torch.randn(2, 8, size, size).to(torch.{dtype}).requires_grad_()
        offsets = torch.randn(2, 4, size, size)
        offsets.view(-1)[::5] = float(value)
        offsets = offsets.to(torch.{dtype}).requires_grad_()
        out = resample(x, offsets, 2, backend="torch")
        out.sum().backward()
        unknown = offsets.detach().unflatten(1, (2, 2)).isnan().any(1)  # (B, groups, H, W)
        assert torch.equal(out.detach().unflatten(1, (2, 4)).isnan().all(2), unknown), (value, size)
        assert torch.equal(offsets.grad.unflatten(1, (2, 2)).isnan().all(1), unknown), (value, size)
        assert x.grad.isnan().any() == unknown.any(), (value, size)
""")


def test_training_with_nan_weights_survives() -> None:
    run("""
from freqfusion import create_fusion
from freqfusion.ops import use_backend
for method in ("dysample", "dysample+", "dysample-s", "dysample-s+", "freqfusion"):
    fusion = create_fusion(method, 16, 16)
    hr, lr = torch.randn(1, 16, 32, 32, requires_grad=True), torch.randn(1, 16, 16, 16, requires_grad=True)
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            if "offset" in name:
                parameter.view(-1)[0] = float("nan")
    with use_backend("torch"):
        out = fusion(hr_feat=hr, lr_feat=lr).lr_feat
        out.sum().backward()
    assert out.isnan().any() and lr.grad.isnan().any(), method
""")


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_sampler_survives_and_shows_nan(padding_mode: str) -> None:
    run(f"""
from freqfusion.ops._sampling import grid_sample
torch.manual_seed(0)
x = torch.randn(2, 3, 9, 9, requires_grad=True)
grid = 2 * torch.rand(2, 40, 40, 2) - 1
grid[0, 3, 4, 0], grid[0, 5, 6, 1], grid[1, 7, 8, 0] = float("nan"), float("nan"), float("inf")
grid.requires_grad_()
out = grid_sample(x, grid, {padding_mode!r})
out.sum().backward()
places = [[0, 3, 4], [0, 5, 6]]
assert out.isnan().all(1).nonzero().tolist() == out.isnan().any(1).nonzero().tolist() == places
assert grid.grad.isnan().all(-1).nonzero().tolist() == grid.grad.isnan().any(-1).nonzero().tolist() == places
assert x.grad[0].isnan().any() and not x.grad[1].isnan().any()
""")


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_finite_coordinates_are_sampled_as_by_torch(padding_mode: str) -> None:
    x, grid = torch.randn(2, 3, 5, 6), 3 * torch.rand(2, 7, 8, 2) - 1.5
    expected = F.grid_sample(x, grid, padding_mode=padding_mode, align_corners=False)
    assert torch.equal(grid_sample(x, grid, padding_mode), expected)


def test_nothing_else_calls_the_sampler_of_torch() -> None:
    callers = [
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        if re.search(r"F\.grid_sample\(|functional\.grid_sample\(|aten\.grid_sampler\w*\(", path.read_text())
    ]
    assert callers == ["ops/_sampling.py"]


def _results(backend: str, x: Tensor, offsets: Tensor, groups: int, squared: bool) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), offsets.clone().requires_grad_()]
    if backend == "naive":
        out = resample_naive(*leaves, groups)
    else:
        out = resample(*leaves, groups, backend=backend)
    loss = out.float().square() if squared else out.float()
    return [out.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("squared", [False, True])  # the square sends NaN back, the sum ones
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "values", [["nan"], ["inf", "-inf"], ["1e30"], ["nan", "inf", "-inf", "-1e30"]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_shows_in_the_same_places_everywhere(
    dtype: torch.dtype, values: list[str], groups: int, squared: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 7).to(dtype)
    offsets = torch.randn(2, 2 * groups, 6, 9) + 0.01
    for number, value in enumerate(values):
        offsets.view(-1)[number :: 7 * len(values)] = float(value)
    offsets[0, :, 2, 3] = float(values[0])  # along both axes
    offsets = offsets.to(dtype)
    actual = _results("torch", x, offsets, groups, squared)
    others = ["naive"]
    if not _native.REASON and dtype != torch.float16:
        others.append("native")
    for other in others:
        for name, value, wanted in zip(
            ("out", "grad x", "grad offsets"),
            actual,
            _results(other, x, offsets, groups, squared),
            strict=True,
        ):
            assert torch.equal(value.isnan(), wanted.isnan()), (other, name)
            if dtype in (torch.float32, torch.float64):
                assert torch.allclose(value, wanted, rtol=1e-3, atol=1e-4, equal_nan=True), (other, name)
    unknown = offsets.isnan().unflatten(1, (2, groups)).any(1)  # (B, groups, H, W)
    out, _, grad_offsets = actual
    assert torch.equal(out.isnan(), unknown.repeat_interleave(4 // groups, dim=1))
    assert torch.equal(grad_offsets.isnan(), unknown.repeat(1, 2, 1, 1))


@pytest.mark.skipif(bool(_native.REASON), reason=_native.REASON or "native is there")
def test_second_derivative_with_nan_offsets() -> None:
    x = torch.randn(1, 2, 4, 5, requires_grad=True)
    offsets = torch.zeros(1, 2, 4, 5)
    offsets[0, 0, 1, 1] = float("nan")
    (grad,) = torch.autograd.grad(resample(x, offsets, backend="native").square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert bool(second.isnan().any())
    assert bool(torch.isfinite(second[0, :, 3, 4]).all())


def test_masks_of_boxes_that_are_nan_are_empty() -> None:
    rcnn = pytest.importorskip("freqfusion.models.detection.rcnn", exc_type=ImportError)
    boxes = torch.tensor([[float("nan"), 1, 5, 5], [float("nan")] * 4, [1, 1, 5, 5], [1, 1, float("inf"), 5]])
    masks = torch.ones(4, 1, 4, 4)
    pasted = rcnn.paste_masks(masks, boxes, (8, 8))
    assert [int(mask.sum()) > 0 for mask in pasted[:3]] == [False, False, True]


class _Resampled(torch.nn.Module):
    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return resample(x, offsets, 2, (3, 4))


def _bad_inputs(height: int, width: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, offsets = torch.randn(1, 4, height, width), torch.randn(1, 4, height, width)
    offsets[0, 0, 1, 1], offsets[0, 1, 4, 4] = float("nan"), 1e30
    offsets[0, 2, 2, 2], offsets[0, 3, 3, 3] = float("inf"), float("-inf")
    return x, offsets


def test_exported_program_with_nan_offsets() -> None:
    sizes = tuple(
        {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)} for _ in range(2)
    )
    program = torch.export.export(_Resampled(), _bad_inputs(6, 8), dynamic_shapes=sizes).module()
    for size in ((6, 8), (9, 5)):
        x, offsets = _bad_inputs(*size)
        expected = resample(x, offsets, 2, (3, 4))
        assert int(expected.isnan().sum()) == 2  # the channels of the first group
        torch.testing.assert_close(program(x, offsets), expected, equal_nan=True)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_compiled_with_nan_offsets(backend: str) -> None:
    if backend == "native" and _native.REASON:
        pytest.skip(_native.REASON)
    torch._dynamo.reset()

    def function(x: Tensor, offsets: Tensor) -> Tensor:
        return resample(x, offsets, 2, backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((6, 8), (9, 5)):
        leaves = [tensor.requires_grad_() for tensor in _bad_inputs(*size)]
        actual, expected = (torch.autograd.grad(call(*leaves).sum(), leaves) for call in (compiled, function))
        for value, wanted in zip(actual, expected, strict=True):
            assert bool(wanted.isnan().any())
            torch.testing.assert_close(value, wanted, equal_nan=True)
