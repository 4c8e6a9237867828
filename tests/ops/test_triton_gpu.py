"""The Triton kernels at real sizes on a GPU: against plain torch there, beyond 32-bit offsets, in CUDA graphs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from freqfusion import FreqFusion
from freqfusion.ops import available_backends, carafe, explain, local_similarity, resample, use_backend
from freqfusion.ops.carafe.logits import add_low_pass, carafe_from_logits
from freqfusion.ops.resample.directed import directed_resample
from support import assert_close

REASON = available_backends()["triton"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(bool(REASON), reason=REASON or "triton is there"),
]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
FIRST, LAST = torch.contiguous_format, torch.channels_last
CASES = {
    "carafe k5 x2": (lambda x, kernels: carafe(x, kernels, 5), (256, (100, 168)), (25, (200, 336))),
    "carafe k3 x1": (lambda x, kernels: carafe(x, kernels, 3), (256, (200, 336)), (9, (200, 336))),
    "carafe uneven": (
        lambda x, kernels: carafe(x, kernels, 5, padding_mode="reflect"),
        (64, (29, 43)),
        (25, (57, 85)),
    ),
    "from logits": (
        lambda x, logits: carafe_from_logits(x, logits, 3, gain=2),
        (256, (200, 336)),
        (9, (200, 336)),
    ),
    "sum with a low-pass": (
        lambda x, logits: torch.cat(add_low_pass(logits.roll(1, 1), x, logits, 5, keep=True), 1),
        (25, (100, 168)),
        (25, (200, 336)),
    ),
    "local_similarity": (local_similarity, (64, (200, 336))),
    "resample": (lambda x, offsets: resample(x, offsets, 4, (100, 168)), (256, (200, 336)), (8, (200, 336))),
}


def inputs_of(case: str, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    maps = [torch.randn(2, channels, *size, device="cuda") for channels, size in CASES[case][1:]]
    if case == "resample":  # never at a whole position, where the derivative in the offsets jumps
        maps[1] = ((16 * maps[1]).round().clamp(-60, 60) + 0.25) / 16
    return (maps[0].to(dtype).contiguous(memory_format=layout), *(tensor.to(dtype) for tensor in maps[1:]))


def values_and_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Result and gradients, for a cotangent of a dtype, by default that of the result."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    generator = torch.Generator("cuda").manual_seed(1)
    values = torch.randn(out.shape, device="cuda", generator=generator).to(dtype or out.dtype)
    cotangent = torch.empty_like(out).copy_(values)  # in the layout of the result
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", list(CASES))
def test_agrees_with_torch(case: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    function, inputs = CASES[case][0], inputs_of(case, dtype, layout)
    with use_backend("torch"):
        expected = values_and_gradients(function, tuple(tensor.float() for tensor in inputs))
    with use_backend("triton"):
        actual = values_and_gradients(function, inputs)
    tolerance = max(TOLERANCE[dtype], 1e-3 if case == "resample" else 0)  # positions round differently
    for name, value, wanted in zip(("out", "grad 0", "grad 1"), actual, expected, strict=False):
        assert_close(name, value, wanted, tolerance)


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 2e-3)]
)
@pytest.mark.parametrize("case", ["carafe k5 x2", "carafe k3 x1", "carafe uneven", "from logits"])
def test_rounding_of_the_reassembly(
    case: str, dtype: torch.dtype, bound: float, layout: torch.memory_format
) -> None:
    function, inputs = CASES[case][0], inputs_of(case, dtype, layout)
    with use_backend("torch"):
        expected = values_and_gradients(function, tuple(tensor.double() for tensor in inputs), dtype)
    with use_backend("triton"):
        actual = values_and_gradients(function, inputs)
    for name, value, wanted in zip(("out", "grad 0", "grad 1"), actual, expected, strict=True):
        assert float((value - wanted).norm() / wanted.norm()) < bound, name


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sampling_where_two_resolutions_say(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """In the 2-norm: at a whole position, where rounding decides the side, the derivative in a prediction jumps."""
    torch.manual_seed(0)
    inputs = tuple(
        torch.randn(2, channels, *size, device="cuda").to(dtype).contiguous(memory_format=layout)
        for channels, size in ((256, (200, 336)), (16, (200, 336)), (64, (100, 168)))
    )

    def function(*maps: Tensor) -> Tensor:
        return directed_resample(*maps, 4, (100, 168))

    with use_backend("torch"):
        expected = values_and_gradients(function, tuple(tensor.float() for tensor in inputs))
    with use_backend("triton"):
        actual = values_and_gradients(function, inputs)
    for index, (value, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert float((value.float() - wanted).norm() / wanted.norm()) < 1e-2, index


def test_it_is_what_a_gpu_gets() -> None:
    x, kernels = inputs_of("carafe uneven", torch.float16, FIRST)
    assert explain("carafe", x, kernels).backend == "triton"


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("case", ["carafe k5 x2", "from logits"])
def test_reassembly_repeats_bit_for_bit(case: str, layout: torch.memory_format) -> None:
    inputs = inputs_of(case, torch.bfloat16, layout)
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend("triton"):
            first, second = (values_and_gradients(CASES[case][0], inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_beyond_32_bit_offsets() -> None:
    """The last image of a batch of more than 2**31 values equals itself alone."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(17, 128, 1024, 1024, dtype=torch.float16, device="cuda")
    x[-1].normal_()
    kernels = torch.zeros(17, 9, 1024, 1024, dtype=torch.float16, device="cuda")
    kernels[-1].uniform_()
    assert x.numel() > 2**31
    with torch.no_grad():
        assert torch.equal(
            carafe(x, kernels, 3, backend="triton")[-1], carafe(x[-1:], kernels[-1:], 3, backend="triton")[0]
        )
        del kernels
        assert torch.equal(
            local_similarity(x, backend="triton")[-1], local_similarity(x[-1:], backend="triton")[0]
        )


def test_in_a_cuda_graph() -> None:
    torch.manual_seed(0)
    fusion = FreqFusion(64, 64).cuda().eval()
    hr, lr = torch.randn(1, 64, 56, 80, device="cuda"), torch.randn(1, 64, 28, 40, device="cuda")
    with torch.no_grad(), use_backend("triton"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # tuning and compilation happen before the capture
            for _ in range(3):
                fusion(hr_feat=hr, lr_feat=lr)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fusion(hr_feat=hr, lr_feat=lr)
        hr.normal_()
        lr.normal_()
        graph.replay()
        expected = fusion(hr_feat=hr, lr_feat=lr)
    for name, actual, wanted in zip(("kernels", "hr", "lr"), captured, expected, strict=True):
        assert_close(name, actual, wanted, 1e-4)


def module_and_maps(dtype: torch.dtype) -> tuple[FreqFusion, Tensor, Tensor]:
    """FreqFusion, and maps of an odd size."""
    torch.manual_seed(0)
    fusion = FreqFusion(64, 32).cuda().to(dtype)
    hr, lr = (
        torch.randn(2, channels, *size, device="cuda").to(dtype)
        for channels, size in ((64, (57, 83)), (32, (29, 42)))
    )
    return fusion, hr.requires_grad_(), lr.requires_grad_()


def fused_and_gradients(
    call: Callable[..., tuple[Tensor, ...]], fusion: FreqFusion, hr: Tensor, lr: Tensor
) -> list[Tensor]:
    _, fine, coarse = call(hr, lr)
    total = fine.float().square().mean() + coarse.float().square().mean()
    grads = torch.autograd.grad(total, (hr, lr, fusion.content_encoder.weight))
    return [tensor.detach().float().clone() for tensor in (fine, coarse, *grads)]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_module(mode: str, dtype: torch.dtype) -> None:
    fusion, hr, lr = module_and_maps(dtype)
    expected = fused_and_gradients(fusion, fusion, hr, lr)
    compiled = torch.compile(fusion, mode=mode, fullgraph=True)
    for _ in range(3):  # CUDA graphs are recorded at the second call and replayed at the third
        torch.compiler.cudagraph_mark_step_begin()
        actual = fused_and_gradients(compiled, fusion, hr, lr)
    for number, (value, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"tensor {number}", value, wanted, 5e-3 if dtype == torch.float32 else 5e-2)


def test_graphed_callable() -> None:
    fusion, hr, lr = module_and_maps(torch.float32)
    expected = fused_and_gradients(fusion, fusion, hr, lr)
    samples = tuple(torch.randn_like(tensor).requires_grad_() for tensor in (hr, lr))
    graphed = torch.cuda.make_graphed_callables(fusion, samples)
    actual = fused_and_gradients(graphed, fusion, hr, lr)
    for number, (value, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"tensor {number}", value, wanted, 5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trains_under_autocast(dtype: torch.dtype) -> None:
    """float32 parameters and inputs, the loss scaled for float16: gradients of float32 that are close to its own."""
    fusion, hr, lr = module_and_maps(torch.float32)
    expected = fused_and_gradients(fusion, fusion, hr, lr)
    optimizer = torch.optim.SGD(fusion.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    before = fusion.content_encoder.weight.detach().clone()
    with torch.autocast("cuda", dtype):
        _, fine, coarse = fusion(hr, lr)
        total = fine.float().square().mean() + coarse.float().square().mean()
    scaler.scale(total).backward()
    scaler.unscale_(optimizer)
    assert fusion.content_encoder.weight.grad is not None
    assert fusion.content_encoder.weight.grad.dtype == torch.float32
    scale = scaler.get_scale()
    actual = [fine, coarse, hr.grad / scale, lr.grad / scale, fusion.content_encoder.weight.grad]
    for number, (value, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"tensor {number}", value.detach().float(), wanted, 5e-2)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(fusion.content_encoder.weight, before)
