"""Train a YOLO of ultralytics whose YAML file has FreqFusion in its neck.

    python examples/yolo_yaml.py --data my_data.yaml --model examples/yolo/yolo11n-freqfusion.yaml --stock yolo11n.pt

ultralytics (python -m pip install ultralytics) is under the AGPL-3.0, and so is what you build with it. --stock is
the same network without fusion, whose weights are taken over: a .pt file that you trust, or a YAML file (fresh ones).
"""

import argparse

from ultralytics import YOLO

from freqfusion.upgrade.hosts import ultralytics as host

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--stock", required=True)
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--size", type=int, default=640)
args = parser.parse_args()

host.register()
yolo = YOLO(args.model)
print(host.transfer_weights(yolo, YOLO(args.stock)))
yolo.train(data=args.data, epochs=args.epochs, imgsz=args.size)
