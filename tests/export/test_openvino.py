"""ONNX files in OpenVINO beside torch, by hand; ``-s`` shows the errors."""

from pathlib import Path

import pytest
import torch

from freqfusion import create_fusion, list_fusions
from freqfusion.export import OPSETS, export_onnx

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.openvino


@pytest.mark.parametrize("name", list_fusions())
@pytest.mark.parametrize("opset", OPSETS)
def test_methods(name: str, opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fusion = create_fusion(name, 16, 16).eval()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(std=0.2)  # large enough that every branch matters
    for dynamic, sizes in ((True, ((24, 32), (25, 35), (48, 16))), (False, ((24, 32),))):
        export_onnx(fusion, tmp_path / "fusion.onnx", sizes[0], dynamic=dynamic, opset=opset)
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        network = openvino.compile_model(tmp_path / "fusion.onnx", "CPU", options)
        for height, width in sizes:
            hr = torch.randn(1, 16, height, width)
            lr = torch.randn(1, 16, -(-height // 2), -(-width // 2))
            with torch.no_grad():
                expected = fusion(hr, lr)[1 if fusion.refines_hr else 2 :]
            outputs = network([hr.numpy(), lr.numpy()])
            assert len(outputs) == len(expected)
            for i, truth in enumerate(expected):
                error = (torch.from_numpy(outputs[i]) - truth).abs().max().item()
                largest = truth.abs().max().item()
                print(f"{name}, opset {opset}, {height}x{width}: {error:.1e} of {largest:.3g}")
                assert error <= 3e-4 * largest
