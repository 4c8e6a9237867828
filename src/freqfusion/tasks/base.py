"""What the Lightning modules of all tasks have in common."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from freqfusion._settings import check_settings
from freqfusion._untrusted import START_WEIGHTS, without_outside
from freqfusion.models.library import HostSegmenter, as_segmenter
from freqfusion.tasks.rng import get_rng_state, set_rng_state
from freqfusion.tasks.sharding import shard
from freqfusion.weights.files import list_problems
from freqfusion.zoo import create_host, from_pretrained
from freqfusion.zoo.pretrained import describe_model, rebuild_model
from freqfusion.zoo.spec import ModelSpec

PRETRAINED = "pretrained:"
"""Begins the name of a network that is a folder of `freqfusion.save_pretrained`."""
MISFITS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError)
"""What networks raise for options that do not fit, besides ValueError."""
REBUILT = "rebuilt"
"""The name, in a checkpoint, of a network that was not made by its name; its options say how it was made."""


class ClassFigure(NamedTuple):
    """A figure that every class has."""

    label: str
    """For people."""
    name: str
    """In files."""
    per_class: str
    """Its key in :attr:`TaskModule.results`, a list with a number a class, NaN where it is not defined."""
    mean: str
    """The key of its mean."""


def existing_network(name: str, options: Mapping[str, Any] | None) -> nn.Module | None:
    """A network that is not made by a name of this package, or None if it is.

    Args:
        name: ``"pretrained:FOLDER"``, or what a checkpoint has in its place.
        options: of the network.

    Returns:
        The network in training mode.

    Raises:
        FileNotFoundError, ImportError, ValueError: see :func:`freqfusion.from_pretrained`.
    """
    if name == REBUILT:
        return rebuild_model((options or {})["description"]).train()
    if not name.startswith(PRETRAINED):
        return None
    if options:
        raise ValueError(f"a network that exists already takes no network_options, got {dict(options)}")
    return from_pretrained(name.removeprefix(PRETRAINED)).train()


def misfit(name: str, options: Mapping[str, Any] | None, error: Exception) -> str:
    """What to say of options that do not fit a network."""
    reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return f"network_options {options} do not fit {name!r}: {' '.join(reason.split())}"


def without_weights(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of a network that starts from no weights, being else the same."""
    library = name.partition(":")[0]
    if "?" in name:
        spec = ModelSpec.parse(name)
        name = str(ModelSpec(spec.source, spec.name, without_outside(spec.arguments, library)))
    return name, without_outside(options, library)


def compare_classes(known: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse data whose classes have another order than the network's; warn of other names.

    Raises:
        ValueError: for the same classes in another order.
    """
    differing = [label for label, pair in enumerate(zip(known, classes, strict=False)) if pair[0] != pair[1]]
    if not differing:
        return
    label = differing[0]
    found = f"class {label} is {known[label]!r} to the network and {classes[label]!r} in the data"
    if sorted(known) == sorted(classes):
        raise ValueError(f"{found}, and so on: bring the data's classes into the network's order")
    rank_zero_warn(f"{found}; {len(differing)} of {len(classes)} names differ")


def compare_states(state: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> str:
    """How a file's tensors differ from a module's in names and shapes, in one line; ``""`` if they fit."""
    return list_problems(
        {
            "missing": [key for key in own if key not in state],
            "unknown": [key for key in state if key not in own],
            "of another shape": [
                f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
                for key, value in own.items()
                if key in state and state[key].shape != value.shape
            ],
        }
    )


def warn_of_warmup(warmup_steps: int, steps: float) -> None:
    """Say so if a run ends before its warm-up does."""
    if warmup_steps and steps <= warmup_steps:
        rank_zero_warn(
            f"the warm-up of {warmup_steps} steps is as long as the whole run of {int(steps)}: "
            "the learning rate never reaches its peak; lower warmup_steps"
        )


def host_network(
    name: str,
    num_classes: int,
    fusion: str,
    options: Mapping[str, Any] | None,
    existing: nn.Module | None,
) -> HostSegmenter:
    """A model of another library as a segmentation network.

    Args:
        name: see :func:`freqfusion.zoo.create_host`.
        num_classes: number of classes.
        fusion: method of its fusions.
        options: further arguments of ``create_host``, and ``frozen_norm`` of
            :func:`~freqfusion.models.library.as_segmenter`.
        existing: a model that is taken instead of one by the name.

    Raises:
        ImportError: if the library is not installed.
        ValueError: for an unknown name, options that do not fit, or an existing model of other classes.
    """
    settings = dict(options or {})
    frozen_norm = settings.pop("frozen_norm", False)
    if existing is None:
        try:
            existing = create_host(name, num_classes, fusion, **settings)
        except MISFITS as error:
            raise ValueError(misfit(name, options, error)) from error
        return as_segmenter(existing, num_classes, frozen_norm=frozen_norm)
    network = as_segmenter(existing)
    if network.num_classes != num_classes:
        raise ValueError(
            f"the network predicts {network.num_classes} classes, the data has {num_classes}: use the data set that "
            "the network was made for"
        )
    return network


class TaskModule(L.LightningModule):
    """A network, how it is trained and how it is judged.

    A subclass makes ``network``, defines the steps and the optimizer, and fills :attr:`results` at the end of an
    evaluation. Random states are part of its checkpoints, for every process its own.

    Args:
        num_classes: number of classes.
    """

    task: ClassVar[str]
    """What ``task:`` in a recipe says."""
    network: nn.Module
    figures: Mapping[str, str]
    """The figures of an evaluation, all but the loss shares in [0, 1]: name to label. Logged as ``val_NAME``."""
    headline: Sequence[str]
    """The names of those to be shown first; the first of them decides on ``best.ckpt``."""
    class_figures: Sequence[ClassFigure]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                f"num_classes is {num_classes}, expected at least 1: pass the data's class count"
            )
        self.classes: tuple[str, ...] = tuple(f"class {index}" for index in range(num_classes))
        self.palette: tuple[tuple[int, int, int], ...] = tuple(
            (level, level, level) for level in torch.linspace(0, 255, num_classes).int().tolist()
        )
        self.category_ids = list(range(1, num_classes + 1))
        """The classes' numbers in annotation files, where these have others than the labels."""
        self.results: dict[str, Any] = {}
        """Figures of the latest evaluation as plain numbers, and lists with a number a class."""
        self.data_options: dict[str, Any] = {}
        """The settings of the data that the network was trained with; set by ``load_checkpoint``."""
        self._rng_states: list[dict[str, Any]] | None = None
        self._is_sharded = False
        self._description: dict[str, Any] | None = None

    @property
    def _is_made_by_weights(self) -> bool:
        """Whether the weights that the network started from decided how it was built."""
        name, options = self.hparams["network"], self.hparams["network_options"] or {}
        if name.startswith(PRETRAINED):
            return True
        if not name.startswith(("torchvision:", "transformers:")):
            return False
        return any({**ModelSpec.parse(name).arguments, **options}.get(key) for key in START_WEIGHTS)

    def check_settings(self) -> None:
        """Hold the saved hyperparameters against the table of bounds, before the network is built.

        Raises:
            ValueError: for a number out of bounds, or numbers that do not fit together.
        """
        self.hparams.update(check_settings(self.task, self.hparams))

    def setup(self, stage: str) -> None:
        if (
            stage == "fit" and self._is_made_by_weights
        ):  # before it is put into shards, and not at every checkpoint
            self._description = describe_model(getattr(self.network, "host", self.network))
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "classes"):
            return
        if len(data.classes) != len(self.classes):
            raise ValueError(
                f"the network predicts {len(self.classes)} classes, the data has "
                f"{len(data.classes)}: use the data set that the network was made for"
            )
        known = getattr(getattr(self.network, "host", self.network), "classes", None)
        if known is not None:
            compare_classes(known, data.classes)
        self.classes, self.palette = tuple(data.classes), tuple(data.palette)
        self.category_ids = list(getattr(data, "category_ids", self.category_ids))

    def configure_model(self) -> None:
        """Put the network into shards where the strategy asks for it."""
        if self.device_mesh is not None and not self._is_sharded:
            shard(self.network, self.device_mesh["data_parallel"])
            self._is_sharded = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        name = self.hparams["network"]
        options = dict(self.hparams["network_options"] or {})
        host: Any = getattr(self.network, "host", None)
        upgrade = getattr(host, "freqfusion_upgrade", None)
        if upgrade is not None and "weights" in options:  # which decide how an upgrade begins
            options["init"] = upgrade.init
        if self._is_made_by_weights:
            checkpoint["hyper_parameters"]["network"] = REBUILT
            if self._description is None:
                self._description = describe_model(host or self.network)
            options = {"description": self._description}
        else:
            checkpoint["hyper_parameters"]["network"], options = without_weights(name, options)
        checkpoint["hyper_parameters"]["network_options"] = options or None
        checkpoint["task"] = self.task
        checkpoint["classes"] = list(self.classes)
        checkpoint["category_ids"] = self.category_ids
        checkpoint["palette"] = [list(colour) for colour in self.palette]
        # Every process draws its own numbers: an exact resume needs the state of each.
        states: list[Any] = [get_rng_state(self.device)]
        if self.trainer.world_size > 1:
            states *= self.trainer.world_size
            torch.distributed.all_gather_object(states, states[0])
        checkpoint["rng_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        compare_classes(checkpoint["classes"], self.classes)
        misfits = "" if self._is_sharded else compare_states(checkpoint["state_dict"], self.state_dict())
        if misfits:
            raise ValueError(
                f"{self.trainer.ckpt_path} does not fit the network of these settings: {misfits}"
            )
        self._rng_states = checkpoint.get("rng_states")

    def checked_steps(self, warmup_steps: int) -> float:
        """The optimiser steps of the run, of which the warm-up should be a part.

        Raises:
            ValueError: if the run has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the run has no end, so its schedule has none: set max_epochs or max_steps")
        warn_of_warmup(warmup_steps, steps)
        return steps

    def on_fit_start(self) -> None:
        """Refuse to start with norms that are frozen while their statistics are of no data."""
        options = self.hparams["network_options"] or {}
        weights = options.get("weights") or options.get("backbone_weights")
        if options.get("frozen_norm") and not weights and not self.is_resumed:
            raise ValueError(
                "frozen_norm is set, but no weights are given, so the backbone would have no normalisation: give "
                "trained ones with --model.network_options.backbone_weights, or train from scratch with "
                "--model.network_options.frozen_norm false"
            )

    @property
    def is_resumed(self) -> bool:
        """Whether the training about to start goes on from a checkpoint."""
        return self._rng_states is not None

    def on_train_start(self) -> None:
        # The last hook before the first batch: whatever drew random numbers while starting is undone here.
        rank = self.trainer.global_rank
        if self._rng_states is not None and rank < len(self._rng_states):
            set_rng_state(self._rng_states[rank], self.device)
        elif rank > 0:
            torch.manual_seed(torch.initial_seed() + rank)
        self._rng_states = None
