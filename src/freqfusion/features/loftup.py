"""LoftUp: every pixel of the image attends to all coarse features."""

from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.features._strips import in_strips, interpolate, refuse_training
from freqfusion.features.base import FeatureUpsampler, Size
from freqfusion.fusion.sapa import ChannelNorm
from freqfusion.ops._checks import accumulation_dtype, checked_options

Positions = Literal["sine", "learnable"]
_COARSE_FREQUENCIES = 5


class _Normalised(nn.Module):
    """A channel norm under the name that the authors' files have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class _Waves(nn.Module):
    """Sines and cosines of positions and colours at frequencies ``e**-2`` to ``e**10``."""

    def __init__(self, n_freqs: int, inputs: int) -> None:
        super().__init__()
        self.n_freqs = n_freqs
        self.biases = nn.Parameter(torch.randn(2, inputs, n_freqs))

    def forward(self, base: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, 2 * inputs * n_freqs, H, W)``."""
        frequencies = torch.linspace(-2, 10, self.n_freqs, dtype=base.dtype, device=base.device).exp()
        phases = (frequencies[:, None, None, None] * base[:, None]).flatten(1, 2)
        # the authors' biases are (inputs, frequencies) read as if they were (frequencies, inputs)
        biases = self.biases.to(base.dtype).flatten(1)[..., None, None]
        return torch.cat([(phases + biases[0]).sin(), (phases + biases[1]).cos()], 1)


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_q = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, y: Tensor, coarse: Tensor) -> Tensor:
        coarse = self.norm_kv(coarse)
        return self.attention(self.norm_q(y), coarse, coarse, need_weights=False)[0]


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Identity(),  # the authors have dropout of probability 0 here
            nn.Linear(hidden, width),
        )

    def forward(self, y: Tensor) -> Tensor:
        return self.net(y)


class _Transformer(nn.Module):
    def __init__(self, width: int, hidden: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList([_Attention(width, num_heads), _MLP(width, hidden)]) for _ in range(num_layers)
        )

    def forward(self, y: Tensor, coarse: Tensor) -> Tensor:
        for layer in self.layers:
            attention, mlp = layer.children()
            y = attention(y, coarse) + y
            y = mlp(y) + y
        return self.norm(y)


class _Body(nn.Module):
    """All but the norm of the features."""

    def __init__(
        self,
        channels: int,
        n_freqs: int,
        num_heads: int,
        num_layers: int,
        lr_size: int,
        lr_pe_type: Positions,
    ) -> None:
        super().__init__()
        width, inputs = channels, 2 * 5 * n_freqs + 3
        self.lr_pe: nn.Module | nn.Parameter
        if lr_pe_type == "sine":
            self.lr_pe = _Waves(_COARSE_FREQUENCIES, 2)
            width += 2 * 2 * _COARSE_FREQUENCIES
        else:
            self.lr_pe = nn.Parameter(0.02 * torch.randn(1, lr_size**2, channels))
        self.fourier_feat = nn.Sequential(
            nn.Identity(), _Waves(n_freqs, 5)
        )  # the authors scale the image at 0
        self.first_conv = nn.Sequential(
            _Normalised(inputs),
            nn.Conv2d(inputs, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        if width % num_heads:
            raise ValueError(f"num_heads must divide the width of the attention, {width}, got {num_heads}")
        norm = ChannelNorm(channels, eps=1e-6)
        self.final_conv = norm if width == channels else nn.Sequential(nn.Conv2d(width, channels, 1), norm)
        self.ca_transformer = _Transformer(width, channels, num_heads, num_layers)

    def coarse(self, features: Tensor) -> Tensor:
        """Keys and values ``(B, h * w, width)``."""
        batch, _, h, w = features.shape
        if isinstance(self.lr_pe, nn.Parameter):
            table: Tensor = self.lr_pe
            if table.shape[1] != h * w:
                side = round(table.shape[1] ** 0.5)
                grid = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
                table = F.interpolate(grid, (h, w), mode="bicubic").flatten(2).mT
            return features.flatten(2).mT + table
        positions = _positions(features, range(h), h).expand(batch, -1, -1, -1)
        return torch.cat([features, self.lr_pe(positions).to(features)], 1).flatten(2).mT

    def rows(self, coarse: Tensor, image: Tensor, first: int, last: int) -> Tensor:
        """Rows ``(B, C, last - first, W)`` of the result, given the scaled image."""
        height = image.shape[2]
        lowest, highest = max(first - 2, 0), min(last + 2, height)  # what two convolutions of 3 x 3 see
        image = image[:, :, lowest:highest]
        positions = _positions(image, range(lowest, highest), height).expand(len(image), -1, -1, -1)
        waves = self.fourier_feat(torch.cat([positions, image], 1))
        y = self.first_conv(torch.cat([waves, image], 1).to(coarse.dtype))[:, :, first - lowest :]
        y = y[:, :, : last - first]
        tokens = self.ca_transformer(y.flatten(2).mT, coarse)
        return self.final_conv(tokens.mT.reshape(y.shape))


def _positions(like: Tensor, rows: range, height: int) -> Tensor:
    """``(1, 2, H, W)``: rows of a map, and all its columns, from -1 to 1 with both ends."""
    dtype, device = accumulation_dtype(like), like.device
    y = torch.linspace(-1, 1, height, dtype=dtype, device=device)[rows.start : rows.stop]
    x = torch.linspace(-1, 1, like.shape[3], dtype=dtype, device=device)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]


class LoftUp(FeatureUpsampler):
    """A transformer whose queries are the pixels and whose keys and values are the coarse features.

    The image is scaled to its own range, per colour over the **whole batch**, as in the authors' code: give images
    one by one where the result must not depend on the others. For another size than the image's the image is
    resized. The values are projected, so the result is not within the range of the features. Time grows with
    the pixels times the coarse pixels. Phases reach 22026 radians: they are float32 at least, and outputs in
    float32 differ from float64 by about 1e-3. In half precision give the image in float32 all the same.

    Args:
        channels: of the features.
        n_freqs: frequencies of the waves of position and colour.
        num_heads: of the attention; divides its width, which is ``channels + 20``.
        num_layers: of the transformer.
        lr_size: side of the table of ``"learnable"`` positions.
        lr_pe_type: positions of the coarse features: ``"sine"`` waves, as in all released weights, or
            ``"learnable"``; the width is ``channels`` then.

    Raises:
        ValueError: for unknown positions, or heads that do not divide the width.

    Source: Huang et al., "LoftUp: Learning a Coordinate-Based Feature Upsampler for Vision Foundation Models",
    ICCV 2025.
    """

    @checked_options
    def __init__(
        self,
        channels: int,
        n_freqs: int = 20,
        num_heads: int = 4,
        num_layers: int = 2,
        lr_size: int = 16,
        lr_pe_type: Positions = "sine",
    ) -> None:
        super().__init__(channels)
        if lr_pe_type not in get_args(Positions):
            raise ValueError(f"lr_pe_type must be one of {get_args(Positions)}, got {lr_pe_type!r}")
        self.upsampler = _Body(channels, n_freqs, num_heads, num_layers, lr_size, lr_pe_type)
        self.channelnorm = _Normalised(channels)

    def upsample(self, features: Tensor, image: Tensor, size: Size, chunk: int | None) -> Tensor:
        refuse_training(self, chunk)
        coarse = self.upsampler.coarse(self.channelnorm(features.to(self.channelnorm.norm.weight.dtype)))
        image = image.to(accumulation_dtype(image, coarse))
        image = interpolate(image, size, mode="bilinear", antialias=True)
        if image.shape[0]:
            low, high = image.amin((0, 2, 3), keepdim=True), image.amax((0, 2, 3), keepdim=True)
            image = (image - low) / (high - low).clamp_min(1e-4) - 0.5
        return in_strips(partial(self.upsampler.rows, coarse, image), size[0], chunk, features.dtype)
