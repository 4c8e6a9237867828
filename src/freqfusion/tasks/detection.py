"""The Lightning module of detectors: network, schedule of the published runs, and how they are judged."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from freqfusion.models.base import ObjectModel, PixelModel
from freqfusion.tasks.evaluators import DetectionEvaluator, PanopticEvaluator
from freqfusion.tasks.object_task import ObjectTask
from freqfusion.tasks.schedule import Schedule, fusion_parameters, settings_in


class DetectionModule(ObjectTask):
    """Trains and judges a detector. The defaults are the published 1x schedule.

    Args:
        network: Its name, as `freqfusion.create_model` takes it: `faster_rcnn_r50`, `mask_rcnn_convnext_tiny`,
            `torchvision:retinanet_resnet50_fpn`, a folder of `freqfusion convert` or `save_pretrained`.
        fusion: How coarse and fine features are joined: a name of `freqfusion.fusion.list_fusions`. nearest leaves a
            detector of torchvision as it is.
        num_classes: Number of classes without background; on the command line it comes from the data.
        things: For each class whether it is a thing; on the command line it comes from the data.
        network_options: Further arguments of `freqfusion.create_model`.
        weights: What the network starts from: a file, a folder of `save_pretrained`, a name on the hub.
        backbone_weights: ImageNet weights of the backbone: a file, `torchvision:TAG`, `timm:TAG`,
            `package:efficientnet_lite0`.
        freeze_backbone: Leave the backbone as it is: no gradients in it, and always in evaluation mode.
        optimizer: sgd or adamw.
        lr: Peak learning rate for a batch of lr_batch_size images.
        lr_batch_size: The learning rate is scaled by the images per optimiser step relative to this number; none
            leaves it as it is.
        fusion_lr_factor: The fusions' learning rate relative to that of all the rest.
        momentum: SGD's momentum.
        weight_decay: Weight decay of all parameters.
        warmup_steps: Optimiser steps of linear warm-up.
        warmup_ratio: Share of the learning rate at the first step of the warm-up.
        milestones: Shares of the run after which the learning rate is multiplied by gamma.
        gamma: Factor at the milestones.
        test_size: Shorter side of the images at evaluation, or several, whose detections are merged; the network's
            own if not given.
        flip_test: Merge with the detections in the mirrored image at evaluation.
        max_detections: How many detections of a class count in an image.
    """

    task = "detection"

    def __init__(
        self,
        network: str | dict[str, Any] = "faster_rcnn_r50",
        fusion: str = "freqfusion",
        num_classes: int = 0,
        things: Sequence[bool] | None = None,
        network_options: dict[str, Any] | None = None,
        weights: str | None = None,
        backbone_weights: str | None = None,
        freeze_backbone: bool = False,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.02,
        lr_batch_size: int | None = 16,
        fusion_lr_factor: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup_steps: int = 500,
        warmup_ratio: float = 1e-3,
        milestones: Sequence[float] = (8 / 12, 11 / 12),
        gamma: float = 0.1,
        test_size: int | Sequence[int] | None = None,
        flip_test: bool = False,
        max_detections: int = 100,
    ) -> None:
        super().__init__(num_classes, things)
        things = self.things
        milestones = list(milestones)
        test_size = list(test_size) if isinstance(test_size, (list, tuple)) else test_size
        self.save_hyperparameters()
        self.check_settings()
        self.network = self.create_network(things=things)
        if not isinstance(self.network, ObjectModel) or isinstance(self.network, PixelModel):
            raise ValueError(
                f"{type(self.network).__name__} is not a detector: networks that classify pixels are "
                "for --task semantic, Mask2Former also for --task masks"
            )
        panoptic = self.network.finds == "segments"
        self.evaluate_with(
            PanopticEvaluator(things)
            if panoptic
            else DetectionEvaluator(self.network.finds == "instances", max_detections)
        )

    def check_data(self, dataset: Any) -> None:
        """Panoptic networks need segments, those with masks need masks."""
        if self.network.finds == "segments" and not dataset.is_panoptic:
            raise ValueError(
                "a panoptic network needs panoptic data: coco_panoptic, cityscapes_panoptic or synthetic_panoptic"
            )
        if self.network.finds == "instances" and not (dataset.has_masks or dataset.is_panoptic):
            raise ValueError(
                "the network predicts masks, but the annotations have none: use one without masks (faster_rcnn_...), "
                "or data with a segmentation for each object"
            )

    def on_fit_start(self) -> None:
        """Refuse to start with stages that are frozen while their weights are random; and see the base."""
        super().on_fit_start()
        options = self.hparams["network_options"] or {}
        frozen = (options.get("backbone_options") or {}).get("frozen_stages")
        weights = self.hparams["weights"] or self.hparams["backbone_weights"]
        if frozen and not weights and not self.is_resumed:
            raise ValueError(
                f"frozen_stages is {frozen}, but no weights are given, so random ones would be kept: give trained "
                "ones with --model.backbone_weights (torchvision:IMAGENET1K_V1 downloads "
                "torchvision's), or train from scratch with --model.network_options.backbone_options {}"
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        options, trainer = self.hparams, self.trainer
        lr = options["lr"]
        if options["lr_batch_size"] is not None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            images = data.hparams["batch_size"] * trainer.accumulate_grad_batches
            lr *= images / options["lr_batch_size"]
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        of_fusions = fusion_parameters(self.network)
        groups = [
            {"params": [p for p in trained if (p in of_fusions) == fused], "lr": lr * factor}
            for fused, factor in ((False, 1.0), (True, options["fusion_lr_factor"]))
        ]
        groups = [group for group in groups if group["params"]]
        optimizer: torch.optim.Optimizer
        if options["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(
                groups, lr, momentum=options["momentum"], weight_decay=options["weight_decay"]
            )
        else:
            optimizer = torch.optim.AdamW(groups, lr, weight_decay=options["weight_decay"])
        schedule = settings_in(Schedule, options)
        return schedule.apply(optimizer, self.checked_steps(schedule.warmup_steps))
