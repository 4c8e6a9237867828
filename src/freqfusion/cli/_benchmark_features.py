"""The command ``freqfusion benchmark --features``: a table on screen, as Markdown and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from freqfusion._files import write_atomically
from freqfusion.benchmarks.features import CHANNELS, PATCH, PUBLISHED, Figures, measure_features

_HEADER = ("image", "upsampler", "seconds", "peak MiB", "process MiB")


def run_features(
    names: Sequence[str],
    sides: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    chunk: int | None,
    out: Path,
    command: str,
) -> None:
    """Measure upsamplers, print each line when it is known, and write ``features.json`` and ``features.md``.

    Arguments are those of :func:`freqfusion.benchmarks.features.measure_features`; ``out`` is the folder and
    ``command`` what the user typed.
    """
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads"
    at_a_time = "all rows at a time" if chunk is None else f"{chunk} rows at a time"
    conditions = (
        f"{place}; torch {torch.__version__}; {str(dtype).removeprefix('torch.')}; {CHANNELS} channels; patches of "
        f"{PATCH} pixels; batch 1, without gradients; {at_a_time}"
    )
    lines = [f"`{command}`", "", conditions, "", *_table_head(_HEADER)]
    print("\n".join(lines), flush=True)
    measured = []
    for figures in measure_features(names, sides, device, dtype, threads, chunk):
        measured.append(figures)
        lines.append(_row(figures))
        print(lines[-1], flush=True)
        # at once, so that a long run that is stopped leaves what it found
        content = {
            "command": command,
            "conditions": conditions,
            "figures": [asdict(each) for each in measured],
        }
        write_atomically(out / "features.json", json.dumps(content, indent=1).encode())
    published = _published(names)
    print("\n".join(published))
    write_atomically(out / "features.md", "\n".join([*lines, *published, ""]).encode())


def _table_head(header: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]


def _row(figures: Figures) -> str:
    if figures.seconds is None:
        return f"| {figures.side} | {figures.name} | {figures.problem} | | |"
    peak, process = (
        "" if count is None else f"{count / 2**20:,.0f}"
        for count in (figures.peak_bytes, figures.process_bytes)
    )
    return f"| {figures.side} | {figures.name} | {figures.seconds:.3g} | {peak} | {process} |"


def _published(names: Sequence[str]) -> list[str]:
    """What the repository of NAF prints of these methods."""
    header = (
        "published, 28 x 28 to",
        "upsampler",
        "parameters",
        "GFLOPs",
        "forward ms",
        "forward MB",
        "backward MB",
    )
    rows = []
    for name in names:
        if name not in PUBLISHED:
            continue
        cost = PUBLISHED[name]
        for i, ratio in enumerate((4, 16)):
            backward = f"{cost.backward_megabytes:g}" if ratio == 16 else ""
            rows.append(
                f"| x{ratio} ({28 * ratio}) | {name} | {cost.parameters:,} | {cost.gflops[i]:g} | "
                f"{cost.milliseconds[i]:g} | {cost.megabytes[i]:g} | {backward} |"
            )
    return ["", *_table_head(header), *rows] if rows else []
