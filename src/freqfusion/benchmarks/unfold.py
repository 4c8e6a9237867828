"""The peer of every benchmark: plain torch that computes as the released code's fallback does.

The released fallback copies the map once per tap (``unfold``), upsamples the copies to the fine size, multiplies
them by the kernels and adds up; its similarities are torch's cosine of the map and of shifted copies; its
convolutions, softmax, window and division by the sum are separate steps. That is written here in our own words,
without two things the release does needlessly (it normalises one set of kernels twice, and "upsamples" copies
that have the fine size already), so it is no slower than the release.

Source: Chen et al., "Frequency-aware Feature Fusion for Dense Image Prediction", TPAMI 2024, the pure
PyTorch fallback beside the authors' module.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.fusion.freqfusion import FreqFusion, OffsetGenerator
from freqfusion.ops import local_similarity_naive, normalize_kernels_naive
from freqfusion.ops.carafe.naive import pad
from freqfusion.ops.resize import resize


def carafe(
    x: Tensor, kernels: Tensor, kernel_size: int, groups: int = 1, padding_mode: str = "zeros"
) -> Tensor:
    """As :func:`freqfusion.ops.carafe`, by ``kernel_size**2`` copies of the map at the fine size.

    Exact wherever nearest interpolation finds the pixel ``floor(I * h / H)``, whole ratios included.
    """
    (batch, channels, h, w), (height, width) = x.shape, kernels.shape[-2:]
    taps = kernel_size * kernel_size
    copies = F.unfold(pad(x, kernel_size // 2, padding_mode == "reflect"), kernel_size)
    copies = resize(copies.reshape(batch, channels * taps, h, w), (height, width), "nearest")
    copies = copies.reshape(batch, groups, channels // groups, taps, height, width)
    weighted = copies * kernels.reshape(batch, groups, 1, taps, height, width)
    return weighted.sum(dim=3).reshape(batch, channels, height, width)


class UnfoldOffsetGenerator(OffsetGenerator):
    """The offset generator with a convolution a prediction and similarities of shifted copies."""

    def offsets(self, hr_feat: Tensor, lr_feat: Tensor) -> Tensor:
        if self.norm_hr is not None and self.norm_lr is not None:
            hr_feat, lr_feat = self.norm_hr(hr_feat), self.norm_lr(lr_feat)
        hr_direction, lr_direction = local_similarity_naive(hr_feat), local_similarity_naive(lr_feat)
        size = hr_feat.shape[-2:]
        if self.direction_feat == "sim_concat":
            hr_feat = hr_direction = torch.cat((hr_feat, hr_direction), dim=1)
            lr_feat = lr_direction = torch.cat((lr_feat, lr_direction), dim=1)

        def predict(fine: nn.Module, hr: Tensor, coarse: nn.Module, lr: Tensor) -> Tensor:
            return fine(hr) + resize(F.pixel_shuffle(coarse(lr), 2), size, "nearest")

        direction = predict(self.hr_offset, hr_direction, self.offset, lr_direction)
        if self.direct_scale is None or self.hr_direct_scale is None:
            return direction * 0.25
        return direction * predict(self.hr_direct_scale, hr_feat, self.direct_scale, lr_feat).sigmoid()


class UnfoldFreqFusion(FreqFusion):
    """FreqFusion step by step, nothing merged; all options and parameters are those of its base class."""

    def _kernels_enhanced(
        self, hr: Tensor, lr: Tensor, known: object
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        highpass_logits: Tensor | None = None
        if self.content_encoder2 is not None:
            of_hr: Tensor = self.content_encoder2(hr)
            hr, highpass_logits = self._sharpen(hr, of_hr, residual=True), of_hr
        logits = self.content_encoder(hr)
        coarse = self._reassemble(
            self.content_encoder(lr), self._lowpass_kernels(logits), self.lowpass_kernel
        )
        lowpass = self._lowpass_kernels(logits + coarse)
        if self.content_encoder2 is not None and highpass_logits is not None:
            coarse = self._reassemble(self.content_encoder2(lr), lowpass, self.lowpass_kernel)
            highpass_logits = highpass_logits + coarse
        return hr, lowpass, highpass_logits

    def _sharpen(self, x: Tensor, highpass_logits: Tensor, residual: bool) -> Tensor:
        lowpass = self._normalise(highpass_logits, self.highpass_kernel, self.hamming_highpass)
        detail = x - self._reassemble(x, lowpass, self.highpass_kernel)
        return x + detail if residual else detail

    def _normalise(self, logits: Tensor, kernel_size: int, hamming: Tensor) -> Tensor:
        window = hamming if hamming.numel() > 1 else None
        return normalize_kernels_naive(logits, kernel_size, self.up_group, window)

    def _reassemble(self, x: Tensor, kernels: Tensor, kernel_size: int) -> Tensor:
        return carafe(x, kernels, kernel_size, self.up_group, self.padding_mode)


def unfold_(module: nn.Module) -> nn.Module:
    """Let every FreqFusion in ``module`` compute as the peer does, with the parameters it has; returns it.

    Sampling stays with :func:`freqfusion.ops.resample`, whose torch backend is the sampler of the release: run
    the result under ``use_backend("torch")``.
    """
    for part in module.modules():
        # the peers add no state, so an instance turns into one by its class alone, wherever it sits
        if type(part) is FreqFusion:
            part.__class__ = UnfoldFreqFusion
        elif type(part) is OffsetGenerator:
            part.__class__ = UnfoldOffsetGenerator
    return module
