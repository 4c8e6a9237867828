"""Turn an official checkpoint into a folder that freqfusion.from_pretrained loads, each tensor checked."""

import json
import sys
from pathlib import Path

from freqfusion.cli._arguments import CommandParser

EXAMPLE = """\
example:
  freqfusion convert segnext_t_freqfusion.pth --to segnext_t

writes segnext_t/model.safetensors and segnext_t/freqfusion.json; in Python then:
  model = freqfusion.from_pretrained("segnext_t")

FILE is recognised by the names and shapes in it and cannot run code. A DIR that holds a model already is left as it
is, and the command fails. docs/models.md lists the models that are known.
"""


def _parser() -> CommandParser:
    parser = CommandParser("convert", __doc__, EXAMPLE)
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="of mmsegmentation, mmdetection or detectron2: .pth, .pt or .safetensors",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write the model to")
    return parser


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)

    from freqfusion.zoo.official import convert_official

    print(f"converting {args.file}", file=sys.stderr)
    conversion = convert_official(args.file, args.to)
    print(f"recognised  {conversion.title}")
    print(f"parameters  {conversion.parameters:,}")
    print(f"tensors     {conversion.tensors}, each with the shape that the model needs")
    for reason, count in conversion.unneeded.items():
        print(f"left out    {count}: {reason}")
    for file in conversion.files:
        print(f"written     {file} ({file.stat().st_size / 1e6:,.1f} MB)")
    print(f"\nimport freqfusion\nmodel = freqfusion.from_pretrained({json.dumps(str(args.to))})")
    return 0
