"""What fit, validate and test share: the typed command line of module, data and trainer, and its run folder."""

import argparse
import difflib
import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, DefaultHelpFormatter, Namespace
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger

from freqfusion._settings import check_settings
from freqfusion.cli._recipes import VARIANTS, choose_variant, find_recipe, needs_network, read_recipe
from freqfusion.cli._settings_help import (
    CHECKPOINT_HELP,
    CONFIG_HELP,
    FIT_HELP,
    OUT_HELP,
    SEED_HELP,
    TASK_HELP,
)
from freqfusion.tasks.names import find_task
from freqfusion.training import create_trainer
from freqfusion.training.checkpoints import (
    BEST,
    LAST,
    check_upsampler,
    load_checkpoint,
    read_checkpoint,
    task_of,
)
from freqfusion.zoo.pretrained import is_saved

_NOISE = (
    r".*treespec, LeafSpec.*",
    r".*in eval mode at the start of training.*",
    r".*`_get_pg_default_device` will be deprecated.*",
    r"(?s).*Grad strides do not match bucket view strides.*",
    r".*Trainer\(log_every_n_steps=.*",
)


Recipe = tuple[Path, dict[str, Any]]
"""A file of settings and what it holds."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of a command's description."""


class UsageError(Exception):
    """The command line asks for something that cannot be; the message is for the user."""


class _Trainer(Trainer):
    """Its signature says what the command line takes: Lightning's settings, and loggers by name too.

    Numbers of batches are spelled out as ``int | float``: Lightning's ``Optional[Union[int, float]]`` is, from the
    cache of ``typing``, ``Union[float, int, None]`` where another library has written that first, and then 1 batch
    would be read as 1.0, all of them.
    """

    def __init__(
        self,
        *,
        logger: Logger | Iterable[Logger | str] | bool | str | None = False,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            logger=logger,  # type: ignore[arg-type]
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **options,
        )


class _SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` when training begins: a run that fails before that leaves no file."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Not yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Into the run folder, wherever a logger writes."""
        folder = Path(self.config["out"])
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, folder / CONFIG, skip_none=False, overwrite=self.overwrite)


class CommandLine(LightningCLI):
    """Builds ``datamodule``, ``model`` and ``trainer`` from ``--config`` files and ``--key value`` pairs.

    Args:
        command: The command's name.
        description: What the command does, with an example, for its help.
        argv: The words after the command.
    """

    def __init__(self, command: str, description: str, argv: list[str]) -> None:
        _be_quiet()
        argv = _plain_words(argv)
        if command == "fit":
            argv = _with_settings_of_run(argv)
        configs, words = _split("--config", argv)  # the words come over all files, wherever they stand
        argv = [word for config in configs for word in ("--config", config)] + words
        self.command = command
        path = None if command == "fit" else _path_of_checkpoint(argv)
        self.checkpoint = None if path is None else _read_whole(path)
        configs, self.words = _split("--config", argv)
        self.recipes = [_read_recipe(config) for config in configs]
        self.task = _task_of(argv, self.recipes, self.checkpoint)
        module_class, data_class = find_task(self.task)
        super().__init__(
            module_class,
            data_class,
            save_config_callback=_SaveConfig if command == "fit" else None,
            trainer_class=_Trainer,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            parser_kwargs={
                "prog": f"freqfusion {command}",
                "usage": f"freqfusion {command} [--config RECIPE ...] [--key value ...]",
                "description": description,
                "formatter_class": _HelpFormatter,
                "exit_on_error": False,
                "allow_abbrev": False,
                "dump_header": ["the settings of this run; give the file to --config to repeat it"],
            },
            args=argv,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser._option_string_actions["--config"].help = CONFIG_HELP
        parser.add_argument(
            "--seed_everything",
            "--seed",
            type=int,
            default=0,
            help=SEED_HELP,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "data.seed")
        if self.task != "features":
            parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        if self.task in ("detection", "masks"):
            parser.link_arguments("data.things", "model.things", apply_on="instantiate")
        parser.add_argument("--task", type=str, default=self.task, help=TASK_HELP)
        parser.add_argument("--out", type=str | None, default=None, help=OUT_HELP[self.command])
        parser.add_argument("--checkpoint", type=str | None, default=None, help=CHECKPOINT_HELP[self.command])
        if self.command == "fit":
            parser.add_argument("--resume", action="store_true", help=FIT_HELP["resume"])
            for name, kind, default in _OF_FIT:
                parser.add_argument(f"--{name}", type=kind, default=default, help=FIT_HELP[name])
        else:
            for name in FIT_HELP:  # a run's config.yaml has them
                parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
        if self.checkpoint is not None:
            parser.set_defaults(_settings_in(self.checkpoint))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        words, variant = self.words, None
        if any(VARIANTS in content for _, content in self.recipes):
            quiet = [word for word in words if not word.startswith("--print_config")]
            variant = self._variant(self._parse(parser, quiet, None))
        self.config = self._parse(parser, words, variant)
        self._check_settings()
        self.out = self._choose_out(self.config)
        self.ckpt_path = self._choose_checkpoint(self.config)

    def _parse(self, parser: LightningArgumentParser, words: list[str], variant: str | None) -> Namespace:
        """The settings of the recipes in a variant, and over those the words of the line."""
        args = []
        for path, content in self.recipes:
            settings = choose_variant(content, variant)
            plain = VARIANTS not in content and path.is_file()  # a pipe can be read but once
            args += ["--config", str(path) if plain else yaml.safe_dump(settings)]
        try:
            return parser.parse_args([*args, *words])
        except ArgumentError as error:
            message = " ".join(str(error).split())
            unknown = re.match(r"unrecognized arguments: (--[\w.]+)", message, re.IGNORECASE)
            near = difflib.get_close_matches(unknown[1], parser._option_string_actions, 1) if unknown else []
            raise UsageError(message + (f"; did you mean {near[0]}?" if near else "")) from error

    def _variant(self, config: Namespace) -> str:
        """The name that the variants of the recipes are chosen by."""
        network, fusion = self.named(config)
        if not isinstance(network, str):  # of a checkpoint
            network = network["spec"]["name"]
        if is_saved(network):  # a folder in place of a network that was named before it
            named = [n for n in _values_of("--model.network", self.words) if not is_saved(n)]
            if not named and any(needs_network(content) for _, content in self.recipes):
                raise UsageError(
                    f"the settings of this recipe depend on the network, and {network} does not say which it is: "
                    f"name it first: --model.network NAME --model.network {network}"
                )
            network = named[-1] if named else network
        return f"{network}_{fusion}"

    def named(self, config: Namespace) -> tuple[Any, str]:
        """The network and the fusion method of a line, or what its task has in their place."""
        network, fusion = (config[f"model.{name}"] for name in find_task(self.task)[0].named_by)
        return network, fusion

    def _check_settings(self) -> None:
        """Refuse what cannot be, before anything is built or written."""
        groups = {"trainer": "trainer", "model": self.task, "data": "data"}
        try:
            if self.command == "fit":
                check_settings("fit", self.config, "--{}")
            for name, group in groups.items():
                check_settings(group, self.config[name].as_dict(), f"--{name}.{{}}")
        except ValueError as error:
            raise UsageError(str(error)) from error

    def before_instantiate_classes(self) -> None:
        if self.command == "fit" and self.ckpt_path is None and os.environ.get("LOCAL_RANK", "0") == "0":
            last = self.out / LAST
            if last.exists():
                raise UsageError(
                    f"{self.out} already holds a run: go on with it by adding --resume, or choose another "
                    "folder with --out"
                )
        if self.command == "fit" and self.ckpt_path is not None:
            changed = _changes(_read(str(self.ckpt_path)), self.config)
            if changed:
                settings = self.ckpt_path.parent / CONFIG
                lost = "" if settings.is_file() else f"; {settings}, which has them, is missing"
                raise UsageError(
                    f"the run of {self.ckpt_path} was started with other settings, and goes on with those: "
                    f"{'; '.join(changed)}. Leave the changes out, or start a new run with another --out{lost}"
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = {**self.config_init["trainer"], **kwargs}
        options = {
            key: value
            for key, value in options.items()
            if value is not None
            or key == "check_val_every_n_epoch"  # None: val_check_interval counts on over epochs
        }
        if self.save_config_callback is not None:
            config = self.config.clone()
            config["out"], config["checkpoint"], config["resume"] = str(self.out), None, False
            save_config = self.save_config_callback(self.parser, config, **self.save_config_kwargs)
            options["callbacks"] = [*options.get("callbacks", []), save_config]
        own = {name: self.config[name] for name, _, _ in _OF_FIT} if self.command == "fit" else {}
        try:
            return create_trainer(self.out, **own, **options)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise UsageError(f"the trainer's settings: {' '.join(str(error).split())}") from error

    def _choose_out(self, config: Namespace) -> Path:
        if config["out"]:
            return Path(config["out"])
        checkpoint = config["checkpoint"]
        if self.command != "fit" and checkpoint not in (None, "last", "best"):
            return Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
        recipe = self.recipes[-1][0] if self.recipes else Path(config["data.dataset"])
        return _default_out(recipe, *self.named(config))

    def _choose_checkpoint(self, config: Namespace) -> Path | None:
        given = config["checkpoint"]
        resume = self.command == "fit" and config["resume"]
        if given in ("last", "best") or resume:
            path = self.out / (BEST if given == "best" else LAST)
            if resume and not path.exists():
                return None
            given = str(path)
        if given is None or (self.command != "fit" and Path(given).is_dir()):
            return None
        if not Path(given).is_file():
            raise UsageError(f"there is no checkpoint at {given}")
        return Path(given)


CONFIG = "config.yaml"
"""The settings of a run, in its folder."""
_ALIASES = {"--skip-bad": "--data.skip_bad=true", "-c": "--config"}
_OF_FIT = (("checkpoint_steps", int, 500), ("log_steps", int, 50), ("stop_at_nan", bool, True))
"""Options of ``fit`` alone: name, type, default."""
_OF_JUDGING = (
    *("backbone_weights", "encoder_weights", "upsampler_weights", "weights"),  # which the run has in its own
    *("boundary_width", "flip_test", "max_detections", "num_classes", "scales", "stride", "test_max_size"),
    *("test_size", "things", "window"),
)
_OF_LOADING = ("cache", "eval_batch_size", "root", "skip_bad", "test_split", "val_split", "workers")
"""What may change when a run goes on."""


def _plain_words(argv: list[str]) -> list[str]:
    """The words with short options in full, and sizes such as 512x768 as lists."""
    words = [_ALIASES.get(word, word) for word in argv]
    for place, word in enumerate(words):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        before = option or (words[place - 1] if place else "")
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        if size and before.startswith(("--model.", "--data.")):
            words[place] = f"{option}{equals}[{size[1]},{size[2]}]"
    return words


def _path_of_checkpoint(argv: list[str]) -> str | None:
    """The checkpoint or folder that settings come from."""
    path, out = _value_of("--checkpoint", argv), _value_of("--out", argv)
    if path in ("best", "last"):  # of a recipe's run folder, if no folder is named
        return None if out is None else str(Path(out) / (BEST if path == "best" else LAST))
    return path


def _read(checkpoint: str) -> dict[str, Any]:
    try:
        return read_checkpoint(checkpoint)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def _read_whole(path: str) -> dict[str, Any]:
    """The settings of a checkpoint or of the folder of a saved network, from which a network was made once."""
    try:
        content = read_checkpoint(path) if Path(path).is_file() else {}
        if task_of(content) == "features":
            check_upsampler(content, path)
            return content
        module, _, _ = load_checkpoint(path)
        if content:
            return content
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    own = {name: module.hparams[name] for name in ("network", "output") if name in module.hparams}
    return {"task": module.task, "hyper_parameters": own}


def _changes(content: dict[str, Any], config: Namespace) -> list[str]:
    """Settings of training in which a command line differs from the checkpoint that it goes on from."""
    changed = []
    for group, key, ignored in (
        ("model", "hyper_parameters", _OF_JUDGING),
        ("data", "datamodule_hyper_parameters", _OF_LOADING),
    ):
        before, now = dict(content.get(key, {})), config[group].as_dict()
        if group == "model":
            before |= content.get("asked", {})
        changed += [
            f"{group}.{name} was {json.dumps(before[name], default=str)}, now {json.dumps(now[name], default=str)}"
            for name in before
            if name in now
            and name not in ignored
            and json.dumps(before[name], default=str, sort_keys=True)
            != json.dumps(now[name], default=str, sort_keys=True)
        ]
    return changed


def _task_of(argv: list[str], recipes: list[Recipe], checkpoint: dict[str, Any] | None) -> str:
    """The task that the command line, its last recipe that names one, or its checkpoint says."""
    task = task_of(checkpoint or {})
    for _, content in recipes:
        task = str(content.get("task", task))
    task = _value_of("--task", argv) or task
    try:
        find_task(task)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return task


def _read_recipe(name: str) -> Recipe:
    """The file of a recipe and its content."""
    try:
        path = find_recipe(name)
        return path, read_recipe(path)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _with_settings_of_run(argv: list[str]) -> list[str]:
    """The words of ``fit``, led by the settings of the run that it goes on with, where there is one."""
    out, config, path = (_value_of(option, argv) for option in ("--out", "--config", "--checkpoint"))
    folder = Path(out) if out else None if config is None else _folder_of_words(argv)
    if "--resume" in argv or path == "last":
        if folder is None or not (folder / LAST).is_file():
            if not any(word.startswith(("--config", "--task", "--model", "--data")) for word in argv):
                where = (
                    "which run? Name its folder with --out"
                    if folder is None
                    else f"there is no checkpoint at {folder / LAST}"
                )
                raise UsageError(f"{where}; to start a new run, give its settings, such as --config RECIPE")
            return argv
        settings = folder / CONFIG
    elif path is not None:
        settings = Path(path).parent / CONFIG
        folder = folder or settings.parent
    else:
        return argv
    return ["--config", str(settings), "--out", str(folder), *argv] if settings.is_file() else argv


def _folder_of_words(argv: list[str]) -> Path:
    """The default run folder of the recipes and words of a line, before the parser exists."""
    recipes = [_read_recipe(config) for config in _values_of("--config", argv)]
    module = find_task(_task_of(argv, recipes, None))[0]
    defaults = inspect.signature(module).parameters
    names = []
    for key in module.named_by:
        said = [content["model"][key] for _, content in recipes if key in content.get("model", {})]
        names.append(_value_of(f"--model.{key}", argv) or (said[-1] if said else defaults[key].default))
    return _default_out(recipes[-1][0], *names)


def _default_out(recipe: Path, network: str, fusion: str) -> Path:
    """The run folder of a network and a fusion method in a recipe."""
    network = Path(network).name if is_saved(network) else network
    name = re.sub(r"[^\w.+-]+", "_", f"{network}_{fusion}")
    return Path("runs", recipe.parent.name, recipe.stem, name)


def _settings_in(content: dict[str, Any]) -> dict[str, Any]:
    """The module's and the data's settings in a checkpoint, as defaults of the command line."""
    defaults: dict[str, Any] = {}
    for group, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        linked = {"num_classes", "things", "seed"}
        defaults |= {
            f"{group}.{name}": value for name, value in content.get(key, {}).items() if name not in linked
        }
    return defaults


def _split(option: str, argv: list[str]) -> tuple[list[str], list[str]]:
    """All values of one option, before the parser exists, and the other words."""
    values, others = [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        following = value if name == option and equals else next(words, None) if word == option else None
        if following is None:
            others.append(word)
        else:
            values.append(following)
    return values, others


def _values_of(option: str, argv: list[str]) -> list[str]:
    """All values of one option."""
    return _split(option, argv)[0]


def _value_of(option: str, argv: list[str]) -> str | None:
    """The value of one option that counts, the last."""
    return next(reversed(_values_of(option, argv)), None)


def _be_quiet() -> None:
    """Leave out what Lightning and torch tell developers: advertisements, hints on things chosen on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Lightning's own refusals as errors that are shown in one line."""
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(" ".join(str(error).split())) from error


def report_usage_error(command: str, error: UsageError) -> int:
    """Print the one line that says what is wrong; returns the exit code."""
    print(f"freqfusion {command}: error: {error}", file=sys.stderr)
    return 2


def judge(command: str, description: str, argv: list[str]) -> int:
    """The commands ``validate`` and ``test``; returns the exit code."""
    try:
        line = CommandLine(command, description, argv)
        network, _ = line.named(line.config)
        if line.ckpt_path is None and not (isinstance(network, str) and is_saved(network)):
            raise UsageError(
                "which weights? Give --checkpoint FILE, or --config RECIPE with "
                "--model.network FOLDER --model.network_options null"
            )
    except UsageError as error:
        return report_usage_error(command, error)
    run = getattr(line.trainer, command)
    weights = None if line.ckpt_path is None else str(line.ckpt_path)
    with plain_errors():
        run(line.model, line.datamodule, ckpt_path=weights, verbose=False)
    return 0
