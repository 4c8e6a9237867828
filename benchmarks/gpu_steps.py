"""The steps of gpu.sh that are Python: every kernel once, time by kernel of the module, and the page."""

import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freqfusion import FreqFusion
from freqfusion.ops import carafe, local_similarity, normalize_kernels, resample, use_backend
from freqfusion.ops._checks import is_channels_last
from freqfusion.ops.carafe.logits import add_low_pass, carafe_from_logits
from freqfusion.ops.carafe.op import carafe_channels_last
from freqfusion.ops.normalized_similarity.op import normalized_similarity
from freqfusion.ops.resample.directed import directed_resample

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if CUDA else (torch.float32, torch.float16)
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
HEIGHT, WIDTH = (19, 27) if CUDA else (3, 5)
"""Of the small maps: odd, and in the interpreter so small that it takes seconds."""
OPERATORS = {
    "carafe k5": (lambda x, k: carafe(x, k, 5), (16, HEIGHT, WIDTH), (25, 2 * HEIGHT, 2 * WIDTH)),
    "carafe k5, uneven": (lambda x, k: carafe(x, k, 5), (16, HEIGHT, WIDTH), (25, 2 * HEIGHT - 1, 3 * WIDTH)),
    "carafe k3": (lambda x, k: carafe(x, k, 3), (16, HEIGHT, WIDTH), (9, HEIGHT, WIDTH)),
    "carafe k5, groups, mirrored": (
        lambda x, k: carafe(x, k, 5, groups=2, padding_mode="reflect"),
        (16, HEIGHT, WIDTH),
        (50, 2 * HEIGHT, 2 * WIDTH),
    ),
    "from logits k3": (
        lambda x, k: carafe_from_logits(x, k, 3, gain=2),
        (16, HEIGHT, WIDTH),
        (9, HEIGHT, WIDTH),
    ),
    "sum with a low-pass k5, and its kernels": (
        lambda plus, x, k: torch.cat(add_low_pass(plus, x, k, 5, keep=True), 1),
        (9, 2 * HEIGHT, 2 * WIDTH),
        (9, HEIGHT, WIDTH),
        (25, 2 * HEIGHT, 2 * WIDTH),
    ),
    "local_similarity": (local_similarity, (16, HEIGHT, WIDTH)),
    "normalized similarity": (
        lambda x: normalized_similarity(
            x, *torch.linspace(-1, 1, 32, device=x.device).to(x.dtype).chunk(2), 2
        ),
        (16, HEIGHT, WIDTH),
    ),
    "normalize k5": (
        lambda k: normalize_kernels(k, 5, window=torch.ones(5, 5, device=k.device)),
        (25, HEIGHT, WIDTH),
    ),
    "resample": (
        lambda x, offsets: resample(x, offsets, 4, (HEIGHT // 2, WIDTH // 2)),
        (16, HEIGHT, WIDTH),
        (8, HEIGHT, WIDTH),
    ),
    "directed resample": (
        lambda x, fine, coarse: directed_resample(x, fine, coarse, 2, (HEIGHT, WIDTH)),
        (16, 2 * HEIGHT, 2 * WIDTH),
        (8, 2 * HEIGHT, 2 * WIDTH),
        (32, HEIGHT, WIDTH),
    ),
    "carafe k5 and directed resample, channels innermost between": (
        lambda x, k, fine, coarse: directed_resample(
            carafe_channels_last(x, k, 5), fine, coarse, 2, (HEIGHT, WIDTH), is_channels_last(x)
        ),
        (16, HEIGHT, WIDTH),
        (25, 2 * HEIGHT, 2 * WIDTH),
        (8, 2 * HEIGHT, 2 * WIDTH),
        (32, HEIGHT, WIDTH),
    ),
}


def _run(name: str, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    """Output and gradients of one operator for the inputs of seed 0."""
    torch.manual_seed(0)
    function, *sizes = OPERATORS[name]
    maps = [torch.randn(2, *size, dtype=torch.float64).to(dtype) for size in sizes]
    leaves = [x.to(device).contiguous(memory_format=layout).requires_grad_() for x in maps]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, dtype=torch.float64).to(dtype).to(device)
    return [
        x.detach().cpu().double() for x in (out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype)))
    ]


def kernels() -> int:
    """Every operator forward and backward at a small odd size, against float64 of the same rounded inputs."""
    wrong = 0
    calls = list(itertools.product(OPERATORS, DTYPES, LAYOUTS))
    with _processes(len(calls)) as pool:  # most of the time is compiling, one kernel after the other
        for right in pool.map(_check, *zip(*calls, strict=True)):
            wrong += not right
    return int(wrong > 0)


def _check(name: str, dtype: torch.dtype, layout: str) -> bool:
    """Whether an operator is right; prints what it found."""
    label = f"{name}, {str(dtype).removeprefix('torch.')}, {layout}"
    try:
        with use_backend("triton"):
            found = _run(name, DEVICE, dtype, LAYOUTS[layout])
    except Exception as error:
        print(f"FAILED {label}: {type(error).__name__}: {error}", flush=True)
        return False
    expected = _exact(name, dtype)
    errors = [float((x - y).norm() / y.norm().clamp_min(1e-12)) for x, y in zip(found, expected, strict=True)]
    right = max(errors) < TOLERANCE[dtype]
    print("ok    " if right else "WRONG ", label, " ".join(f"{x:.1e}" for x in errors), flush=True)
    return right


def _exact(name: str, dtype: torch.dtype) -> list[Tensor]:
    """In float64 with plain torch, of the inputs as ``dtype`` holds them."""
    torch.manual_seed(0)
    function, *sizes = OPERATORS[name]
    leaves = [
        torch.randn(2, *size, dtype=torch.float64).to(dtype).double().requires_grad_() for size in sizes
    ]
    with use_backend("torch"):
        out = function(*leaves)
    cotangent = torch.randn(out.shape, dtype=torch.float64).to(dtype).double()
    return [x.detach() for x in (out, *torch.autograd.grad(out, leaves, cotangent))]


def profile(folder: Path) -> int:
    """Time by kernel, launches and kept memory of FreqFusion at the finest level of two COCO images."""
    kinds = list(itertools.product((torch.bfloat16, torch.float32), LAYOUTS))
    with _processes(len(kinds)) as pool:
        list(pool.map(_first_step, *zip(*kinds, strict=True)))
    records = []
    for dtype, layout in kinds:
        fusion, hr, lr = _module_and_maps(dtype, layout)
        for backward in (False, True):
            records.append(_profiled(fusion, hr, lr, backward, 10 if CUDA else 1) | {"layout": layout})
            _print(records[-1])
    (folder / "profile.json").write_text(json.dumps(records, indent=1) + "\n")
    return 0


def _module_and_maps(dtype: torch.dtype, layout: str) -> tuple[FreqFusion, Tensor, Tensor]:
    torch.manual_seed(0)
    coarse = (100, 168) if CUDA else (5, 7)
    hr, lr = (
        torch.randn(2, 256, *size, dtype=dtype, device=DEVICE)
        .contiguous(memory_format=LAYOUTS[layout])
        .requires_grad_()
        for size in ((2 * coarse[0], 2 * coarse[1]), coarse)
    )
    fusion = FreqFusion(256, 256).to(DEVICE, dtype)
    return fusion.to(memory_format=LAYOUTS[layout]), hr, lr


def _first_step(dtype: torch.dtype, layout: str) -> None:
    """Run the module forward and backward once; prints how long it took, which is mostly compiling."""
    fusion, hr, lr = _module_and_maps(dtype, layout)
    began = time.monotonic()
    _, fine, coarse = fusion(hr, lr)
    torch.autograd.backward((fine, coarse), (torch.ones_like(fine), torch.ones_like(coarse)))
    _wait()
    seconds = time.monotonic() - began
    print(f"first step, {str(dtype).removeprefix('torch.')}, {layout}: {seconds:.1f} s", flush=True)


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def _processes(calls: int) -> ProcessPoolExecutor:
    """At most sixteen, for each holds a GPU's context; fresh ones, for that does not survive a fork."""
    count = min(16, calls, os.cpu_count() or 1)
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def _profiled(fusion: FreqFusion, hr: Tensor, lr: Tensor, backward: bool, repeats: int) -> dict[str, Any]:
    kept = 0
    leaves = (hr, lr, *fusion.parameters())
    ones = (torch.ones_like(hr), torch.ones_like(hr))

    def run() -> None:
        nonlocal kept
        with torch.set_grad_enabled(backward):
            before = torch.cuda.memory_allocated() if CUDA else 0
            _, fine, coarse = fusion(hr, lr)
        if backward:
            kept = (torch.cuda.memory_allocated() if CUDA else 0) - before
            torch.autograd.grad((fine, coarse), leaves, ones)

    for _ in range(3 if CUDA else 1):
        run()
    _wait()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    asked = time.perf_counter() - began  # what Python and torch do to launch, where the GPU is not slower
    _wait()
    whole = time.perf_counter() - began
    graph = _graph_seconds(fusion, hr, lr, backward, repeats) if CUDA else 0.0
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if CUDA else [activity.CPU]
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(repeats):
            run()
        _wait()
    kernels = {}
    for event in seen.key_averages():
        spent = event.self_device_time_total if CUDA else event.self_cpu_time_total
        if spent and (not CUDA or event.device_type == torch.autograd.DeviceType.CUDA):
            kernels[event.key] = {"us": spent / repeats, "launches": event.count / repeats}
    return {
        "dtype": str(hr.dtype).removeprefix("torch."),
        "pass": "forward+backward" if backward else "forward",
        "us": sum(kernel["us"] for kernel in kernels.values()),
        "launches": sum(kernel["launches"] for kernel in kernels.values()),
        "asked_us": 1e6 * asked / repeats,
        "wall_us": 1e6 * whole / repeats,
        "graph_us": 1e6 * graph,
        "kept_bytes": kept,
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1]["us"])),
    }


def _graph_seconds(fusion: FreqFusion, hr: Tensor, lr: Tensor, backward: bool, repeats: int) -> float:
    """One run of a CUDA graph of the same, which needs no launches of its own."""
    samples = tuple(torch.randn_like(x).requires_grad_(backward) for x in (hr, lr))
    if backward:
        graphed = torch.cuda.make_graphed_callables(FreqFusion(256, 256).to(hr), samples)
        ones = (torch.ones_like(hr), torch.ones_like(hr))

        def run() -> None:
            _, fine, coarse = graphed(hr, lr)
            torch.autograd.grad((fine, coarse), (hr, lr, *graphed.parameters()), ones)

    else:
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            fusion(*samples)
        run = graph.replay
    for _ in range(3):
        run()
    _wait()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait()
    return (time.perf_counter() - began) / repeats


def _print(record: dict[str, Any]) -> None:
    print(_title(record), flush=True)
    for name, kernel in list(record["kernels"].items())[:15]:
        print(f"  {kernel['us']:9.1f} us  {kernel['launches']:5.1f}x  {name[:90]}", flush=True)


def _title(record: dict[str, Any]) -> str:
    kept = f", outputs and kept {record['kept_bytes'] / 2**20:.0f} MiB" if record["kept_bytes"] else ""
    return (
        f"FreqFusion, {record['dtype']}, {record['layout']}, {record['pass']}: {record['us']:.0f} us of the GPU in "
        f"{record['launches']:.0f} launches; by the clock {record['wall_us']:.0f} us, launching them takes "
        f"{record['asked_us']:.0f}; as a CUDA graph {record['graph_us']:.0f} us by the clock{kept}"
    )


def page(folder: Path) -> int:
    """Write performance-gpu.md from what the steps left."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    device = torch.cuda.get_device_name() if CUDA else platform.processor() or "CPU"
    steps = (folder / "steps.txt").read_text().splitlines()
    parts = [
        "# Performance on a GPU",
        f"{device}, torch {torch.__version__}, commit {commit or 'unknown'}. Written by `benchmarks/gpu.sh`.",
        "\n".join(f"- {line}" for line in steps),
    ]
    for name in ("tests", "memcheck", "kernels"):
        log = folder / f"{name}.log"
        if log.exists():
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
            parts += [f"## {name.capitalize()}", "```\n" + "\n".join(last) + "\n```"]
    if (folder / "profile.json").exists():
        parts.append("## Time by kernel of the module")
        for record in json.loads((folder / "profile.json").read_text()):
            rows = list(record["kernels"].items())[:12]
            lines = [f"| {x['us']:.1f} | {x['launches']:.1f} | `{name[:80]}` |" for name, x in rows]
            parts += [
                _title(record),
                "\n".join(["| us | launches | kernel |", "| ---: | ---: | --- |", *lines]),
            ]
    for name in ("bfloat16", "float32", "training"):
        part = folder / name / "benchmark.md"
        if part.exists():  # its headings go one level down, and its plots stay behind
            lines = [line for line in part.read_text().splitlines() if not line.startswith("![")]
            parts.append("\n".join(f"#{line}" if line.startswith("#") else line for line in lines).strip())
    (folder / "performance-gpu.md").write_text("\n\n".join(parts) + "\n")
    print(folder / "performance-gpu.md")
    return 0


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    sys.exit({"kernels": kernels, "profile": profile, "page": page}[name](*map(Path, rest)))
