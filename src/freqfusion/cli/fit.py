"""Train a network by a recipe; go on exactly after a stop with --resume."""

from freqfusion._optional import require
from freqfusion.cli._settings_help import asks_for_help, command_help

DESCRIPTION = """\
Train a network by a recipe.

example:
  freqfusion fit --config camvid/segnext --data.root CAMVID_FOLDER
  freqfusion fit --config ade20k/segnext --data.root FOLDER --model.network segnext_b --model.fusion bilinear

`freqfusion recipes` lists the recipes; a YAML file of your own can be given in their place. Every setting of the
recipe can be given on the command line, e.g. --data.batch_size 4 --seed 1.
--skip-bad (short for --data.skip_bad true) leaves out broken samples with a warning.
The run folder gets last.ckpt, best.ckpt, metrics.csv and learning_curve.png. After a stop
freqfusion fit --resume --out RUN goes on exactly where last.ckpt stood, with the settings of the run.
--trainer.logger tensorboard (wandb, mlflow, csv, or several: [tensorboard,wandb]) writes figures, settings and
pictures of predictions into the run folder too.
"""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    if asks_for_help(argv):
        print(command_help("fit", DESCRIPTION, argv))
        return 0
    for module in ("lightning", "jsonargparse", "torchmetrics", "torchvision", "rich", "matplotlib"):
        require(module, "train")
    from freqfusion.cli._lightning import CommandLine, UsageError, plain_errors, report_usage_error
    from freqfusion.training.checkpoints import BEST, LAST

    try:
        line = CommandLine("fit", DESCRIPTION, argv)
    except UsageError as error:
        return report_usage_error("fit", error)
    trainer = line.trainer
    if trainer.is_global_zero:
        parameters = sum(p.numel() for p in line.model.network.parameters()) / 1e6
        named = ", ".join(map(str, line.named(line.config)))
        print(f"{named}: {parameters:.2f} M parameters; run folder {line.out}", flush=True)
    try:
        with plain_errors():
            trainer.fit(
                line.model, line.datamodule, ckpt_path=None if line.ckpt_path is None else str(line.ckpt_path)
            )
    except SystemExit:  # Lightning's answer to Ctrl-C
        last = line.out / LAST
        if trainer.is_global_zero:
            after = (
                f"repeat the line with --resume to go on from {last}"
                if last.exists()
                else "nothing was saved yet"
            )
            print(f"\nstopped at step {trainer.global_step}; {after}")
        return 130
    if trainer.is_global_zero:
        if (line.out / BEST).exists():
            print(f"best checkpoint: {line.out / BEST}")
        elif (line.out / LAST).exists():
            print(
                "nothing was judged (see --trainer.check_val_every_n_epoch and --trainer.limit_val_batches); "
                f"last checkpoint: {line.out / LAST}"
            )
    return 0
