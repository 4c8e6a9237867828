"""Train an upgraded U-Net of segmentation_models_pytorch on binary masks, such as the vessels of DRIVE.

    python examples/unet_vessels.py --data DIR --out my_unet

DIR/train and DIR/test hold images/NAME.jpg and labels/NAME.png (0 background, 1 object), of any size.
"""

import argparse
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

import freqfusion

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--out", required=True, help="folder of the trained model")
parser.add_argument("--weights", help="of the encoder; imagenet downloads them")
parser.add_argument("--fusion", default="freqfusion")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--crop", type=int, default=256, help="side of the training crops")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def read(split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    paths = sorted((args.data / split / "images").iterdir())
    images = (decode_image(path, ImageReadMode.RGB) / 255 - 0.5 for path in paths)
    labels = (decode_image(args.data / split / "labels" / f"{path.stem}.png") for path in paths)
    return [(image, (label[:1] > 0).float()) for image, label in zip(images, labels, strict=True)]


def dice(predicted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return 2 * (predicted * truth).sum() / (predicted.sum() + truth.sum() + 1e-6)


model = freqfusion.upgrade_(smp.Unet("resnet18", encoder_weights=args.weights, classes=1), args.fusion).to(
    device
)
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
crop, train = v2.RandomCrop(args.crop, pad_if_needed=True), read("train")
for step in range(1, args.steps + 1):
    crops = torch.stack([crop(torch.cat(train[i])) for i in torch.randint(len(train), (args.batch,))]).to(
        device
    )
    logits, truth = model(crops[:, :3]), crops[:, 3:]
    loss = F.binary_cross_entropy_with_logits(logits, truth) + 1 - dice(logits.sigmoid(), truth)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

model.eval()
with torch.inference_mode():  # whole images, whose sides need not be multiples of 32
    scores = [dice((model(image[None].to(device)) > 0).float().cpu(), truth) for image, truth in read("test")]
print(f"Dice on {len(scores)} test images: {torch.stack(scores).mean():.4f}")
freqfusion.save_pretrained(model, args.out)
