"""Fine-tune an upgraded SegFormer of transformers on a folder of images and masks.

    python examples/segformer.py --data DIR --checkpoint nvidia/mit-b0 --out my_segformer

DIR holds classes.txt (one class a line) and train/images, train/masks with files of the same names; masks hold
class indices, 255 where there is no truth. The checkpoint is a folder or a name on the Hugging Face hub.
"""

import argparse

import torch
from transformers import SegformerForSemanticSegmentation

import freqfusion
from freqfusion.data import create_dataset
from freqfusion.data.transforms import train_transform

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True)
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--out", required=True, help="folder of the trained model")
parser.add_argument("--fusion", default="freqfusion")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--crop", type=int, default=512)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

data = create_dataset("folder", args.data, "train")
augment = train_transform((args.crop, args.crop), (0.5, 2.0), None, flip=0.5, photometric=True)
model = SegformerForSemanticSegmentation.from_pretrained(args.checkpoint, num_labels=len(data.classes))
freqfusion.upgrade_(model, args.fusion).to(device).train()
slow = [p for name, p in model.named_parameters() if name.startswith("segformer.")]
fast = [p for name, p in model.named_parameters() if not name.startswith("segformer.")]
optimizer = torch.optim.AdamW([{"params": slow}, {"params": fast, "lr": 6e-4}], 6e-5, weight_decay=0.01)

for step in range(1, args.steps + 1):
    samples = [augment(data[int(i)]) for i in torch.randint(len(data), (args.batch,))]
    images = torch.stack([sample["image"] for sample in samples]).to(device)
    labels = torch.stack([sample["mask"] for sample in samples]).long().to(device)
    loss = model(pixel_values=images, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == args.steps:
        print(f"step {step}: loss {loss.item():.3f}")

freqfusion.save_pretrained(model, args.out)
print(f'get it back with freqfusion.from_pretrained("{args.out}")')
