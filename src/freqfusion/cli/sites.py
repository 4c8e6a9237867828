"""List the places in a model where coarse features meet fine ones, and what an upgrade would add."""

from typing import TYPE_CHECKING

from freqfusion.cli._arguments import CommandParser

if TYPE_CHECKING:
    from torch import nn

EXAMPLE = """\
example:
  freqfusion sites torchvision:fasterrcnn_resnet50_fpn
  freqfusion sites "smp:Unet?encoder_name=resnet18" --fusion carafe
  freqfusion sites transformers:Mask2Former
  freqfusion sites my_package.networks:build_model

The model is built with random weights; nothing is downloaded. In Python: freqfusion.find_sites(model).
"""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser("sites", __doc__, EXAMPLE)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name such as mask2former_swin_t; library:name?argument=value&..., of torchvision, smp, transformers, "
        "monai or ultralytics; or package.module:function or file.py:function of your own",
    )
    parser.add_argument(
        "--fusion", default="freqfusion", help="method whose parameters are counted [freqfusion]"
    )
    args = parser.parse_args(argv)

    from freqfusion.upgrade.core import find_sites, upgrade_
    from freqfusion.zoo.build import build
    from freqfusion.zoo.spec import ModelSpec

    spec = ModelSpec.parse(args.model)
    if not spec.library:
        spec.options.setdefault("num_classes", 2)  # it does not matter here
    model = build(spec)
    sites = find_sites(model)
    before = _count(model)
    upgrade_(model, args.fusion, verify=False)  # where no site can be used it raises and says why

    rows = [("site", "in", "fine", "coarse", "parameters", "")]
    for site in sites:
        added = "0" if site.skipped else f"{_count(model.get_submodule(site.path)):,}"
        rows.append((site.path, site.host, str(site.hr_channels), str(site.lr_channels), added, site.skipped))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths[:2], strict=True)]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[2:5], widths[2:], strict=True)]
        cells += [f"skipped: {row[5]}"] if row[5] else []
        print("  ".join(cells).rstrip())
    after = _count(model)
    print(f"\n{args.fusion} adds {after - before:,} parameters to {before:,} ({after / before - 1:+.1%})")
    return 0


def _count(module: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in module.parameters())
