"""AnyUp: attention to coarse pixels near an output pixel, by queries from the image and keys from both."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freqfusion.features._attention import around, attend_rows, every, neighbourhood
from freqfusion.features._encoders import (
    GROUPS,
    AxisRotation,
    check_image,
    check_widths,
    convolution,
    normalised,
    project,
    unit,
)
from freqfusion.features._rows import Rows
from freqfusion.features.base import FeatureUpsampler, Size
from freqfusion.ops._checks import check_kernel_size, checked_options

_MAX_UNIFIED = 2**25
"""Correlations of channels and filters that exist at a time, where a row has no more."""


class AnyUp(FeatureUpsampler):
    """Attention within a share of the map around each output pixel; one model for the features of any encoder.

    The output is the mean over the heads' attention of the features themselves, so it stays within their range.
    Features must have at least two rows and columns.

    Args:
        qk_dim: channels D of queries and keys; divisible by 8 and by ``num_heads``.
        kernel_size: odd side of the first convolution of the image.
        kernel_size_lfu: odd side of the filters that unify features of any number of channels.
        window_ratio: reach of a window to each side as a share of the map's height and width; 0: no window.
        num_heads: heads of the attention.
        lfu_dim: number of those filters; by default ``qk_dim``.
        natten: attend to the shifted window of neighbourhood attention instead of what lies within
            ``window_ratio``. That is another function, with fewer parameters; weights of the first form load too.

    Source: Wimmer et al., "AnyUp: Universal Feature Upsampling", ICLR 2026, https://arxiv.org/abs/2510.12764.
    Names and shapes of tensors are those of the published weights.
    """

    @checked_options
    def __init__(
        self,
        qk_dim: int = 128,
        kernel_size: int = 1,
        kernel_size_lfu: int = 5,
        window_ratio: float = 0.1,
        num_heads: int = 4,
        lfu_dim: int | None = None,
        natten: bool = False,
    ) -> None:
        super().__init__()
        check_kernel_size("kernel_size", kernel_size)
        check_kernel_size("kernel_size_lfu", kernel_size_lfu)
        check_widths(qk_dim, num_heads)
        filters = qk_dim if lfu_dim is None else lfu_dim
        if filters < 1 or filters % GROUPS:
            raise ValueError(f"lfu_dim must be divisible by {GROUPS}, got {lfu_dim}")
        self.kernel_size = kernel_size
        self.window_ratio = window_ratio
        self.natten = natten
        self.image_encoder = _encoder(convolution(3, qk_dim, kernel_size), qk_dim)
        self.key_encoder = _encoder(convolution(qk_dim, qk_dim), qk_dim)
        self.query_encoder = _encoder(convolution(qk_dim, qk_dim), qk_dim)
        self.key_features_encoder = _encoder(_Unification(filters, kernel_size_lfu), qk_dim, filters)
        self.cross_decode = (_NattenDecoder if natten else _Decoder)(qk_dim, num_heads)
        self.aggregation = _encoder(convolution(2 * qk_dim, qk_dim, 3), qk_dim)
        self.rope = AxisRotation(qk_dim)

    def upsample(self, features: Tensor, image: Tensor, size: Size, chunk: int | None) -> Tensor:
        coarse = features.shape[-2:]
        if min(coarse) < 2:
            raise ValueError(f"AnyUp needs features of at least 2 rows and columns, got {tuple(coarse)}")
        rows, columns = (
            self._window(fine, few, name)
            for fine, few, name in zip(size, coarse, ("rows", "columns"), strict=True)
        )
        check_image(image, self.kernel_size)
        image = image.to(self.rope.freqs.dtype)
        encoded = Rows.of(image, chunk).through(self.image_encoder).through(self.rope)
        pooled = encoded.through(self.key_encoder).pooled(coarse).whole()
        described = Rows.of(unit(features.to(image.dtype)), None)
        known = described.through(self.key_features_encoder).whole()
        keys = Rows.of(torch.cat([pooled, known], 1), None).through(self.aggregation).whole()
        queries = encoded.through(self.query_encoder).pooled(size)
        queries, keys = self.cross_decode(queries, keys)
        return attend_rows(queries, keys, features, rows, columns, self.cross_decode.heads, mean=True)

    def own_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the first form under the names of the second, where this is of the second."""
        state = dict(state)
        both = "cross_decode.cross_attn."
        if not self.natten or not any(key.startswith(f"{both}attention.") for key in state):
            return state
        for kind, last in (
            ("weight", (..., None, None)),
            ("bias", ...),
        ):  # what lacks here is found missing later
            state.pop(f"{both}attention.out_proj.{kind}", None)
            joined = state.pop(f"{both}attention.in_proj_{kind}", None)
            parts = () if joined is None else torch.atleast_1d(joined).chunk(3)
            for name, part in zip(("q_proj", "k_proj"), parts, strict=False):
                state[f"{both}{name}.{kind}"] = part[last]
        for name in ("norm_q", "norm_k"):
            if f"{both}{name}.weight" in state:
                state[f"cross_decode.{name}.weight"] = state.pop(f"{both}{name}.weight")
        return state

    def _window(self, fine: int, coarse: int, name: str) -> Tensor:
        ratio = self.window_ratio
        if not self.natten:
            return around(fine, coarse, ratio) if ratio > 0 else every(fine, coarse)
        if not 0 < ratio < 0.5:
            return neighbourhood(fine, coarse, coarse, name)
        return neighbourhood(fine, coarse, max(3, round(2 * ratio * coarse)) // 2 * 2 + 1, name)


def _encoder(first: nn.Module, channels: int, inputs: int | None = None) -> nn.Sequential:
    return nn.Sequential(first, _Block(inputs or channels, channels), _Block(channels, channels))


class _Block(nn.Module):
    """Twice a group norm, SiLU and a 1x1 convolution, added to the input; under AnyUp's names."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(GROUPS, inputs),
            nn.SiLU(),
            convolution(inputs, outputs),
            nn.GroupNorm(GROUPS, outputs),
            nn.SiLU(),
            convolution(outputs, outputs),
        )
        self.shortcut = nn.Identity() if inputs == outputs else convolution(inputs, outputs)

    def rows(self, x: Rows) -> Rows:
        x = x.kept()
        return x.through(self.block).joined(x.through(self.shortcut), torch.add)


class _Unification(nn.Module):
    """Features of any number of channels as a fixed number of maps: how each resembles each of some filters."""

    def __init__(self, filters: int, kernel_size: int) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(filters, 1, kernel_size, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        reach = self.basis.shape[-1] // 2
        inside = F.conv2d(x.new_ones(1, 1, height, width), torch.ones_like(self.basis[:1]), padding=reach)
        padded = F.pad(x, (reach,) * 4)
        step = max(1, _MAX_UNIFIED // max(1, x.shape[0] * channels * len(self.basis) * width))
        again = torch.is_grad_enabled() and step < height
        out = []
        for lo in range(0, height, step):
            hi = min(lo + step, height)
            arguments = padded[:, :, lo : hi + 2 * reach], inside[:, :, lo:hi], self.basis
            out.append(
                checkpoint(_unify, *arguments, use_reentrant=False, preserve_rng_state=False)
                if again
                else _unify(*arguments)
            )
        return torch.cat(out, 2)


def _unify(padded: Tensor, inside: Tensor, basis: Tensor) -> Tensor:
    """Rows of the unification of padded ones; ``inside``: positions of each window within the map."""
    batch, channels = padded.shape[:2]
    maps = F.conv2d(padded.flatten(0, 1)[:, None], basis) / inside
    # The maps come channel by channel, each with all filters, and are read as a table of filters by channels. That
    # mixes the two, depends on the channels' order, and is what the published weights were trained with.
    table = maps.reshape(batch, len(basis), channels, *maps.shape[2:])
    return table.softmax(1).mean(2)


class _Decoder(nn.Module):
    """Norms and projections of queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.cross_attn = _CrossAttention(width, heads)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.heads = heads

    def forward(self, queries: Rows, keys: Tensor) -> tuple[Rows, Tensor]:
        part = self.cross_attn
        of_queries, of_keys, _ = part.attention.in_proj_weight.chunk(3)
        query_bias, key_bias, _ = part.attention.in_proj_bias.chunk(3)
        queries = queries.through(self.conv2d)
        queries = queries.each(lambda x: project(normalised(part.norm_q, x), of_queries, query_bias))
        return queries, project(normalised(part.norm_k, keys), of_keys, key_bias)


class _CrossAttention(nn.Module):
    """Holds the parameters as the published files name them; those of values and output are never used."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_q = nn.RMSNorm(width)
        self.norm_k = nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, heads)


class _NattenDecoder(nn.Module):
    """The same under the names of the form with neighbourhood attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.cross_attn = nn.ModuleDict(
            {name: convolution(width, width, bias=True) for name in ("q_proj", "k_proj")}
        )
        self.norm_q = nn.RMSNorm(width)
        self.norm_k = nn.RMSNorm(width)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.heads = heads

    def forward(self, queries: Rows, keys: Tensor) -> tuple[Rows, Tensor]:
        part = self.cross_attn
        queries = queries.through(self.conv2d)
        queries = queries.each(lambda x: part["q_proj"](normalised(self.norm_q, x)))
        return queries, part["k_proj"](normalised(self.norm_k, keys))
