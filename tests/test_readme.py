"""The README's Python examples run as printed."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_python_examples() -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    upgrade, fusion = examples
    names: dict = {}
    exec(fusion, names)
    assert tuple(names["x1234"].shape) == (2, 4 * 64, 128, 96)
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    exec(upgrade, names)
    assert len(names["model"].freqfusion_upgrade.sites) == 3
