"""The Python of the pages runs as printed, block after block, in an empty folder."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's code leaves behind."""
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)
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
