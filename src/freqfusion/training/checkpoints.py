"""Checkpoints: written whole or not at all, read without running anything in them."""

import math
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from freqfusion._files import replacing
from freqfusion._untrusted import MAX_CLASSES, building, check_arguments, check_plain
from freqfusion.data.base import voc_colour
from freqfusion.data.class_names import COCO_PANOPTIC, COCO_THINGS
from freqfusion.features import create_upsampler
from freqfusion.models.base import ObjectModel, PixelModel
from freqfusion.tasks.base import ClassTask
from freqfusion.tasks.detection import DetectionModule
from freqfusion.tasks.features import FeatureModule
from freqfusion.tasks.mask_classification import MaskClassificationModule
from freqfusion.tasks.names import TASKS, find_task
from freqfusion.tasks.semantic import SegmentationModule
from freqfusion.weights.files import load_plain
from freqfusion.weights.fill import match
from freqfusion.zoo import ModelSpec, create_model
from freqfusion.zoo.pretrained import read_description, refuse_code

LAST = "last.ckpt"
BEST = "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, and reads plain data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        content = read_checkpoint(path)
        for name, kind in _OF_TRAINING.items():
            if not isinstance(content.get(name), kind):
                held = f"has {type(content[name]).__name__!r} for" if name in content else "lacks"
                raise ValueError(
                    f"{path} is damaged: it {held} {name}, without which a run cannot go on; copy it again"
                )
        return content


_OF_TRAINING: dict[str, type] = {
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
}
"""What a checkpoint holds for a run that goes on."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint that this package wrote, on the CPU.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file that is cut off, refuses to load as plain data, or is not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: give the path of a .ckpt file")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not a complete checkpoint (cut off while copying, or another kind of file): "
            "copy it again, or take last.ckpt or best.ckpt of a run folder"
        )
    try:
        content = load_plain(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of freqfusion fit: {error}") from error
    content = content if isinstance(content, dict) else {}
    of_features = task_of(content) == FeatureModule.task
    missing = (_PARTS if of_features else {**_PARTS, **_OF_CLASSES}).keys() - content.keys()
    if missing:
        raise ValueError(
            f"{path} is not a checkpoint of freqfusion fit (it lacks {', '.join(sorted(missing))}): "
            "take last.ckpt or best.ckpt of a run folder; freqfusion convert turns published weights into a folder "
            "that is taken like one"
        )
    _check(content, path)
    return content


_PARTS: dict[str, type] = {"state_dict": dict, "hyper_parameters": dict}
"""What a checkpoint holds at least."""
_OF_CLASSES: dict[str, type] = {"classes": list, "palette": list}
"""What it holds besides, where a network predicts classes."""
_START = ("weights", "backbone_weights", "encoder_weights", "upsampler_weights")
"""Settings that name a file, which a checkpoint leaves empty."""


def _check(content: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another form, or whose network would fetch or open something."""
    for name, kind in {**_PARTS, **_OF_CLASSES}.items():
        if name in content and not isinstance(content[name], kind):
            raise ValueError(f"{path} is damaged: its {name} is a {type(content[name]).__name__}")
    check_plain({key: value for key, value in content.items() if key != "state_dict"}, path)
    for key, value in content["state_dict"].items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path} is damaged: its state_dict has {type(value).__name__!r} among the tensors"
            )
    data = content.get("datamodule_hyper_parameters", {})
    ids = content.get("category_ids", [])
    if not (isinstance(data, dict) and isinstance(ids, list) and all(type(number) is int for number in ids)):
        raise ValueError(f"{path} is damaged: its settings of the data or its category_ids have another form")
    settings = content["hyper_parameters"]
    for name in ("network_options", *_START):
        if settings.get(name):
            raise ValueError(
                f"{path} sets {name}={settings[name]!r:.80}; its own weights are for what is in it"
            )
    if task_of(content) == FeatureModule.task:
        _check_encoder(settings, path)
    else:
        _check_classes(content, path)


def _check_encoder(settings: dict[str, Any], path: Path) -> None:
    """Refuse an encoder or an upsampler that would fetch or open something."""
    encoder = settings.get("encoder")
    if not isinstance(encoder, str):
        raise ValueError(f"{path} is damaged: its encoder is {encoder!r:.80}, expected a name")
    refuse_code(ModelSpec.from_json(ModelSpec.parse(encoder).to_json(), path), str(path))
    check_arguments(settings.get("upsampler_options") or {}, path)


def _check_classes(content: dict[str, Any], path: Path) -> None:
    """Refuse classes, or a network that predicts them, of another form."""
    if not (
        all(isinstance(name, str) for name in content["classes"])
        and all(map(_is_colour, content["palette"]))
        and len(content["classes"]) == len(content["palette"])
    ):
        raise ValueError(f"{path} is damaged: its classes and palette must be names and as many RGB colours")
    settings = content["hyper_parameters"]
    count, classes = settings.get("num_classes"), len(content["classes"])
    if count != classes or classes > MAX_CLASSES:
        raise ValueError(
            f"{path} contradicts itself: it was made for {count} classes and names {classes}, expected as many, "
            f"{MAX_CLASSES} at most"
        )
    network = settings.get("network")
    if not isinstance(network, dict):
        raise ValueError(f"{path} is damaged: its network is {network!r:.80}, expected how it is made")
    refuse_code(read_description(network, str(path))[0], str(path))


def _is_colour(value: Any) -> bool:
    three = isinstance(value, (list, tuple)) and len(value) == 3
    return three and all(type(level) is int and 0 <= level <= 255 for level in value)


def task_of(content: dict[str, Any]) -> str:
    """The task of what `read_checkpoint` returns; checkpoints of before there were several do not say."""
    return str(content.get("task", next(iter(TASKS))))


def load_checkpoint(
    path: str | Path,
) -> tuple[ClassTask, tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Rebuild what ``freqfusion fit`` saved: nothing but the file is needed.

    Args:
        path: A ``.ckpt`` file, or a folder of :func:`freqfusion.save_pretrained` or ``freqfusion convert``, whose
            network then gets its task's default settings.

    Returns:
        The module in evaluation mode on the CPU, the names of its classes, and one RGB colour per class.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file that is cut off, unsafe to load, or not one of ours.
    """
    module: ClassTask
    if Path(path).is_dir():
        module = _around_pretrained(str(path))
        return module.eval(), module.classes, module.palette
    content = read_checkpoint(path)
    if task_of(content) == FeatureModule.task:
        raise ValueError(
            f"{path} holds no network but an upsampler of features: load it with "
            f"freqfusion.features.create_upsampler({content['hyper_parameters'].get('upsampler')!r:.80}, CHANNELS, "
            f"weights={str(path)!r}), and judge it with freqfusion validate"
        )
    module_class: Any = find_task(task_of(content))[0]
    with building(Path(path).stat().st_size, f"{path}: its network cannot be made as it says: "):
        module = module_class(**content["hyper_parameters"])
    misfits = match(content["state_dict"], module.state_dict()).problems
    if misfits:
        raise ValueError(f"{path} does not fit the network that it names: {misfits}")
    try:
        module.load_state_dict(content["state_dict"])
    except RuntimeError as error:  # tensors of another kind
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    module.data_options = dict(content.get("datamodule_hyper_parameters", {}))
    module.classes = tuple(content["classes"])
    module.category_ids = list(content.get("category_ids", module.category_ids))
    module.palette = tuple((red, green, blue) for red, green, blue in content["palette"])
    return module.eval(), module.classes, module.palette


def check_upsampler(content: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint of the task features whose tensors do not fit the upsampler that it names.

    Args:
        content: what :func:`read_checkpoint` returned of ``path``.

    Raises:
        ValueError: for any other.
    """
    settings = content["hyper_parameters"]
    with building(Path(path).stat().st_size, f"{path}: its upsampler cannot be made as it says: "):
        upsampler = create_upsampler(
            settings["upsampler"], content["channels"], **(settings["upsampler_options"] or {})
        )
    own = {f"upsampler.{key}": value for key, value in upsampler.state_dict().items()}
    misfits = match(content["state_dict"], own).problems
    if misfits:
        raise ValueError(f"{path} does not fit the upsampler that it names: {misfits}")


def _around_pretrained(folder: str) -> ClassTask:
    """A module of the task that a saved network is for; classes without names are numbered.

    A Mask2Former can serve several: with the classes of COCO it is for segments or instances, else for classes of
    pixels.
    """
    network = create_model(folder)
    num_classes, classes = network.num_classes, network.spec.classes
    options: dict[str, Any] = {}
    task = SegmentationModule.task
    if isinstance(network, ObjectModel) and not isinstance(network, PixelModel):
        task, options = DetectionModule.task, {"things": list(network.things)}
    elif isinstance(network, ObjectModel):
        published = {COCO_PANOPTIC: "panoptic", COCO_THINGS: "instance"}.get(tuple(classes or ()))
        if published:
            things = [index < len(COCO_THINGS) for index in range(num_classes)]
            task, options = MaskClassificationModule.task, {"output": published, "things": things}
    if classes is not None and len(classes) != num_classes:
        raise ValueError(
            f"{folder} names {len(classes)} classes for a network of {num_classes}; copy it again"
        )
    module_class: Any = TASKS[task][0]
    module: ClassTask = module_class(network=folder, num_classes=num_classes, **options)
    if classes is not None:
        module.classes = tuple(classes)
    module.palette = tuple(
        voc_colour(0 if name == "background" else index) for index, name in enumerate(module.classes, 1)
    )
    return module


def greatest_weight(module: nn.Module) -> Tensor:
    """The greatest absolute value of the parameters, of this process's shards where they are in shards.

    Returns:
        ``()``, floating point, on their device; infinite or NaN if one of them is.
    """
    weights: list[Any] = [parameter.detach() for parameter in module.parameters()]
    local = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
    return torch.nn.utils.get_total_norm([weight for weight in local if weight.numel()], math.inf)


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt``, from which a run goes on exactly, and ``best.ckpt``, the best validation so far.

    The first figure of the task's headline decides, the greater the better. ``last.ckpt`` is written every
    ``every_steps`` optimiser steps and after each validation.

    Args:
        folder: Where the files go.
        every_steps: Optimiser steps between two of ``last.ckpt``.
    """

    def __init__(self, folder: str | Path, every_steps: int = 500) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}")
        self.folder, self.every_steps = Path(folder), every_steps
        self.best_score: float | None = None
        self._step = 0
        self.saved_step = 0
        """The optimiser step that ``last.ckpt`` holds."""

    @property
    def last(self) -> Path:
        """The file to go on from."""
        return self.folder / LAST

    @property
    def best(self) -> Path:
        """The file with the best validation figure."""
        return self.folder / BEST

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = self.saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        # Only right after a step: gradients that are still being accumulated are in no file.
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if stepped and self._step % self.every_steps == 0 and not self._validation_follows(trainer):
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get(f"val_{pl_module.headline[0]}")
        before = self.best_score
        # A score of NaN, where no class occurs, is the best only until there is a number.
        if score is not None and (before is None or math.isnan(before) or float(score) > before):
            self.best_score = float(score)
            # Before last.ckpt, which knows of this score: a run that goes on from there must find the file.
            if not self._save(trainer, self.best):
                self.best_score = before
        if trainer.is_last_batch or (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self._save_last(trainer)

    def _save_last(self, trainer: L.Trainer) -> None:
        if self._save(trainer, self.last):
            self.saved_step = trainer.global_step

    @staticmethod
    def _save(trainer: L.Trainer, path: Path) -> bool:
        """Write a checkpoint unless the weights are no longer finite, which would take the place of good ones."""
        greatest = greatest_weight(trainer.lightning_module)
        if not math.isfinite(trainer.strategy.reduce(greatest, reduce_op="sum")):
            return False
        trainer.save_checkpoint(path, weights_only=False)
        return True

    @staticmethod
    def _validation_follows(trainer: L.Trainer) -> bool:
        """Whether this batch ends an epoch or a validation comes next, after which ``last.ckpt`` is due anyway.

        Lightning's counters, restored from a file written just before, would skip that validation.
        """
        if trainer.is_last_batch:
            return True
        every = trainer.val_check_batch
        if not every or every == float("inf"):
            return False
        loop = trainer.fit_loop
        batch = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
        return (batch + 1) % every == 0
