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


@pytest.mark.parametrize(
    ("dtype", "layout", "limit"),
    [
        ("bfloat16", "channels_last", 19),
        ("bfloat16", "contiguous_format", 21),
        ("float32", "channels_last", 19),
        ("float32", "contiguous_format", 20),
    ],
)
def test_a_first_step_compiles_few_kernels_and_another_size_none(dtype: str, layout: str, limit: int) -> None:
    usages = run_compiling(STEP, dtype, layout)
    keys = [usage["key"] for usage in usages]
    half = len(keys) // 2
    assert keys[:half] == keys[half:]
    assert 10 < len(set(keys)) <= limit
    assert all(usage["stack"] == 0 and usage["shared"] <= 227 * 1024 for usage in usages)
