"""A2U: affinity-aware upsampling."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.fusion._norms import GroupNorm
from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.ops import carafe, normalize_kernels
from freqfusion.ops._checks import check_kernel_size, checked_options, is_exporting
from freqfusion.ops.resize import crop, shuffle


class AdaptivePool(nn.AdaptiveAvgPool2d):
    """Average pooling to ``(size, size)``; under export as two matrix products.

    ONNX has no such pooling of a map whose size is known only at run time.
    """

    output_size: int

    def forward(self, input: Tensor) -> Tensor:
        if not is_exporting():
            return super().forward(input)
        rows, columns = (self._averages(length, input) for length in input.shape[-2:])
        return rows @ input @ columns.mT

    def _averages(self, length: int, like: Tensor) -> Tensor:
        """``(size, length)``: the weights of every cell."""
        size = self.output_size
        cell = torch.arange(size, device=like.device)[:, None]
        place = torch.arange(length, device=like.device)
        start = torch.div(cell * length, size, rounding_mode="floor")
        end = torch.div((cell + 1) * length + size - 1, size, rounding_mode="floor")
        inside = ((place >= start) & (place < end)).float()
        return (inside / inside.sum(dim=1, keepdim=True)).to(like.dtype)


class AffinityKernels(nn.Module):
    """Logits of the upsampling kernels from second-order statistics of the fine map.

    Two filters per channel or shared, ``U`` and ``V``, and a weight for each of the kernels' taps are predicted
    from the whole image; the inner product of the two filtered maps is the affinity that scales the taps.
    """

    def __init__(self, channels: int, up_kernel: int, encode_kernel: int, share: bool) -> None:
        super().__init__()
        self.encode_kernel = encode_kernel
        filters = 1 if share else channels

        def norm() -> nn.Sequential:
            return nn.Sequential(GroupNorm(channels), nn.LeakyReLU())

        def pooled(size: int, out_channels: int) -> nn.Sequential:
            return nn.Sequential(AdaptivePool(size), nn.Conv2d(channels, out_channels, 1))

        self.bnu = norm()
        self.bnv = norm()
        self.bconv_UP = pooled(1, 4 * up_kernel**2)
        self.bconv_U = pooled(encode_kernel, filters)
        self.bconv_V = pooled(encode_kernel, filters)

    def forward(self, guide: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, up_kernel**2, 2 * ceil(H / 2), 2 * ceil(W / 2))`` in (0, 1)."""
        height, width = guide.shape[-2:]
        even = F.pad(guide, (0, width % 2, 0, height % 2))
        affinity = self.bnu(self._filter(even, self.bconv_U(guide)))
        affinity = affinity * self.bnv(self._filter(even, self.bconv_V(guide)))
        affinity = affinity.sum(dim=1, keepdim=True) / math.sqrt(guide.shape[1])
        return shuffle(self.bconv_UP(guide) * affinity, 2).sigmoid()

    def _filter(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Convolve each image ``(C, H, W)`` with its own filters ``(1 or C, k, k)``, stride 2, zero padding."""
        size = self.encode_kernel
        before = size // 2 - 1
        padded = F.pad(x, (before, size - 2 - before) * 2)
        rows, columns = padded.shape[-2] - size + 1, padded.shape[-1] - size + 1
        out = torch.zeros_like(x[..., ::2, ::2])
        for dy in range(size):
            for dx in range(size):
                window = padded[..., dy : dy + rows : 2, dx : dx + columns : 2]
                out = out + window * kernels[:, :, dy, dx, None, None]
        return out


class A2U(Fusion):
    """Upsamples the coarse map with kernels predicted from the fine map, which passes unchanged.

    The kernels are a softmax of sigmoids, so the largest weight is at most e times the smallest.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map; may differ.
        up_kernel: odd side of the reassembly kernels.
        encode_kernel: even side of the dynamic filters.
        share: one dynamic filter for all channels, rather than one each.

    Raises:
        ValueError: for an even ``up_kernel`` or an odd ``encode_kernel``.

    Source: Dai et al., "Learning Affinity-Aware Upsampling for Deep Image Matting", CVPR 2021.
    """

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        up_kernel: int = 3,
        encode_kernel: int = 6,
        share: bool = True,
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        check_kernel_size("up_kernel", up_kernel)
        if encode_kernel < 2 or encode_kernel % 2:
            raise ValueError(f"encode_kernel must be even (its stride is 2), got {encode_kernel}")
        self.up_kernel = up_kernel
        self.kernel_gen = AffinityKernels(hr_channels, up_kernel, encode_kernel, share)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        logits = crop(self.kernel_gen(hr_feat), hr_feat.shape[-2:])
        kernels = normalize_kernels(logits, self.up_kernel)
        return FusedFeatures(kernels, hr_feat, carafe(lr_feat, kernels, self.up_kernel))
