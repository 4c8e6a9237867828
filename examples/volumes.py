"""Train MONAI's SegResNet on synthetic volumes, plain or upgraded, and score vessels and blobs in 3D.

python examples/volumes.py --fusion freqfusion --seed 0

With --brain, grey and white matter in patches of a brain instead (brain_patches.py).
"""

import argparse
import json
import time
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.metrics import compute_average_surface_distance, compute_dice
from monai.networks.nets import SegResNet
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader

import freqfusion
from freqfusion.data import SyntheticVolumes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--fusion", default="freqfusion", help="a method for volumes, or plain for the host's own"
)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=2)
parser.add_argument("--lr", type=float, default=2e-3, help="the highest of the schedule")
parser.add_argument("--size", type=int, nargs=3, default=(16, 32, 32), help="depth, height, width in voxels")
parser.add_argument("--test", type=int, default=24, help="volumes to score")
parser.add_argument("--brain", action="store_true", help="patches of a brain; needs nilearn")
args = parser.parse_args()
Volumes: Any = SyntheticVolumes
if args.brain:
    from brain_patches import BrainPatches as Volumes

torch.manual_seed(args.seed)
blocks = {"blocks_down": (1, 1, 1), "blocks_up": (1, 1)}
model = SegResNet(3, init_filters=8, in_channels=1, out_channels=3, upsample_mode="nontrainable", **blocks)
if args.fusion != "plain":
    freqfusion.upgrade_(model, args.fusion, init="paper")
loss_function = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
optimizer = torch.optim.AdamW(model.parameters(), args.lr)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
train = Volumes("train", args.steps * args.batch, args.size, seed=args.seed)
start = time.process_time()
for sample in DataLoader(train, args.batch):  # each volume once
    loss = loss_function(model(sample["image"] - 0.5), sample["mask"][:, None])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
seconds = time.process_time() - start

model.eval()
dice, distance = [], []
with torch.inference_mode():
    for sample in DataLoader(Volumes("test", args.test, args.size)):
        predicted, truth = model(sample["image"] - 0.5).argmax(1), sample["mask"].long()
        both = [one_hot(x, 3).movedim(-1, 1) for x in (predicted, truth)]
        dice.append(compute_dice(*both, include_background=False)[0])
        distance.append(compute_average_surface_distance(*both, symmetric=True)[0])
classes = Volumes.classes[1:]
scores = {"fusion": args.fusion, "seed": args.seed, "cpu_seconds": round(seconds)}
for name, values, found in zip(classes, torch.stack(dice).T, torch.stack(distance).T, strict=True):
    measured = found[found.isfinite()]  # without a surface on one side there is no distance
    scores[f"{name}_dice"] = round(100 * values.nanmean().item(), 2)
    scores[f"{name}_distance"] = round(measured.mean().item(), 3) if len(measured) else None
    scores[f"{name}_unmeasured"] = len(found) - len(measured)
print(json.dumps(scores))
