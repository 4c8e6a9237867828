"""Draw what a trained network sees in images: masks, boxes or panoptic segments."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from freqfusion._optional import require
from freqfusion._settings import check_settings
from freqfusion.cli._arguments import CommandParser, whole_number
from freqfusion.cli._progress import progress_bar

if TYPE_CHECKING:
    import torch

    from freqfusion.prediction.inputs import ImageRecord
    from freqfusion.prediction.writers import Writer
    from freqfusion.tasks.base import ClassTask
    from freqfusion.tasks.object_task import ObjectTask
    from freqfusion.tasks.semantic import SegmentationModule

EXAMPLE = """\
example:
  freqfusion predict photos/ --checkpoint runs/camvid/best.ckpt --out results/
  freqfusion predict --model nuclei --out results/

SOURCE is an image, a folder (subfolders are searched too), a pattern in quotes such as 'photos/**/*.jpg', or a
video (with pip install "freqfusion[video]"), whose frames are predicted one by one.
CHECKPOINT is a file of freqfusion fit, or a folder of freqfusion convert or save_pretrained.
NAME is a trained network of the package freqfusion-weights: nuclei, nuclei_unet, nuclei_unet_bilinear or blood_cells.
Without SOURCE its example photograph is predicted.

Photos are turned upright by their EXIF orientation first; results are of the upright photo.

writes into the folder OUT, for photos/street/a.jpg:
  overlays/street/a.png   the result over the image
and, of semantic segmentation,
  masks/street/a.png      class indices, 8 bits with a palette (16 bits for more than 255 classes)
  colours/street/a.png    the class colours
  class_shares.csv, class_shares.json   the share of each class in each image
of detection and instance segmentation,
  predictions.json        boxes, scores and masks in COCO's form
  object_counts.csv       how many objects of each class each image has
of panoptic segmentation,
  panoptic/street/a.png, panoptic.json  the segments in COCO's panoptic form
"""


def _parser() -> CommandParser:
    parser = CommandParser("predict", __doc__, EXAMPLE)
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help="image, folder, pattern or video; see below"
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--checkpoint", type=Path, help="of the trained network; see below")
    network.add_argument("--model", metavar="NAME", help="a trained network of freqfusion-weights; see below")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, mps")
    parser.add_argument("--flip", action="store_true", help="average or merge with the mirrored image")
    parser.add_argument("--skip-bad", action="store_true", help="log unreadable images and go on")
    semantic = parser.add_argument_group("semantic segmentation")
    semantic.add_argument(
        "--window",
        type=whole_number,
        help="side of a sliding window, pixels; overlaps are averaged [as evaluated in training]",
    )
    semantic.add_argument("--stride", type=whole_number, help="step of the window, pixels [two thirds of it]")
    semantic.add_argument(
        "--scales",
        type=float,
        nargs="+",
        help="average over these image scales, e.g. 0.75 1 1.25 [as evaluated in training]",
    )
    objects = parser.add_argument_group("detection and instance segmentation")
    objects.add_argument(
        "--score", type=float, help="least score, from 0 to 1, of what is drawn and written [0.5]"
    )
    objects.add_argument(
        "--sizes",
        type=whole_number,
        nargs="+",
        help="merge what is found with the images' shorter side resized to these lengths [as in training]",
    )
    return parser


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.source is None and args.model is None:
        parser.error("SOURCE is missing: give an image, a folder, a pattern or a video")
    for module in ("torchvision", "lightning", "rich", "numpy", "PIL", "matplotlib"):
        require(module, "train")
    _predict(args)
    return 0


def _predict(args: argparse.Namespace) -> None:
    # Imported here, so that --help and a missing package are answered at once.
    from rich.console import Console

    from freqfusion.data import BadSampleError
    from freqfusion.prediction.inputs import open_source
    from freqfusion.training import load_checkpoint
    from freqfusion.zoo.released import EXAMPLE_PHOTOGRAPH, released_folder

    if args.model is not None:
        args.checkpoint = released_folder(args.model)
        args.source = args.source or args.checkpoint / EXAMPLE_PHOTOGRAPH
    source = open_source(args.source, args.out)
    module, _, _ = load_checkpoint(args.checkpoint)
    output = _output(args, module.to(_device(args.device)))
    console = Console()
    done = seen = 0
    try:
        with progress_bar("predicting") as bar:
            for picture in bar.track(source.pictures, source.count):
                seen += 1
                try:
                    _add(output, picture)
                except BadSampleError as error:
                    if not args.skip_bad:
                        before = f"; {done} images before it are in {args.out}" if done else ""
                        raise ValueError(f"{error} (--skip-bad leaves such images out){before}") from error
                    console.print(f"left out: {error}", style="yellow", markup=False)
                    continue
                done += 1
    except (KeyboardInterrupt, ValueError):
        if done:  # what was found so far is not lost
            output.finish()
        raise
    if not done:
        raise ValueError(f"none of the {seen} images in {args.source} could be read")
    console.print(output.finish())
    console.print(f"{done} of {seen} images predicted; results in {args.out}", markup=False)


def _add(output: "Writer", picture: "ImageRecord") -> None:
    from freqfusion.data import BadSampleError

    image = picture.read()
    try:
        output.add(picture, image)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        raise BadSampleError(
            f"{picture.file}: {image.shape[2]}x{image.shape[1]} pixels need more memory than there is. Make it "
            "smaller, or cut it into parts."
        ) from error


def _output(args: argparse.Namespace, module: "ClassTask") -> "Writer":
    from freqfusion.prediction.writers import ObjectWriter, PanopticWriter, SemanticWriter

    trained = module.hparams
    if module.task == "semantic":
        _refuse(args, ("sizes", "score"), "semantic segmentation")
        settings = {"resize": module.data_options.get("resize"), **_inference_settings(args, trained)}
        return SemanticWriter(cast("SegmentationModule", module), args.out, settings, args.checkpoint)
    _refuse(args, ("window", "stride", "scales"), "objects and segments")
    objects = cast("ObjectTask", module)
    trained_as = objects.inference
    inference = replace(trained_as, sizes=args.sizes or trained_as.sizes, flip=args.flip or trained_as.flip)
    if objects.network.finds == "segments":
        _refuse(args, ("score",), "panoptic segmentation")
        return PanopticWriter(objects, args.out, inference)
    return ObjectWriter(objects, args.out, inference, 0.5 if args.score is None else args.score)


def _refuse(args: argparse.Namespace, options: tuple[str, ...], task: str) -> None:
    for name in options:
        value = getattr(args, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name} does not apply to this network's task, {task}; leave it out")


def _inference_settings(args: argparse.Namespace, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the command line, else those with which the network was judged in training."""
    own_window = args.window is not None
    settings = {
        "window": args.window if own_window else trained["window"],
        "stride": args.stride if own_window or args.stride is not None else trained["stride"],
        "scales": args.scales or trained["scales"],
    }
    check_settings("semantic", settings)
    return {**settings, "flip": args.flip or trained["flip_test"]}


def _device(name: str) -> "torch.device":
    import torch

    from freqfusion.benchmarks.cost import choose_device

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return choose_device(name)
