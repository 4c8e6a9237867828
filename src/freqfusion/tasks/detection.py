"""The Lightning module of detectors: network, schedule of the published runs, and how they are judged."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from freqfusion.models import PanopticFPN, create_detector
from freqfusion.models.detection.augmented import predict_objects
from freqfusion.tasks.base import MISFITS, existing_network, misfit, warn_of_warmup
from freqfusion.tasks.evaluators import DetectionJudge, PanopticJudge
from freqfusion.tasks.object_data import training_target
from freqfusion.tasks.object_task import ObjectTask
from freqfusion.tasks.schedule import steps_with_warmup
from freqfusion.upgrade import upgrade_
from freqfusion.zoo.spec import ModelSpec


class DetectionModule(ObjectTask):
    """Trains and judges a detector. The defaults are the published 1x schedule.

    Args:
        network: A name of `freqfusion.models.create_detector`, `torchvision:NAME` for one of torchvision's
            detectors, upgraded, or `pretrained:FOLDER` for one that `freqfusion convert` or `save_pretrained` wrote.
        fusion: How coarse and fine features are joined: a name of `freqfusion.fusion.list_fusions`. nearest leaves a
            detector of torchvision as it is.
        num_classes: Number of classes without background; on the command line it comes from the data.
        things: For each class whether it is a thing; on the command line it comes from the data.
        network_options: Further arguments of `freqfusion.models.create_detector`, or of torchvision's function.
        upgrade_options: For a detector of torchvision, further arguments of `freqfusion.upgrade_`.
        optimizer: sgd or adamw.
        lr: Peak learning rate for a batch of lr_batch_size images.
        lr_batch_size: The learning rate is scaled by the images an optimiser step relative to this number; none
            leaves it as it is.
        momentum: SGD's momentum.
        weight_decay: Weight decay of all parameters.
        warmup_steps: Optimiser steps of linear warm-up.
        warmup_ratio: Share of the learning rate at the first step of the warm-up.
        milestones: Epochs after which the learning rate is multiplied by gamma.
        gamma: Factor at the milestones.
        test_sizes: Shorter sides of the images at evaluation, whose detections are merged; the network's own if not
            given.
        flip_test: Merge with the detections in the mirrored image at evaluation.
        max_detections: How many detections of a class count in an image.
    """

    task = "detection"

    def __init__(
        self,
        network: str = "faster_rcnn_r50",
        fusion: str = "freqfusion",
        num_classes: int = 0,
        things: Sequence[bool] | None = None,
        network_options: dict[str, Any] | None = None,
        upgrade_options: dict[str, Any] | None = None,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.02,
        lr_batch_size: int | None = 16,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup_steps: int = 500,
        warmup_ratio: float = 1e-3,
        milestones: Sequence[float] = (8, 11),
        gamma: float = 0.1,
        test_sizes: Sequence[int] | None = None,
        flip_test: bool = False,
        max_detections: int = 100,
    ) -> None:
        super().__init__(num_classes, things)
        things = self.things
        milestones = list(milestones)
        test_sizes = None if test_sizes is None else list(test_sizes)
        self.save_hyperparameters()
        self.check_settings()
        try:
            existing = existing_network(network, network_options)
            self.network = (
                _create_network(
                    network, fusion, num_classes, things, network_options or {}, upgrade_options or {}
                )
                if existing is None
                else existing
            )
        except MISFITS as error:
            raise ValueError(misfit(network, network_options, error)) from error
        if existing is not None:
            _check_existing(existing, num_classes, things)
        panoptic = isinstance(self.network, PanopticFPN)
        self.judge_by(
            PanopticJudge(things) if panoptic else DetectionJudge(_has_masks(self.network), max_detections)
        )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            transform: Any = self.network.transform
            transform._skip_resize = True  # torchvision's option for data that is resized already

    def check_data(self, dataset: Any) -> None:
        """Panoptic networks need segments, those with masks need masks."""
        if isinstance(self.network, PanopticFPN) and not dataset.is_panoptic:
            raise ValueError(
                "a panoptic network needs panoptic data: coco_panoptic, cityscapes_panoptic or synthetic_panoptic"
            )
        if _has_masks(self.network) and not (dataset.has_masks or dataset.is_panoptic):
            raise ValueError(
                "the network predicts masks, but the annotations have none: use one without masks (faster_rcnn_...), "
                "or data with a segmentation for each object"
            )

    def on_fit_start(self) -> None:
        """Refuse to start with stages that are frozen while their weights are random."""
        options = self.hparams["network_options"] or {}
        frozen = (options.get("backbone_options") or {}).get("frozen_stages")
        if frozen and not options.get("backbone_weights") and not self.is_resumed:
            raise ValueError(
                f"frozen_stages is {frozen}, but no weights are given, so random ones would be kept: give trained "
                "ones with --model.network_options.backbone_weights (torchvision:IMAGENET1K_V1 downloads "
                "torchvision's), or train from scratch with --model.network_options.backbone_options {}"
            )

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """What the network finds in images ``(3, H, W)`` in [0, 1], with this module's inference settings.

        Labels count from 0.
        """
        options = self.hparams
        found = predict_objects(self.network, images, sizes=options["test_sizes"], flip=options["flip_test"])
        return [{**result, "labels": result["labels"] - 1} for result in found]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        things = [label for label, thing in enumerate(self.things) if thing]
        samples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        targets = [training_target(sample, things) for sample in samples]
        losses: dict[str, Tensor] = self.network(batch["image"], targets)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        self.log("train_loss", loss, sync_dist=True, batch_size=len(batch["image"]))
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        options = self.hparams
        trainer = self.trainer
        trainer.fit_loop.setup_data()  # so that the batches of an epoch are known
        total = trainer.estimated_stepping_batches
        warn_of_warmup(options["warmup_steps"], total)
        lr = options["lr"]
        if options["lr_batch_size"] is not None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            images = data.hparams["batch_size"] * trainer.accumulate_grad_batches
            lr *= images / options["lr_batch_size"]
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer: torch.optim.Optimizer
        if options["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(
                parameters, lr, momentum=options["momentum"], weight_decay=options["weight_decay"]
            )
        else:
            optimizer = torch.optim.AdamW(parameters, lr, weight_decay=options["weight_decay"])
        steps_an_epoch = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        factor = steps_with_warmup(
            [round(epoch * steps_an_epoch) for epoch in options["milestones"]],
            options["gamma"],
            options["warmup_steps"],
            options["warmup_ratio"],
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _create_network(
    name: str,
    fusion: str,
    num_classes: int,
    things: list[bool],
    options: dict[str, Any],
    upgrade_options: dict[str, Any],
) -> nn.Module:
    if not name.startswith("torchvision:"):
        if upgrade_options:
            raise ValueError(
                f"upgrade_options are for detectors of torchvision; {name!r} is built with the fusion"
            )
        panoptic = things if name.startswith("panoptic_fpn") else None
        return create_detector(name, num_classes, fusion, things=panoptic, **options)
    spec = ModelSpec.parse(name)
    arguments = {**spec.arguments, "num_classes": num_classes + 1, **options}
    model = ModelSpec(spec.source, spec.name, arguments).build()
    return model if fusion == "nearest" else upgrade_(model, fusion, **{"init": "paper", **upgrade_options})


def _check_existing(network: nn.Module, num_classes: int, things: list[bool]) -> None:
    """Refuse a network that is no detector of these classes."""
    if not isinstance(getattr(network, "transform", None), GeneralizedRCNNTransform):
        raise ValueError(f"this {type(network).__name__} is no detector that is called as torchvision's are")
    own = getattr(network, "num_classes", num_classes)  # torchvision's do not tell
    if own != num_classes:
        raise ValueError(
            f"the network predicts {own} classes, the data has {num_classes}: use the data set that the network was "
            "made for"
        )
    if isinstance(network, PanopticFPN) and network.things != things:
        raise ValueError("the network was made for other things and stuff than the data has")


def _has_masks(network: nn.Module) -> bool:
    heads: Any = getattr(network, "roi_heads", None)
    return heads is not None and bool(heads.has_mask())
