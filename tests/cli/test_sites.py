"""``freqfusion sites``."""

from pathlib import Path

import pytest

from freqfusion.cli.main import main


def test_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    file = tmp_path / "net.py"
    file.write_text(
        "import torchvision\ndef make():\n    return torchvision.ops.FeaturePyramidNetwork([8, 16, 32], 16)\n"
    )
    assert main(["sites", f"{file}:make", "--fusion", "carafe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["site", "in", "fine", "coarse", "parameters"]
    assert lines[1].startswith("fusions.1  torchvision FeaturePyramidNetwork    16      16 ")
    assert lines[-1].startswith("carafe adds ")


def test_nothing_to_upgrade(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "torch.nn:Identity"]) == 2
    assert "found no place in this Identity" in capsys.readouterr().err


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "mask_rcnn"]) == 2
    assert "unknown model 'mask_rcnn', did you mean mask_rcnn_r50?" in capsys.readouterr().err
