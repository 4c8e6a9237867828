"""Measure what fusion does to the features of a trained model, and look at it pixel by pixel."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from freqfusion._optional import require
from freqfusion._spread import spread
from freqfusion._text import readable
from freqfusion.cli._arguments import CommandParser, image_size, whole_number
from freqfusion.cli._progress import progress_bar

if TYPE_CHECKING:
    from freqfusion.analysis.measure import FeatureStudy

EXAMPLE = """\
examples:
  freqfusion analyze --checkpoint runs/camvid/best.ckpt --data.root CAMVID_FOLDER --out analysis/
  freqfusion analyze --checkpoint runs/freqfusion/best.ckpt --against runs/bilinear/best.ckpt --out analysis/
  freqfusion analyze --features before.npy after.npy labels.npy --out analysis/

writes into the folder OUT:
  report.html             tables, figures and an explorer of single pixels; opens from disk
  similarity.csv, ...     the numbers, and each figure as .png, .svg and .csv
"""


def _parser() -> CommandParser:
    parser = CommandParser("analyze", __doc__, EXAMPLE)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        type=Path,
        help="a .ckpt of `freqfusion fit`, or a folder of freqfusion.save_pretrained",
    )
    source.add_argument(
        "--features",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".npy, .npz or .safetensors with features, labels and, if wanted, images and predictions",
    )
    parser.add_argument("--against", type=Path, help="a second model to compare with")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--data.root", dest="data", type=Path, help="folder of the images and labels [that of the training]"
    )
    parser.add_argument(
        "--data.dataset",
        dest="dataset",
        help="its layout: ade20k, camvid, folder, ... [that of the training, or folder]",
    )
    parser.add_argument("--split", help="part of the data [the one judged in training, or val]")
    parser.add_argument(
        "--classes", type=Path, help="with --features: a text file with one class name per line"
    )
    parser.add_argument("--limit", type=whole_number, help="take only so many images, evenly spread [all]")
    parser.add_argument("--pictures", type=whole_number, default=6, help="images of them in the explorer [6]")
    parser.add_argument("--sites", nargs="+", metavar="PATH", help="fusions to look at [all]")
    parser.add_argument(
        "--data.resize",
        dest="resize",
        type=image_size,
        metavar="HxW",
        help="size of all images [that of the training]",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [a GPU where there is one]")
    return parser


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.command = shlex.join(["freqfusion", "analyze", *argv])
    if args.features and any((args.against, args.data, args.dataset, args.split, args.sites, args.resize)):
        parser.error(
            "--features takes no --against, --data.root, --data.dataset, --data.resize, --split or --sites"
        )
    if args.classes and not args.features:
        parser.error("--classes goes with --features; a data set knows its classes")
    for module in ("torchvision", "rich", "numpy", "scipy", "PIL", "matplotlib", "jinja2"):
        require(module, "train")

    from freqfusion.analysis.page import write_study

    study, source = _saved(args) if args.features else _trained(args)
    write_study(study, args.out, source, args.command)
    _print(study)
    print(f"the page is {args.out / 'report.html'}")
    return 0


def _print(study: "FeatureStudy") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from freqfusion.analysis.tables import displacement_tables, similarity_tables

    for block in [*similarity_tables(study), *displacement_tables(study)[:1]]:
        table = Table()
        for place, name in enumerate(block.header):
            table.add_column(Text(readable(name)), justify="right" if place else "left")
        for row in block.rows:
            table.add_row(*(Text(readable(cell)) for cell in row))
        Console().print(table)


def _saved(args: argparse.Namespace) -> "tuple[FeatureStudy, str]":
    from freqfusion.analysis.measure import FeatureStudy
    from freqfusion.analysis.saved_features import read_features

    saved = read_features(args.features, args.classes)
    indices = spread(len(saved), args.limit)
    pictures = spread(len(indices), args.pictures)
    study = FeatureStudy(saved.classes, saved.palette)
    with progress_bar("measuring") as bar:
        for place, index in enumerate(bar.track(indices)):
            study.add(saved[index], show=place in pictures)
    return study, "saved features"


def _trained(args: argparse.Namespace) -> "tuple[FeatureStudy, str]":
    require("lightning", "train")
    from freqfusion.analysis.measure import FeatureStudy
    from freqfusion.analysis.subjects import load_subject, observe, open_data, tell_apart
    from freqfusion.benchmarks.cost import choose_device

    paths = [path for path in (args.against, args.checkpoint) if path is not None]
    subjects = tell_apart([load_subject(path, args.sites) for path in paths])
    data = open_data(subjects[-1], args.data, args.dataset, args.resize)
    split = args.split or data.hparams["val_split"]
    indices = spread(len(data.dataset(split)), args.limit)
    pictures = spread(len(indices), args.pictures)
    study = FeatureStudy(data.classes, data.palette)
    observed = observe(subjects, data, split, indices, choose_device(args.device))
    with progress_bar("measuring") as bar:
        for place, observation in enumerate(bar.track(observed, len(indices))):
            study.add(observation, show=place in pictures)
    return study, f"the data set {data.hparams['dataset']} ({split})"
