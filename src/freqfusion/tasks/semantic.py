"""The Lightning module of semantic segmentation: network, loss, the published schedule, and how it is judged."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MeanMetric

from freqfusion.metrics import BinaryMetrics, SegmentationMetrics
from freqfusion.models.base import IGNORE_INDEX, PixelModel, pixel_cross_entropy
from freqfusion.models.inference import fitting_size, predict_logits
from freqfusion.tasks.base import ClassMetric, ClassTask
from freqfusion.tasks.rng import fixed_randomness
from freqfusion.tasks.schedule import AdamWSettings, Schedule, settings_in

BINARY_LABELS = {"dice": "Dice", "sensitivity": "sensitivity", "specificity": "specificity", "auc": "AUC"}
"""Metrics of the second class, for networks of two classes."""


class SegmentationModule(ClassTask):
    """Trains and judges a semantic segmentation network. The defaults are the published SegNeXt schedule.

    The loss is cross entropy averaged over all pixels of the batch, ignored ones counting zero, as in the
    published runs (mmsegmentation's ``avg_non_ignore=False``): so a batch split over processes or over
    accumulated steps gives the gradient of the whole batch.

    Networks of two classes are judged by Dice, sensitivity, specificity and the area under the ROC curve too.

    Args:
        network: Its name, as `freqfusion.create_model` takes it: `segnext_t`, `unet_convnext_tiny`,
            `smp:Unet?encoder_name=resnet18`, a folder of `freqfusion convert` or `save_pretrained`.
        fusion: How coarse and fine features are joined: a name of `freqfusion.fusion.list_fusions`.
        num_classes: Number of classes; on the command line it comes from the data.
        network_options: Further arguments of `freqfusion.create_model`.
        weights: What the network starts from: a file, a folder of `save_pretrained`, a name on the hub.
        backbone_weights: ImageNet weights of the backbone: a file, `torchvision:TAG`, `timm:TAG`,
            `package:efficientnet_lite0`.
        freeze_backbone: Leave the backbone as it is: no gradients in it, and always in evaluation mode.
        class_weights: One weight per class in the loss.
        lr: Peak learning rate of all but the backbone and the fusions.
        backbone_lr_factor: The backbone's learning rate relative to that.
        fusion_lr_factor: The fusions' learning rate relative to that.
        betas: AdamW's decay rates of the two moments.
        weight_decay: AdamW's weight decay; normalisation layers have none.
        warmup_steps: Optimiser steps of linear warm-up.
        warmup_ratio: Share of the learning rate at the first step of the warm-up.
        poly_power: Power of the decay to zero over the run.
        test_size: Shorter side of the images at evaluation, whose scores are resized back; their own size if
            not given.
        test_max_size: Limit of the longer side then.
        window: Side(s) in pixels of the sliding window at evaluation; whole images when not given.
        stride: Step(s) of the sliding window.
        scales: Image scales whose predictions are averaged at evaluation.
        flip_test: Average with the prediction of the mirrored image at evaluation.
        boundary_width: Width of the band of boundary IoU: pixels (int) or a share of the image's diagonal.
    """

    task = "semantic"
    metric_labels = {  # noqa: RUF012  # read only
        "loss": "loss",
        "miou": "mIoU",
        "boundary_iou": "boundary IoU",
        "pixel_accuracy": "pixel accuracy",
        "mean_accuracy": "mean accuracy",
    }
    headline = ("miou", "boundary_iou")
    class_metrics = (
        ClassMetric("IoU", "iou", "iou", "miou"),
        ClassMetric("boundary IoU", "boundary_iou", "boundary_iou_per_class", "boundary_iou"),
    )
    network: PixelModel
    class_weights: Tensor | None

    def __init__(
        self,
        network: str | dict[str, Any] = "segnext_t",
        fusion: str = "freqfusion",
        num_classes: int = 0,
        network_options: dict[str, Any] | None = None,
        weights: str | None = None,
        backbone_weights: str | None = None,
        freeze_backbone: bool = False,
        class_weights: list[float] | None = None,
        lr: float = 6e-4,
        backbone_lr_factor: float = 0.1,
        fusion_lr_factor: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        warmup_steps: int = 1500,
        warmup_ratio: float = 1e-6,
        poly_power: float = 1.0,
        test_size: int | None = None,
        test_max_size: int = 2560,
        window: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip_test: bool = False,
        boundary_width: int | float = 0.02,
    ) -> None:
        super().__init__(num_classes)
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(
                f"class_weights has {len(class_weights)} values for {num_classes} classes: give one per class"
            )
        scales = tuple(scales)
        self.save_hyperparameters()
        self.check_settings()
        self.network = self.create_network()
        if not isinstance(self.network, PixelModel):
            raise ValueError(
                f"{type(self.network).__name__} finds objects and does not classify pixels: train it with "
                "--task detection"
            )
        if class_weights is not None and self.network.has_own_loss:
            raise ValueError("class_weights is not supported for Mask2Former; remove it")
        self.metrics = SegmentationMetrics(num_classes, IGNORE_INDEX, boundary_width=boundary_width)
        self.binary = BinaryMetrics(IGNORE_INDEX) if num_classes == 2 else None
        if self.binary is not None:
            self.metric_labels = {**self.metric_labels, **BINARY_LABELS}
        self.mean_loss = MeanMetric()
        per_class = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", per_class, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, num_classes, H, W)`` of normalised images ``(B, 3, H, W)``."""
        logits: Tensor = self.network(image)
        return logits

    def loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Cross entropy of logits ``(B, K, H, W)`` and masks ``(B, H, W)``, averaged over all pixels."""
        return pixel_cross_entropy(logits, mask, self.class_weights)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        image, mask = batch["image"], batch["mask"]
        loss = self.network.loss(image, mask, self.loss)
        self.log("train_loss", loss, logger=False, sync_dist=True, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._judge(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._judge(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._sum_up("val")

    def on_test_epoch_end(self) -> None:
        self._sum_up("test")

    def predict(self, images: Tensor) -> Tensor:
        """Scores ``(B, num_classes, H, W)`` of normalised images with this module's inference settings.

        Logits after a single pass; log probabilities after several (scales, mirrored).
        """
        options = self.hparams
        height, width = images.shape[-2:]
        size = self.judged_size(height, width)
        resized = images if size is None else F.interpolate(images, size, mode="bilinear", antialias=True)
        with fixed_randomness(images.device):
            scores = predict_logits(
                self.network,
                resized,
                window=options["window"],
                stride=options["stride"],
                scales=options["scales"],
                flip=options["flip_test"],
            )
        if size is not None:
            scores = F.interpolate(scores, (height, width), mode="bilinear", align_corners=False)
        if len(options["scales"]) > 1 or options["flip_test"]:
            scores = scores.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return scores

    def judged_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Height and width at which an image is judged; None for its own."""
        short_side = self.hparams["test_size"]
        if short_side is None:
            return None
        return fitting_size(height, width, short_side, self.hparams["test_max_size"])

    def _judge(self, batch: dict[str, Any], stage: str) -> None:
        if not batch["name"]:  # this process has no image left while another has one
            return
        scores = self.predict(batch["image"])
        self.metrics.update(scores.argmax(dim=1), batch["mask"])
        if self.binary is not None:
            found = scores.softmax(dim=1)[:, 1].nan_to_num(0.0)  # weights that turned NaN find nothing
            self.binary.update(found, batch["mask"])
        self.mean_loss.update(self.loss(scores, batch["mask"]), weight=len(batch["name"]))

    def _sum_up(self, stage: str) -> None:
        values = self.metrics.compute()
        self.metrics.reset()
        if self.binary is not None:
            values |= self.binary.compute()
            self.binary.reset()
        # Both metrics have summed over all processes; Lightning's own mean rounds where these differ in images.
        values["loss"] = self.mean_loss.compute()
        self.mean_loss.reset()
        self.log_dict(
            {f"{stage}_{name}": values[name].float() for name in self.metric_labels},
            logger=False,
            sync_dist=True,
        )
        self.results = {name: float(values[name]) for name in self.metric_labels if name != "loss"}
        self.results |= {figure.per_class: values[figure.per_class].tolist() for figure in self.class_metrics}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = settings_in(AdamWSettings, self.hparams).create(self.network)
        schedule = settings_in(Schedule, self.hparams)
        return schedule.apply(optimizer, self.checked_steps(schedule.warmup_steps))
