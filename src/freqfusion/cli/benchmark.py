"""Measure speed and memory of operators, module, models and upsamplers, or tell what each fusion method costs."""

import argparse
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from freqfusion._optional import require
from freqfusion.cli._arguments import CommandParser, whole_number

if TYPE_CHECKING:
    import torch

    from freqfusion.benchmarks.cases import Case

DTYPES = ("float32", "float64", "bfloat16", "float16")
EXAMPLE = """\
example:
  freqfusion benchmark                                      about two minutes on two CPU cores
  freqfusion benchmark --shapes coco --ops carafe freqfusion --out runs/benchmark/coco
  freqfusion benchmark --ops freqfusion --scaling
  freqfusion benchmark --training segnext_t --shrink 4
  freqfusion benchmark --explain --ops carafe --shapes coco odd
  freqfusion benchmark --cost --results runs/compare/camvid/results.json
  freqfusion benchmark --features naf featup_jbu --sides 224 448
  freqfusion benchmark --features naf --sides 2048 --chunk 32     within 8 GiB, the result's 6 included

Contestants: "unfold" (what the released code's fallback does, in plain torch), every backend of this machine,
and with --compile torch.compile of the torch backend. The folder gets benchmark.json, benchmark.md and plots.
Leave the machine alone meanwhile. docs/benchmarks.md says how it is measured. With --cost the folder gets cost.md,
cost.csv and cost.json instead.
"""
_WITH_COST = ("cost", "device", "methods", "out", "results", "rounds")
_WITH_FEATURES = ("features", "sides", "chunk", "device", "dtype", "threads", "out")


def _parser() -> CommandParser:
    parser = CommandParser("benchmark", __doc__, EXAMPLE)
    parser.add_argument(
        "--ops",
        nargs="+",
        metavar="NAME",
        help="among carafe, local_similarity, resample, normalize, freqfusion, fpn_small, segnext_t [all]",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["small"],
        metavar="SET",
        help="among small, unet, coco, cityscapes, one-pixel, odd, or full for all of them [small]",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... [cuda where there is one, else cpu]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of inputs and weights [float32]")
    parser.add_argument("--threads", type=whole_number, help="of the CPU [as torch chooses]")
    parser.add_argument(
        "--rounds", type=whole_number, help="turns of each contestant, or with --cost of each method [7; 5]"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="begin nothing more after so many, and say what is left out",
    )
    parser.add_argument(
        "--compile", action="store_true", help="with torch.compile as a contestant; compiling takes minutes"
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="also how FreqFusion's time and memory grow with pixels, channels, batch and threads",
    )
    parser.add_argument(
        "--training",
        nargs="*",
        metavar="NETWORK",
        help="measure training steps of whole networks, and of the operators those of --ops alone; among segnext_t, "
        "fpn_resnet50, unet_tf_efficientnet_lite0, mask2former_r50 [all]",
    )
    parser.add_argument(
        "--shrink",
        type=whole_number,
        default=1,
        help="train on one image so many times smaller, to try it [1]",
    )
    parser.add_argument(
        "--explain", action="store_true", help="only say which backend runs and why the others cannot"
    )
    parser.add_argument(
        "--kernels",
        metavar="sm_NN",
        help="only compile every Triton kernel for a compute capability such as sm_90, without a GPU, and print what "
        "each takes: registers, spilled bytes, shared memory",
    )
    parser.add_argument(
        "--cost",
        action="store_true",
        help="only parameters, FLOPs, memory and latency of fusion methods, at three sites and in models",
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="of --cost: names of `freqfusion list` [all]"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="of --cost: a results.json of `freqfusion compare`, to draw its quality against latency",
    )
    parser.add_argument(
        "--features",
        nargs="*",
        metavar="NAME",
        help="only time and memory of upsamplers of frozen features: names of `freqfusion.features.list_upsamplers` "
        "[all]",
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        type=whole_number,
        metavar="PIXELS",
        help="of --features: sides of the image [224 448 1024]",
    )
    parser.add_argument(
        "--chunk", type=whole_number, help="of --features: rows of the result computed at a time [all]"
    )
    parser.add_argument("--out", type=Path, default=Path("runs", "benchmark"), help="folder of the results")
    return parser


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    modes = (
        ("cost", args.cost, _WITH_COST, ("methods", "results")),
        ("features", args.features is not None, _WITH_FEATURES, ("sides", "chunk")),
    )
    for mode, on, allowed, own in modes:
        for name in given:
            if name not in allowed if on else name in own:
                parser.error(f"--{name} does not go {'with' if on else 'without'} --{mode}")
    if args.cost:
        return _cost(args)
    if args.features is not None:
        return _features(args, shlex.join(["freqfusion", "benchmark", *argv]))
    if args.kernels is not None:
        return _print_kernels(args.kernels)
    import torch  # with all that follows not before, so that --help is answered at once

    from freqfusion.benchmarks.cases import GROUPS, make_cases
    from freqfusion.benchmarks.cost import choose_device

    only_training = args.training is not None and not args.ops
    cases = [] if only_training else make_cases(args.ops or GROUPS, args.shapes)
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    if args.explain:
        for line in _explain(cases, device, dtype):
            print(line)
        return 0
    for package in ("rich", "numpy", "PIL", "matplotlib"):
        require(package, "train")
    from freqfusion.benchmarks.runner import Settings
    from freqfusion.benchmarks.session import run_benchmark
    from freqfusion.benchmarks.training import find_networks, shrunk

    networks = [] if args.training is None else find_networks(args.training)
    if args.shrink > 1:
        networks = [shrunk(network, args.shrink) for network in networks]

    settings = Settings(device, dtype, args.threads or torch.get_num_threads(), args.rounds or 7)
    command = shlex.join(["freqfusion", "benchmark", *argv])
    run_benchmark(
        cases,
        settings,
        args.out,
        compiled=args.compile,
        scaling=args.scaling,
        networks=networks,
        minutes=args.minutes or math.inf,
        command=command,
    )
    return 0


def _cost(args: argparse.Namespace) -> int:
    from freqfusion.cli._benchmark_cost import read_quality, run_cost
    from freqfusion.fusion import list_fusions

    methods = list(dict.fromkeys(args.methods or list_fusions()))
    unknown = sorted(set(methods) - set(list_fusions()))
    if unknown:
        raise ValueError(f"there is no method {unknown[0]!r}; choose from: {', '.join(list_fusions())}")
    quality = None if args.results is None else read_quality(args.results, methods)
    run_cost(methods, args.out, args.device, quality, args.rounds)
    return 0


def _features(args: argparse.Namespace, command: str) -> int:
    import torch

    from freqfusion.benchmarks.cost import choose_device
    from freqfusion.benchmarks.features import PATCH, SIDES
    from freqfusion.cli._benchmark_features import run_features
    from freqfusion.features import list_upsamplers

    names = list(dict.fromkeys(args.features or list_upsamplers()))
    unknown = sorted(set(names) - set(list_upsamplers()))
    if unknown:
        raise ValueError(f"there is no upsampler {unknown[0]!r}; choose from: {', '.join(list_upsamplers())}")
    sides = args.sides or SIDES
    if min(sides) < PATCH:
        raise ValueError(f"--sides must be at least {PATCH}, the side of a patch, got {min(sides)}")
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    run_features(
        names, sides, device, dtype, args.threads or torch.get_num_threads(), args.chunk, args.out, command
    )
    return 0


def _explain(cases: Sequence["Case"], device: "torch.device", dtype: "torch.dtype") -> Iterator[str]:
    from freqfusion.benchmarks.cases import explain_case

    for case in cases:
        yield f"{case} ({device}, {str(dtype).removeprefix('torch.')})"
        for call, explanation in explain_case(case, device, dtype).items():
            kernels = f" ({explanation.kernels})" if explanation.kernels else ""
            yield f"  {call}: {explanation.backend}{kernels}"
            for backend, reason in explanation.cannot.items():
                if backend != explanation.backend:
                    yield f"    {backend} " + (f"cannot run because {reason}" if reason else "could run too")


def _print_kernels(target: str) -> int:
    """A line for every kernel of every representative call; 1 if one spills."""
    capability = target.removeprefix("sm_")
    if not capability.isdecimal() or target == capability:
        raise ValueError(f"--kernels takes a compute capability such as sm_90, got {target!r}")
    require("triton", "dev")
    from freqfusion.ops._triton import INTERPRETED

    if INTERPRETED:
        raise ValueError("kernels are interpreted while TRITON_INTERPRET is set; unset it to compile them")
    from freqfusion.benchmarks import kernels

    count = spilling = 0
    print(kernels.HEADING)
    for line, spills in kernels.table(int(capability)):
        print(line, flush=True)
        count += 1
        spilling += spills
    print(f"{count} kernels for {target}, {spilling or 'none'} of them with spilled registers", flush=True)
    for line, spills in kernels.first_steps(int(capability)):
        print(line, flush=True)
        spilling += spills
    return int(spilling > 0)
