"""Choice of the backend: precedence, predicates, errors, fallbacks."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from freqfusion import FreqFusion, ops
from freqfusion.ops import (
    _backends,
    _native,
    _triton,
    available_backends,
    carafe,
    explain,
    local_similarity,
    resample,
    use_backend,
    window_similarity,
)
from support import assert_close

X, KERNELS, OFFSETS = torch.zeros(1, 4, 3, 3), torch.zeros(1, 9, 6, 6), torch.zeros(1, 2, 6, 6)

needs_native = pytest.mark.skipif(bool(_native.REASON), reason=_native.REASON or "native is there")


@pytest.fixture(autouse=True)
def _no_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_preferred", None)


def test_torch_is_always_available() -> None:
    assert available_backends()["torch"] == ""
    assert list(available_backends()) == list(_backends.BACKENDS)


@needs_native
def test_native_is_preferred_and_context_and_argument_override() -> None:
    assert explain("carafe", X, KERNELS).backend == "native"
    with use_backend("torch"):
        assert explain("carafe", X, KERNELS).backend == "torch"
        assert _backends.choose("carafe", "native", X, KERNELS) == "native"
        with use_backend("native"):
            assert explain("carafe", X, KERNELS).backend == "native"
        assert explain("carafe", X, KERNELS).backend == "torch"
    assert explain("carafe", X, KERNELS).backend == "native"


def test_the_operator_runs_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("carafe", "local_similarity", "resample"):
        original = getattr(_native, name)

        def spy(*args: object, _name: str = name, _original: object = original) -> torch.Tensor:
            ran.append(_name)
            return _original(*args)  # type: ignore[operator]

        monkeypatch.setattr(_native, name, spy)
    carafe(X, KERNELS, 3, backend="torch")
    local_similarity(X, backend="torch")
    resample(X, OFFSETS, backend="torch")
    assert ran == []
    if not _native.REASON:
        carafe(X, KERNELS, 3, backend="native")
        local_similarity(X, backend="native")
        resample(X, OFFSETS, backend="native")
        assert ran == ["carafe", "local_similarity", "resample"]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="backend must be one of 'native', 'triton', 'torch', got 'cuda'"):
        carafe(X, KERNELS, 3, backend="cuda")
    with pytest.raises(ValueError, match="name must be one of"), use_backend("fast"):
        pass


@needs_native
def test_forced_native_says_why_it_cannot() -> None:
    for x, kernels, message in (
        (X.half(), KERNELS.half(), r"cannot run because it has no kernel for torch\.float16"),
        (X.double(), KERNELS, "one tensor is float64 and another is not"),
        (X.to("meta"), KERNELS.to("meta"), "it computes on the CPU, and a tensor is on meta"),
        (X[..., :1, :1], torch.zeros(1, 9, 20, 20), "more than 256 fine pixels"),
    ):
        with pytest.raises(RuntimeError, match=message):
            carafe(x, kernels, 3, backend="native")
        assert explain("carafe", x, kernels).backend == "torch"
        with use_backend("native"):  # a preference gives way
            assert carafe(x, kernels, 3).shape == (1, 4, *kernels.shape[-2:])
    with pytest.raises(RuntimeError, match="float16"):
        local_similarity(X.half(), backend="native")
    with pytest.raises(RuntimeError, match="float16"):
        resample(X.half(), OFFSETS, backend="native")
    assert "no kernel for normalize_kernels" in explain("normalize_kernels", KERNELS).cannot["native"]


def test_without_the_library_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernels = torch.rand(1, 4, 3, 3, requires_grad=True), torch.rand(1, 9, 6, 6)
    expected = carafe(x, kernels, 3, backend="torch")
    monkeypatch.setattr(_native, "REASON", "it was not compiled")
    monkeypatch.setattr(_native, "_LIBRARY", None)
    assert available_backends()["native"] == "it was not compiled"
    explanation = explain("carafe", x, kernels)
    assert explanation.backend == "torch"
    assert (explanation.cannot["native"], explanation.cannot["torch"]) == ("it was not compiled", "")
    assert torch.equal(carafe(x, kernels, 3), expected)
    local_similarity(resample(x, OFFSETS)).sum().backward()
    window_similarity(torch.rand(1, 4, 6, 6), x, 3).sum().backward()
    with pytest.raises(RuntimeError, match="backend 'native' cannot run because it was not compiled"):
        resample(x, OFFSETS, backend="native")


FOLDERS = {path.parent.name for path in Path(ops.__file__).parent.glob("*/op.py")}


def test_every_operator_has_a_folder_with_its_oracle() -> None:
    inner = {"convolution", "normalized_similarity"}  # whose oracles are torch's own and others here
    variants = {"carafe_from_logits", "directed_resample"}  # by kernels of the reassembly and the resampling
    assert variants | FOLDERS == set(_backends.OPERATORS)
    assert inner < FOLDERS
    for name in FOLDERS - inner:
        assert getattr(ops, name) is getattr(import_module(f"freqfusion.ops.{name}.op"), name)
        naive = f"{name}_naive"
        assert getattr(ops, naive) is getattr(import_module(f"freqfusion.ops.{name}.naive"), naive)


@pytest.mark.parametrize("name", sorted(_backends.OPERATORS))
def test_what_an_operator_cannot_is_explained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "REASON", "")
    monkeypatch.setattr(_triton, "cannot_run_on", lambda device: "")
    known, maps = _backends.OPERATORS[name], (X, KERNELS, KERNELS)
    limited = known._replace(cannot=lambda backend, *tensors: f"{backend} has no kernel for {len(tensors)}")
    monkeypatch.setitem(_backends.OPERATORS, name, limited)
    expected = {
        backend: f"{backend} has no kernel for {known.tensors}"
        if backend in known.kernels
        else f"it has no kernel for {name}"
        for backend in ("native", "triton")
    }
    explanation = explain(name, *maps[: known.tensors])
    assert explanation == ("torch", {**expected, "torch": ""}, "")


@pytest.mark.parametrize(
    ("name", "shapes", "reasons"),
    [
        ("carafe", [(1, 4, 1, 1), (1, 9, 17, 16)], {"native": "more than 256 fine pixels"}),
        ("window_similarity", [(1, 4, 17, 16), (1, 4, 1, 1)], {"native": "more than 256 fine pixels"}),
        ("carafe", [(1, 4, 1, 2**15), (1, 9, 1, 2**15)], {"triton": "a fine side times"}),
        ("carafe_from_logits", [(1, 4, 2**16, 1), (1, 9, 2**14, 1)], {"triton": "a fine side times"}),
        ("window_similarity", [(1, 4, 1, 2**15), (1, 4, 1, 2**15)], {"triton": "a fine side times"}),
        ("normalize_kernels", [(1, 4097, 1, 1)], {"triton": "there are more than 4096 channels"}),
    ],
)
def test_limits_of_kernels_are_explained(
    name: str, shapes: list[tuple[int, ...]], reasons: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "REASON", "")
    monkeypatch.setattr(_triton, "cannot_run_on", lambda device: "")
    with use_backend("torch"):  # or the kernels that could serve would be explained, which takes Triton
        found = explain(name, *(torch.zeros(1).expand(shape) for shape in shapes)).cannot
    for backend in _backends.OPERATORS[name].kernels:
        wanted = reasons.get(backend, "")
        assert found[backend].startswith(wanted) if wanted else found[backend] == ""


@pytest.mark.parametrize(("value", "expected"), [("torch", "torch"), ("", None), ("quick", "ValueError")])
def test_environment_variable(value: str, expected: str | None) -> None:
    code = "from freqfusion.ops import _backends; print(_backends._preferred)"
    environment = {**os.environ, "FREQFUSION_BACKEND": value}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if expected == "ValueError":
        assert "FREQFUSION_BACKEND must be one of 'native', 'triton', 'torch', got 'quick'" in result.stderr
    else:
        assert result.stdout.strip() == str(expected)


def test_triton_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    on_cpu = "it computes on CUDA devices, and a tensor is on cpu"
    for x, kernels, message in (
        (X, KERNELS, on_cpu),
        (X.double(), KERNELS.double(), r"it has no kernel for torch\.float64"),
        (X, KERNELS.double(), r"it has no kernel for torch\.float64"),
    ):
        with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run because .*{message}"):
            carafe(x, kernels, 3, backend="triton")
    assert explain("carafe", X, KERNELS).cannot["triton"] == on_cpu
    assert explain("normalize_kernels", KERNELS).cannot["triton"] == on_cpu
    with use_backend("triton"):  # a preference gives way
        assert carafe(X, KERNELS, 3).shape == (1, 4, 6, 6)
        assert local_similarity(X.double()).dtype == torch.float64
    monkeypatch.setattr(_triton, "cannot_run_on", lambda device: "")
    x, kernels = torch.zeros(1).expand(1, 4, 1, 2**15), torch.zeros(1).expand(1, 9, 1, 2**15)
    with pytest.raises(RuntimeError, match="a fine side times the coarse one is 1073741824 or more"):
        carafe(x, kernels, 3, backend="triton")


def test_triton_is_left_alone_where_it_does_not_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", True)  # so that the device of these tensors does
    _triton._probe.cache_clear()
    monkeypatch.setattr(_triton, "_try", lambda device: "Triton is broken")
    try:
        with use_backend("triton"):
            for _ in range(3):
                carafe(X, KERNELS, 3)
                assert explain("carafe", X, KERNELS).cannot["triton"] == "Triton is broken"
        assert available_backends()["triton"] == "Triton is broken"
    finally:
        _triton._probe.cache_clear()
    logged = [record.getMessage() for record in caplog.records if record.name == _triton.__name__]
    assert logged == ["the triton backend is not used on cpu because Triton is broken"]


def test_what_triton_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(_triton, "find_spec", lambda name: None)
    assert "Triton is not installed" in _triton._try(device)
    monkeypatch.setattr(_triton, "find_spec", lambda name: name)
    old = ModuleType("triton")
    old.__version__ = "3.3.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", old)
    assert _triton._try(device) == "it needs Triton 3.4 or newer, and 3.3.1 is installed"
    old.__version__ = "3.10.0"  # type: ignore[attr-defined]
    launch = ModuleType("launch")

    def probe(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC")

    launch.probe = probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"{_triton.__name__}.launch", launch)
    assert _triton._try(device) == "a first kernel failed: RuntimeError: Failed to find C compiler."


def test_importing_leaves_triton_and_dynamo_out() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import freqfusion
print(sorted({"triton", "torch._dynamo"} & (set(sys.modules) - before)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


INTERPRETED = """
import torch
from freqfusion.ops import available_backends, explain, use_backend
x, kernels = torch.zeros(1, 4, 3, 3), torch.zeros(1, 9, 6, 6)
print(available_backends()["triton"] == "", explain("carafe", x, kernels).backend == "triton")
with use_backend("triton"):
    print(explain("carafe", x, kernels).backend)
"""


def test_the_interpreter_serves_only_when_asked() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert result.stdout.split() == ["True", "False", "triton"], result.stderr


def test_transforms_of_torch_func() -> None:
    """Forward-mode derivatives exist only for torch's own operators; a kernel would return zeros."""
    x, kernels, offsets = torch.rand(1, 4, 3, 3), torch.rand(1, 9, 6, 6), torch.rand(1, 2, 6, 6)
    for function in (
        lambda x: carafe(x, kernels, 3),
        local_similarity,
        lambda x: resample(x, offsets),
        lambda x: window_similarity(x, x[..., :2, :2], 3),
    ):
        assert torch.allclose(torch.func.vmap(function)(x[None])[0], function(x), atol=1e-6)
        direction = torch.rand_like(x)
        try:
            _, tangent = torch.func.jvp(function, (x,), (direction,))
        except NotImplementedError as error:
            if "grid_sampler_2d" not in str(error):  # torch's sampler has no forward mode in older versions
                raise
            continue
        jacobian = torch.autograd.functional.jacobian(function, x)
        expected = (jacobian * direction).sum(dim=(-4, -3, -2, -1))
        assert torch.allclose(tangent, expected, atol=1e-5)


def test_export_takes_the_composite() -> None:
    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor, kernels: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return local_similarity(resample(carafe(x, kernels, 3), offsets))

    inputs = (torch.rand(1, 4, 3, 3), torch.rand(1, 9, 6, 6), torch.rand(1, 2, 6, 6))
    exported = torch.export.export(Both(), inputs)
    assert "freqfusion" not in str(exported.graph)
    assert torch.allclose(exported.module()(*inputs), Both()(*inputs), atol=1e-5)


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("hr_size", [(12, 20), (11, 19), (15, 27)])
def test_a_whole_module_agrees(hr_size: tuple[int, int], layout: torch.memory_format) -> None:
    """FreqFusion with kernels and without, results and gradients, at exactly twice the size and at others."""
    torch.manual_seed(0)
    fusion = FreqFusion(16, 24, init="official").double()
    inputs = [torch.randn(2, 16, *hr_size), torch.randn(2, 24, 6, 10)]
    leaves = [x.double().contiguous(memory_format=layout).requires_grad_() for x in inputs]
    found = {}
    for name in ("native", "torch"):
        with use_backend(name):
            out = fusion(hr_feat=leaves[0], lr_feat=leaves[1])
        total = sum(((i + 1) * value.square()).mean() for i, value in enumerate(out))
        found[name] = [*out, *torch.autograd.grad(total, (*leaves, *fusion.parameters()))]
    for number, (native, other) in enumerate(zip(found["native"], found["torch"], strict=True)):
        assert_close(f"tensor {number}", native, other, 1e-9)


def test_convolutions_with_hooks_are_called() -> None:
    """FreqFusion joins convolutions of one input, but not where that would pass over a hook or an adapter."""
    torch.manual_seed(0)
    fusion = FreqFusion(16, 16)
    hr, lr = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)
    expected = fusion(hr_feat=hr, lr_feat=lr)
    assert fusion.dysampler is not None
    calls = []
    for module in (fusion.content_encoder, fusion.dysampler.offset):
        module.register_forward_hook(lambda *_: calls.append(1))
    out = fusion(hr_feat=hr, lr_feat=lr)
    assert len(calls) == 3  # the encoder of both maps, and the coarse offsets
    for value, wanted in zip(out, expected, strict=True):
        assert_close("out", value, wanted.detach(), 1e-5)


@needs_native
def test_compiled_code_follows_the_preference() -> None:
    torch._dynamo.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(lambda x: carafe(x, KERNELS, 3), backend=keep, fullgraph=True)
    compiled(X)
    with use_backend("torch"):
        compiled(X)
    assert ["'native'" in code for code in graphs] == [True, False]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_deterministic_mode(backend: str) -> None:
    """The same gradients twice; the mode also fills fresh memory with NaN, which a kernel must not leave behind."""
    if available_backends()[backend]:
        pytest.skip(available_backends()[backend])
    torch.manual_seed(0)
    fusion = FreqFusion(16, 24)
    hr, lr = torch.randn(2, 16, 13, 18), torch.randn(2, 24, 7, 9)
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            inputs = [x.clone().requires_grad_() for x in (hr, lr)]
            with use_backend(backend):
                _, fused_hr, fused_lr = fusion(*inputs)
                (fused_hr.square().sum() + fused_lr.square().sum()).backward()
            gradients.append([x.grad for x in (*inputs, *fusion.parameters())])
            fusion.zero_grad()
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*gradients, strict=True):
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)
