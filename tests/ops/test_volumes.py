"""The operators on volumes: oracle in forward and gradients, awkward shapes, links with 2D, memory, wrong input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from freqfusion.ops import (
    _native,
    carafe,
    carafe_naive,
    explain,
    local_similarity,
    local_similarity_naive,
    normalize_kernels,
    normalize_kernels_naive,
    resample,
    resample_naive,
    window_similarity,
)
from support import assert_close

pytestmark = pytest.mark.usefixtures("each_backend")

Size = tuple[int, int, int]

SIZES: list[tuple[Size, Size]] = [
    ((2, 3, 4), (4, 6, 8)),
    ((3, 2, 3), (3, 4, 6)),  # anisotropic: 1 x 2 x 2
    ((2, 3, 2), (5, 5, 3)),  # no whole ratio
    ((1, 3, 4), (1, 7, 8)),  # one voxel thick
    ((1, 1, 1), (2, 1, 3)),
    ((4, 5, 3), (4, 5, 3)),
    ((5, 4, 6), (3, 2, 5)),
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def assert_same(
    function: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> None:
    out, expected = function(*inputs), oracle(*inputs)
    assert_close("out", out, expected, 1e-12)
    cotangent = noise(*expected.shape, seed=9).detach()
    for i, (actual, wanted) in enumerate(
        zip(*(torch.autograd.grad(value, inputs, cotangent) for value in (out, expected)), strict=True)
    ):
        assert_close(f"gradient {i}", actual, wanted, 1e-11)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("coarse, fine", SIZES)
def test_reassembly_equals_naive(coarse: Size, fine: Size, padding: str) -> None:
    for kernel, groups in ((1, 1), (3, 2), (5, 1)):
        inputs = noise(2, 4, *coarse), noise(2, groups * kernel**3, *fine, seed=1)
        assert_same(
            lambda x, kernels, k=kernel, g=groups: carafe(x, kernels, k, g, padding),
            lambda x, kernels, k=kernel, g=groups: carafe_naive(x, kernels, k, g, padding),
            inputs,
        )


def test_reassembly_by_hand() -> None:
    """The oracle itself, against the definition voxel by voxel."""
    x, kernels = noise(1, 2, 2, 3, 2).detach(), noise(1, 27, 3, 4, 4, seed=1).detach()
    out = carafe_naive(x, kernels, 3)
    expected = torch.zeros_like(out)
    for d, i, j in torch.cartesian_prod(*map(torch.arange, (3, 4, 4))).tolist():
        centre = d * 2 // 3, i * 3 // 4, j * 2 // 4
        for tap, step in enumerate(torch.cartesian_prod(*[torch.arange(-1, 2)] * 3).tolist()):
            place = [c + s for c, s in zip(centre, step, strict=True)]
            if all(0 <= p < side for p, side in zip(place, (2, 3, 2), strict=True)):
                expected[0, :, d, i, j] += kernels[0, tap, d, i, j] * x[(0, slice(None), *place)]
    assert_close("out", out, expected, 1e-14)


@pytest.mark.parametrize("size", sorted({size for pair in SIZES for size in pair}))
@pytest.mark.parametrize("window, dilation", [(3, 1), (3, 2), (5, 1), (3, 2**40)])
def test_similarity_equals_naive(size: Size, window: int, dilation: int) -> None:
    assert_same(
        lambda x: local_similarity(x, window, dilation),
        lambda x: local_similarity_naive(x, window, dilation),
        (noise(2, 3, *size),),
    )


def test_similarity_knows_its_neighbours() -> None:
    x = torch.zeros(1, 1, 3, 3, 3)
    x[0, 0, 1, 1, 1] = x[0, 0, 2, 0, 1] = 1
    similarity = local_similarity(x, dilation=1)[0, :, 1, 1, 1]
    assert similarity.shape == (26,)
    place = (2 * 3 + 0) * 3 + 1  # one slice below, one row up; after the centre by one less
    assert similarity.nonzero().flatten().tolist() == [place - 1]


@pytest.mark.parametrize("unit", [None, (2, 3, 1)])
@pytest.mark.parametrize("coarse, fine", SIZES)
def test_sampling_equals_naive(coarse: Size, fine: Size, unit: Size | None) -> None:
    for groups in (1, 2):
        assert_same(
            lambda x, offsets, g=groups: resample(x, offsets, g, unit),
            lambda x, offsets, g=groups: resample_naive(x, offsets, g, unit),
            (noise(2, 4, *coarse), noise(2, 3 * groups, *fine, seed=1)),
        )


def test_sampling_moves_by_voxels_of_each_axis() -> None:
    x = noise(1, 2, 4, 5, 6).detach()
    assert_close("in place", resample(x, torch.zeros(1, 3, 4, 5, 6).double()), x, 1e-12)
    for channel, axis in ((0, 4), (1, 3), (2, 2)):  # x, y, z
        offsets = torch.zeros(1, 6, 4, 5, 6).double()
        offsets[:, 2 * channel + 1] = 0.5  # of the second group, in voxels of a grid of half as many
        unit = [side // 2 if a == axis else side for a, side in enumerate(x.shape[2:], 2)]
        moved = resample(x, offsets, 2, tuple(unit))
        length = x.shape[axis]
        shift = length / (length // 2) / 2  # half a unit, in voxels
        low, share = int(shift), shift - int(shift)
        assert_close("first group", moved[:, 0], x[:, 0], 1e-12)
        expected = (1 - share) * x.select(axis, low) + share * x.select(axis, low + 1)
        assert_close("second group", moved.select(axis, 0)[:, 1], expected[:, 1], 1e-12)


def test_sampling_at_unknown_places() -> None:
    offsets = torch.zeros(1, 3, 2, 2, 2)
    offsets[0, 2, 0, 0, 0] = torch.nan
    out = resample(torch.ones(1, 1, 2, 2, 2), offsets)
    assert out.isnan().sum() == 1
    assert bool(out[0, 0, 0, 0, 0].isnan())


def test_normalisation_equals_naive() -> None:
    window = torch.rand(27) + 0.1
    for given in (None, window):
        assert_same(
            lambda logits, w=given: normalize_kernels(logits, 3, 2, w),
            lambda logits, w=given: normalize_kernels_naive(logits, 3, 2, w),
            (noise(2, 54, 1, 3, 4),),
        )


def test_one_slice_is_an_image() -> None:
    """Middle slice of the kernels on a volume of one slice: the operator for images."""
    x, kernels = noise(2, 4, 3, 5), noise(2, 2 * 9, 6, 9, seed=1)
    deep = torch.zeros(2, 2, 3, 9, 1, 6, 9, dtype=torch.float64)
    deep[:, :, 1, :, 0] = kernels.detach().unflatten(1, (2, 9))
    for padding in ("zeros", "reflect"):
        out = carafe(x[:, :, None], deep.flatten(1, 3), 3, 2, padding)[:, :, 0]
        assert_close("reassembly", out, carafe(x, kernels, 3, 2, padding), 1e-12)
    assert_close(
        "similarity",
        local_similarity(x[:, :, None])[:, [*range(9, 13), *range(13, 17)], 0],
        local_similarity(x),
        1e-12,
    )
    offsets = noise(2, 4, 6, 9, seed=2)
    moved = resample(x[:, :, None], torch.cat((offsets, offsets[:, :2]), 1)[:, :, None], 2)[:, :, 0]
    assert_close("sampling", moved, resample(x, offsets, 2), 1e-12)


def test_gradcheck() -> None:
    x, kernels = noise(1, 2, 2, 1, 2), noise(1, 27, 2, 2, 3, seed=1)
    for padding in ("zeros", "reflect"):
        assert torch.autograd.gradcheck(lambda x, k, p=padding: carafe(x, k, 3, 1, p), (x, kernels))
    small = noise(1, 2, 1, 1, 2), noise(1, 27, 1, 2, 2, seed=1)
    assert torch.autograd.gradgradcheck(lambda x, k: carafe(x, k, 3), small)
    x = noise(1, 3, 2, 3, 2)
    assert torch.autograd.gradcheck(lambda x: local_similarity(x, dilation=1), (x,))
    assert torch.autograd.gradgradcheck(lambda x: local_similarity(x, dilation=1), (x,))
    offsets = (0.3 + 0.1 * torch.rand(1, 3, 2, 4, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, o: resample(x, o), (x, offsets))


def test_similarity_of_zero_vectors() -> None:
    x = torch.ones(1, 3, 3, 3, 3)
    x[:, :, 1, 1, 1] = 0
    x.requires_grad_()
    out = local_similarity(x, dilation=1)
    assert bool((out[0, :, 1, 1, 1] == 0).all())
    out.sum().backward()
    assert x.grad is not None
    oracle = x.detach().clone().requires_grad_()
    local_similarity_naive(oracle, dilation=1).sum().backward()
    assert oracle.grad is not None
    away = torch.ones(3, 3, 3, dtype=torch.bool)
    away[1, 1, 1] = False  # there the exact derivative is that of the floor, and torch's cosine has its own
    assert_close("gradient", x.grad[0][:, away] + 1, oracle.grad[0][:, away] + 1, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = noise(1, 8, 3, 4, 5).to(dtype)
    kernels = normalize_kernels(noise(1, 27, 6, 8, 10, seed=1), 3).to(dtype)
    offsets = noise(1, 3, 6, 8, 10, seed=2).to(dtype)
    for name, low, exact in (
        ("reassembly", carafe(x, kernels, 3), carafe(x.double(), kernels.double(), 3)),
        ("similarity", local_similarity(x), local_similarity(x.double())),
        ("sampling", resample(x, offsets), resample(x.double(), offsets.double())),
    ):
        assert low.dtype == dtype
        assert_close(name, low, exact, 2 * torch.finfo(dtype).eps)
    for call in (lambda x: carafe(x, kernels, 3), local_similarity, lambda x: resample(x, offsets)):
        leaves = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        grads = [torch.autograd.grad(call(leaf).double().square().sum(), leaf)[0] for leaf in leaves]
        assert grads[0].dtype == dtype
        assert_close("gradient", grads[0], grads[1], 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", [(5, 4, 6), (2, 3, 5)])
def test_layouts_and_empty_batch(size: Size) -> None:
    x, kernels, offsets = (
        noise(2, 4, *size).detach(),
        noise(2, 27, 5, 8, 6).detach(),
        noise(2, 3, 5, 8, 6).detach(),
    )
    for call in (
        lambda x: carafe(x, kernels[: len(x)], 3),
        local_similarity,
        lambda x: resample(x, offsets[: len(x)]),
    ):
        expected = call(x)
        last = call(x.contiguous(memory_format=torch.channels_last_3d))
        assert_close("channels_last", last, expected, 1e-12)
        assert_close("transposed", call(x.mT.contiguous().mT), expected, 1e-12)
        assert call(x[:0]).shape == (0, *expected.shape[1:])
    last = carafe(x.contiguous(memory_format=torch.channels_last_3d), kernels, 3)
    assert last.is_contiguous(memory_format=torch.channels_last_3d)


def test_opcheck(each_backend: str) -> None:
    x, kernels, grad = (
        noise(2, 4, 2, 3, 2).float(),
        noise(2, 54, 3, 4, 4, seed=1).float(),
        noise(2, 4, 3, 4, 4).float(),
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operators = torch.ops.freqfusion
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.carafe, (x, kernels, 3, 2, False, each_backend)),
        (operators.carafe_backward_x, (kernels, grad, (2, 3, 2), 3, 2, True, each_backend)),
        (operators.carafe_backward_kernels, (x, grad, 3, 2, False, each_backend)),
        (operators.local_similarity, (x, 3, 2, each_backend)),
    ]
    for operator, arguments in cases:
        arguments = tuple(
            value.detach().requires_grad_() if isinstance(value, Tensor) else value for value in arguments
        )
        results = torch.library.opcheck(operator.default, arguments, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}, results


def test_what_is_kept_for_the_backward_pass(each_backend: str) -> None:
    """The inputs, of the native similarity its result too, and no copy of the map for each tap."""
    x, kernels = noise(1, 16, 4, 6, 6).float().detach().requires_grad_(), noise(1, 27, 8, 12, 12).float()
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        carafe(x, kernels, 3)
        assert kept == x.numel() + kernels.numel()
        kept = 0
        similarity = local_similarity(x)
        assert kept == x.numel() + (similarity.numel() if each_backend == "native" else 0)
        kept = 0
        resample(x, kernels[:, :3])
        assert kept <= x.numel() + 8 * 3 * kernels[0, 0].numel()


def test_wrong_input() -> None:
    x, kernels = torch.zeros(1, 4, 3, 3, 3), torch.zeros(1, 27, 6, 6, 6)
    with pytest.raises(
        ValueError, match=r"kernels must have groups \* kernel_size\*\*3 = 1 \* 5\*\*3 = 125 channels"
    ):
        carafe(x, kernels, 5)
    with pytest.raises(
        ValueError, match="x has 5 dimensions and kernels has 4; both must be images or both volumes"
    ):
        carafe(x, kernels[:, :, 0], 3)
    with pytest.raises(ValueError, match=r"x must have 4 dimensions .*, got 3 .*; a volume has 5 dimensions"):
        carafe(x[0, 0], kernels, 3)
    with pytest.raises(ValueError, match=r"x has an empty side: shape \(1, 4, 0, 3, 3\)"):
        carafe(x[:, :, :0], kernels, 3)
    with pytest.raises(ValueError, match=r"offsets must have 3 \* groups = 6 channels, got 27"):
        resample(x, kernels, 2)
    with pytest.raises(
        TypeError, match=r"unit_size must be \(depth, height, width\) or None, got \(3, 3\); pass three"
    ):
        resample(x, kernels[:, :3], 1, (3, 3))
    with pytest.raises(ValueError, match=r"query must have 4 dimensions \(B, C, H, W\), got 5"):
        window_similarity(x, x, 3)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run because"):
        carafe(x, kernels, 3, backend="triton")
    explained = explain("carafe", x, kernels)
    assert explained.cannot["triton"] == "it has no kernels for volumes (B, C, D, H, W)"
    assert explained.cannot["native"] == _native.REASON
