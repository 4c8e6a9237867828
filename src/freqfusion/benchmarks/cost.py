"""What fusion methods cost: parameters, FLOPs, memory kept for the backward pass, latency.

How each figure comes about:

- **Parameters**: every learnable number. ``weights`` leaves out what has one dimension (biases, affine factors
  of norms), which is how some papers count.
- **FLOPs**: torch's own counter, 2 a multiply-add, with formulas for our operators. It counts convolutions,
  matrix products and reassembly; elementwise arithmetic, softmax, normalisation, interpolation and
  ``grid_sample`` count as nothing, so a method made of those looks cheaper here than on the clock. Counted on
  the meta device, where nothing is computed, so they depend on no machine. Forward in evaluation, backward in
  training. The one formula of torch's that is replaced is that of the convolution's backward pass: torch's
  counts the weight gradient of a grouped convolution as if it had a single group.
- **Memory kept**: the distinct storages that a forward pass in training leaves to the backward pass, besides
  inputs, parameters and buffers, which are there anyway. A passing peak is not in it.
- **Latency**: seconds of one forward pass in evaluation without gradients, and of one backward pass (gradients
  of both maps and of all parameters) in training. The methods take turns, so that a busy spell of the machine
  meets all of them; each turn repeats a short pass and waits for the device once, at the end.

Needs torch alone.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import freqfusion.ops._flops  # noqa: F401  registers the formulas of our operators
from freqfusion.fusion import Fusion, create_fusion, list_fusions
from freqfusion.zoo import create_model

CHANNELS = 256
SITES = ((25, 42), (50, 84), (100, 168))
"""Sizes of the coarse maps, each joined with one of twice the size: an FPN's on an 800 x 1344 image (COCO)."""
LATENCY_SITE = (120, 120)
"""Coarse map of the latencies, joined with one of 240 x 240: the test of Liu et al., DySample, ICCV 2023."""
IMAGE = (512, 512)
NUM_CLASSES = 150
"""Image and classes of the whole models: ADE20K's."""
MODELS = ("segnext_t", "segnext_s", "segnext_b", "segnext_l", "fpn_small", "fpn_resnet18")
THREE_SITES = "three FPN sites"
META = torch.device("meta")
ROUNDS = 5
MIN_SECONDS = 0.02
"""A turn repeats a pass until it is this long: shorter ones drown in the noise of the clock."""

Progress = Callable[[int, int, str], None]
"""Told before each step how many are done, how many there are, and what comes."""
Inputs = Callable[[torch.device], list[tuple[Tensor, ...]]]
"""Makes the inputs of a module at each of its places."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one pass: median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Cost:
    """What one method costs at one place; None where it could not be measured, and ``note`` says why."""

    place: str
    """``THREE_SITES``: the sum of three sites with 256 channels on both sides; or the name of a model."""
    method: str
    parameters: int | None = None
    weights: int | None = None
    """Parameters of more than one dimension."""
    flops_forward: int | None = None
    flops_backward: int | None = None
    saved_bytes: int | None = None
    """At the sites: on the device of the measurement; of a model: of torch's own operators (meta device)."""
    forward_ms: Latency | None = None
    """Only of :data:`THREE_SITES`, and of one site of size :data:`LATENCY_SITE`."""
    backward_ms: Latency | None = None
    note: str = ""


def choose_device(name: str | None = None) -> torch.device:
    """The device called ``name``, or the present one: the accelerator if there is one, else the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    present = ["cpu"]
    if accelerator is not None:
        count = torch.accelerator.device_count()
        present += [accelerator.type, *(f"{accelerator.type}:{index}" for index in range(count))]
    if name not in present:
        raise ValueError(f"there is no device {name!r} here; choose one of {', '.join(present)}")
    return torch.device(name)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """All learnable numbers of ``module``, and those in parameters of more than one dimension.

    >>> count_parameters(nn.Conv2d(2, 4, 3))
    (76, 72)
    """
    sizes = [(parameter.numel(), parameter.ndim) for parameter in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, dimensions in sizes if dimensions > 1)


def count_flops(module: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """FLOPs of a forward pass in evaluation and of a backward pass in training, by torch's counter.

    What is not counted stands in the text of this module. Use the meta device to compute nothing.

    Args:
        module: a fusion method, or a network with one output.
        *inputs: its inputs; gradients are taken for those that ask for one, and for all parameters.

    >>> count_flops(nn.Conv2d(2, 4, 1, bias=False), torch.zeros(1, 2, 3, 3))
    (144, 144)
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(*inputs)
    backward = _backward(_outputs(module.train()(*inputs)), module, inputs)
    corrected = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=corrected) as backward_counter:
        backward()
    return counter.get_total_flops(), backward_counter.get_total_flops()


def _convolution_backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
    **shapes: Any,
) -> int:
    """As much as the forward pass for the gradient of the input, and again for that of the weight."""
    positions = math.prod((x if transposed else grad)[2:])
    return 2 * x[0] * positions * math.prod(weight) * sum(output_mask[:2])  # the third is of the bias


def count_saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Bytes that a forward pass in training keeps for the backward pass, besides inputs, parameters and buffers.

    A storage that several saved tensors share counts once, and in full.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> count_saved_bytes(nn.Sequential(nn.Sigmoid(), nn.Flatten()), x)  # the sigmoid keeps its result
    24
    """
    given = {_storage_key(x.untyped_storage()) for x in (*inputs, *module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[_storage_key(storage)] = storage  # held, so that its address is not given to another
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        module.train()(*inputs)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in given)


def _storage_key(storage: torch.UntypedStorage) -> int:
    return storage._cdata  # not data_ptr(), which is 0 for all on the meta device


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else (result.hr_feat, result.lr_feat)


def _backward(outputs: Sequence[Tensor], module: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """A backward pass to all that asks for a gradient; it can be called again and again."""
    leaves = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
    gradients = [torch.ones_like(x) for x in outputs]
    return partial(torch.autograd.grad, outputs, leaves, gradients, retain_graph=True, allow_unused=True)


def _maps(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """A fine map and a coarse one of ``size``, both asking for gradients, as the maps of a network do."""
    height, width = size
    shapes = (1, CHANNELS, 2 * height, 2 * width), (1, CHANNELS, height, width)
    hr_feat, lr_feat = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    return hr_feat, lr_feat


def _sites(device: torch.device) -> list[tuple[Tensor, ...]]:
    return [_maps(size, device) for size in SITES]


def _image(device: torch.device) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(1, 3, *IMAGE, device=device),)]


class _Turns:
    """Times the two passes of one method, a turn at a time; the first turn warms up."""

    def __init__(self, fusion: Fusion, device: torch.device) -> None:
        self.fusion = fusion
        self.device = device
        self.repeats: dict[str, int] = {}
        self.samples: dict[str, list[float]] = {"forward": [], "backward": []}

    def take(self, maps: tuple[Tensor, Tensor]) -> None:
        with torch.no_grad():
            self._time("forward", partial(self.fusion.eval(), *maps))
        outputs = _outputs(self.fusion.train()(*maps))
        self._time("backward", _backward(outputs, self.fusion, maps))

    def _time(self, name: str, call: Callable[[], object]) -> None:
        if name in self.repeats:
            self.samples[name].append(self._seconds(call, self.repeats[name]))
        else:
            call()
            self.repeats[name] = math.ceil(MIN_SECONDS / self._seconds(call, 1))

    def _seconds(self, call: Callable[[], object], repeats: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self._wait()
        return (time.perf_counter() - start) / repeats

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def latency(self, name: str) -> Latency:
        milliseconds = 1e3 * torch.tensor(self.samples[name], dtype=torch.float64)
        lower, median, upper = (float(milliseconds.quantile(share)) for share in (0.25, 0.5, 0.75))
        return Latency(median, lower, upper)


class _Row:
    """Collects the figures of one :class:`Cost`, and the reason for each that cannot be had."""

    def __init__(self, place: str, method: str) -> None:
        self.place = place
        self.method = method
        self.figures: dict[str, Any] = {}
        self.failures: dict[str, str] = {}

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        # Methods of the user's own are measured too; whatever one of them raises must not cost the others' figures.
        try:
            yield
        except Exception as error:
            self.failures[what] = str(error).strip().partition("\n")[0] or type(error).__name__

    def count(self, build: Callable[[], nn.Module], inputs: Inputs, device: torch.device) -> None:
        """Take all figures but the latency; one module for each of ``inputs``."""
        with self.attempt("cannot be built"):
            module = build().to(device)
            parameters, weights = count_parameters(module)
            places = len(inputs(META))
            self.figures |= {"parameters": places * parameters, "weights": places * weights}
            with self.attempt("memory"):
                self.figures["saved_bytes"] = sum(count_saved_bytes(module, *x) for x in inputs(device))
            with self.attempt("FLOPs"):
                module.to(META)  # its values are not needed any more
                counts = [count_flops(module, *x) for x in inputs(META)]
                self.figures["flops_forward"] = sum(forward for forward, _ in counts)
                self.figures["flops_backward"] = sum(backward for _, backward in counts)

    def cost(self) -> Cost:
        note = "; ".join(f"{what}: {reason}" for what, reason in self.failures.items())
        return Cost(self.place, self.method, **self.figures, note=note)


def measure_costs(
    methods: Sequence[str],
    device: torch.device,
    rounds: int = ROUNDS,
    progress: Progress = lambda done, total, step: None,
) -> list[Cost]:
    """Measure methods at the three sites of an FPN with 256 channels, and in every model that there is.

    Args:
        methods: names of :func:`freqfusion.fusion.list_fusions`, each once.
        device: where latency, and memory at the sites, are measured; see :func:`choose_device`.
        rounds: how many times each method's latency is sampled, after a round to warm up.
        progress: told before each step.

    Returns:
        A row per method at the sites, then a row per model and method. A figure that cannot be computed (a model that
        needs an absent package, an operator without a meta form, too little memory) is None, and ``note`` of
        the row says why.

    Raises:
        ValueError: for an unknown or repeated method, or fewer than one round.
    """
    for method in methods:
        if method not in list_fusions():
            raise ValueError(f"unknown fusion {method!r}; choose among: {', '.join(list_fusions())}")
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods must name at least one method, and each once, got {list(methods)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    total, done = len(methods) * (1 + 1 + rounds + len(MODELS)), 0

    def step(what: str) -> None:
        nonlocal done
        progress(done, total, what)
        done += 1

    sites = [_Row(THREE_SITES, method) for method in methods]
    for row in sites:
        step(f"{row.method}: parameters, FLOPs, memory")
        row.count(partial(create_fusion, row.method, CHANNELS, CHANNELS), _sites, device)
    _measure_latencies(sites, device, rounds, step)
    networks = [_Row(model, method) for model in MODELS for method in methods]
    for row in networks:
        step(f"{row.place} with {row.method}")
        row.count(partial(create_model, row.place, NUM_CLASSES, row.method), _image, META)
    return [row.cost() for row in (*sites, *networks)]


def _measure_latencies(
    rows: Sequence[_Row], device: torch.device, rounds: int, step: Callable[[str], None]
) -> None:
    maps = _maps(LATENCY_SITE, device)
    turns = {
        row.method: _Turns(create_fusion(row.method, CHANNELS, CHANNELS).to(device), device)
        for row in rows
        if row.figures  # else it cannot be built
    }
    for number in range(rounds + 1):
        for row in rows:
            step(f"{row.method}: latency, " + (f"round {number} of {rounds}" if number else "warm-up"))
            if row.method in turns:
                with row.attempt("latency"):
                    turns[row.method].take(maps)
                if "latency" in row.failures:
                    del turns[row.method]
    for row in rows:
        if row.method in turns:
            turn = turns[row.method]
            row.figures |= {f"{name}_ms": turn.latency(name) for name in turn.samples}


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """What the reader of a latency must know of the machine it was taken on."""
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    try:  # Linux, where the platform module knows no more than the architecture
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
