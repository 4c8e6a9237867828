"""The Lightning module that trains an upsampler of the features of a frozen encoder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from freqfusion.features import FeatureUpsampler, create_upsampler, encoder_options, list_upsamplers
from freqfusion.metrics import FeatureMetrics
from freqfusion.tasks.base import MISFITS, TaskModule
from freqfusion.tasks.encoders import FrozenEncoder
from freqfusion.tasks.rng import fixed_randomness
from freqfusion.tasks.schedule import AdamWSettings, Schedule, settings_in

BASELINES = {"bilinear": "bilinear", "joint_bilateral": "joint bilateral"}
"""Upsamplers without weights that are judged beside the trained one: name to label."""
FIGURES = {"cosine": "cosine similarity", "relative_mse": "squared error"}


class FeatureModule(TaskModule):
    """Trains an upsampler of the features of a frozen encoder, without any truth.

    The encoder's features of an image are the target. Those of the image reduced by a factor are upsampled to the
    target's size, guided by the image. Only the upsampler is trained and saved, under ``upsampler.``; the encoder's
    weights stay in their own file.

    It is judged by the mean cosine similarity with the target over all pixels and by the squared error in relation to
    the target's squares; interpolation without weights is judged beside it.

    Sources: the losses are those of NAF (arXiv 2511.18452), squared error, and of JAFAR (arXiv 2506.11136) and AnyUp
    (arXiv 2510.12764), cosine distance and squared error after scaling by the target's own range.

    Args:
        encoder: The frozen network: a name of `timm.list_models()`, or of transformers, `transformers:Dinov2Model`.
        encoder_weights: Its weights, without which there is nothing to learn: a file, `timm:TAG`; of transformers a
            folder or a name on the hub.
        encoder_layers: Indices of the layers, or stages, whose features are taken, -1 for the last.
        upsampler: What is trained: a name of `freqfusion.features.list_upsamplers`.
        upsampler_options: Further arguments of `freqfusion.features.create_upsampler`.
        upsampler_weights: What the upsampler starts from: a file of released weights or a checkpoint.
        loss: mse, the squared error; or cosine_mse, cosine distance plus the squared error after scaling each
            pixel's channels by the target's smallest and largest.
        factors: By how much images are reduced for the features to be upsampled; one is drawn for each batch, the
            first judges.
        guide_size: Longer side of the image that guides the upsampler; its own if not given.
        lr: Peak learning rate.
        betas: AdamW's decay rates of the two moments.
        weight_decay: AdamW's weight decay; normalisation layers have none.
        warmup_steps: Optimiser steps of linear warm-up.
        warmup_ratio: Share of the learning rate at the first step of the warm-up.
        poly_power: Power of the decay to zero over the run; 0 for none.
        milestones: Shares of the run after which the learning rate is multiplied by 0.1, in place of the decay.
    """

    task = "features"
    named_by = ("encoder", "upsampler")
    headline = ("cosine", "bilinear_cosine")
    upsampler: FeatureUpsampler
    encoder: FrozenEncoder
    baselines: dict[str, FeatureUpsampler]

    def __init__(
        self,
        encoder: str = "vit_small_patch14_dinov2",
        encoder_weights: str | None = None,
        encoder_layers: Sequence[int] = (-1,),
        upsampler: str = "naf",
        upsampler_options: dict[str, Any] | None = None,
        upsampler_weights: str | None = None,
        loss: Literal["mse", "cosine_mse"] = "mse",
        factors: Sequence[float] = (2.0,),
        guide_size: int | None = None,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        warmup_ratio: float = 1e-6,
        poly_power: float = 0.0,
        milestones: Sequence[float] = (),
    ) -> None:
        super().__init__()
        factors, milestones, encoder_layers = list(factors), list(milestones), list(encoder_layers)
        self.save_hyperparameters()
        self.check_settings()
        self.encoder = FrozenEncoder(encoder, encoder_weights, encoder_layers)
        self.upsampler = self._create_upsampler()
        self.baselines = {name: create_upsampler(name) for name in BASELINES if name in list_upsamplers()}
        self.metrics = nn.ModuleDict({name: FeatureMetrics() for name in ("trained", *self.baselines)})
        self.mean_loss = MeanMetric()
        self.metric_labels = {"loss": "loss", **FIGURES} | {
            f"{name}_{figure}": f"{BASELINES[name]}: {label}"
            for name in self.baselines
            for figure, label in FIGURES.items()
        }

    @property
    def network(self) -> FeatureUpsampler:
        """The upsampler."""
        return self.upsampler

    def _create_upsampler(self) -> FeatureUpsampler:
        settings = self.hparams
        name, options = settings["upsampler"], settings["upsampler_options"] or {}
        options = {**encoder_options(name, self.encoder.network), **options}
        try:
            upsampler = create_upsampler(
                name, self.encoder.channels, weights=settings["upsampler_weights"], **options
            )
        except MISFITS as error:
            raise ValueError(
                f"upsampler_options {options} do not fit {name!r}: {' '.join(str(error).split())}"
            ) from error
        if not any(parameter.requires_grad for parameter in upsampler.parameters()):
            raise ValueError(
                f"upsampler {name!r} has no weights, so there is nothing to train; choose another"
            )
        return upsampler.train()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FeatureModule":
        # what is not trained is no part of this module, yet goes to its device
        for module in (self.encoder.network, *self.baselines.values()):
            module._apply(fn)
        super()._apply(fn, recurse)
        return self

    def setup(self, stage: str) -> None:
        if stage == "fit" and not self.encoder.fingerprint:
            raise ValueError(
                f"the encoder {self.encoder.name} has no weights, so its features mean nothing: give a file with "
                "--model.encoder_weights"
            )
        data: Any = getattr(self.trainer, "datamodule", None)
        crop = getattr(data, "hparams", {}).get("crop_size")
        stride = self.encoder.stride
        if crop is not None and any(side % stride for side in crop):
            height, width = (max(1, round(side / stride)) * stride for side in crop)
            raise ValueError(
                f"crop_size is {crop[0]}x{crop[1]}, expected multiples of {stride} pixels, for each of which the "
                f"encoder gives one feature: use --data.crop_size {height}x{width}"
            )

    def forward(self, features: Tensor, image: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Features ``(B, C, H, W)``; see :class:`~freqfusion.features.FeatureUpsampler`."""
        upsampled: Tensor = self.upsampler(features, image, size)
        return upsampled

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss of features ``(B, C, H, W)``, averaged over the pixels."""
        features, target = features.float(), target.float()
        if self.hparams["loss"] == "mse":
            return F.mse_loss(features, target)
        low, high = target.aminmax(dim=1, keepdim=True)
        scaled = ((features - target) / (high - low).clamp_min(1e-6)).square().mean()
        return 1 - F.cosine_similarity(features, target, dim=1).mean() + scaled

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        factors = self.hparams["factors"]
        factor = factors[int(torch.randint(len(factors), ()))] if len(factors) > 1 else factors[0]
        features, guide, target = self._task_of(batch["image"], factor)
        loss = self.loss(self(features, guide, target.shape[-2:]), target)
        self.log("train_loss", loss, logger=False, sync_dist=True, batch_size=len(batch["image"]))
        return loss

    @torch.no_grad()
    def _task_of(self, image: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the reduced image, the image that guides, and the features to be found."""
        target = self.encoder(image)
        stride = self.encoder.stride
        features = self.encoder(
            _resize(image, [max(1, round(n / factor)) * stride for n in target.shape[-2:]])
        )
        longer = max(image.shape[-2:])
        limit = self.hparams["guide_size"] or longer
        guide = image
        if longer > limit:
            guide = _resize(image, [max(1, round(side * limit / longer)) for side in image.shape[-2:]])
        return features, guide, target

    def upsample_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """As in an evaluation, the upsampled features of images ``(B, 3, H, W)`` in [0, 1], and the target."""
        features, guide, target = self._task_of(image, self.hparams["factors"][0])
        with fixed_randomness(self.device):
            return self(features, guide, target.shape[-2:]), target

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._judge(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._judge(batch)

    def on_validation_epoch_end(self) -> None:
        self._sum_up("val")

    def on_test_epoch_end(self) -> None:
        self._sum_up("test")

    def _judge(self, batch: dict[str, Any]) -> None:
        if not batch["name"]:  # this process has no image left while another has one
            return
        features, guide, target = self._task_of(batch["image"], self.hparams["factors"][0])
        for name, metric in self.metrics.items():
            upsampler = self.baselines.get(name, self.upsampler)
            with fixed_randomness(self.device):
                found = upsampler(features, guide, target.shape[-2:])
            cast(FeatureMetrics, metric).update(found, target)
            if name == "trained":
                self.mean_loss.update(self.loss(found, target), weight=len(batch["name"]))

    def _sum_up(self, stage: str) -> None:
        values: dict[str, Tensor] = {"loss": self.mean_loss.compute()}
        self.mean_loss.reset()
        for name, metric in self.metrics.items():
            figures: Mapping[str, Tensor] = cast(FeatureMetrics, metric).compute()
            cast(FeatureMetrics, metric).reset()
            values |= {
                figure if name == "trained" else f"{name}_{figure}": x for figure, x in figures.items()
            }
        self.log_dict(
            {f"{stage}_{name}": values[name].float() for name in self.metric_labels},
            logger=False,
            sync_dist=True,
        )
        self.results = {name: float(values[name]) for name in self.metric_labels if name != "loss"}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        settings = checkpoint["hyper_parameters"]
        given = ("encoder_weights", "upsampler_weights")
        checkpoint["asked"] = {name: settings[name] for name in given}
        settings |= dict.fromkeys(given)
        checkpoint["encoder"] = self.encoder.fingerprint
        checkpoint["channels"] = self.encoder.channels
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("encoder") != self.encoder.fingerprint:
            raise ValueError(
                "the upsampler was trained with other weights of the encoder, which are not in the checkpoint: give "
                f"those with --model.encoder_weights; then they were {checkpoint['asked']['encoder_weights']}"
            )
        super().on_load_checkpoint(checkpoint)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = settings_in(AdamWSettings, {**self.hparams, "backbone_lr_factor": 1.0}).create(
            self.upsampler
        )
        schedule = settings_in(Schedule, self.hparams)
        return schedule.apply(optimizer, self.checked_steps(schedule.warmup_steps))


def _resize(image: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(image, size=list(size), mode="bilinear", antialias=True)
