"""Upsample the features of a frozen encoder, such as DINOv2, and look at them in pictures and pixel by pixel."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from freqfusion._optional import require
from freqfusion._spread import spread
from freqfusion.cli._arguments import CommandParser, image_size, whole_number
from freqfusion.cli._progress import progress_bar

if TYPE_CHECKING:
    import torch

    from freqfusion.features import FeatureUpsampler
    from freqfusion.prediction.inputs import ImageRecord

EXAMPLE = """\
examples:
  freqfusion features photo.jpg --model vit_small_patch14_dinov2 --weights dinov2_vits14_pretrain.pth \\
    --upsampler bilinear --upsampler naf --upsampler-weights naf=naf_release.pth --out features/
  freqfusion features photos/ --model transformers:Dinov2Model --weights DINOV2_FOLDER \\
    --upsampler bilinear --size 224x336 --save npy --out features/

IMAGE is an image, a folder (subfolders are searched too), or a pattern in quotes. Several may be given.
`freqfusion list` names the upsamplers. Weights are files at hand; without them an encoder or a learned upsampler is
random, which the command says.

writes into the folder OUT, for photos/street/a.jpg:
  pictures/street/a.png          the image and the features in three colours, before and after upsampling
  features/street/a/naf.npy      with --save npy (or safetensors): the upsampled features, (1, C, H, W)
  report.html                    the pictures and an explorer of single pixels; opens from disk
"""
LONGER_SIDE = 512
"""Of the images, pixels, if no size is asked for."""


def _parser() -> CommandParser:
    parser = CommandParser("features", __doc__, EXAMPLE, "feature pictures")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="see below")
    parser.add_argument(
        "--model",
        required=True,
        help="the encoder: a name of timm, or transformers:CLASS such as transformers:Dinov2Model",
    )
    parser.add_argument(
        "--weights",
        help="its weights: of timm a file, an address, or timm:TAG, a download; of transformers a folder [random]",
    )
    parser.add_argument(
        "--upsampler",
        action="append",
        required=True,
        metavar="NAME",
        help="a name of freqfusion list; may repeat",
    )
    parser.add_argument(
        "--upsampler-weights",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="weights of an upsampler: a file, an address, or released:NAME, a download; may repeat [random]",
    )
    parser.add_argument(
        "--layers",
        type=whole_number,
        nargs="+",
        metavar="N",
        help="layers whose features are joined [the last]",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--resize",
        type=image_size,
        metavar="HxW",
        help=f"size to which the images are brought first [longer side at most {LONGER_SIDE}]",
    )
    parser.add_argument(
        "--size", type=image_size, metavar="HxW", help="size of the result [that of the image]"
    )
    parser.add_argument(
        "--chunk", type=whole_number, metavar="N", help="rows computed at a time, to save memory [all]"
    )
    parser.add_argument("--save", choices=("npy", "safetensors"), help="write the upsampled features too")
    parser.add_argument("--pictures", type=whole_number, default=6, help="images of them on the page [6]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [a GPU where there is one]")
    return parser


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.command = shlex.join(["freqfusion", "features", *argv])
    if len(set(args.upsampler)) < len(args.upsampler):
        parser.error("--upsampler names a method twice")
    args.files = {}
    for text in args.upsampler_weights:
        name, equals, file = text.partition("=")
        if not equals or not file or name not in args.upsampler:
            parser.error(f"--upsampler-weights is {text!r}, expected NAME=FILE with a NAME of --upsampler")
        args.files[name] = file
    for module in ("torchvision", "rich", "numpy", "PIL", "matplotlib", "jinja2"):
        require(module, "train")
    _features(args)
    return 0


def _features(args: argparse.Namespace) -> None:
    # Imported here, so that --help and a missing package are answered at once.
    from freqfusion.analysis.upsampled import cells_of, draw_strip, observe_maps, write_upsampled
    from freqfusion.benchmarks.cost import choose_device
    from freqfusion.drawing.figures import save_png
    from freqfusion.features import extract_features, list_upsamplers
    from freqfusion.zoo.encoders import load_encoder

    for name in args.upsampler:
        if name not in list_upsamplers():
            raise ValueError(f"unknown upsampler {name!r}; choose one of: {', '.join(list_upsamplers())}")
    device = choose_device(args.device)
    records = _records(args)
    shown = spread(len(records), args.pictures)
    cells = cells_of(len(shown), 1 + len(args.upsampler))
    try:
        encoder = load_encoder(args.model, args.weights).to(device)
    except TypeError as error:  # an option in the name
        raise ValueError(f"{args.model}: {error}") from error
    notes = [] if args.weights else [f"{args.model} has random weights; give it its own with --weights."]
    upsamplers: dict[str, FeatureUpsampler] = {}
    observed = []
    with progress_bar("upsampling") as bar:
        for place, record in enumerate(bar.track(records)):
            image = _read(record, args.resize).to(device)
            coarse = extract_features(encoder, image, args.layers)
            if not upsamplers:
                upsamplers = _upsamplers(args, encoder, coarse.shape[1])
                notes += _random(args.files, upsamplers)
                for note in notes:
                    print(f"freqfusion features: warning: {note}", file=sys.stderr)
            maps = _maps(args, record, image, coarse, upsamplers)
            one = observe_maps(record.name.as_posix(), image[0], maps, cells)
            save_png(args.out / "pictures" / f"{record.name}.png", draw_strip(one))
            if place in shown:
                observed.append(one)
    write_upsampled(observed, args.out, args.model, notes, args.command)
    print(f"{len(records)} images; the page is {args.out / 'report.html'}")


def _records(args: argparse.Namespace) -> "list[ImageRecord]":
    from freqfusion.prediction.inputs import open_source

    records: list[ImageRecord] = []
    for source in args.images:
        records += open_source(source, args.out, videos=False).pictures
    names = [record.name.as_posix().lower() for record in records]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two images would both be called {twice[0]}: name the folder that holds both")
    return records


def _read(record: "ImageRecord", size: tuple[int, int] | None) -> "torch.Tensor":
    """``(1, 3, H, W)`` in [0, 1]."""
    import torch.nn.functional as F

    image = record.read()[None].float() / 255
    if size is None:
        shrink = min(1.0, LONGER_SIDE / max(image.shape[-2:]))
        height, width = (max(1, round(side * shrink)) for side in image.shape[-2:])
        size = (height, width)
    return F.interpolate(image, size, mode="bilinear", antialias=True)


def _upsamplers(
    args: argparse.Namespace, encoder: "torch.nn.Module", channels: int
) -> "dict[str, FeatureUpsampler]":
    from freqfusion.features import create_upsampler, encoder_options

    upsamplers = {}
    for name in args.upsampler:
        options = encoder_options(name, encoder)
        upsampler = create_upsampler(name, channels, weights=args.files.get(name), **options)
        upsamplers[name] = upsampler.to(next(encoder.parameters()).device)
    return upsamplers


def _random(files: Mapping[str, str], upsamplers: "Mapping[str, FeatureUpsampler]") -> list[str]:
    """A sentence on the upsamplers that have weights but were given none."""
    names = [
        name for name, upsampler in upsamplers.items() if name not in files and any(upsampler.state_dict())
    ]
    if not names:
        return []
    return [
        f"random weights, whose results mean nothing: {', '.join(names)}; give each its own with "
        "--upsampler-weights NAME=FILE."
    ]


def _maps(
    args: argparse.Namespace,
    record: "ImageRecord",
    image: "torch.Tensor",
    coarse: "torch.Tensor",
    upsamplers: "dict[str, FeatureUpsampler]",
) -> "Iterator[tuple[str, torch.Tensor]]":
    """The features, coarse and by upsampler; saved where that is wanted."""
    import torch

    from freqfusion.analysis.upsampled import COARSE

    yield COARSE, coarse[0]
    for name, upsampler in upsamplers.items():
        try:
            with torch.no_grad():
                features = upsampler(coarse, image, args.size, chunk=args.chunk)
        except ValueError as error:
            raise ValueError(f"{record.name}: {name}: {error}") from error
        if args.save:
            _save(args.out / "features" / record.name / f"{name}.{args.save}", features)
        yield name, features[0]


def _save(path: Path, features: "torch.Tensor") -> None:
    import numpy as np

    from freqfusion._files import replacing

    features = features.cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        if path.suffix == ".npy":
            with part.open("wb") as file:
                np.save(file, features.numpy())
        else:
            require("safetensors.torch", "hub").save_file({"features": features}, part)
