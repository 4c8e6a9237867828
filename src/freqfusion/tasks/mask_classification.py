"""The Lightning module of mask classification (Mask2Former): instances or panoptic segments."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from freqfusion.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from freqfusion.models.inference import fitting_size
from freqfusion.models.library import HostSegmenter
from freqfusion.tasks.base import existing_network, host_network
from freqfusion.tasks.evaluators import DetectionJudge, PanopticJudge
from freqfusion.tasks.object_task import ObjectTask
from freqfusion.tasks.schedule import adamw_with_schedule


class MaskModule(ObjectTask):
    """Trains and judges a Mask2Former. The defaults are the published settings.

    Args:
        network: A name such as `mask2former_swin_t` of `freqfusion.models.library.list_hosts`, or `pretrained:FOLDER`
            for one that `freqfusion convert` or `save_pretrained` wrote.
        fusion: How coarse and fine features are joined: a name of `freqfusion.fusion.list_fusions`. bilinear is the
            plain network.
        num_classes: Number of classes; on the command line it comes from the data.
        things: For each class whether it is a thing; on the command line it comes from the data.
        output: What is wanted and judged: panoptic segments or instances.
        network_options: Further arguments of `freqfusion.zoo.create_host`.
        lr: Peak learning rate of all but the backbone.
        backbone_lr_factor: The backbone's learning rate relative to that.
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
    network: HostSegmenter

    def __init__(
        self,
        network: str = "mask2former_r50",
        fusion: str = "freqfusion",
        num_classes: int = 0,
        things: Sequence[bool] | None = None,
        output: Literal["panoptic", "instance"] = "panoptic",
        network_options: dict[str, Any] | None = None,
        lr: float = 1e-4,
        backbone_lr_factor: float = 0.1,
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
        existing = existing_network(network, network_options)
        self.network = host_network(network, num_classes, fusion, network_options, existing)
        if not self.network.is_mask2former:
            raise ValueError(
                f"{network!r} is no Mask2Former; networks that give a class for every pixel are for the task semantic"
            )
        self.judge_by(
            PanopticJudge(self.things) if output == "panoptic" else DetectionJudge(True, max_detections)
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
                "the annotations have no masks, by which Mask2Former is trained: use data with a segmentation for "
                "each object, or a detector of boxes (task detection)"
            )

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """What the network finds in images ``(3, H, W)`` in [0, 1], with this module's inference settings.

        Labels count from 0.
        """
        options = self.hparams
        things = [label for label, thing in enumerate(self.things) if thing]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        with torch.no_grad():
            results = self.network.find([self._prepared(image) for image in images], sizes)
        if options["output"] == "panoptic":
            return [result.panoptic(things) for result in results]
        kept = None if all(self.things) else things
        return [result.instances(top_k=options["max_detections"], things=kept) for result in results]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        samples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        if self.hparams["output"] == "instance":
            samples = [self._things_of(sample) for sample in samples]
        loss = self.network.object_loss([_normalise(image) for image in batch["image"]], samples)
        self.log("train_loss", loss, sync_dist=True, batch_size=len(batch["image"]))
        return loss

    def _things_of(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample whose stuff is left out: it is no more to be found than a crowd."""
        thing = torch.tensor(self.things, device=sample["labels"].device)[sample["labels"]]
        return {**sample, "iscrowd": sample["iscrowd"] | ~thing}

    def _prepared(self, image: Tensor) -> Tensor:
        size = self.hparams["test_size"]
        if size is not None:
            fitting = fitting_size(image.shape[-2], image.shape[-1], size, self.hparams["test_max_size"])
            image = F.interpolate(image[None], fitting, mode="bilinear", antialias=True)[0]
        return _normalise(image)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        options = self.hparams
        return adamw_with_schedule(
            self.network,
            int(self.checked_steps(options["warmup_steps"])),
            lr=options["lr"] * options["backbone_lr_factor"],
            head_lr_factor=1 / options["backbone_lr_factor"],
            betas=tuple(options["betas"]),
            weight_decay=options["weight_decay"],
            poly_power=options["poly_power"],
            warmup_steps=options["warmup_steps"],
            warmup_ratio=options["warmup_ratio"],
            milestones=options["milestones"],
        )


def _normalise(image: Tensor) -> Tensor:
    return TF.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD))
