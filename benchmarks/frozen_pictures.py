"""What saved networks of benchmarks/frozen.py miss: images, truth, and errors in orange, as one picture.

example:
  python benchmarks/frozen_pictures.py foreground --root NUCLEI --dataset-options '{"foreground": "nucleus"}' \\
      --resize 256 256 --networks runs/frozen/bilinear-0 runs/frozen/freqfusion-0 --out nuclei.png

The images are spread evenly over the split; shown of each is the square with most boundary in the truth, enlarged.
"""

import argparse
import json
from pathlib import Path

import torch

import freqfusion
from freqfusion._spread import spread
from freqfusion.data.transforms import eval_transform
from freqfusion.drawing.figures import (
    densest_window,
    error_map,
    picture_strip,
    save_png,
    zoom,
)
from freqfusion.metrics.functional import boundary_band
from freqfusion.tasks.image_data import SegmentationData
from freqfusion.tasks.pictures import draw_truth, image_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset")
    parser.add_argument("--root", required=True)
    parser.add_argument("--dataset-options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--split", default="val")
    parser.add_argument("--resize", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), required=True)
    parser.add_argument("--networks", type=Path, nargs="+", required=True, help="named METHOD-SEED")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--side", type=int, default=96, help="of the square, pixels")
    parser.add_argument("--zoom", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = SegmentationData(
        args.dataset, root=args.root, dataset_options=args.dataset_options, resize=args.resize
    )
    networks = [freqfusion.from_pretrained(path).eval() for path in args.networks]
    rows = []
    for index in spread(len(data.dataset(args.split)), args.images):
        sample = data.sample(args.split, index)
        image, mask = image_bytes(sample["image"]), sample["mask"].as_subclass(torch.Tensor)
        top, left = densest_window(boundary_band(mask[None].long(), 1)[0].numpy(), args.side)
        shown = slice(top, top + args.side), slice(left, left + args.side)
        row = [image, draw_truth(data, sample)]
        for network in networks:
            tensor = eval_transform(network.normalisation)(sample)["image"].as_subclass(torch.Tensor)
            with torch.no_grad():
                found = network(tensor[None]).argmax(1)[0]
            row.append(error_map(found.numpy(), mask.numpy(), image=image))
        rows.append([zoom(picture[shown], args.zoom) for picture in row])
    titles = ["image", "truth", *(path.name.rsplit("-", 1)[0] for path in args.networks)]
    save_png(args.out, picture_strip(rows, titles))


if __name__ == "__main__":
    main()
