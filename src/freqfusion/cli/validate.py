"""Evaluate a checkpoint on the validation images."""

from freqfusion._optional import require
from freqfusion.cli._settings_help import asks_for_help, command_help

DESCRIPTION = """\
Evaluate a checkpoint on the validation images.

example:
  freqfusion validate --checkpoint runs/camvid/segnext/segnext_t_freqfusion/best.ckpt --data.root CAMVID_FOLDER

All settings come from the checkpoint; any can be changed, e.g. --model.flip_test true. The figures are
printed and written beside the checkpoint (or into --out).
"""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    if asks_for_help(argv):
        print(command_help("validate", DESCRIPTION, argv))
        return 0
    for module in ("lightning", "jsonargparse", "torchmetrics", "torchvision", "rich", "matplotlib"):
        require(module, "train")
    from freqfusion.cli._lightning import judge

    return judge("validate", DESCRIPTION, argv)
