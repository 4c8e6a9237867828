"""UPLiFT: x2 per iteration, each by kernels from the features and a convolutional encoding of the image."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.features._strips import (
    Read,
    Resized,
    Stream,
    in_strips,
    interpolate,
    refuse_training,
    row_weights,
    rows_of,
)
from freqfusion.features.base import FeatureUpsampler, Size
from freqfusion.ops import carafe
from freqfusion.ops._checks import check_count, checked_options

_NEIGHBOURS = {
    5: lambda y, x: abs(y) + abs(x) <= 1,
    9: lambda y, x: max(abs(y), abs(x)) <= 1,
    13: lambda y, x: abs(y) + abs(x) <= 2,
    17: lambda y, x: max(abs(y), abs(x)) <= 1 or (y % 2 == 0 and x % 2 == 0),
    25: lambda y, x: True,
}
"""Which of the 5 x 5 coarse pixels around the parent are averaged, by their number."""
_RADIUS = 2
_SIDE = 2 * _RADIUS + 1
_HALO = 4
"""Coarse rows on each side of a strip that an iteration's result depends on."""


def _cut_or_fill(x: Tensor, channels: int) -> Tensor:
    """The first channels of ``x``, zeros after its last."""
    missing = channels - x.shape[1]
    return F.pad(x, [0, 0, 0, 0, 0, missing]) if missing > 0 else x[:, :channels]


class _Residual(nn.Module):
    """Convolutions beside a shortcut; each 3 x 3 is followed by a norm and ReLU."""

    def __init__(self, inputs: int, channels: int, count: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (inputs, channels)[:count]:
            layers += [
                nn.Conv2d(width, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
        self.conv = nn.Sequential(*layers, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + _cut_or_fill(x, y.shape[1])


class _Block(nn.Module):
    def __init__(self, inputs: int, channels: int, count: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(_Residual(inputs, channels, count))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class _Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)


class _Encoder(nn.Module):
    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(zip((3, *channels), channels, strict=False)):
            self.add_module(f"block_{i}", _Block(inputs, outputs, 1))


class _Decoder(nn.Module):
    def __init__(self, inputs: int, of_encoder: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        first, second = channels
        self.block_0 = _Block(inputs + of_encoder[-1], first, 2)
        self.up_1 = _Up(first)
        self.block_1 = _Block(first + of_encoder[-2], second, 2)


class _Attender(nn.Module):
    def __init__(self, channels: int, neighbours: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, neighbours, 1)


class UPLiFT(FeatureUpsampler):
    """Doubles the features until they have the asked size, then resizes them; one network for all iterations.

    Each pixel is a weighted mean of the coarse ones around its parent, so the result stays within the range of
    the features. For features of patches of 14 pixels the image is enlarged by 16/14 first.

    Args:
        channels: of the features.
        patch_size: side of the encoder's patches, in pixels: 14 or 16.
        attender: of how many coarse pixels the mean is: 5, 9, 13, 17 or 25.
        encoder_channels: of the blocks that encode the image.
        decoder_channels: of the two blocks that predict the weights.
        iters: how often the size is doubled; by default as few times as reach the asked size, at least once. The
            authors trained with 1 to 4.
        mean: of the images that the encoder was trained with, per colour, in [0, 1]; by default ImageNet's.
        std: standard deviation of the same.

    Raises:
        ValueError: for another number of neighbours or blocks.

    Source: "UPLiFT", CVPR 2026, arXiv 2601.17950; the released configuration for vision transformers, DINO's.
    """

    @checked_options
    def __init__(
        self,
        channels: int,
        patch_size: int = 14,
        attender: int = 17,
        encoder_channels: Sequence[int] = (16, 32, 64, 128, 128),
        decoder_channels: Sequence[int] = (64, 64),
        iters: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(channels)
        if attender not in _NEIGHBOURS:
            raise ValueError(f"attender must be one of {tuple(_NEIGHBOURS)}, got {attender}")
        if len(encoder_channels) < 2 or len(decoder_channels) != 2:
            raise ValueError(
                "encoder_channels must be two numbers or more and decoder_channels two, "
                f"got {tuple(encoder_channels)} and {tuple(decoder_channels)}"
            )
        for name, widths in (("encoder_channels", encoder_channels), ("decoder_channels", decoder_channels)):
            for width in widths:
                check_count(name, width)
        self.mean = self.mean if mean is None else tuple(mean)
        self.std = self.std if std is None else tuple(std)
        self.patch_size = patch_size
        self.iters = None if iters is None else check_count("iters", iters)
        self.encoder = _Encoder(encoder_channels)
        self.decoder = _Decoder(channels, encoder_channels, decoder_channels)
        self.attender = _Attender(decoder_channels[1], attender)
        self._shallow = encoder_channels[-2]
        line, chosen = range(-_RADIUS, _RADIUS + 1), _NEIGHBOURS[attender]
        self._taps = [(y + _RADIUS) * _SIDE + x + _RADIUS for y in line for x in line if chosen(y, x)]

    def upsample(self, features: Tensor, image: Tensor, size: Size, chunk: int | None) -> Tensor:
        refuse_training(self, chunk)
        dtype, own = features.dtype, self.attender.conv1.weight.dtype
        features, image = features.to(own), image.to(own)
        if self.patch_size == 14:
            enlarged = [16 * side // 14 for side in image.shape[-2:]]
            image = interpolate(image, enlarged, mode="bilinear", antialias=True)
        height, width = features.shape[-2:]
        ratio = max(-(-size[0] // height), -(-size[1] // width))
        iters = self.iters or max(1, (ratio - 1).bit_length())
        full = (image.shape[2], image.shape[3])
        encoded = Stream(partial(self._encode, image), readers=2 * iters)
        read = rows_of(features)
        for i in range(iters):
            deep = _Samples(encoded, slice(self._shallow, None), full, (height, width), 2 * i)
            size_after = (2 * height, 2 * width)
            shallow = _Samples(encoded, slice(self._shallow), full, size_after, 2 * i + 1)
            read = Stream(partial(self._double, read, deep, shallow, height))
            height, width = size_after
        return in_strips(
            Resized(read, features, height, size, mode="bilinear", antialias=True), size[0], chunk, dtype
        )

    def _encode(self, image: Tensor, first: int, last: int) -> Tensor:
        """Stream of the last two blocks' maps, side by side."""
        blocks = list(self.encoder.children())
        lowest, highest = max(first - len(blocks), 0), min(last + len(blocks), image.shape[2])
        x = before = image[:, :, lowest:highest]
        for block in blocks:
            before, x = x, block(x)
        return torch.cat([before, x], 1)[:, :, first - lowest : last - lowest]

    def _double(self, read: Read, deep: Read, shallow: Read, height: int, first: int, last: int) -> Tensor:
        """Stream of the doubled map; ``height`` is that of the map before.

        A strip is treated like a whole map: what its ends do to it stays within the halo, which is cut off.
        """
        lowest, highest = max(first // 2 - _HALO, 0), min(-(-last // 2) + _HALO, height)
        x = read(lowest, highest)
        t = self.decoder.block_0(torch.cat([x, deep(lowest, highest)], 1))
        t = self.decoder.up_1.up(t) + _double_with_ends(t, lowest, height)
        t = self.decoder.block_1(torch.cat([t, shallow(2 * lowest, 2 * highest)], 1))
        logits = self.attender.conv1(t)
        weights = (logits + _cut_or_fill(t, logits.shape[1])).softmax(1)
        taps = torch.tensor(self._taps, device=x.device)
        kernels = weights.new_zeros(len(x), _SIDE**2, *weights.shape[-2:]).index_copy(1, taps, weights)
        out = carafe(x, _replicating(kernels), _SIDE)
        return out[:, :, first - 2 * lowest : last - 2 * lowest]


def _double_with_ends(t: Tensor, lowest: int, height: int) -> Tensor:
    """Bilinear x2 that keeps the corners of a map of ``height`` rows, given those from row ``lowest``."""
    few, columns = t.shape[2], 2 * t.shape[3]
    if few == height:
        return F.interpolate(t, (2 * few, columns), mode="bilinear", align_corners=True)
    t = F.interpolate(t, (few, columns), mode="bilinear", align_corners=True)
    weights = row_weights(t, height, 2 * height, mode="bilinear", align_corners=True)
    return weights[2 * lowest : 2 * (lowest + few), lowest : lowest + few] @ t


def _replicating(kernels: Tensor) -> Tensor:
    """Kernels ``(B, 25, 2h, 2w)`` whose taps outside the map are added to those of the border's pixels."""
    for axis in (3, 4):
        taps = kernels.unflatten(1, (_SIDE, _SIDE)).movedim(axis - 2, 1).movedim(axis, -1)
        taps = taps.clone()  # (B, taps of the axis, of the other, other axis, axis)
        for near in range(min(_RADIUS, taps.shape[-1] // 2)):
            start, end = slice(2 * near, 2 * near + 2), slice(-2 * near - 2, -2 * near or None)
            taps[:, _RADIUS - near, ..., start] += taps[:, : _RADIUS - near, ..., start].sum(1)
            taps[:, _RADIUS + near, ..., end] += taps[:, _RADIUS + near + 1 :, ..., end].sum(1)
        kernels = taps.movedim(-1, axis).movedim(1, axis - 2).flatten(1, 2)
    return kernels


class _Samples:
    """Stream of one of the encoder's maps, brought to a size by nearest neighbours.

    Args:
        encoded: the maps.
        channels: those of the map.
        full: size of the maps.
        size: of the result.
        reader: of ``encoded``.
    """

    def __init__(self, encoded: Stream, channels: slice, full: Size, size: Size, reader: int) -> None:
        self._encoded, self._channels, self._reader = encoded, channels, reader
        self._rows, columns = (_nearest(*lengths) for lengths in zip(full, size, strict=True))
        self._columns = slice(None) if size[1] == full[1] else columns

    def __call__(self, first: int, last: int) -> Tensor:
        x = self._encoded.take(self._rows[first:last], self._reader)
        return x[:, self._channels, :, self._columns]


def _nearest(many: int, few: int) -> list[int]:
    """Which of ``many`` rows each of ``few`` takes; torch's own rule, which rounds in float32."""
    rows = torch.arange(many, dtype=torch.float64, device="cpu")[None, None]
    return F.interpolate(rows, few, mode="nearest")[0, 0].long().tolist()
