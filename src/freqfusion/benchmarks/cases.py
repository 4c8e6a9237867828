"""What is measured, as data: computations, sizes, and every pair of the two.

A :class:`Case` is one computation at one size; :class:`Problem` makes it ready for one contestant. To add a
computation, add an :class:`Operation` to :data:`OPERATIONS`; to add sizes, a :class:`ShapeSet` to
:data:`SHAPE_SETS`.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freqfusion.benchmarks import unfold
from freqfusion.fusion import FreqFusion
from freqfusion.ops import (
    Explanation,
    available_backends,
    carafe,
    explain,
    local_similarity,
    normalize_kernels,
    resample,
    use_backend,
)
from freqfusion.ops._backends import UNASKED
from freqfusion.ops.carafe.logits import carafe_from_logits
from freqfusion.ops.local_similarity.naive import local_similarity_naive
from freqfusion.ops.normalize_kernels.naive import normalize_kernels_naive
from freqfusion.zoo import create_model

PEER = "unfold"
COMPILED = "compile"
MMCV = "mmcv"
"""The contestants beside the backends: the peer, the torch backend through :func:`torch.compile`, and the CUDA
operator of mmcv where one is installed."""
FORWARD = "forward"
BOTH = "forward+backward"
PASSES = (FORWARD, BOTH)

COMPRESSED_CHANNELS = 64
"""Channels of the maps in which FreqFusion compares pixels, by default."""
RESAMPLE_GROUPS = 4
NUM_CLASSES = 19
"""Classes of the whole models: Cityscapes'."""

Size = tuple[int, ...]
Calls = list[tuple[str, tuple[Size, ...]]]
"""Operators of :mod:`freqfusion.ops`, each with the sizes of its tensors."""


@dataclass(frozen=True)
class Shape:
    """A coarse map ``(batch, channels, *coarse)`` and a fine one ``(batch, channels, *fine)``.

    An image is a shape too, with ``coarse`` equal to ``fine``.
    """

    batch: int
    channels: int
    coarse: tuple[int, int]
    fine: tuple[int, int]

    def __str__(self) -> str:
        sizes = " to ".join(f"{height}x{width}" for height, width in dict.fromkeys((self.coarse, self.fine)))
        return f"{self.batch}x{self.channels}x{sizes}"

    @property
    def coarse_map(self) -> Size:
        return (self.batch, self.channels, *self.coarse)

    @property
    def fine_map(self) -> Size:
        return self.at_fine(self.channels)

    def at_fine(self, channels: int) -> Size:
        return (self.batch, channels, *self.fine)


def image(batch: int, height: int, width: int) -> Shape:
    return Shape(batch, 3, (height, width), (height, width))


class ShapeSet(NamedTuple):
    """Sizes of the maps, and of the image that whole models get (None leaves those out)."""

    maps: tuple[Shape, ...]
    image: Shape | None


SHAPE_SETS = {
    "small": ShapeSet((Shape(1, 256, (32, 32), (64, 64)),), image(1, 128, 128)),
    "unet": ShapeSet(
        (Shape(1, 256, (64, 64), (128, 128)), Shape(1, 256, (128, 128), (256, 256))), image(1, 256, 256)
    ),
    "coco": ShapeSet(  # the levels of an FPN on two images of 800 x 1344
        (
            Shape(2, 256, (100, 168), (200, 336)),
            Shape(2, 256, (50, 84), (100, 168)),
            Shape(2, 256, (25, 42), (50, 84)),
        ),
        image(1, 800, 1344),
    ),
    "cityscapes": ShapeSet(  # strides 8 and 4 of an image of 1024 x 2048
        (Shape(1, 256, (128, 256), (256, 512)),), image(1, 1024, 2048)
    ),
    "one-pixel": ShapeSet((Shape(1, 256, (1, 1), (1, 1)), Shape(1, 256, (1, 1), (2, 2))), None),
    "odd": ShapeSet((Shape(1, 256, (29, 43), (57, 85)),), image(1, 227, 339)),
}


@dataclass(frozen=True)
class Operation:
    """One computation, of any size."""

    name: str
    group: str
    """What ``--ops`` calls it; variants share a group."""
    build: Callable[[Shape, bool], Callable[..., Any]]
    """The function or module for a shape: ours, or the peer's if the second argument is true."""
    sizes: Callable[[Shape], tuple[Size, ...]]
    """Sizes of its inputs; the first is the feature map."""
    calls: Callable[[Shape], Calls]
    flops: Callable[[Shape], tuple[int, int]] | None
    """FLOPs of the forward pass and of the backward pass alone; None to count the module's."""
    channels_last: bool = False
    """Layout of all inputs."""
    whole_model: bool = False
    """Whether its input is an image."""


def _taps(shape: Shape, kernel_size: int) -> Size:
    return shape.at_fine(kernel_size**2)


def _on_fine(shape: Shape) -> Shape:
    return replace(shape, coarse=shape.fine)


def _reassembly(name: str, kernel_size: int, upsample: bool) -> Operation:
    """CARAFE of the coarse map, or of the fine one. One multiply-add per tap and output value, twice that back."""

    def place(shape: Shape) -> Shape:
        return shape if upsample else _on_fine(shape)

    def sizes(shape: Shape) -> tuple[Size, ...]:
        return place(shape).coarse_map, _taps(shape, kernel_size)

    def flops(shape: Shape) -> tuple[int, int]:
        forward = 2 * kernel_size**2 * math.prod(shape.fine_map)
        return forward, 2 * forward

    return Operation(
        name,
        "carafe",
        lambda shape, peer: partial(unfold.carafe if peer else carafe, kernel_size=kernel_size),
        sizes,
        lambda shape: [("carafe", sizes(shape))],
        flops,
    )


def _sharpen(x: Tensor, logits: Tensor) -> Tensor:
    """Twice the map minus its low-pass, step by step: what the peer does."""
    return 2 * x - unfold.carafe(x, normalize_kernels_naive(logits, 3), 3)


def _sharpen_flops(shape: Shape) -> tuple[int, int]:
    forward = 2 * 9 * math.prod(shape.fine_map)
    return forward, 2 * forward


def _similarity_flops(shape: Shape) -> tuple[int, int]:
    """Forward: half of the eight neighbours, for similarity is symmetric, and the norm. Back: all, and itself."""
    values = math.prod(shape.at_fine(COMPRESSED_CHANNELS))
    return 2 * (4 + 1) * values, 2 * (8 + 1) * values


def _resample_flops(shape: Shape) -> tuple[int, int]:
    """A multiply-add for each of four neighbours; back as many for the map, and again for the offsets."""
    forward = 2 * 4 * math.prod(shape.fine_map)
    return forward, 2 * forward


def _normalize_flops(shape: Shape) -> tuple[int, int]:
    """An exponential, a sum and a product per tap; back a product, a sum, a difference and a product."""
    taps = math.prod(_taps(shape, 5))
    return 3 * taps, 4 * taps


class _Normalization(nn.Module):
    """Kernels of 5x5 taps from their logits, with a Hamming window as in FreqFusion."""

    window: Tensor

    def __init__(self, peer: bool) -> None:
        super().__init__()
        line = torch.hamming_window(5, periodic=False)
        self.register_buffer("window", torch.outer(line, line))
        self.normalize = normalize_kernels_naive if peer else normalize_kernels

    def forward(self, logits: Tensor) -> Tensor:
        return self.normalize(logits, 5, window=self.window)


def _module(peer: bool, create: Callable[[], nn.Module]) -> nn.Module:
    return unfold.unfold_(create()) if peer else create()


def _fusion_calls(shape: Shape) -> Calls:
    """What one FreqFusion calls."""
    return [call for name in _PARTS for call in OPERATIONS[name].calls(shape)]


def _model(name: str) -> Operation:
    def calls(shape: Shape) -> Calls:
        """Those of a fusion at strides 16 and 8, which stand for all in the network."""
        height, width = shape.fine
        coarse, fine = ((-(-height // stride), -(-width // stride)) for stride in (16, 8))
        return _fusion_calls(Shape(shape.batch, 256, coarse, fine))

    return Operation(
        name,
        name,
        lambda shape, peer: _module(peer, partial(create_model, name, NUM_CLASSES)),
        lambda shape: (shape.fine_map,),
        calls,
        None,
        whole_model=True,
    )


def _in_nhwc(operation: Operation) -> Operation:
    return replace(operation, name=f"{operation.name}, NHWC", channels_last=True)


_PARTS = ("carafe k5 x2", "carafe k3 x1", "local_similarity", "resample", "normalize k5")
_OPERATIONS = (
    _reassembly("carafe k5 x2", 5, upsample=True),
    _reassembly("carafe k3 x1", 3, upsample=False),
    Operation(
        "sharpen k3",
        "carafe",
        lambda shape, peer: _sharpen if peer else partial(carafe_from_logits, kernel_size=3, gain=2),
        lambda shape: (shape.fine_map, _taps(shape, 3)),
        lambda shape: [("carafe_from_logits", (shape.fine_map, _taps(shape, 3)))],
        _sharpen_flops,
    ),
    Operation(
        "local_similarity",
        "local_similarity",
        lambda shape, peer: local_similarity_naive if peer else local_similarity,
        lambda shape: (shape.at_fine(COMPRESSED_CHANNELS),),
        lambda shape: [("local_similarity", (shape.at_fine(COMPRESSED_CHANNELS),))],
        _similarity_flops,
    ),
    Operation(
        "resample",
        "resample",
        # the release samples with torch's grid_sample, as the torch backend does
        lambda shape, peer: partial(resample, groups=RESAMPLE_GROUPS, unit_size=shape.coarse),
        lambda shape: (shape.fine_map, shape.at_fine(2 * RESAMPLE_GROUPS)),
        lambda shape: [("resample", (shape.fine_map, shape.at_fine(2 * RESAMPLE_GROUPS)))],
        _resample_flops,
    ),
    Operation(
        "normalize k5",
        "normalize",
        lambda shape, peer: _Normalization(peer),
        lambda shape: (_taps(shape, 5),),
        lambda shape: [("normalize_kernels", (_taps(shape, 5),))],
        _normalize_flops,
    ),
    Operation(
        "FreqFusion",
        "freqfusion",
        lambda shape, peer: _module(peer, partial(FreqFusion, shape.channels, shape.channels)),
        lambda shape: (shape.fine_map, shape.coarse_map),
        _fusion_calls,
        None,
    ),
)
OPERATIONS = {
    operation.name: operation
    for operation in (
        *(form for operation in _OPERATIONS for form in (operation, _in_nhwc(operation))),
        _model("fpn_small"),
        _model("segnext_t"),
    )
}
GROUPS = tuple(dict.fromkeys(operation.group for operation in OPERATIONS.values()))


@dataclass(frozen=True)
class Case:
    """One computation at one size."""

    name: str
    """A key of :data:`OPERATIONS`."""
    shape: Shape

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.name]

    def __str__(self) -> str:
        return f"{self.name}, {self.shape}"


def make_cases(groups: Sequence[str], shape_sets: Sequence[str]) -> list[Case]:
    """Every operation of ``groups`` at every size of ``shape_sets``, size by size.

    Args:
        groups: of :data:`GROUPS`.
        shape_sets: of :data:`SHAPE_SETS`, or ``"full"`` for all.

    Raises:
        ValueError: for an unknown name, or where nothing is left to measure.

    >>> [str(case) for case in make_cases(["fpn_small", "segnext_t"], ["odd"])]
    ['fpn_small, 1x3x227x339', 'segnext_t, 1x3x227x339']
    """
    for given, known, option in (
        (groups, GROUPS, "operation"),
        (shape_sets, (*SHAPE_SETS, "full"), "set of shapes"),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"there is no {option} {name!r}; choose among {', '.join(known)}")
    operations = [operation for operation in OPERATIONS.values() if operation.group in groups]
    cases = []
    for name in SHAPE_SETS if "full" in shape_sets else dict.fromkeys(shape_sets):
        maps, picture = SHAPE_SETS[name]
        cases += [Case(o.name, shape) for shape in maps for o in operations if not o.whole_model]
        cases += [Case(o.name, picture) for o in operations if o.whole_model and picture is not None]
    if not cases:
        raise ValueError(
            f"{', '.join(groups)} cannot be measured at {', '.join(shape_sets)}, which has no image for whole "
            "models; choose other operations or shapes"
        )
    return cases


def list_contestants(compiled: bool = False) -> list[str]:
    """The peer, then the torch backend, then the other backends that this machine can use.

    Args:
        compiled: with the torch backend through :func:`torch.compile` at the end.
    """
    reasons = available_backends()
    others = [name for name in UNASKED if name != "torch" and not reasons[name]]
    return [PEER, "torch", *others, *([COMPILED] if compiled else []), *([MMCV] if _mmcv_carafe() else [])]


def _mmcv_carafe() -> Callable[..., Tensor] | None:
    """``mmcv.ops.carafe``, which only builds of mmcv with CUDA operators have."""
    if importlib.util.find_spec("mmcv") is None:
        return None
    try:
        return importlib.import_module("mmcv.ops").carafe
    except (ImportError, AttributeError):
        return None


def _mmcv_cannot(case: Case, device: torch.device, dtype: torch.dtype) -> str:
    if case.operation.group != "carafe":
        return "mmcv is compared where it has the operator: carafe"
    if device.type != "cuda" or dtype not in (torch.float32, torch.float16):
        return "mmcv's operator takes float32 and float16 on CUDA"
    (h, w), (height, width) = (size[-2:] for size in case.operation.sizes(case.shape)[:2])
    ratio = height // h
    return "" if (height, width) == (ratio * h, ratio * w) else "mmcv takes whole ratios only"


def explain_case(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Explanation]:
    """Which backend serves each operator that the case calls, and why the others cannot.

    The keys name an operator and the sizes of its tensors.
    """
    explanations = {}
    for operator, sizes in case.operation.calls(case.shape):
        tensors = [
            torch.empty(size, dtype=dtype, device=device) for size in sizes
        ]  # not touched: costs nothing
        if case.operation.channels_last:
            tensors = [tensor.to(memory_format=torch.channels_last) for tensor in tensors]
        key = f"{operator}({', '.join('x'.join(map(str, size)) for size in sizes)})"
        explanations[key] = explain(operator, *tensors)
    return explanations


def why_not(case: Case, contestant: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why ``contestant`` has nothing of its own to run in this case, or ``""``."""
    if contestant in (PEER, COMPILED):
        return ""
    if contestant == MMCV:
        return _mmcv_cannot(case, device, dtype)
    explanations = explain_case(case, device, dtype)
    reasons = [explanation.cannot[contestant] for explanation in explanations.values()]
    return "; ".join(dict.fromkeys(reasons)) if all(reasons) else ""


class Problem:
    """A case made ready for one contestant; contestants get the same inputs and weights.

    Args:
        case: what to compute.
        contestant: of :func:`list_contestants`.
        device: where.
        dtype: of inputs and weights.
    """

    def __init__(self, case: Case, contestant: str, device: torch.device, dtype: torch.dtype) -> None:
        operation = case.operation
        self.device = device
        torch.manual_seed(0)
        function = operation.build(case.shape, contestant == PEER)
        self.module = function.to(device, dtype) if isinstance(function, nn.Module) else None
        if contestant == COMPILED:
            function = torch.compile(function)
        elif contestant == MMCV:
            (h, _), (height, _) = (size[-2:] for size in operation.sizes(case.shape)[:2])
            reassemble = _mmcv_carafe()
            assert reassemble is not None  # else it would be no contestant
            options = function.keywords  # type: ignore[attr-defined]
            function = partial(reassemble, group_size=1, scale_factor=height // h, **options)
        self._function = function
        self._backend = contestant if contestant in available_backends() else "torch"
        self.inputs = tuple(
            torch.randn(size, dtype=dtype, device=device) for size in operation.sizes(case.shape)
        )
        if operation.channels_last:
            self.inputs = tuple(x.contiguous(memory_format=torch.channels_last) for x in self.inputs)
        for x in self.inputs:
            x.requires_grad_(not operation.whole_model)  # nobody asks for the gradient of an image
        self.leaves = [x for x in (*self.inputs, *self.parameters()) if x.requires_grad]
        self.gradients: tuple[Tensor, ...] = ()
        """Gradients of the outputs for the backward pass; made once their shapes are known."""

    def parameters(self) -> list[Tensor]:
        return [] if self.module is None else list(self.module.parameters())

    def forward(self) -> tuple[Tensor, ...]:
        """Run in evaluation mode, without gradients; returns the outputs."""
        with torch.no_grad():
            return self._call(training=False)

    def forward_backward(self) -> tuple[Tensor | None, ...]:
        """Run in training mode; returns the gradients of inputs and weights."""
        outputs = self._call(training=True)
        if not self.gradients:
            self.make_gradients(outputs)
        return torch.autograd.grad(outputs, self.leaves, self.gradients, allow_unused=True)

    def make_gradients(self, outputs: Sequence[Tensor]) -> None:
        self.gradients = tuple(torch.randn_like(x) for x in outputs)

    def run(self, pass_name: str) -> tuple[Tensor | None, ...]:
        """One of :data:`PASSES`."""
        return self.forward() if pass_name == FORWARD else self.forward_backward()

    def wait(self) -> None:
        """Until the device has done all that it was asked for."""
        if self.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self.device)

    def _call(self, training: bool) -> tuple[Tensor, ...]:
        if self.module is not None and self.module.training != training:
            self.module.train(training)
        with use_backend(self._backend):
            result = self._function(*self.inputs)
        return (result,) if isinstance(result, Tensor) else (result.hr_feat, result.lr_feat)


class Work(NamedTuple):
    """What a pass must do at least."""

    flops: int
    bytes: int


def least_work(case: Case, dtype: torch.dtype) -> dict[str, Work]:
    """The arithmetic of each of :data:`PASSES`, and the bytes that must move.

    Bytes: inputs, weights and outputs once forward; once back the inputs, the weights, the gradients of the outputs,
    and those of the inputs (not of an image) and weights.
    What lies between is not counted, for it could stay in the cache. FLOPs: 2 a multiply-add; of modules those
    that torch counts, see :func:`freqfusion.benchmarks.cost.count_flops`. Nothing is computed.
    """
    from freqfusion.benchmarks.cost import count_flops  # not in the processes that measure memory

    meta = Problem(case, "torch", torch.device("meta"), dtype)
    given = _bytes((*meta.inputs, *meta.parameters()))
    made = _bytes(meta.forward())
    if case.operation.flops is not None:
        forward, backward = case.operation.flops(case.shape)
    else:
        assert meta.module is not None
        forward, backward = count_flops(meta.module, *meta.inputs)
    there = given + made
    back = given + made + _bytes(meta.leaves)
    return {FORWARD: Work(forward, there), BOTH: Work(forward + backward, there + back)}


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)
