"""FeatUp: a stack of learned joint bilateral upsamplers, each x2."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.features._strips import Read, Resized, Stream, in_strips, refuse_training, rows_of
from freqfusion.features.base import FeatureUpsampler, Size
from freqfusion.fusion.sapa import ChannelNorm
from freqfusion.ops import carafe, window_similarity
from freqfusion.ops._checks import checked_options
from freqfusion.ops.carafe.naive import reflect_index


class JBUStage(nn.Module):
    """Filters features at the size of an image, by kernels from the image's own likeness and the distance.

    Args:
        guidance_dim: channels of the image.
        key_dim: channels in which its pixels are compared.
        radius: of the window, in pixels of the image.
    """

    @checked_options
    def __init__(self, guidance_dim: int = 3, key_dim: int = 32, radius: int = 3) -> None:
        super().__init__()
        self.radius = radius
        self.kernel_size = 2 * radius + 1
        taps = self.kernel_size**2
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        self.range_proj = nn.Sequential(
            nn.Conv2d(guidance_dim, key_dim, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(key_dim, key_dim, 1)
        )
        self.fixup_proj = nn.Sequential(
            nn.Conv2d(taps + guidance_dim, taps, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(taps, taps, 1)
        )

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        """Upsample ``features`` ``(B, C, h, w)`` to the size of ``guidance`` ``(B, G, H, W)``."""
        return self.filter(F.interpolate(features, guidance.shape[-2:], mode="bicubic"), guidance)

    def rows(self, features: Read, height: int, guidance: Tensor, first: int, last: int) -> Tensor:
        """Stream of the result; ``height`` is that of the features."""
        size = guidance.shape[-2:]
        fine = Resized(features, guidance, height, size, mode="bicubic")
        if (first, last) == (0, size[0]):
            return self.filter(fine(first, last), guidance)
        rows = reflect_index(size[0], self.radius, guidance.device)[first : last + 2 * self.radius]
        lowest, highest = int(rows.min()), int(rows.max()) + 1
        window = fine(lowest, highest)
        if highest - lowest < len(rows):  # at the ends, where some rows are mirrored
            window = window.index_select(2, rows - lowest)
        return self.filter(window, guidance.index_select(2, rows), self.radius)

    def filter(self, fine: Tensor, guidance: Tensor, halo: int = 0) -> Tensor:
        """Filter interpolated features; the first and last ``halo`` rows are neighbours only."""
        middle = slice(halo, guidance.shape[2] - halo)
        keys = self.range_proj(guidance)
        likeness = window_similarity(keys, keys, self.kernel_size, "reflect")[:, :, middle]
        kernels = self._kernels(likeness, guidance[:, :, middle])
        kernels = F.pad(kernels, [0, 0, halo, halo])
        return carafe(fine, kernels, self.kernel_size, padding_mode="reflect")[:, :, middle]

    def _kernels(self, likeness: Tensor, guidance: Tensor) -> Tensor:
        temperature = self.range_temp.exp().clamp(1e-4, 1e4)
        line = torch.linspace(-1, 1, self.kernel_size, dtype=likeness.dtype, device=likeness.device)
        distances = (line[:, None] ** 2 + line**2).reshape(-1, 1, 1)
        kernels = (temperature * likeness).softmax(1) * (-distances / (2 * self.sigma_spatial**2)).exp()
        kernels = kernels / kernels.sum(1, keepdim=True).clamp_min(1e-7)
        return kernels + 0.1 * self.fixup_proj(torch.cat([kernels, guidance], 1))


class FeatUpJBU(FeatureUpsampler):
    """Four stages of joint bilateral upsampling with learned kernels: x16, then bilinear to the asked size.

    The stages see the image averaged to their own size, so features of patches of 14 pixels are upsampled x16
    too, as in the authors' code, and then reduced with antialiasing.

    Args:
        channels: of the features.
        norm: whether the features pass a layer normalisation over their channels first, as in one of the
            authors' two sets of weights; by default whether the file of weights holds one.

    Source: Fu et al., "FeatUp: A Model-Agnostic Framework for Features at Any Resolution", ICLR 2024 (JBUStack).
    """

    @checked_options
    def __init__(self, channels: int, norm: bool | None = None) -> None:
        super().__init__(channels)
        self._norm_by_file = norm is None
        self.up1, self.up2, self.up3, self.up4 = (JBUStage() for _ in range(4))
        self.fixup_proj = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(channels, channels, 1))
        self.norm = ChannelNorm(channels) if norm else None

    def own_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a file under this upsampler's names; adds the norm that the file has where that decides."""
        if self._norm_by_file and "norm.weight" in state and self.norm is None:
            self.norm = ChannelNorm(self.fixup_proj[1].in_channels)
        return {key: value for key, value in state.items() if self.norm or not key.startswith("norm.")}

    def upsample(self, features: Tensor, image: Tensor, size: Size, chunk: int | None) -> Tensor:
        refuse_training(self, chunk)
        dtype, own = features.dtype, self.up1.range_temp.dtype
        features, image = features.to(own), image.to(own)
        if self.norm is not None:
            features = self.norm(features)
        height, width = features.shape[-2:]
        read = rows_of(features)
        for stage in (self.up1, self.up2, self.up3, self.up4):
            guidance = F.adaptive_avg_pool2d(image, (2 * height, 2 * width))
            read = Stream(partial(stage.rows, read, height, guidance))
            height, width = guidance.shape[-2:]
        fixed = Stream(partial(self._fix, read))
        return in_strips(
            Resized(fixed, features, height, size, mode="bilinear", antialias=True), size[0], chunk, dtype
        )

    def _fix(self, read: Read, first: int, last: int) -> Tensor:
        x = read(first, last)
        return torch.add(x, self.fixup_proj(x), alpha=0.1)
