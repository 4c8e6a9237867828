"""The examples of docs/export.md run as printed."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from freqfusion.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def test_examples(tmp_path, monkeypatch):
    if any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime", "PIL")):
        pytest.skip("onnx, onnxscript, onnxruntime or PIL is not installed")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.effect_noise((71, 45), 50).save("photo.png")
    make, run, program = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(make, names)
    exec(run, names)
    with Image.open("mask.png") as mask:
        assert mask.size == (71, 45)
    assert (
        names["logits"].argmax(1) == names["model"].eval()(tensor(names["image"])).argmax(1).numpy()
    ).all()
    exec(program, names)
    assert names["logits"].shape == (1, 5, 65, 99)


def tensor(image: Any) -> Any:
    import torch

    return torch.from_numpy(image)


def test_options_are_those_of_the_command(capsys):
    assert main(["export", "--help"]) == 0
    text = capsys.readouterr().out
    commands = PAGE.read_text(encoding="utf-8").partition("## onnxruntime")[0]
    options = set(re.findall(r"--[a-z]+", commands))
    assert {"--dynamic", "--module", "--half", "--format", "--size"} == options
    assert all(f"  {option} " in text for option in options)
