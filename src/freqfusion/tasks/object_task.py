"""What the tasks on images with objects have in common: how they are trained and judged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from freqfusion.models.base import ObjectModel
from freqfusion.models.inference import ObjectInference
from freqfusion.tasks.base import ClassTask
from freqfusion.tasks.evaluators import Evaluator


class ObjectTask(ClassTask):
    """A network that finds objects or segments.

    A subclass makes ``network``, calls :meth:`evaluate_with` and configures the optimizer.

    Args:
        num_classes: number of classes.
        things: for each class whether it is a thing; all by default.
    """

    network: ObjectModel
    evaluator: Evaluator

    def __init__(self, num_classes: int, things: Sequence[bool] | None) -> None:
        super().__init__(num_classes)
        self.things = [True] * num_classes if things is None else [bool(thing) for thing in things]

    @property
    def inference(self) -> ObjectInference:
        """How the network is asked in an evaluation."""
        options, size = self.hparams, self.hparams["test_size"]
        return ObjectInference(
            sizes=[size] if isinstance(size, int) else size,
            max_size=options.get("test_max_size"),
            flip=options.get("flip_test", False),
            max_detections=options["max_detections"],
        )

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """What the network finds in images ``(3, H, W)`` in [0, 1], with this module's inference settings.

        Returns:
            For each image a dict with ``boxes``, ``labels`` from 0, ``scores`` and perhaps ``masks``, or with
            ``segments``, ``segment_labels`` and ``segment_scores``.
        """
        return self.network.find(images, self.inference)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        samples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        loss = self.network.loss(batch["image"], samples)
        self.log("train_loss", loss, logger=False, sync_dist=True, batch_size=len(batch["image"]))
        return loss

    def evaluate_with(self, evaluator: Evaluator) -> None:
        """Take an evaluator's metrics as those of the task."""
        self.evaluator = evaluator
        self.metric_labels = evaluator.metric_labels
        self.class_metrics = evaluator.class_metrics
        self.headline = [figure.name for figure in evaluator.class_metrics if "50" not in figure.name][:2]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        if data.things != self.things:
            raise ValueError("the network was made for other things and stuff than the data has")
        self.check_data(data.dataset(data.hparams["train_split" if stage == "fit" else "val_split"]))

    def check_data(self, dataset: Any) -> None:
        """Refuse an object data set that lacks what the network is trained with or judged by."""

    def on_validation_epoch_start(self) -> None:
        self._start("val")

    def on_test_epoch_start(self) -> None:
        self._start("test")

    def _start(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        files = None if self.trainer.state.fn == "fit" else Path(self.trainer.default_root_dir, stage)
        self.evaluator.start(data.dataset(data.hparams[f"{stage}_split"]), files)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._judge(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._judge(batch)

    def _judge(self, batch: dict[str, Any]) -> None:
        if not batch["name"]:  # this process has no image left while another has one
            return
        results: list[dict[str, Tensor]] = self(batch["image"])
        for index, result in enumerate(results):
            self.evaluator.update({key: values[index] for key, values in batch.items()}, result)

    def on_validation_epoch_end(self) -> None:
        self._sum_up("val")

    def on_test_epoch_end(self) -> None:
        self._sum_up("test")

    def _sum_up(self, stage: str) -> None:
        self.results = self.evaluator.compute()
        # every process has the figures of all
        self.log_dict(
            {f"{stage}_{name}": self.results[name] for name in self.metric_labels},
            logger=False,
            rank_zero_only=False,
        )
