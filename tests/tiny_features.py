"""A tiny encoder, tiny upsamplers and runs for the tests of the task features; as a script, two processes."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.features import FeatureUpsampler, catalog
from freqfusion.tasks import FeatureData, FeatureModule
from freqfusion.training import create_trainer

ENCODER = "test_vit"
"""64 channels, patches of 16 pixels."""


class ScaledFeatures(FeatureUpsampler):
    """Bilinear interpolation times one number, which starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def upsample(self, features: Tensor, image: Tensor, size: tuple[int, int], chunk: int | None) -> Tensor:
        return self.scale * F.interpolate(features, size, mode="bilinear")


class NoisyFeatures(FeatureUpsampler):
    """Batch statistics, dropout and random numbers in each pass, which make an exact resume hard."""

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__(channels)
        self.layers = nn.Sequential(
            nn.Conv2d(channels + 3, width, 1),
            nn.BatchNorm2d(width),
            nn.Dropout(0.3),
            nn.Conv2d(width, channels, 1),
        )

    def upsample(self, features: Tensor, image: Tensor, size: tuple[int, int], chunk: int | None) -> Tensor:
        coarse = F.interpolate(features, size, mode="bilinear")
        x = torch.cat([coarse, F.interpolate(image, size, mode="bilinear").to(features.dtype)], dim=1)
        return coarse + self.layers(x) * (1 + 0.2 * torch.rand(len(x), 1, 1, 1, device=x.device))


class PlainFeatures(NoisyFeatures):
    """No batch statistics and no randomness: the gradient of a batch is the mean of its images'."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.layers = nn.Conv2d(channels + 3, channels, 1)  # type: ignore[assignment]

    def upsample(self, features: Tensor, image: Tensor, size: tuple[int, int], chunk: int | None) -> Tensor:
        coarse = F.interpolate(features, size, mode="bilinear")
        return coarse + self.layers(torch.cat([coarse, F.interpolate(image, size, mode="bilinear")], dim=1))


UPSAMPLERS = {
    name: catalog._Method(kind, kind is not ScaledFeatures, "made for tests", 0)
    for name, kind in {"scaled": ScaledFeatures, "noisy": NoisyFeatures, "plain": PlainFeatures}.items()
}


def encoder_weights(folder: Path, seed: int = 7) -> str:
    """A file of weights for the encoder."""
    path = folder / f"encoder_{seed}.pt"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.save(timm.create_model(ENCODER, num_classes=3).state_dict(), path)
    return str(path)


def tiny_data(length: int = 10, size: tuple[int, int] = (80, 100), **options: Any) -> FeatureData:
    settings = {"crop_size": (64, 96), "batch_size": 2, "workers": 0, **options}
    return FeatureData("synthetic", dataset_options={"length": length, "size": size}, **settings)


def tiny_module(weights: str, upsampler: str = "noisy", **options: Any) -> FeatureModule:
    return FeatureModule(ENCODER, weights, upsampler=upsampler, **{"lr": 0.02, "warmup_steps": 2, **options})


def tiny_fit(
    out: Path,
    upsampler: str = "noisy",
    *,
    resume: Path | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[FeatureModule, L.Trainer]:
    """Train; returns the module and the trainer."""
    torch.manual_seed(0 if resume is None else 99)  # what comes from the checkpoint must not depend on it
    module = tiny_module(encoder_weights(out.parent / "weights"), upsampler, **(model or {}))
    settings = {"checkpoint_steps": 1, "log_steps": 1, "accelerator": "cpu", "enable_progress_bar": False}
    trainer = create_trainer(out, **{**settings, **options})
    trainer.fit(module, tiny_data(**(data or {})), ckpt_path=None if resume is None else str(resume))
    return module, trainer


if __name__ == "__main__":
    catalog._METHODS.update(UPSAMPLERS)
    tiny_fit(Path(sys.argv[1]), "plain", data={"length": 5}, max_epochs=2, strategy="ddp", devices=2)
