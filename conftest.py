"""Without Triton its kernels cannot be imported to look for doctests."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["src/freqfusion/ops/_triton"]
