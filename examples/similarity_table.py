"""The paper's Table I for networks of one's own: similarity of the fused features, and boundaries of the masks.

    python examples/similarity_table.py --data CAMVID runs/*/best.ckpt

Takes checkpoints of `freqfusion fit` whose decoder is the FPN, and measures what its finest output is made from:
the sum of the fine map and the coarse one that the fusion brought up.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from freqfusion.analysis.record import record_features
from freqfusion.analysis.similarity import FeatureSimilarity
from freqfusion.data.transforms import eval_transform
from freqfusion.metrics import BoundaryDistance, SegmentationMetrics
from freqfusion.tasks import SegmentationData
from freqfusion.training import load_checkpoint
from freqfusion.training.checkpoints import read_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoints", nargs="+", type=Path)
parser.add_argument("--data", required=True, help="folder of the data set they were trained on")
parser.add_argument("--module", default="decode_head.fpn.outputs.0", help="its input is measured")
parser.add_argument("--limit", type=int, help="only the first images of the validation part")
parser.add_argument("--out", type=Path, default=Path("similarity.json"))
args = parser.parse_args()

print("| network | IntraSim | SimMargin | SimAcc | at boundaries | | | mIoU | boundary, mean px | p95 px |")
print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
rows = {}
for path in args.checkpoints:
    network = load_checkpoint(path)[0].network.eval()
    normalise = eval_transform(network.normalisation)
    data = SegmentationData(**{**read_checkpoint(path)["datamodule_hyper_parameters"], "root": args.data})
    classes, count = len(data.classes), min(args.limit or 10**9, len(data.dataset("val")))
    similarity, distance = FeatureSimilarity(classes), BoundaryDistance(classes)
    metrics = SegmentationMetrics(classes, boundary_width=2)
    for index in track(range(count), path.parent.name, console=Console(stderr=True)):
        sample = data.sample("val", index)
        labels = torch.as_tensor(sample["mask"])[None].long()
        with torch.inference_mode(), record_features(network, [args.module]) as recorded:
            predicted = network(normalise(sample)["image"][None]).argmax(1)
        similarity.update(recorded[args.module].inputs[0], labels)
        distance.update(predicted, labels)
        metrics.update(predicted, labels)
    scores, displaced = similarity.compute().class_mean, distance.compute().overall["both"]
    miou = float(metrics.compute()["miou"])
    cells = [getattr(scores[r], x) for r in ("all", "boundary") for x in ("intra", "margin", "accuracy")]
    rows[path.parent.name] = [*cells, miou, displaced.mean, displaced.percentile_95]
    values = " | ".join(f"{value:.3f}" for value in rows[path.parent.name])
    print(f"| {path.parent.name} | {values} |", flush=True)
args.out.write_text(json.dumps(rows, indent=1))
