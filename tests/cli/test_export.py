"""``freqfusion export``."""

import pytest
import torch

from freqfusion.cli.main import main

FUSION = "fusion:bilinear?hr_channels=2&lr_channels=3"


def test_a_fusion_module(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", FUSION, "--size", "8x12", "--format", "torch-export", "--dynamic"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bilinear.pt2: torch.export, float32, ")
    assert lines[0].endswith(", any size")
    assert lines[1] == "inputs hr_feat, lr_feat; outputs fused_lr"
    assert [line.split()[0] for line in lines[3:]] == ["size", "8x12", "9x15", "16x6"]
    program = torch.export.load("bilinear.pt2").module()
    assert program(torch.zeros(1, 2, 9, 9), torch.zeros(1, 3, 5, 5))[0].shape == (1, 3, 9, 9)


def test_a_part_of_a_network_with_another_number_of_channels(capsys, tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.Softmax(1))\n"
    )
    out = tmp_path / "conv.pt2"
    arguments = ["export", f"{file}:make", "--size", "8x8", "--format", "torch-export", "--out", str(out)]
    assert main([*arguments, "--channels", "1", "--module", "0"]) == 0
    assert torch.export.load(out).module()(torch.zeros(1, 1, 8, 8))[0].shape == (1, 2, 8, 8)
    capsys.readouterr()
    assert main([*arguments, "--module", "2"]) == 2
    assert "the model has no module '2'; its parts are: 0, 1" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "does not take inputs of shape (1, 3, 8, 8)" in capsys.readouterr().err


def test_a_checkpoint(tmp_path):
    pytest.importorskip("lightning")
    pytest.importorskip("torchmetrics")
    from freqfusion.training import load_checkpoint
    from tiny_training import tiny_fit

    tiny_fit(tmp_path, "plain", max_steps=3, data={"length": 4})
    checkpoint, out = tmp_path / "last.ckpt", tmp_path / "net.pt2"
    words = ["--size", "8x9", "--format", "torch-export", "--out", str(out)]
    assert main(["export", str(checkpoint), *words]) == 0
    image = torch.randn(1, 3, 8, 9)
    network = load_checkpoint(checkpoint)[0].network
    with torch.no_grad():
        assert torch.allclose(torch.export.load(out).module()(image)[0], network(image), atol=1e-6)


def test_a_saved_model(tmp_path):
    pytest.importorskip("safetensors")
    from freqfusion.zoo import save_pretrained
    from support import load_model

    model = load_model("fusion:deconv?hr_channels=2&lr_channels=3").eval()
    folder = save_pretrained(model, tmp_path / "saved")
    out = tmp_path / "net.pt2"
    assert main(["export", str(folder), "--size", "8x8", "--format", "torch-export", "--out", str(out)]) == 0
    hr, lr = torch.zeros(1, 2, 8, 8), torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(torch.export.load(out).module()(hr, lr)[0], model(hr, lr).lr_feat)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--size", "8"], "'8' is not a height and a width such as 512x768"),
        (["--size", "0x8"], "--size is (0, 8), expected"),
        (["--size", "9x9", "--dynamic", "2"], "dynamic=2 needs a size of multiples of 2, got 9x9"),
        (["--size", "8x8", "--channels", "0"], "--channels is 0, expected a whole number of at least 1"),
        (["--size", "8x8", "--format", "torch-export", "--out", "x.onnx"], "must end in .pt2, got x.onnx"),
    ],
)
def test_wrong_words(words, message, capsys):
    if "torch-export" not in words:
        words = [*words, "--format", "torch-export"]
    assert main(["export", FUSION, *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    assert main(["export", "--help"]) == 0
    assert "example:" in capsys.readouterr().out
