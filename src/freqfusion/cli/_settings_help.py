"""The help of fit, validate and test, read from the source: answered without importing torch."""

import ast
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from freqfusion._optional import require
from freqfusion._settings import BOUNDS

PACKAGE = Path(__file__).parents[1]
SOURCES = {
    "semantic": ("SegmentationModule", "SegmentationData"),
    "detection": ("DetectionModule", "ObjectData"),
    "masks": ("MaskClassificationModule", "ObjectData"),
    "features": ("FeatureModule", "FeatureData"),
}
"""The classes whose arguments are the settings of a task; the first is meant where nothing says which."""
LINKED = ("num_classes", "seed", "things")
"""Arguments that come from others."""
CONFIG_HELP = (
    "A recipe: a name that `freqfusion recipes` lists, or a YAML file. Several come over each other, and the other "
    "options over all of them."
)
SEED_HELP = "Decides initial weights, order, augmentation and dropout."
TASK_HELP = (
    f"What is trained: {', '.join(SOURCES)}. Recipes say it. The options below depend on it: --task NAME --help "
    "shows them."
)
OUT_HELP = {
    "fit": "The run folder [runs/, then the names of the recipe, the network and the fusion method; or of the "
    "encoder and the upsampler].",
    "validate": "Folder of the results [that of the checkpoint].",
    "test": "Folder of the results [that of the checkpoint].",
}
CHECKPOINT_HELP = {
    "fit": "Go on exactly from a checkpoint: a path, or 'last' for the run folder's last.ckpt.",
    "validate": "The weights to judge, and all settings that are not given: a path, or 'best' or 'last' of the run "
    "folder --out; or a folder of freqfusion convert or save_pretrained, which leaves the data to be given.",
}
CHECKPOINT_HELP["test"] = CHECKPOINT_HELP["validate"]
FIT_HELP = {
    "resume": "The same as --checkpoint last, where there is one.",
    "checkpoint_steps": "Optimiser steps between two last.ckpt.",
    "log_steps": "Optimiser steps averaged in a row of metrics.csv.",
    "stop_at_nan": "End the run when the loss or a weight is no longer finite; false goes on with a warning.",
}
_WIDTH, _INDENT = 100, 26


def asks_for_help(argv: list[str]) -> bool:
    """Whether a line asks for the help of the whole command."""
    return any(word in ("-h", "--help") for word in argv)


def command_help(command: str, description: str, argv: list[str]) -> str:
    """What ``freqfusion COMMAND --help`` prints: the settings of the task that the line or its recipe says."""
    task = _task_of(argv)
    module, data = SOURCES[task]
    lines = [
        f"usage: freqfusion {command} [--config RECIPE ...] [--key value ...]",
        "",
        description,
        "options:",
    ]
    lines += _entry("-c, --config RECIPE", CONFIG_HELP)
    lines += _entry("--seed NUMBER", f"{SEED_HELP} [0]")
    lines += _entry("--task NAME", f"{TASK_HELP} [{task}]")
    lines += _entry("--out FOLDER", OUT_HELP[command])
    lines += _entry("--checkpoint FILE", CHECKPOINT_HELP[command])
    for name, text in FIT_HELP.items() if command == "fit" else ():
        lines += _entry(f"--{name}", text)
    lines += _entry("--print_config", "Print all settings as YAML and end.")
    for title, group, name in (
        ("the network and how it is trained", "model", module),
        ("the data", "data", data),
    ):
        lines += ["", f"{title} ({name}):"]
        for argument, kind, default, text in _arguments(name):
            if argument not in LINKED:
                lines += _entry(f"--{group}.{argument}", f"{text} ({kind}) [{default}]")
    names = ", ".join(sorted(BOUNDS["trainer"]))
    lines += ["", "the trainer:"]
    lines += _entry(
        "--trainer.NAME",
        "Any argument of lightning.Trainer, such as accelerator, precision, strategy, sync_batchnorm, max_time, "
        f"{names}: "
        "https://lightning.ai/docs/pytorch/stable/common/trainer.html",
    )
    return "\n".join(lines)


def _task_of(argv: list[str]) -> str:
    task = next(iter(SOURCES))
    for option, value in pairwise(argv):
        if option in ("-c", "--config"):
            require("yaml", "train")
            from freqfusion.cli._recipes import find_recipe, read_recipe

            task = read_recipe(find_recipe(value)).get("task", task)
    for option, value in pairwise(argv):
        task = value if option == "--task" else task
    return task if task in SOURCES else next(iter(SOURCES))


def _entry(option: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH - _INDENT) or [""]
    head = f"  {option}"
    first = [f"{head:<{_INDENT}}{wrapped[0]}"] if len(head) < _INDENT else [head, " " * _INDENT + wrapped[0]]
    return first + [" " * _INDENT + line for line in wrapped[1:]]


def _arguments(name: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and description of each argument of a class, those of its base after its own."""
    found = _find_class(name)
    init = next(x for x in found.body if isinstance(x, ast.FunctionDef) and x.name == "__init__")
    texts = _descriptions(ast.get_docstring(found) or "")
    positional = init.args.args[1:]
    pairs = [
        *zip(positional, init.args.defaults, strict=True),
        *zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True),
    ]
    for argument, default in pairs:
        assert argument.annotation is not None
        assert default is not None
        yield (
            argument.arg,
            ast.unparse(argument.annotation),
            ast.unparse(default),
            texts.get(argument.arg, ""),
        )
    if init.args.kwarg is not None:
        yield from _arguments(ast.unparse(found.bases[0]))


def _find_class(name: str) -> ast.ClassDef:
    for path in sorted((PACKAGE / "tasks").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
    raise LookupError(name)


def _descriptions(docstring: str) -> dict[str, str]:
    """The entries below ``Args:``."""
    texts: dict[str, str] = {}
    section = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    name = ""
    for line in section.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            texts[name] = text
        elif name:
            texts[name] += f" {line.strip()}"
    return texts
