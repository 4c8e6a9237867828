"""Fine-tune a YOLO of ultralytics with FreqFusion in its neck.

    python examples/yolo.py --model yolo11n.yaml --data my_data.yaml --out my_yolo

ultralytics (python -m pip install ultralytics) is under the AGPL-3.0, and so is what you build with it. --data is the
YAML of a data set as ultralytics documents it; --model a configuration (fresh weights) or a .pt file that you trust.
"""

import argparse

from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import freqfusion
from freqfusion.upgrade.hosts.ultralytics import UpgradeTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="yolo11n.yaml")
parser.add_argument("--data", required=True)
parser.add_argument(
    "--out", required=True, help="folder of the trained model, beside what ultralytics writes"
)
parser.add_argument("--fusion", default="freqfusion")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--size", type=int, default=640, help="of the images in the network")
args = parser.parse_args()


class Trainer(UpgradeTrainer, DetectionTrainer):
    fusion = args.fusion  # detects as the model did before, until it is trained


yolo = YOLO(args.model)
yolo.train(data=args.data, epochs=args.epochs, batch=args.batch, imgsz=args.size, trainer=Trainer)

model = yolo.model.float().eval()
host = f"ultralytics:{args.model.replace('.pt', '.yaml')}?nc={len(yolo.names)}"
freqfusion.save_pretrained(model, args.out, host=host)
print(f'get the network back with freqfusion.from_pretrained("{args.out}")')
