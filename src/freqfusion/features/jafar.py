"""JAFAR: attention to all coarse pixels, by queries from the image and keys from image and features."""

from collections.abc import Sequence

from torch import Tensor, nn

from freqfusion.features._attention import attend_rows, every
from freqfusion.features._encoders import (
    GROUPS,
    AxisRotation,
    NamedBlock,
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


class JAFAR(FeatureUpsampler):
    """Every output pixel attends to all coarse pixels; one model per encoder.

    The output is the mean over the heads' attention of the features themselves, so it stays within their range.
    The work grows with ``H * W * h * w``; give ``chunk`` for large outputs.

    Args:
        channels: C of the features.
        qk_dim: channels D of queries and keys; divisible by 8 and by ``num_heads``.
        kernel_size: odd side of the first convolution of the image.
        num_heads: heads of the attention.
        mean: of the images that the encoder was trained with, per colour, in [0, 1]; by default ImageNet's.
        std: standard deviation of the same.

    Source: Couairon et al., "JAFAR: Jack up Any Feature at Any Resolution", NeurIPS 2025,
    https://arxiv.org/abs/2506.11136. Names and shapes of tensors are those of the published weights.
    """

    @checked_options
    def __init__(
        self,
        channels: int,
        qk_dim: int = 128,
        kernel_size: int = 1,
        num_heads: int = 4,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(channels)
        check_kernel_size("kernel_size", kernel_size)
        check_widths(qk_dim, num_heads)
        self.kernel_size = kernel_size
        self.mean = self.mean if mean is None else tuple(mean)
        self.std = self.std if std is None else tuple(std)
        self.image_encoder = _encoder(3, qk_dim, kernel_size)
        self.key_encoder = _encoder(qk_dim, qk_dim)
        self.query_encoder = _encoder(qk_dim, qk_dim)
        self.key_features_encoder = _encoder(channels, qk_dim)
        self.cross_decode = _Decoder(channels, qk_dim, num_heads)
        self.sft_key = nn.ModuleDict(
            {
                name: convolution(qk_dim, qk_dim) for name in ("gamma", "beta")
            }  # of the features, for the image
        )
        self.rope = AxisRotation(qk_dim)
        self.norm = nn.GroupNorm(GROUPS, qk_dim, affine=False)

    def upsample(self, features: Tensor, image: Tensor, size: Size, chunk: int | None) -> Tensor:
        coarse = features.shape[-2:]
        check_image(image, self.kernel_size)
        image = image.to(self.rope.freqs.dtype)
        encoded = Rows.of(image, chunk).through(self.image_encoder).through(self.rope)
        pooled = self.norm(encoded.through(self.key_encoder).pooled(coarse).whole())
        described = Rows.of(unit(features.to(image.dtype)), None)
        known = described.through(self.key_features_encoder).whole()
        keys = self.sft_key["gamma"](known) * pooled + self.sft_key["beta"](known)
        queries = encoded.through(self.query_encoder).pooled(size).through(self.norm)
        return self.cross_decode(queries, keys, features, size)


def _encoder(inputs: int, channels: int, kernel_size: int = 1) -> nn.Sequential:
    return nn.Sequential(
        convolution(inputs, channels, kernel_size), NamedBlock(channels), NamedBlock(channels)
    )


class _Decoder(nn.Module):
    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.cross_attn = _CrossAttention(channels, width, heads)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, queries: Rows, keys: Tensor, features: Tensor, size: Size) -> Tensor:
        attention = self.cross_attn
        of_queries, query_bias, of_keys, key_bias = attention.projections()
        queries = queries.through(self.conv2d)
        queries = queries.each(lambda x: project(normalised(attention.norm_q, x), of_queries, query_bias))
        keys = project(normalised(attention.norm_k, keys), of_keys, key_bias)
        rows, columns = (every(*sides) for sides in zip(size, features.shape[-2:], strict=True))
        heads = attention.attention.num_heads
        return attend_rows(queries, keys, features, rows, columns, heads, mean=True)


class _CrossAttention(nn.Module):
    """Holds the parameters as the published files name them; ``norm_v`` and the values' are never used."""

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm_q = nn.RMSNorm(width)
        self.norm_k = nn.RMSNorm(width)
        self.norm_v = nn.RMSNorm(channels)
        self.attention = nn.MultiheadAttention(width, heads, vdim=channels)

    def projections(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of queries, then of keys."""
        attention = self.attention
        query_bias, key_bias, _ = attention.in_proj_bias.chunk(3)
        if attention.in_proj_weight is not None:  # one tensor where channels and width are equal
            of_queries, of_keys, _ = attention.in_proj_weight.chunk(3)
        else:
            of_queries, of_keys = attention.q_proj_weight, attention.k_proj_weight
        return of_queries, query_bias, of_keys, key_bias
