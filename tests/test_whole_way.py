"""A model upgraded, trained, saved, made again in another process and exported: the same outputs all along."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import freqfusion

for package in ("segmentation_models_pytorch", "safetensors", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


def test_from_upgrade_to_onnx(tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    options = {"encoder_depth": 3, "decoder_channels": (16, 8, 8), "classes": 2}
    model = smp.Unet("resnet18", encoder_weights=None, **options)
    image, mask = torch.rand(2, 3, 48, 64), torch.randint(2, (2, 48, 64))
    model.eval()
    before = model(image)

    freqfusion.upgrade_(model, filter_fn=lambda site: site.path.endswith("fusions.0"))
    assert torch.equal(model(image), before)

    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(image), mask).backward()
        optimizer.step()
    gates = [p for name, p in model.named_parameters() if "gate" in name]
    assert all(gate.abs().max() > 0 for gate in gates)
    trained = model.eval()(image)
    assert not torch.equal(trained, before)

    freqfusion.save_pretrained(model, tmp_path / "saved")
    torch.save(image, tmp_path / "image.pt")
    code = f"""
import torch, freqfusion
from freqfusion.export import export_onnx
model = freqfusion.from_pretrained({str(tmp_path / "saved")!r})
image = torch.load({str(tmp_path / "image.pt")!r}, weights_only=True)
torch.save(model(image).detach(), {str(tmp_path / "out.pt")!r})
export_onnx(model, {str(tmp_path / "model.onnx")!r}, (48, 64))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), trained)

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    results = [session.run(None, {name: image[i : i + 1].numpy()})[0] for i in range(2)]
    difference = np.abs(np.concatenate(results) - trained.detach().numpy()).max()
    assert difference < 1e-4 * trained.abs().max()
