"""Draw the masks of an image, or of a folder of images, with a trained checkpoint."""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqfusion._optional import require

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import Tensor

EXAMPLE = """\
example:
  freqfusion predict photos/ --checkpoint runs/camvid/best.ckpt --out masks/

writes into the folder OUT, for photos/street/a.jpg:
  masks/street/a.png      class indices, 8 bits with a palette (16 bits for more than 255 classes)
  colours/street/a.png    the class colours
  overlays/street/a.png   the colours over the image, with a legend
  class_shares.csv, class_shares.json   the share of each class in each image
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="freqfusion predict",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="IMAGE_OR_FOLDER", help="subfolders are searched too")
    parser.add_argument("--checkpoint", type=Path, required=True, help="written by `freqfusion fit`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, mps")
    parser.add_argument(
        "--window",
        type=int,
        help="side of a sliding window, pixels; overlaps are averaged [as evaluated in training]",
    )
    parser.add_argument("--stride", type=int, help="step of the window, pixels [two thirds of it]")
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        help="average over these image scales, e.g. 0.75 1 1.25 [as evaluated in training]",
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    parser.add_argument("--skip-bad", action="store_true", help="log unreadable images and go on")
    return parser


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    for module in ("torchvision", "lightning", "rich", "numpy", "PIL", "matplotlib"):
        require(module, "train")
    try:
        _predict(args)
    except (FileNotFoundError, ValueError) as error:
        if os.environ.get("FREQFUSION_DEBUG"):
            raise
        print(f"freqfusion predict: error: {error}", file=sys.stderr)
        return 2
    return 0


def _predict(args: argparse.Namespace) -> None:
    # Imported here, so that --help and a missing package are answered at once.
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from freqfusion._files import write_atomically
    from freqfusion.data import read_image
    from freqfusion.training import load_checkpoint
    from freqfusion.training.checkpoints import read_checkpoint
    from freqfusion.training.predict import find_images, predict_mask

    images = find_images(args.source, args.out)
    module, classes, palette = load_checkpoint(args.checkpoint)
    network = module.network.to(_device(args.device))
    data = read_checkpoint(args.checkpoint).get("datamodule_hyper_parameters", {})
    settings = {"resize": data.get("resize"), **_inference_settings(args, module.hparams)}
    console = Console()
    counts: dict[str, torch.Tensor] = {}
    progress = Progress(
        TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    with progress:
        for path, name in progress.track(images):
            try:
                image = read_image(path)
            except ValueError as error:
                if not args.skip_bad:
                    raise ValueError(f"{error} (--skip-bad leaves such images out)") from error
                progress.console.print(f"left out: {error}", style="yellow", markup=False)
                continue
            mask = predict_mask(network, image, **settings)
            count = torch.bincount(mask.flatten(), minlength=len(classes))
            counts[name.as_posix()] = count
            _draw(args.out, name, image, mask, count, classes, palette)
    if not counts:
        raise ValueError(f"none of the {len(images)} images in {args.source} could be read")
    write_atomically(args.out / "class_shares.csv", _csv(counts, classes))
    write_atomically(args.out / "class_shares.json", _json(counts, classes, args.checkpoint))
    console.print(_table(counts, classes))
    console.print(f"{len(counts)} of {len(images)} images predicted; results in {args.out}", markup=False)


def _inference_settings(args: argparse.Namespace, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the command line, else those with which the network was judged in training."""
    own_window = args.window is not None
    return {
        "window": args.window if own_window else trained["window"],
        "stride": args.stride if own_window or args.stride is not None else trained["stride"],
        "scales": args.scales or trained["scales"],
        "flip": args.flip or trained["flip_test"],
    }


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error
    return device


def _draw(
    out: Path,
    name: Path,
    image: "Tensor",
    mask: "Tensor",
    count: "Tensor",
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> None:
    from freqfusion.analysis.figures import beside, colour_mask, legend, overlay, save_index_png, save_png

    file = f"{name}.png"
    save_index_png(out / "masks" / file, mask, palette)
    save_png(out / "colours" / file, colour_mask(mask, palette))
    present = [index for index in count.argsort(descending=True, stable=True).tolist() if count[index]]
    key = legend(
        [classes[index] for index in present],
        [palette[index] for index in present],
        [float(count[index]) / mask.numel() for index in present],
        font_size=min(max(mask.shape[0] // 40, 12), 72),
        height=mask.shape[0],
    )
    save_png(out / "overlays" / file, beside(overlay(image.permute(1, 2, 0), mask, palette), key))


def _csv(counts: "dict[str, Tensor]", classes: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class_index", "class", "pixels", "share"])
    for name, count in counts.items():
        total = int(count.sum())
        for index, pixels in enumerate(count.tolist()):
            writer.writerow([name, index, classes[index], pixels, f"{pixels / total:.6f}"])
    return text.getvalue().encode("utf-8")


def _json(counts: "dict[str, Tensor]", classes: Sequence[str], checkpoint: Path) -> bytes:
    content = {
        "checkpoint": str(checkpoint),
        "classes": list(classes),
        "shares": {name: (count / count.sum()).tolist() for name, count in counts.items()},
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def _table(counts: "dict[str, Tensor]", classes: Sequence[str]) -> "Table":
    import torch
    from rich.table import Table

    from freqfusion.analysis.figures import format_share

    every = torch.stack(list(counts.values()))
    total = every.sum(0)
    table = Table(title="class shares", title_justify="left")
    table.add_column("class")
    table.add_column("share of the pixels", justify="right")
    table.add_column("in images", justify="right")
    for index in total.argsort(descending=True, stable=True).tolist():
        if total[index]:
            share = format_share(float(total[index] / total.sum()))
            table.add_row(classes[index], share, str(int((every[:, index] > 0).sum())))
    return table
