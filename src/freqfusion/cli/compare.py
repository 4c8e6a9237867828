"""Compare runs: those that are there, or a race of fusion methods that this command trains first."""

import argparse
import math
import shlex
from pathlib import Path

from freqfusion._optional import require
from freqfusion.cli._arguments import CommandParser, whole_number

PRESETS = Path(__file__).parents[1] / "comparison" / "presets"
PACKAGES = (
    "lightning",
    "jsonargparse",
    "torchmetrics",
    "torchvision",
    "scipy",
    "rich",
    "matplotlib",
    "jinja2",
)
EXAMPLE = """\
example:
  freqfusion compare runs/camvid/segnext/*
  freqfusion compare --preset tiny --seeds 1
  freqfusion compare --config compare/camvid --data.root FOLDER --methods bilinear carafe freqfusion

Runs are folders of `freqfusion fit`, of one task and judged on the same data. They are grouped by what differs in
their settings (fusion, network, ...); runs that differ in the seed alone are repetitions of one method.

In a race every method and seed is one run of `freqfusion fit` with the recipe's settings; words that compare does
not know, such as --data.crop_size or --trainer.max_epochs, go to fit. Interrupted, or with more methods or seeds,
the same line with the same --out goes on where it stood.

The folder gets report.html, results.csv, results.json, results.md and the pictures; in a race each run its own
folder with its log.
"""
_OF_RUNS = ("split",)
_OF_RACE = ("methods", "seeds", "leaders", "jobs", "minutes")


def _parser(is_race: bool = False) -> CommandParser:
    parser = CommandParser("compare", __doc__, EXAMPLE)
    if not is_race:  # else the values of options that fit knows would be taken for runs
        parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders to compare")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="RECIPE", help="of a race, as for fit: a name or a file")
    what.add_argument(
        "--preset",
        choices=sorted(path.stem for path in PRESETS.glob("*.yaml")),
        help="of a race: a recipe that needs no files",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results [runs/compare, in a race with its name]"
    )
    parser.add_argument("--baseline", metavar="METHOD", help="what the others are held against [the leader]")
    parser.add_argument(
        "--data.root", dest="root", metavar="FOLDER", help="where the data is [as the runs say]"
    )
    parser.add_argument(
        "--no-images", action="store_true", help="leave the data set's images out of the pictures"
    )
    runs = parser.add_argument_group("of runs")
    runs.add_argument(
        "--split",
        choices=("val", "test"),
        default="val",
        help="metrics of the last validation, or of freqfusion test [val]",
    )
    race = parser.add_argument_group("of a race")
    race.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help="names of `freqfusion list`, or all [all]",
    )
    race.add_argument(
        "--seeds", type=whole_number, default=3, help="runs of each method, seeds 0, 1, ... [3]"
    )
    race.add_argument(
        "--leaders",
        type=whole_number,
        metavar="N",
        help="only the N best of the first seed run the other seeds",
    )
    race.add_argument(
        "--jobs", type=whole_number, help="runs side by side [one per GPU; without a GPU one per core]"
    )
    race.add_argument(
        "--minutes",
        type=float,
        help="end the runs after so many, and compare those that are complete [no end]",
    )
    return parser


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    is_race = any(word.partition("=")[0] in ("--config", "--preset") for word in argv)
    parser = _parser(is_race)
    args, words = parser.parse_known_args(argv)
    both = is_race and bool(words) and not words[0].startswith("-")
    if both or not (is_race or args.runs):
        parser.error(
            "name run folders to compare, or a race with --config RECIPE or --preset NAME, and not both"
        )
    for name in _OF_RUNS if is_race else _OF_RACE:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for {'runs that are there' if is_race else 'a race'} only")
    command = f"freqfusion {shlex.join(['compare', *argv])}"
    return _race(parser, args, words, command) if is_race else _runs(parser, args, words, command)


def _runs(parser: CommandParser, args: argparse.Namespace, words: list[str], command: str) -> int:
    if words:
        parser.error(f"there is no option {words[0]} for runs that are there")
    for package in PACKAGES:
        require(package, "train")
    from rich.console import Console

    from freqfusion.cli._race import show
    from freqfusion.comparison.page import write_comparison
    from freqfusion.comparison.runs import compare_runs

    out = args.out or Path("runs", "compare")
    comparison = compare_runs(args.runs, args.split, args.baseline, args.root)
    title, images = "freqfusion compare", not args.no_images
    notes = write_comparison(out, comparison, title=title, command=command, images=images, root=args.root)
    show(comparison, notes, out, Console())
    return 0


def _race(parser: CommandParser, args: argparse.Namespace, words: list[str], command: str) -> int:
    from freqfusion.comparison.race import in_order
    from freqfusion.fusion import list_fusions

    known = list_fusions()
    methods = in_order(known) if args.methods == ["all"] else list(dict.fromkeys(args.methods))
    for name in methods:
        if name not in known:
            parser.error(f"there is no method {name!r}; choose from: {', '.join(known)}")
    if args.baseline is not None and args.baseline not in methods:
        parser.error(f"--baseline {args.baseline} is none of the methods of this race: {', '.join(methods)}")
    for package in PACKAGES:
        require(package, "train")
    from freqfusion.cli._race import run_race
    from freqfusion.cli._recipes import find_recipe, read_recipe

    try:
        config = find_recipe(args.config) if args.config else PRESETS / f"{args.preset}.yaml"
    except ValueError as error:
        parser.error(str(error))
    if not config.is_file():
        parser.error(f"{config} is not a file, and every run of a race reads it again")
    read_recipe(config)  # which says what is wrong with it
    for taken in (
        "--model.fusion",
        "--seed",
        "--seed_everything",
        "--resume",
        "--checkpoint",
        "--config",
        "-c",
    ):
        if any(word == taken or word.startswith(f"{taken}=") for word in words):
            parser.error(f"{taken} is set for every run by the race itself; use --methods and --seeds")
    out = args.out or Path("runs", "compare", config.stem)
    return run_race(
        methods,
        range(args.seeds),
        out,
        config,
        words if args.root is None else [*words, "--data.root", args.root],
        command=command,
        title=f"freqfusion compare: {out.name}",
        leaders=args.leaders,
        jobs=args.jobs,
        baseline=args.baseline,
        images=not args.no_images,
        minutes=args.minutes or math.inf,
    )
