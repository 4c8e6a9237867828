"""Fine-tune an upgraded Mask2Former of transformers on a folder of images and semantic masks.

    python examples/mask2former.py --data DIR --checkpoint facebook/mask2former-swin-tiny-ade-semantic --out my_model

DIR holds classes.txt (one class a line) and train/images, train/masks with files of the same names; masks hold
class indices, 255 where there is no truth. The checkpoint is a folder or a name on the Hugging Face hub.
"""

import argparse

import torch
from transformers import Mask2FormerForUniversalSegmentation

import freqfusion
from freqfusion.data import create_dataset
from freqfusion.data.transforms import train_transform

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True)
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--out", required=True, help="folder of the trained model")
parser.add_argument("--fusion", default="freqfusion")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--batch", type=int, default=2)
parser.add_argument("--crop", type=int, default=512)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

data = create_dataset("folder", args.data, "train")
augment = train_transform((args.crop, args.crop), (0.5, 2.0), None, flip=0.5, photometric=True)
model = Mask2FormerForUniversalSegmentation.from_pretrained(
    args.checkpoint, num_labels=len(data.classes), ignore_mismatched_sizes=True
)
freqfusion.upgrade_(model, args.fusion).to(device).train()
slow = [p for name, p in model.named_parameters() if ".encoder." in name]  # the backbone
fast = [p for name, p in model.named_parameters() if ".encoder." not in name]
optimizer = torch.optim.AdamW([{"params": slow, "lr": 1e-5}, {"params": fast}], 1e-4, weight_decay=0.05)

for step in range(1, args.steps + 1):
    samples = [augment(data[int(i)]) for i in torch.randint(len(data), (args.batch,))]
    images = torch.stack([sample["image"] for sample in samples]).to(device)
    masks = [sample["mask"].to(device) for sample in samples]
    classes = [mask.unique() for mask in masks]
    classes = [present[present != 255].long() for present in classes]
    binary = [(mask == present[:, None, None]).float() for mask, present in zip(masks, classes, strict=True)]
    loss = model(pixel_values=images, mask_labels=binary, class_labels=classes).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    if step % 10 == 0 or step == args.steps:
        print(f"step {step}: loss {loss.item():.3f}")

freqfusion.save_pretrained(model, args.out)
print(f'get it back with freqfusion.from_pretrained("{args.out}")')
