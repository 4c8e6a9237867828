"""An upgraded U-Net as ONNX for any size, run by OpenVINO and compared with PyTorch."""

import openvino
import segmentation_models_pytorch as smp
import torch

import freqfusion
from freqfusion.export import export_onnx

model = smp.Unet("resnet18", encoder_weights=None, classes=5).eval()
freqfusion.upgrade_(model, init="paper")  # so that the fusions count before training
print(export_onnx(model, "unet.onnx", (64, 96), dynamic=True))

# float32: on CPUs with bfloat16 arithmetic OpenVINO rounds to that unless it is told not to
network = openvino.compile_model("unet.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
for size in ((64, 96), (65, 99), (128, 48)):
    image = torch.rand(1, 3, *size)
    with torch.no_grad():
        expected = model(image)
    error = (torch.from_numpy(network(image.numpy())[0]) - expected).abs().max()
    print(f"{size}: differs by {error:.1e} of {expected.abs().max():.2f}")
    assert error < 1e-3 * expected.abs().max()
