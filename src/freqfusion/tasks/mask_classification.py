"""The Lightning module of mask classification (Mask2Former): instances or panoptic segments."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from freqfusion.models.base import ObjectModel, PixelModel
from freqfusion.tasks.evaluators import DetectionEvaluator, PanopticEvaluator
from freqfusion.tasks.object_task import ObjectTask
from freqfusion.tasks.schedule import AdamWSettings, Schedule, settings_in


class MaskClassificationModule(ObjectTask):
    """Trains and judges a Mask2Former. The defaults are the published settings.

    Args:
        network: Its name, as `freqfusion.create_model` takes it: `mask2former_swin_t`, a folder of
            `freqfusion convert` or `save_pretrained`.
        fusion: How coarse and fine features are joined: a name of `freqfusion.fusion.list_fusions`. bilinear is the
            plain network.
        num_classes: Number of classes; on the command line it comes from the data.
        things: For each class whether it is a thing; on the command line it comes from the data.
        output: What is wanted and judged: panoptic segments or instances.
        network_options: Further arguments of `freqfusion.create_model`.
        weights: What the network starts from: a file, a folder of `save_pretrained`, a name on the hub.
        backbone_weights: ImageNet weights of the backbone: a file, `torchvision:TAG`, `timm:TAG`,
            `package:efficientnet_lite0`.
        freeze_backbone: Leave the backbone as it is: no gradients in it, and always in evaluation mode.
        lr: Peak learning rate of all but the backbone and the fusions.
        backbone_lr_factor: The backbone's learning rate relative to that.
        fusion_lr_factor: The fusions' learning rate relative to that.
        betas: AdamW's decay rates of the two moments.
        weight_decay: AdamW's weight decay; normalisation layers, embeddings and tables of positions have none.
        warmup_steps: Optimiser steps of linear warm-up.
        warmup_ratio: Share of the learning rate at the first step of the warm-up.
        poly_power: Power of the decay to zero over the run; 0 for none.
        milestones: Shares of the run after which the learning rate is multiplied by 0.1, in place of the decay.
        test_size: Shorter side of the images at evaluation; their own size if not given.
        test_max_size: Limit of the longer side.
        max_detections: How many instances of an image are kept.
    """

    task = "masks"

    def __init__(
        self,
        network: str | dict[str, Any] = "mask2former_r50",
        fusion: str = "freqfusion",
        num_classes: int = 0,
        things: Sequence[bool] | None = None,
        output: Literal["panoptic", "instance"] = "panoptic",
        network_options: dict[str, Any] | None = None,
        weights: str | None = None,
        backbone_weights: str | None = None,
        freeze_backbone: bool = False,
        lr: float = 1e-4,
        backbone_lr_factor: float = 0.1,
        fusion_lr_factor: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        warmup_steps: int = 0,
        warmup_ratio: float = 1.0,
        poly_power: float = 0.9,
        milestones: Sequence[float] = (),
        test_size: int | None = 800,
        test_max_size: int = 1333,
        max_detections: int = 100,
    ) -> None:
        super().__init__(num_classes, things)
        things, milestones = self.things, list(milestones)
        self.save_hyperparameters()
        self.check_settings()
        self.network = self.create_network(things=things, output=output)
        if not (isinstance(self.network, ObjectModel) and isinstance(self.network, PixelModel)):
            raise ValueError(
                f"{network!r} is not a Mask2Former: networks that classify pixels are for --task "
                "semantic, detectors for --task detection"
            )
        self.evaluate_with(
            PanopticEvaluator(self.things)
            if output == "panoptic"
            else DetectionEvaluator(True, max_detections)
        )

    def check_data(self, dataset: Any) -> None:
        """Both kinds of output need masks, panoptic segments panoptic data."""
        if self.hparams["output"] == "panoptic" and not dataset.is_panoptic:
            raise ValueError(
                "panoptic segments need panoptic data: coco_panoptic, cityscapes_panoptic or synthetic_panoptic; for "
                "instances set --model.output instance"
            )
        if not (dataset.is_panoptic or dataset.has_masks):
            raise ValueError(
                "the annotations have no masks, which Mask2Former needs: use data with a segmentation for "
                "each object, or a detector of boxes (task detection)"
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = settings_in(AdamWSettings, self.hparams).create(self.network)
        schedule = settings_in(Schedule, self.hparams)
        return schedule.apply(optimizer, self.checked_steps(schedule.warmup_steps))
