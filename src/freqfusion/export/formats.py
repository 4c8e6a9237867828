"""ONNX, torch.export and AOTInductor files."""

import io
import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from freqfusion._files import write_atomically
from freqfusion._optional import require
from freqfusion.data.normalisation import Normalisation
from freqfusion.export.checks import ExportReport, SizeCheck
from freqfusion.export.tracing import (
    Inputs,
    Size,
    cast,
    check_sizes,
    default_inputs,
    hint,
    inference_copy,
    input_names,
    named_outputs,
    seeded,
    trace,
)
from freqfusion.fusion import Fusion
from freqfusion.models.base import normalisation_of
from freqfusion.zoo.spec import ModelSpec, spec_of

OPSETS = (20, 18)
"""ONNX operator sets of the files, the default first.

18 is for TensorRT: parsers up to that of 11.1 read the name that ``GridSample`` of set 20 has for bilinear
sampling as nearest sampling (github.com/NVIDIA/TensorRT/issues/4646, onnx/onnx-tensorrt/pull/1060)."""
TOLERANCE = {torch.float32: 3e-4, torch.float16: 2e-2}
"""Largest difference from torch that passes, relative to the largest value.

In float16, if it is more: twice the difference that torch itself has there."""

SPEC = "freqfusion.spec"
"""Under which ONNX and ``torch.export`` files say how the model is made, as JSON: a property of the one, an extra
file of the other. Of a network it also has ``normalisation``, ``mean`` and ``std`` of the images per colour."""

Runner = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    size: Size,
    *,
    dynamic: int = False,
    half: bool = False,
    opset: int = OPSETS[0],
    inputs: Inputs | None = None,
) -> ExportReport:
    """Write ``model`` as ONNX with the standard's own operators alone.

    The file is run in onnxruntime on the CPU and compared with torch before it is written.

    Args:
        model: a network, a part of one, or a fusion module; it stays as it is, and is exported in evaluation
            mode. What it returns becomes a flat list of tensors: those of dicts keep their keys as names, a
            fusion module's are ``fused_hr`` (if the method changes it) and ``fused_lr``.
        path: of the file.
        size: height and width of the input (of a fusion module's fine map) that is compared, and for which
            a file of fixed size is made.
        dynamic: False: for ``size`` alone. True: for any size. A number: for sizes of multiples of it, for
            networks that take no others.
        half: float16 weights and inputs; the model's own float32 parts stay float32.
        opset: 20, or 18 for TensorRT, see :data:`OPSETS`.
        inputs: called with a height and a width, the model's arguments; by default a random image
            ``(1, 3, H, W)``, or for a fusion module both maps.

    Returns:
        The report; ``print`` shows it.

    Raises:
        ImportError: if onnx, onnxscript or onnxruntime is not installed.
        ValueError: if the model does not take the size, or cannot be exported; the message says what to try.
        RuntimeError: if the file's results are not torch's. Nothing is written then.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset must be one of {OPSETS}, got {opset}")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    import onnx

    job = _Job(model, size, dynamic, half, inputs)
    program, example = trace(job.exported, job.inputs, size, dynamic, job.dtype)
    try:
        converted = torch.onnx.export(
            program,
            example,
            input_names=list(job.input_names),
            output_names=list(job.output_names),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(
            f"this {type(model).__name__} does not convert to ONNX: {str(error).strip()}"
        ) from error
    assert converted is not None
    proto = converted.model_proto
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in proto.graph.node if node.domain})
    if foreign:
        raise ValueError(f"ONNX has no operators for a part of this model: {', '.join(foreign)} were needed")
    onnx.helper.set_model_props(proto, job.properties)
    data: bytes = proto.SerializeToString()
    onnx.checker.check_model(data)
    checks = job.compare(_onnx_runner(data))
    write_atomically(path, data)
    return job.report(path, f"ONNX opset {opset}", len(proto.graph.node), checks)


def export_program(
    model: nn.Module,
    path: str | Path,
    size: Size,
    *,
    dynamic: int = False,
    half: bool = False,
    compiled: bool = False,
    inputs: Inputs | None = None,
) -> ExportReport:
    """Write ``model`` as a ``torch.export`` program, or compiled for this machine's CPU by AOTInductor.

    Read it with ``torch.export.load(path).module()``, or where compiled with
    ``torch._inductor.aoti_load_package(path)``; either is called with the inputs and gives a tuple of tensors.
    It is compared with torch before it is written.

    Args:
        model: see :func:`export_onnx`.
        path: of the file, which must end in ``.pt2``.
        size: see :func:`export_onnx`.
        dynamic: see :func:`export_onnx`.
        half: see :func:`export_onnx`.
        compiled: an AOTInductor package; needs a C++ compiler.
        inputs: see :func:`export_onnx`.

    Returns:
        The report; ``print`` shows it.

    Raises:
        ValueError: if the model does not take the size, or cannot be exported; the message says what to try.
        RuntimeError: if the file's results are not torch's. Nothing is written then.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"the file of an exported program must end in .pt2, got {path}")
    job = _Job(model, size, dynamic, half, inputs)
    program, _ = trace(job.exported, job.inputs, size, dynamic, job.dtype)
    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    if compiled:
        with tempfile.TemporaryDirectory() as folder:
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder, "model.pt2"))
            )
            loaded = torch._inductor.aoti_load_package(package)
            checks = job.compare(lambda inputs: loaded(*inputs))
            data = Path(package).read_bytes()
    else:
        buffer = io.BytesIO()
        try:
            torch.export.save(program, buffer, extra_files=job.properties)
        except ValueError as error:
            if "JSON" not in str(error):
                raise
            raise ValueError(
                f"torch {torch.__version__} cannot save this model: it computes with a constant that is infinite or "
                "NaN. A newer torch can: `python -m pip install -U torch`"
            ) from error
        data = buffer.getvalue()
        module = torch.export.load(io.BytesIO(data)).module()
        checks = job.compare(lambda inputs: module(*inputs))
    write_atomically(path, data)
    return job.report(path, "AOTInductor" if compiled else "torch.export", nodes, checks)


class _Job:
    """What both functions do around their format: the copy of the model, its names, and torch's results."""

    def __init__(self, model: nn.Module, size: Size, dynamic: int, half: bool, inputs: Inputs | None) -> None:
        self.dynamic = int(dynamic)
        self.sizes = check_sizes(size, self.dynamic)
        self.inputs = seeded(inputs or default_inputs(model))
        self.dtype = torch.float16 if half else torch.float32
        self.properties = {}
        self.normalisation: Normalisation | None = None
        if isinstance(getattr(model, "spec", None), ModelSpec):  # a whole model, and not a part
            made = spec_of(model).to_json()
            if not isinstance(model, Fusion):
                self.normalisation = normalisation_of(model)
                made |= {"normalisation": self.normalisation._asdict()}
            self.properties[SPEC] = json.dumps(made)
        reference = inference_copy(model)
        self.exported = inference_copy(model).half() if half else reference
        # half-precision inputs are what both sides get
        self.examples = [cast(self.inputs(*size), self.dtype) for size in self.sizes]
        self.expected = [self._run(reference, cast(example, torch.float32)) for example in self.examples]
        self.allowed = [self._allowed(*pair) for pair in zip(self.examples, self.expected, strict=True)]
        self.input_names = input_names(model, len(self.examples[0]))
        self.output_names = tuple(
            name if name not in self.input_names else f"output_{name}" for name in self.expected[0]
        )
        if not self.output_names:
            raise ValueError(f"this {type(model).__name__} returns no tensor")

    def _run(self, model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, Tensor]:
        try:
            with torch.no_grad():
                return named_outputs(model, example)
        except Exception as error:
            shapes = " and ".join(str(tuple(x.shape)) for x in example)
            raise ValueError(
                f"this {type(model).__name__} does not take inputs of shape {shapes} ({error})"
                f"{hint(self.dynamic) or '; choose another size'}"
            ) from error

    def _allowed(self, example: tuple[Tensor, ...], expected: dict[str, Tensor]) -> dict[str, float]:
        """The difference that passes, for every output."""
        allowed = {name: TOLERANCE[self.dtype] * float(x.float().abs().max()) for name, x in expected.items()}
        if self.dtype == torch.float16:
            for name, x in self._run(self.exported, example).items():
                loss = _difference(x, expected[name])
                if math.isfinite(loss):
                    allowed[name] = max(allowed[name], 2 * loss)
        return allowed

    def compare(self, run: Runner) -> tuple[SizeCheck, ...]:
        """Run the file at every size.

        Raises:
            RuntimeError: if it fails or differs.
        """
        checks = []
        for size, example, expected, allowed in zip(
            self.sizes, self.examples, self.expected, self.allowed, strict=True
        ):
            place = f"at {size[0]}x{size[1]}"
            try:
                results = run(example)
            except Exception as error:
                reason = re.sub(r"\s+", " ", str(error))[:300]
                raise RuntimeError(
                    f"the exported file fails {place}, nothing was written: {reason}{hint(self.dynamic)}"
                ) from error
            shapes = [[tuple(x.shape) for x in tensors] for tensors in (results, expected.values())]
            if shapes[0] != shapes[1]:
                raise RuntimeError(
                    f"the exported file gives shapes {shapes[0]} {place}, torch {shapes[1]}; nothing was "
                    f"written{hint(self.dynamic)}"
                )
            differences = [_difference(*pair) for pair in zip(results, expected.values(), strict=True)]
            for name, difference in zip(expected, differences, strict=True):
                if not difference <= allowed[name]:  # so NaN fails too
                    raise RuntimeError(
                        f"the exported file's {name!r} differs from torch by {difference:.1e} {place}, and "
                        f"{allowed[name]:.1e} is allowed; nothing was written{hint(self.dynamic)}"
                    )
            largest = max(float(x.float().abs().max()) for x in expected.values())
            checks.append(SizeCheck(size, max(differences), largest))
        return tuple(checks)

    def report(self, path: str | Path, kind: str, nodes: int, checks: tuple[SizeCheck, ...]) -> ExportReport:
        height, width = self.sizes[0]
        words = {0: f"{height}x{width} alone", 1: "any size"}
        return ExportReport(
            Path(path),
            kind,
            self.input_names,
            self.output_names,
            words.get(self.dynamic, f"multiples of {self.dynamic}"),
            "float16" if self.dtype == torch.float16 else "float32",
            nodes,
            checks,
            self.normalisation,
        )


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


def _onnx_runner(data: bytes) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised too
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, feed)]

    return run
