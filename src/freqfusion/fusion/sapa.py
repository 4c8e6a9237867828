"""SAPA: kernels from the similarity of fine queries and coarse keys."""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from freqfusion.fusion._norms import GroupNorm
from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.ops import carafe, normalize_kernels, window_similarity
from freqfusion.ops._checks import check_kernel_size, checked_options
from freqfusion.ops.resize import resize

Norm = Literal["group", "layer", "none"]


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel of ``(B, C, H, W)``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SAPA(Fusion):
    """Upsamples the coarse map by similarity: a fine pixel takes from those coarse neighbours that it resembles.

    This is SAPA-B, or SAPA-G with ``gating=True``. Neighbours outside the map have similarity zero, not minus
    infinity: they take a share of the softmax and contribute nothing, as in the authors' code.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map; may differ.
        up_kernel_size: odd side of the neighbourhood.
        embedding_dim: channels of queries and keys.
        qkv_bias: whether their projections have a bias.
        norm: of both maps before the projections: ``"group"`` (32 groups, or as many as divide the
            channels), ``"layer"`` (over the channels of each pixel, the authors' first form) or ``"none"``.
        gating: blend the query with one of the coarse map itself, by a gate predicted from the coarse map.

    Raises:
        ValueError: for an even kernel or an unknown norm.

    Source: Lu et al., "SAPA: Similarity-Aware Point Affiliation for Feature Upsampling", NeurIPS 2022. Weights
    of the authors' first form, stored as matrices, load too. Start: normal with std 0.02, biases zero.
    """

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        up_kernel_size: int = 5,
        embedding_dim: int = 32,
        qkv_bias: bool = True,
        norm: Norm = "group",
        gating: bool = False,
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        check_kernel_size("up_kernel_size", up_kernel_size)
        if norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}")
        self.up_kernel_size = up_kernel_size

        def normalisation(channels: int) -> nn.Module:
            if norm == "group":
                return GroupNorm(channels)
            return ChannelNorm(channels) if norm == "layer" else nn.Identity()

        self.norm_y = normalisation(hr_channels)
        self.norm_x = normalisation(lr_channels)
        self.gating = gating
        if gating:
            self.qy = nn.Conv2d(hr_channels, embedding_dim, 1, bias=qkv_bias)
            self.qx = nn.Conv2d(lr_channels, embedding_dim, 1, bias=qkv_bias)
            self.gate = nn.Conv2d(lr_channels, 1, 1)
        else:
            self.q = nn.Conv2d(hr_channels, embedding_dim, 1, bias=qkv_bias)
        self.k = nn.Conv2d(lr_channels, embedding_dim, 1, bias=qkv_bias)
        for projection in (module for module in self.children() if isinstance(module, nn.Conv2d)):
            nn.init.normal_(projection.weight, std=0.02)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        self.register_load_state_dict_pre_hook(_matrices_to_convolutions)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        x, y = self.norm_x(lr_feat), self.norm_y(hr_feat)
        query, key = self._gated_query(x, y, lr_feat) if self.gating else self.q(y), self.k(x)
        kernels = normalize_kernels(window_similarity(query, key, self.up_kernel_size), self.up_kernel_size)
        return FusedFeatures(kernels, hr_feat, carafe(lr_feat, kernels, self.up_kernel_size))

    def _gated_query(self, x: Tensor, y: Tensor, lr_feat: Tensor) -> Tensor:
        """From both normalised maps and the coarse one as it came, which its own part of the query reads."""
        gate = self.gate(x).sigmoid()
        share, coarse = (
            resize(part, y.shape[-2:], "nearest") for part in (gate, (1 - gate) * self.qx(lr_feat))
        )
        return share * self.qy(y) + coarse


def _matrices_to_convolutions(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for name in ("q.weight", "k.weight", "qy.weight", "qx.weight", "gate.weight"):
        weight = state_dict.get(prefix + name)
        if weight is not None and weight.ndim == 2:
            state_dict[prefix + name] = weight[:, :, None, None]
