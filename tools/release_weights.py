#!/usr/bin/env python3
"""Write the best network of a run into a folder of the package freqfusion-weights, in half precision.

example:
  tools/release_weights.py runs/nuclei_unet/last.ckpt weights/src/freqfusion_weights/nuclei_unet

Vectors (biases, norms) stay in float32: they are small, and running variances may be large. Model cards and
photographs are put beside the files by hand.
"""

import argparse
from pathlib import Path

import freqfusion
from freqfusion.training import load_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="of freqfusion fit")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    module, classes, _ = load_checkpoint(args.checkpoint)
    network = module.network
    for tensor in network.state_dict(keep_vars=True).values():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor.data = tensor.data.half()
    freqfusion.save_pretrained(network, args.folder, classes=classes)
    print(f"{args.folder}: {sum(file.stat().st_size for file in args.folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
