"""What a first step of FreqFusion compiles; in a process of its own, where Triton compiles."""

from importlib.util import find_spec

import pytest

from support import run_compiling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]
STEP = """
import json, sys
import torch
from freqfusion.benchmarks.kernels import first_step
found = [
    usage._asdict()
    for size in ((50, 84), (26, 100))  # widths that the same powers of two divide
    for usage in first_step(90, getattr(torch, sys.argv[1]), getattr(torch, sys.argv[2]), size)
]
print(json.dumps(found))
"""


KINDS = [
    (dtype, layout) for dtype in ("bfloat16", "float32") for layout in ("channels_last", "contiguous_format")
]


@pytest.mark.parametrize(("dtype", "layout"), KINDS)
def test_another_size_compiles_nothing_and_nothing_spills(dtype: str, layout: str) -> None:
    usages = run_compiling(STEP, dtype, layout)
    keys = [usage["key"] for usage in usages]
    half = len(keys) // 2
    assert keys[:half] == keys[half:]
    assert all(usage["stack"] == 0 and usage["shared"] <= 227 * 1024 for usage in usages)


@pytest.mark.parametrize(
    ("dtype", "layout", "limit"), [(*kind, 17 if kind == KINDS[1] else 15) for kind in KINDS]
)
def test_a_first_step_compiles_few_kernels(dtype: str, layout: str, limit: int) -> None:
    keys = {usage["key"] for usage in run_compiling(STEP, dtype, layout)}
    assert 10 < len(keys) <= limit
