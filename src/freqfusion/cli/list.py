"""List the fusion methods: guided or not, parameters at 256 channels, paper."""

from freqfusion.cli._arguments import CommandParser

EXAMPLE = """\
example:
  freqfusion list

A name of the list goes to --model.fusion of fit, or to freqfusion.create_fusion(name, hr_channels, lr_channels).
"""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    CommandParser("list", __doc__, EXAMPLE).parse_args(argv)
    from freqfusion.fusion import describe_fusions

    print(f"{'name':<14} {'guided':<7} {'parameters':>10}  paper")
    for line in describe_fusions():
        guided = "yes" if line.guided else "no"
        paper = f"{line.paper} {line.year}" if line.year else line.paper
        print(f"{line.name:<14} {guided:<7} {line.parameters:>10,}  {paper}")
    return 0
