"""Say what works on this machine and what is missing: paste it into a bug report."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from importlib import metadata
from typing import Any

from freqfusion import __version__
from freqfusion.cli._arguments import CommandParser

EXAMPLE = """\
example:
  freqfusion doctor
  freqfusion doctor --json > doctor.json

Names versions, devices, the backends of the operators (each computes FreqFusion once, forward and backward, and is
compared with plain PyTorch) and the optional packages. It reads no data, sends nothing and prints no paths. The
exit code is 1 where a computation fails, a package is older than needed, or torch does not load.
"""
VARIABLES = ("FREQFUSION_", "TRITON_", "OMP_", "MKL_NUM_", "CUDA_VISIBLE_DEVICES", "PYTORCH_")
"""How the names of environment variables start that change what runs, or how fast."""
TOLERANCE = 1e-4
"""Relative difference of two float32 backends that is called a fault; rounding gives some 1e-6."""


CORE = "core"
"""Stands for what every installation brings, among the extras."""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser("doctor", __doc__, EXAMPLE)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return int(bool(report["faults"]))


def examine() -> dict[str, Any]:
    """All that the command prints, as it stands in the JSON; ``faults`` lists what is wrong, a line each."""
    report: dict[str, Any] = {
        "freqfusion": __version__,
        "installed": _installation(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
        "compiler": _compiler(),
        "extras": _extras(),
    }
    old = {
        f"{name} {package['installed']} is older than {package['needed']}"
        for packages in report["extras"].values()
        for name, package in packages.items()
        if package["old"]
    }
    report["faults"] = sorted(old)  # several extras may bring one package
    try:
        report |= _torch()
    except (ImportError, OSError) as error:
        report["faults"].append(f"torch does not load: {error}")
    report["faults"] += [
        f"backend {check['backend']} on {check['device']}: {check['error']}"
        for check in report.get("checks", [])
        if check["error"]
    ]
    return report


def as_text(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = [
        f"freqfusion  {report['freqfusion']} ({report['installed']})",
        f"python      {report['python']}, {report['system']}",
    ]
    if "torch" in report:
        lines += [
            f"torch       {report['torch']}, {report['build']}; {report['threads']} threads",
            *(f"device      {device}" for device in report["devices"]),
        ]
    lines += [
        f"compiler    {report['compiler'] or 'no C++ compiler found; only building the CPU kernels needs one'}"
    ]
    lines += [f"variable    {name}={value}" for name, value in report["environment"].items()]
    lines += ["", "backends, forward and backward of a small FreqFusion:"]
    for check in report.get("checks", []):
        outcome = check["error"] or (
            f"ok in {check['milliseconds']:.1f} ms, relative difference from torch {check['difference']:.0e}"
        )
        lines.append(f"  {check['backend']:<7} {check['device']:<5} {outcome}")
    lines += [f"  {name:<7} not used: {why}" for name, why in report.get("unusable", {}).items()]
    lines += ["", "packages:"]
    for extra, packages in report["extras"].items():
        present = [
            f"{name} {package['installed']}" for name, package in packages.items() if package["installed"]
        ]
        amiss = [name for name, package in packages.items() if package["old"] or not package["installed"]]
        lines.append(f"  {extra:<13}{', '.join(present) or '-'}")
        if amiss:
            target = "freqfusion" if extra == CORE else f"freqfusion[{extra}]"
            lines.append(f'  {"":<13}missing or old: {", ".join(amiss)}; python -m pip install "{target}"')
    lines += ["", *(f"FAULT: {fault}" for fault in report["faults"])]
    return "\n".join(lines if report["faults"] else [*lines, "No faults found."])


def _installation() -> str:
    try:
        distribution = metadata.distribution("freqfusion")
    except metadata.PackageNotFoundError:
        return "run from a folder, not installed"
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return "editable" if origin.get("dir_info", {}).get("editable") else "from a wheel"


def _compiler() -> str:
    """The first line of what the compiler says of itself, or ``""``; looked for as at install."""
    words = shlex.split(os.environ.get("CXX", ""))
    found = words or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not found:
        return ""
    try:
        said = subprocess.run(
            [*found, "--version"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{found[0]} does not run: {error}"
    return said.partition("\n")[0]


def _extras() -> dict[str, dict[str, dict[str, Any]]]:
    """For the core and each extra, its packages: version needed, version installed or None, whether that is old."""
    extras: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        requirements = metadata.requires("freqfusion") or []
    except metadata.PackageNotFoundError:
        return {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+)(\[.*\])?\s*(?:>=([\d.]+))?(?:.*extra == ['\"](\w+)['\"])?", requirement)
        if match is None or match[1] == "freqfusion" or match[4] in ("dev", "docs"):
            continue
        try:
            installed = metadata.version(match[1])
        except metadata.PackageNotFoundError:
            installed = None
        old = installed is not None and _numbers(installed) < _numbers(match[3] or "")
        extras.setdefault(match[4] or CORE, {})[match[1]] = {
            "needed": match[3],
            "installed": installed,
            "old": old,
        }
    return extras


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without zeros at the end.

    >>> _numbers("2.8.0+cpu"), _numbers("1.0rc1"), _numbers("")
    ((2, 8), (1,), ())
    """
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in re.sub(r"(\.0+)*$", "", release[0]).split(".")) if release else ()


def _torch() -> dict[str, Any]:
    """What needs torch: versions, devices, backends and the computations."""
    import torch

    from freqfusion.benchmarks.cost import describe_machine
    from freqfusion.ops import available_backends

    built = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else torch.version.hip and f"ROCm {torch.version.hip}"
    )
    devices = [f"cpu: {describe_machine(torch.device('cpu'))['device_name']}, {os.cpu_count()} cores"]
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds.append("cuda")
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = about.total_memory / 2**30
            devices.append(f"cuda:{index}: {about.name}, {memory:.0f} GiB, sm_{about.major}{about.minor}")
    if torch.backends.mps.is_available():
        kinds.append("mps")
        devices.append("mps: Apple GPU")
    reasons = available_backends()
    if "cuda" not in kinds and not reasons["triton"]:
        reasons["triton"] = "Triton's interpreter is on, which is for tests"
    return {
        "torch": torch.__version__,
        "build": f"built for {built or 'the CPU'}",
        "threads": torch.get_num_threads(),
        "devices": devices,
        "unusable": {name: why for name, why in reasons.items() if why},
        "checks": [
            _check(backend, kind)
            for kind in kinds
            for backend, only in (("torch", kind), ("native", "cpu"), ("triton", "cuda"))
            if kind == only and not reasons[backend]
        ],
    }


def _check(backend: str, device: str) -> dict[str, Any]:
    """One small FreqFusion, forward and backward, against plain torch on the same device."""
    import torch

    from freqfusion.benchmarks.machine import best_seconds
    from freqfusion.fusion import FreqFusion
    from freqfusion.ops import explain, use_backend

    outcome: dict[str, Any] = {"backend": backend, "device": device, "error": ""}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fusion = FreqFusion(hr_channels=16, lr_channels=16, init="paper")
            maps = torch.rand(1, 16, 20, 24), torch.rand(1, 16, 10, 12)
        fusion.to(device)
        fine, coarse = (each.to(device).requires_grad_() for each in maps)
        weights = list(fusion.parameters())

        def step() -> torch.Tensor:
            _, fine_out, coarse_out = fusion(fine, coarse)
            loss = fine_out.square().mean() + coarse_out.square().mean()
            found = (fine_out, coarse_out, *torch.autograd.grad(loss, [fine, coarse, *weights]))
            return torch.cat([each.detach().flatten() for each in found])

        with use_backend("torch"):
            expected = step()
        with use_backend(backend):
            reason = explain("carafe", coarse, torch.zeros(1, 9, 20, 24, device=device)).cannot[backend]
            if reason:
                raise RuntimeError(reason)
            difference = ((step() - expected).norm() / expected.norm()).item()
            outcome |= {
                "difference": difference,
                "milliseconds": 1e3 * best_seconds(step, torch.device(device)),
            }
        if not difference < TOLERANCE:
            outcome["error"] = (
                f"differs from torch by {difference:.1e}, relative; at most {TOLERANCE:.0e} is rounding"
            )
    except Exception as error:  # whatever breaks is what the report is for
        outcome["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return outcome
