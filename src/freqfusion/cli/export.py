"""Write a network or a fusion module as ONNX, torch.export or AOTInductor, compared with torch."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from freqfusion.cli._arguments import CommandParser, image_size, whole_number

if TYPE_CHECKING:
    from torch import nn

EXAMPLE = """\
example:
  freqfusion export runs/camvid/best.ckpt --size 512x512 --dynamic
  freqfusion export my_saved_model/ --size 512x512 --dynamic 32 --half --out model.onnx
  freqfusion export "fusion:freqfusion?hr_channels=64&lr_channels=64" --size 64x96
  freqfusion export my_saved_detector/ --module backbone --size 800x1344 --dynamic 32

The file is run at SIZE, with --dynamic at two more sizes, and written only if its results are torch's.
docs/export.md shows how to use it.
"""
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "aotinductor": ".pt2"}


def _parser() -> CommandParser:
    parser = CommandParser("export", __doc__, EXAMPLE)
    parser.add_argument(
        "model",
        metavar="CHECKPOINT_OR_MODEL",
        help="a .ckpt of `freqfusion fit`, a folder of freqfusion.save_pretrained, or a model with random weights "
        'by its line of text, such as "segnext_t?num_classes=19" (see `freqfusion sites --help`)',
    )
    parser.add_argument(
        "--size",
        type=image_size,
        required=True,
        metavar="HxW",
        help="of the image, or of a fusion's fine map",
    )
    parser.add_argument("--format", choices=SUFFIXES, default="onnx", help="of the file [onnx]")
    parser.add_argument(
        "--dynamic",
        type=whole_number,
        nargs="?",
        const=1,
        default=0,
        metavar="STEP",
        help="let the file take any size, or with STEP any of multiples of it, as networks need that check "
        "their input's size [SIZE alone]",
    )
    parser.add_argument(
        "--opset",
        type=whole_number,
        choices=(20, 18),
        default=20,
        help="of ONNX; 18 for TensorRT, see docs/export.md [20]",
    )
    parser.add_argument("--half", action="store_true", help="float16 weights and inputs")
    parser.add_argument("--module", metavar="PATH", help="export this part, such as a detector's backbone")
    parser.add_argument("--channels", type=whole_number, default=3, help="of the image [3]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="[the model's name, here]")
    return parser


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)

    import torch

    from freqfusion.export import export_onnx, export_program
    from freqfusion.fusion import Fusion

    model = _load(args.model)
    if args.module is not None:
        try:
            model = model.get_submodule(args.module)
        except AttributeError as error:
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"the model has no module {args.module!r}; its parts are: {parts}") from error
    path = args.out or Path(_name(args.model) + SUFFIXES[args.format])
    settings = {"dynamic": args.dynamic, "half": args.half}
    if not isinstance(model, Fusion):
        settings["inputs"] = lambda height, width: (torch.randn(1, args.channels, height, width),)
    print("exporting and comparing; a large network takes minutes", file=sys.stderr)
    try:
        if args.format == "onnx":
            report = export_onnx(model, path, args.size, opset=args.opset, **settings)
        else:
            report = export_program(model, path, args.size, compiled=args.format == "aotinductor", **settings)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    print(report)
    return 0


def _load(text: str) -> "nn.Module":
    path = Path(text)
    if path.suffix == ".ckpt":
        from freqfusion._optional import require

        for module in ("lightning", "torchvision", "torchmetrics"):
            require(module, "train")
        from freqfusion.training import load_checkpoint

        return load_checkpoint(path)[0].network
    if path.is_dir():
        from freqfusion import from_pretrained

        return from_pretrained(path).float()
    from freqfusion.zoo.build import build
    from freqfusion.zoo.spec import ModelSpec

    return build(ModelSpec.parse(text))


def _name(text: str) -> str:
    """A file name: the stem of a path, or a model's name."""
    path = Path(text)
    if path.suffix == ".ckpt" or path.is_dir():
        return path.resolve().stem
    return re.sub(r"\W+", "_", text.partition("?")[0].rpartition(":")[2]).strip("_") or "model"
