"""NAF: attention to a window of coarse pixels, by queries and keys from the image alone."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from freqfusion.features._attention import attend_rows, neighbourhood
from freqfusion.features._encoders import NamedBlock, check_image, convolution
from freqfusion.features._rows import Rows
from freqfusion.features.base import FeatureUpsampler, Size
from freqfusion.ops._checks import accumulation_dtype, check_groups, check_kernel_size, checked_options
from freqfusion.ops.resize import resize


class NAF(FeatureUpsampler):
    """Neighbourhood attention filtering: one model for the features of any encoder.

    Queries are the image, encoded at the output's size, keys their means over each coarse pixel; both turned by
    their places. The output is a mean of features of a window, shifted inside at borders, so it stays within their
    range. In training mode the places are scaled by a factor drawn between ``1 / rope_rescale`` and
    ``rope_rescale`` in each pass; in evaluation mode the factor is 1. (The published code keeps a factor while the
    size of the output stays the same, in evaluation too.)

    Args:
        dim: channels D of the encoded image; divisible by 16, by ``heads_attn`` and by 4 times ``heads_rope``.
        heads_attn: heads of the attention; must divide the channels of the features.
        heads_rope: heads of the rotation.
        kernel_size: odd side of the window in coarse pixels; features must have as many rows and columns.
        rope_base: longest period of the rotation.
        rope_rescale: the largest factor of the places in training.
        img_layers: blocks of each branch of the image encoder.

    Source: Chambon et al., "NAF: Zero-Shot Feature Upsampling via Neighborhood Attention Filtering", CVPR 2026,
    https://arxiv.org/abs/2511.18452. Names and shapes of tensors are those of the published weights.
    """

    @checked_options
    def __init__(
        self,
        dim: int = 256,
        heads_attn: int = 4,
        heads_rope: int = 4,
        kernel_size: int = 9,
        rope_base: float = 100.0,
        rope_rescale: float = 2.0,
        img_layers: int = 2,
    ) -> None:
        super().__init__()
        check_kernel_size("kernel_size", kernel_size)
        if dim % 16 or dim % heads_attn or dim % (4 * heads_rope):
            raise ValueError(
                f"dim must be divisible by 16, heads_attn and 4 * heads_rope, got {dim} for {heads_attn} and "
                f"{heads_rope} heads"
            )
        if not rope_base > 0 or not rope_rescale >= 1:
            raise ValueError(
                f"rope_base must be over 0 and rope_rescale at least 1, got {rope_base} and {rope_rescale}"
            )
        self.heads_attn = heads_attn
        self.kernel_size = kernel_size
        self.image_encoder = _Encoder(dim, heads_rope, rope_base, rope_rescale, img_layers)

    def upsample(self, features: Tensor, image: Tensor, size: Size, chunk: int | None) -> Tensor:
        check_groups("features", features.shape[1], self.heads_attn)
        coarse = features.shape[-2:]
        rows, columns = (
            neighbourhood(fine, few, self.kernel_size, name)
            for fine, few, name in zip(size, coarse, ("rows", "columns"), strict=True)
        )
        height, width = size
        most = 4 * min(size)
        if image.shape[2] > 4 * height or image.shape[3] > 4 * width:
            image = resize(image, (min(image.shape[2], most), min(image.shape[3], most)), "bilinear")
        check_image(image, 3)
        image = image.to(self.image_encoder.rope.periods.dtype)
        queries = self.image_encoder(Rows.of(image, chunk), size)
        keys = queries.pooled(coarse).whole()
        return attend_rows(queries, keys, features, rows, columns, self.heads_attn, mean=False)


class _Encoder(nn.Module):
    """Two branches, one of single pixels and one of neighbourhoods, pooled to the output's size and turned."""

    def __init__(self, dim: int, heads: int, base: float, rescale: float, layers: int) -> None:
        super().__init__()
        self.encoder = _branch(dim // 2, 1, layers)
        self.sem_encoder = _branch(dim // 2, 3, layers)
        self.rope = _Rotation(dim // heads, base, rescale)

    def forward(self, image: Rows, size: Size) -> Rows:
        pixels, places = image.through(self.encoder), image.through(self.sem_encoder)
        x = pixels.pooled(size).joined(places.pooled(size), lambda *maps: torch.cat(maps, 1))
        factor = self.rope.factor()
        return x.placed(lambda x, lo, hi: self.rope(x, lo, hi, size, factor))


def _branch(channels: int, kernel_size: int, layers: int) -> nn.Sequential:
    blocks = [NamedBlock(channels, kernel_size, bias=True, residual=False) for _ in range(layers)]
    return nn.Sequential(convolution(3, channels, kernel_size, bias=True), *blocks)


class _Rotation(nn.Module):
    """Rotary position embedding along both axes, in each head.

    Args:
        width: channels d of a head.
        base: longest period, in halves of the map.
        rescale: largest factor of the places in training.
    """

    periods: Tensor
    """As the published files hold them, rounded; :meth:`forward` computes them."""

    def __init__(self, width: int, base: float, rescale: float) -> None:
        super().__init__()
        self.steps = [4 * t / width for t in range(width // 4)]
        self.base = base
        self.register_buffer("periods", torch.tensor([base**step for step in self.steps]))
        self.rescale = rescale

    def factor(self) -> Tensor | float:
        """Of the places; in training drawn log-uniformly."""
        if not self.training:
            return 1.0
        most = math.log(self.rescale)
        return torch.empty((), device=self.periods.device).uniform_(-most, most).exp()

    def forward(self, x: Tensor, lo: int, hi: int, size: Size, factor: Tensor | float) -> Tensor:
        """Rows ``lo`` to ``hi - 1`` of a map of ``size``."""
        height, width = size
        dtype = accumulation_dtype(x)
        y = (torch.arange(lo, hi, device=x.device, dtype=dtype) * 2 + 1) / height - 1
        z = (torch.arange(width, device=x.device, dtype=dtype) * 2 + 1) / width - 1
        speed = torch.tensor(
            [2 * math.pi / self.base**step for step in self.steps], device=x.device, dtype=dtype
        )
        speed = (factor * speed)[:, None, None]
        down, across = speed * y[:, None], speed * z[None]
        angle = torch.cat([down.expand(-1, -1, width), across.expand(-1, hi - lo, -1)])
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.unflatten(1, (-1, 2, angle.shape[0])).unbind(2)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], 2)
        return turned.flatten(1, 3)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        periods = state.get(prefix + "periods")
        expected = torch.tensor([self.base**step for step in self.steps], device="cpu")
        if periods is not None and periods.shape == expected.shape and not periods.is_meta:
            found = periods.to("cpu", torch.float32)
            if not torch.allclose(found, expected, rtol=1e-2):  # which half precision keeps
                raise ValueError(
                    f"these weights' periods {found.tolist()} are not those of rope_base={self.base}; build NAF with "
                    "the rope_base that they were trained with"
                )
        super()._load_from_state_dict(state, prefix, *rest)
