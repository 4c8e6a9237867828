"""Train a small network twice, with and without FreqFusion, and write a page that compares them."""

import argparse
from pathlib import Path

from freqfusion._optional import require
from freqfusion.cli._arguments import CommandParser, whole_number

EXAMPLE = """\
example:
  freqfusion quickstart
  freqfusion quickstart --minutes 1 --seed 3 --out runs/try

Nothing is downloaded; the scenes are made from the seed. The number of steps follows from --minutes (225
steps of each network a minute), not from the speed of the machine, so that a seed gives the same figures
again. Runs on the CPU; the minutes hold for about two cores.
"""


def _parser() -> CommandParser:
    parser = CommandParser("quickstart", __doc__, EXAMPLE)
    parser.add_argument("--minutes", type=float, default=2.0, help="length of both trainings together [2]")
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder of the results [quickstart]"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="of the scenes and the first weights [0]"
    )
    return parser


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    for module in (
        "torchvision",
        "lightning",
        "torchmetrics",
        "rich",
        "numpy",
        "PIL",
        "matplotlib",
        "jinja2",
    ):
        require(module, "train")
    _quickstart(args)
    return 0


def _quickstart(args: argparse.Namespace) -> None:
    # Imported here, so that --help and a missing package are answered at once.
    from rich.console import Console
    from rich.table import Table

    from freqfusion.comparison.quickstart import compare
    from freqfusion.comparison.quickstart_page import headline, table_rows, write_page

    console = Console()
    comparison = compare(args.minutes, args.out, args.seed, console)
    write_page(args.out, comparison)
    header, rows, best = table_rows(comparison.runs)
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row_index, row in enumerate(rows):
        cells = [f"[bold]{cell}[/]" if best.get(i) == row_index else cell for i, cell in enumerate(row)]
        table.add_row(*cells)
    console.print(table)
    console.print(headline(comparison.runs) + ".", highlight=False)
    console.print(f"The page with curves and pictures: {args.out / 'report.html'}", markup=False)
