"""Train a small network twice, with and without FreqFusion, and write a page that compares them."""

import shlex
from pathlib import Path

from freqfusion._optional import require
from freqfusion.cli._arguments import CommandParser, whole_number
from freqfusion.cli.compare import PACKAGES, PRESETS

EXAMPLE = """\
example:
  freqfusion quickstart
  freqfusion quickstart --minutes 1 --seed 3 --out runs/try

A race (see `freqfusion compare --help`) of two methods on scenes that are drawn on the fly; nothing is downloaded.
The number of steps follows from --minutes (225 steps of each network a minute), not from the speed of the machine,
so that a seed gives the same figures again. Runs on the CPU; the minutes hold for about two cores. Stopped, the
same line goes on; another --seed in the same folder is a repetition.
"""
METHODS = ["bilinear", "freqfusion"]
STEPS_A_MINUTE = 225
BATCH, VAL_SCENES, EVALUATIONS = 8, 200, 5
EXPLANATION = (
    "A segmentation network decides what it sees on coarse feature maps and where it ends on fine ones; joining "
    "the two is where boundaries get lost. Bilinear upsampling blurs the coarse map across object boundaries "
    "and spreads wrong features inside objects.",
    "FreqFusion predicts, for every pixel, a smoothing kernel for the coarse map that evens out the inside of "
    "objects, and offsets that resample features near a boundary from the consistent inside. From the fine map "
    "it takes the high frequencies, which carry the outline, and adds them back sharpened (Chen, Fu, Gu, Yan, Harada "
    "and Huang, “Frequency-aware feature fusion for dense image prediction”, IEEE TPAMI 2024).",
)


def _parser() -> CommandParser:
    parser = CommandParser("quickstart", __doc__, EXAMPLE)
    parser.add_argument("--minutes", type=float, default=2.0, help="length of both trainings together [2]")
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder of the results [quickstart]"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="of the order of the scenes and the first weights [0]"
    )
    return parser


def fit_words(minutes: float) -> list[str]:
    """The words of ``fit`` by which the quickstart differs from the tiny race: steps, each of new scenes.

    >>> fit_words(4)[:2], fit_words(0.001)[:2]
    (['--trainer.max_steps', '900'], ['--trainer.max_steps', '5'])
    """
    interval = max(1, round(minutes * STEPS_A_MINUTE / EVALUATIONS))
    steps = interval * EVALUATIONS  # the last of which is validated
    settings = {
        "trainer.max_steps": steps,
        "trainer.val_check_interval": interval,
        "trainer.accelerator": "cpu",
        "model.warmup_steps": steps // 20,
        "data.dataset_options.length": max(steps * BATCH, VAL_SCENES),
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    for package in PACKAGES:
        require(package, "train")
    from freqfusion._cores import available_cores
    from freqfusion.cli._race import run_race

    return run_race(
        METHODS,
        [args.seed],
        args.out,
        PRESETS / "tiny.yaml",
        fit_words(args.minutes),
        command=f"freqfusion {shlex.join(['quickstart', *argv])}",
        title="freqfusion quickstart",
        jobs=min(len(METHODS), available_cores()),
        baseline=METHODS[0],
        explanation=EXPLANATION,
    )
