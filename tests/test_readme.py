"""The README's Python example runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_example() -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 1
    names: dict = {}
    exec(examples[0], names)
    assert tuple(names["x1234"].shape) == (2, 4 * 64, 128, 96)
