"""List the fusion methods and the upsamplers of frozen features, with parameters and papers."""

from freqfusion.cli._arguments import CommandParser

EXAMPLE = """\
example:
  freqfusion list

Fusion methods go to --model.fusion of fit, or to freqfusion.create_fusion(name, hr_channels, lr_channels); parameters
are counted at 256 channels. Upsamplers go to --upsampler of features, or to
freqfusion.features.create_upsampler(name, channels); parameters are counted at 384 channels.
"""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    CommandParser("list", __doc__, EXAMPLE).parse_args(argv)
    from freqfusion.features import describe_upsamplers
    from freqfusion.fusion import describe_fusions

    print(f"{'fusion':<16} {'guided':<11} {'parameters':>10}  paper")
    for fusion in describe_fusions():
        _print(fusion.name, fusion.guided, fusion.parameters, fusion.paper, fusion.year)
    print(f"\n{'upsampler':<16} {'one encoder':<11} {'parameters':>10}  paper")
    for upsampler in describe_upsamplers():
        _print(upsampler.name, upsampler.per_encoder, upsampler.parameters, upsampler.paper, upsampler.year)
    return 0


def _print(name: str, flag: bool, parameters: int, paper: str, year: int) -> None:
    print(
        f"{name:<16} {'yes' if flag else 'no':<11} {parameters:>10,}  {f'{paper} {year}' if year else paper}"
    )
