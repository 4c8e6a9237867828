"""The examples of docs/decoders.md run as printed."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "decoders.md"


def test_examples() -> None:
    text = PAGE.read_text(encoding="utf-8")
    decoders, segmenter = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(decoders, names)
    assert len(names["pyramid"]) == 4
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    exec(segmenter, names)
    assert names["model"].num_classes == 19


def test_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert pictures == ["images/decoders.svg"]
    assert all((PAGE.parent / picture).is_file() for picture in pictures)
