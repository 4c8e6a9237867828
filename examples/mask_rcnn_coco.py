"""Fine-tune a Mask R-CNN with FreqFusion in its pyramid on data in COCO's format.

    python examples/mask_rcnn_coco.py --images DIR --annotations FILE.json --out my_mask_rcnn

Weights are random unless --weights says otherwise; torchvision downloads what it names.
"""

import argparse

import torch
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

import freqfusion

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", required=True)
parser.add_argument("--annotations", required=True)
parser.add_argument("--out", required=True, help="folder of the trained model")
parser.add_argument("--weights", help="DEFAULT for torchvision's COCO weights (91 classes)")
parser.add_argument("--fusion", default="freqfusion")
parser.add_argument("--min-size", type=int, default=800, help="short side of the images in the network")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--batch", type=int, default=2)
parser.add_argument("--lr", type=float, default=0.005)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

augment = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])
coco = CocoDetection(args.images, args.annotations, transforms=augment)
filled = [i for i, image in enumerate(coco.ids) if coco.coco.getAnnIds([image], iscrowd=False)]
data = wrap_dataset_for_transforms_v2(coco, target_keys=("boxes", "labels", "masks"))

name = f"torchvision:maskrcnn_resnet50_fpn?min_size={args.min_size}"
weights = args.weights and f"torchvision:{args.weights}"
detector = freqfusion.create_model(name, fusion=args.fusion, weights=weights, init="identity")
model = detector.host  # torchvision's own, which detects as before until it is trained
model.to(device).train()
optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)

for step in range(1, args.steps + 1):
    batch = [data[filled[i]] for i in torch.randint(len(filled), (args.batch,))]
    images = [image.to(device) for image, _ in batch]
    targets = [{key: value.to(device) for key, value in target.items()} for _, target in batch]
    loss = sum(model(images, targets).values())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

freqfusion.save_pretrained(model, args.out)
print(f'get it back with freqfusion.from_pretrained("{args.out}")')
