"""What the Lightning modules of all tasks have in common."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from freqfusion._settings import check_settings
from freqfusion._untrusted import START_WEIGHTS
from freqfusion.models.library import LibraryModel
from freqfusion.tasks.rng import get_rng_state, set_rng_state
from freqfusion.tasks.sharding import shard
from freqfusion.weights.fill import match
from freqfusion.zoo import ModelSpec, create_model
from freqfusion.zoo.create import wrap
from freqfusion.zoo.normalisation import take_normalisation_
from freqfusion.zoo.pretrained import describe_model, is_saved, rebuild_model, with_normalisation
from freqfusion.zoo.spec import spec_of
from freqfusion.zoo.start import freeze_backbone_

MISFITS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError)
"""What networks raise for options that do not fit, besides ValueError."""


class ClassMetric(NamedTuple):
    """A figure that every class has."""

    label: str
    """Its name for people."""
    name: str
    """Its name in files."""
    per_class: str
    """Its key in :attr:`TaskModule.results`, a list with a number per class, NaN where it is not defined."""
    mean: str
    """The key of its mean."""


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


def warn_of_warmup(warmup_steps: int, steps: float) -> None:
    """Say so if a run ends before its warm-up does."""
    if warmup_steps and steps <= warmup_steps:
        rank_zero_warn(
            f"the warm-up of {warmup_steps} steps is as long as the whole run of {int(steps)}: "
            "the learning rate never reaches its peak; lower warmup_steps"
        )


class TaskModule(L.LightningModule):
    """What is trained and how it is judged.

    A subclass makes ``network``, defines the steps and the optimizer, and fills :attr:`results` at the end of an
    evaluation. Random states are part of its checkpoints, for every process its own.
    """

    task: ClassVar[str]
    """What ``task:`` in a recipe says."""
    named_by: ClassVar[tuple[str, str]] = ("network", "fusion")
    """The two settings that say what is trained: run folders and variants of recipes are named by their values."""
    network: Any
    metric_labels: Mapping[str, str]
    """The figures of an evaluation, all but the loss shares in [0, 1]: name to label. Logged as ``val_NAME``."""
    headline: Sequence[str]
    """The names of those to be shown first; the first of them decides on ``best.ckpt``."""
    class_metrics: Sequence[ClassMetric] = ()
    classes: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, Any] = {}
        """Figures of the latest evaluation as plain numbers, and lists with a number per class."""
        self._rng_states: list[dict[str, Any]] | None = None
        self._is_sharded = False

    def check_settings(self) -> None:
        """Hold the saved hyperparameters against the table of bounds, before the network is built.

        Raises:
            ValueError: for a number out of bounds, or numbers that do not fit together.
        """
        self.hparams.update(check_settings(self.task, self.hparams))

    def configure_model(self) -> None:
        """Put the network into shards where the strategy asks for it."""
        if self.device_mesh is not None and not self._is_sharded:
            shard(self.network, self.device_mesh["data_parallel"])
            self._is_sharded = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = self.task
        # Every process draws its own numbers: an exact resume needs the state of each.
        states: list[Any] = [get_rng_state(self.device)]
        if self.trainer.world_size > 1:
            states *= self.trainer.world_size
            torch.distributed.all_gather_object(states, states[0])
        checkpoint["rng_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        misfits = "" if self._is_sharded else match(checkpoint["state_dict"], self.state_dict()).problems
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


class ClassTask(TaskModule):
    """A network that predicts classes.

    Args:
        num_classes: number of classes.
    """

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
        self.data_options: dict[str, Any] = {}
        """The settings of the data that the network was trained with; set by ``load_checkpoint``."""
        self._description: dict[str, Any] | None = None

    @property
    def _is_shaped_by_weights(self) -> bool:
        """Whether the weights that a library's network started from decided how it was built."""
        name, options = self.hparams["network"], self.hparams["network_options"] or {}
        if isinstance(name, Mapping) or is_saved(name):
            return True
        given = {**ModelSpec.parse(name).options, **options, **self.hparams}
        return isinstance(self.network, LibraryModel) and any(given.get(key) for key in START_WEIGHTS)

    def create_network(self, **options: Any) -> Any:
        """The network that the hyperparameters say, a name or the description in a checkpoint, in training mode.

        Args:
            **options: further ones of :func:`freqfusion.create_model`.

        Raises:
            FileNotFoundError, ImportError, ValueError: see there; also for options that do not fit.
        """
        settings = self.hparams
        network, options = settings["network"], {**(settings["network_options"] or {}), **options}
        try:
            if isinstance(network, Mapping):
                found = wrap(
                    rebuild_model(network, source="the checkpoint"), settings["num_classes"], **options
                ).train()
            else:
                found = create_model(
                    network,
                    settings["num_classes"],
                    settings["fusion"],
                    weights=settings["weights"],
                    backbone_weights=settings["backbone_weights"],
                    **options,
                )
            if settings["freeze_backbone"]:
                freeze_backbone_(found)
            return found
        except MISFITS as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            given = settings["network_options"] or {}
            raise ValueError(
                f"network_options {given} do not fit {network!r}: {' '.join(reason.split())}"
            ) from error

    def setup(self, stage: str) -> None:
        if stage == "fit":  # before it is put into shards, and not at every checkpoint
            self._description = self._describe()
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "classes"):
            return
        if len(data.classes) != len(self.classes):
            raise ValueError(
                f"the network predicts {len(self.classes)} classes, the data has "
                f"{len(data.classes)}: use the data set that the network was made for"
            )
        known = getattr(self.network.spec, "classes", None)
        if known is not None:
            compare_classes(known, data.classes)
        self.classes, self.palette = tuple(data.classes), tuple(data.palette)
        self.category_ids = list(getattr(data, "category_ids", self.category_ids))

    def _describe(self) -> dict[str, Any]:
        """How the network is made, for its checkpoints."""
        network = _bare(self.network)
        if self._is_shaped_by_weights:
            return describe_model(network)
        return with_normalisation({"spec": spec_of(network).to_json()}, network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        settings = checkpoint["hyper_parameters"]
        if not isinstance(settings["network"], Mapping):
            checkpoint["asked"] = {name: settings[name] for name in ("network", "network_options")}
        # what was trained is made again without the weights that it started from
        settings["network"] = self._description or self._describe()
        settings |= {"network_options": None, "weights": None, "backbone_weights": None}
        checkpoint["classes"] = list(self.classes)
        checkpoint["category_ids"] = self.category_ids
        checkpoint["palette"] = [list(colour) for colour in self.palette]
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        compare_classes(checkpoint["classes"], self.classes)
        super().on_load_checkpoint(checkpoint)
        network = _bare(self.network)
        take_normalisation_(network, checkpoint["hyper_parameters"]["network"], str(self.trainer.ckpt_path))
        if self._description is not None:
            self._description = with_normalisation(self._description, network)

    def on_fit_start(self) -> None:
        """Refuse to start with frozen norms whose statistics are of no data; warn of such a backbone."""
        options = self.hparams["network_options"] or {}
        weights = self.hparams["weights"] or self.hparams["backbone_weights"]
        if options.get("frozen_norm") and not weights and not self.is_resumed:
            raise ValueError(
                "frozen_norm is set, but no weights are given, so the backbone would have no normalisation: give "
                "trained ones with --model.backbone_weights, or train from scratch with "
                "--model.network_options.frozen_norm false"
            )
        if self.network.frozen and not weights and not self._is_shaped_by_weights and not self.is_resumed:
            rank_zero_warn(
                "freeze_backbone is set, but no weights are given: unless the network brings its own, the backbone "
                "stays random; give trained ones with --model.backbone_weights"
            )


def _bare(network: nn.Module) -> nn.Module:
    """A library's model without its wrapper."""
    return network.host if isinstance(network, LibraryModel) else network
