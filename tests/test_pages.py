"""The Python of the pages runs as printed, block after block, in an empty folder."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, word: str = "") -> dict[str, Any]:
    """What the page's code leaves behind, or that of the blocks with ``word``."""
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if word in block]
    assert blocks
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    return names


def test_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("safetensors")
    names = run_page("upgrade.md", tmp_path, monkeypatch)
    assert type(names["neck"]).__name__ == "UpgradedNeck"
    assert names["model"].freqfusion_upgrade.fusion == "freqfusion"


def test_similarity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    names = run_page("similarity.md", tmp_path, monkeypatch)
    assert names["after"].compute().images == 2
    assert names["displacement"].compute().overall["both"].pixels > 0


def test_detection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    names = run_page("detection.md", tmp_path, monkeypatch)
    assert names["masks"].shape[1:] == (1, 375, 501)
    assert names["boxes"].shape == (len(names["masks"]), 4)


def test_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("the projections have other names")
    from safetensors.torch import load_file

    model = run_page("hosts.md", tmp_path, monkeypatch, "peft")["model"]
    names = [
        name for name, _ in model.named_parameters() if ".fusions." in name and "original_module" not in name
    ]
    saved = load_file("adapter/adapter_model.safetensors")
    assert any("gate" in name for name in names)
    assert {name.replace("modules_to_save.default.", "") for name in names} <= set(saved)
