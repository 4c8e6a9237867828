"""Race the fusion methods on one network and one data set, or tell what each costs."""

import json
import shlex
from pathlib import Path

from freqfusion._optional import require
from freqfusion.cli._arguments import CommandParser, whole_number
from freqfusion.fusion import list_fusions

PRESETS = Path(__file__).parents[1] / "comparison" / "presets"
EXAMPLE = """\
example:
  freqfusion compare --preset tiny --seeds 1
  freqfusion compare --config compare/camvid --data.root FOLDER --methods bilinear carafe freqfusion
  freqfusion compare --cost

Every method and seed is one run of `freqfusion fit` with the recipe's settings; words that compare does not
know, such as --data.root or --trainer.max_epochs, go to fit. Interrupted, or with more methods or seeds, the
same line with the same --out goes on where it stood. The folder gets report.html, results.csv, results.json,
results.md and the pictures; each run its own folder with its log.
"""


def _parser() -> CommandParser:
    parser = CommandParser("compare", __doc__, EXAMPLE)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="RECIPE", help="of the race, as for fit: a name or a file")
    what.add_argument(
        "--preset",
        choices=sorted(path.stem for path in PRESETS.glob("*.yaml")),
        help="a recipe that comes with the package",
    )
    what.add_argument(
        "--cost", action="store_true", help="parameters, FLOPs, memory and latency; trains nothing"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help="names of `freqfusion list`, or all [all]",
    )
    parser.add_argument(
        "--seeds", type=whole_number, default=3, help="runs of each method, seeds 0, 1, ... [3]"
    )
    parser.add_argument(
        "--leaders",
        type=whole_number,
        metavar="N",
        help="only the N best of the first seed run the other seeds",
    )
    parser.add_argument(
        "--jobs", type=whole_number, help="runs side by side [one a GPU; without a GPU one a core]"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results [runs/compare/ and the recipe's name]"
    )
    parser.add_argument(
        "--no-images", action="store_true", help="leave the data set's images out of the pictures"
    )
    parser.add_argument(
        "--device", help="of --cost: cpu, cuda, cuda:1, ... [cuda where there is one, else cpu]"
    )
    parser.add_argument(
        "--results", type=Path, help="of --cost: a race's results.json, to draw its mIoU against latency"
    )
    return parser


def _quality(path: Path, methods: list[str]) -> dict[str, float]:
    """Mean IoU of the methods in a race's ``results.json``."""
    try:
        standings = json.loads(path.read_text(encoding="utf-8"))["standings"]
        scores = {standing["method"]: float(standing["miou"]) for standing in standings}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the results.json of a race ({error!r})") from error
    return {method: score for method, score in scores.items() if method in methods}


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    args, words = parser.parse_known_args(argv)
    known = list_fusions()
    methods = known if args.methods == ["all"] else list(dict.fromkeys(args.methods))
    for name in methods:
        if name not in known:
            parser.error(f"there is no method {name!r}; choose from: {', '.join(known)}")
    if args.cost:
        out = args.out or Path("runs", "compare", "cost")
        if words:
            parser.error(f"--cost does not know {' '.join(words)}")
        from freqfusion.cli._compare_cost import run_cost

        quality = None if args.results is None else _quality(args.results, methods)
        run_cost(methods, out, device=args.device, quality=quality)
        return 0
    for module in (
        "lightning",
        "jsonargparse",
        "torchmetrics",
        "torchvision",
        "rich",
        "matplotlib",
        "jinja2",
    ):
        require(module, "train")
    from freqfusion.cli._recipes import find_recipe

    try:
        config = find_recipe(args.config) if args.config else PRESETS / f"{args.preset}.yaml"
    except ValueError as error:
        parser.error(str(error))
    if not config.is_file():
        parser.error(f"{config} is not a file, and every run of a race reads it again")
    out = args.out or Path("runs", "compare", config.stem)
    for taken in (
        "--model.fusion",
        "--seed",
        "--seed_everything",
        "--resume",
        "--ckpt_path",
        "--config",
        "-c",
    ):
        if any(word == taken or word.startswith(f"{taken}=") for word in words):
            parser.error(f"{taken} is set for every run by the race itself; use --methods and --seeds")
    from freqfusion.cli._compare_race import run_race

    return run_race(
        methods,
        args.seeds,
        out,
        config,
        words,
        command=f"freqfusion {shlex.join(['compare', *argv])}",
        leaders=args.leaders,
        jobs=args.jobs,
        images=not args.no_images,
    )
