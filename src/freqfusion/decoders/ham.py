"""The light Hamburger head of SegNeXt, plain or with a fusion method between its levels.

Sources: Hamburger, Geng et al., ICLR 2021, arXiv 2109.04553 (matrix factorisation); SegNeXt, Guo et al.,
NeurIPS 2022, arXiv 2209.08575 (the light head); FreqFusion, Chen et al., TPAMI 2024, arXiv 2408.12879.
Module and parameter names follow the authors' state dicts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.decoders.progressive import cascade_channels, fuse_cascade
from freqfusion.fusion.catalog import create_fitting_fusion
from freqfusion.ops._checks import NotScriptable, refuse_torchscript
from freqfusion.ops._constants import Constants

TRAIN_STEPS = 6
EVAL_STEPS = 7
EPSILON = 1e-6
BASES_SEED = 0
NORM_GROUPS = 32


class NMF2D(Constants, nn.Module):
    """Non-negative matrix factorisation of a feature map by multiplicative updates (the Hamburger core).

    Each image, as a matrix of ``C`` rows and ``H * W`` columns, is replaced by its best approximation of
    rank ``rank``: 6 update steps in training and 7 in evaluation. In training the bases start at random in
    every forward (global generator). In evaluation they always start at one fixed draw, so that a result
    depends neither on chance nor on the other images of the batch. Computed in float32 at least.

    Args:
        channels: C of the input.
        rank: number of bases R.
    """

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        generator = torch.Generator(device="cpu").manual_seed(BASES_SEED)
        bases = torch.rand(1, channels, rank, generator=generator, device="cpu")
        self.register_constant("eval_bases", F.normalize(bases, dim=1))
        self.eval_bases: Tensor

    def forward(self, x: Tensor, bases: Tensor | None = None) -> Tensor:
        """Low-rank approximation of ``x``.

        Args:
            x: ``(B, C, H, W)``, not negative.
            bases: ``(B, C, R)`` start values of unit length along C; by default chosen as described above.

        Returns:
            ``(B, C, H, W)`` with the dtype of ``x``.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # "meta" has none
            matrix = x.to(dtype).flatten(2)
            if bases is None:
                bases = self._start(matrix)
            result = self._approximate(matrix, bases.to(dtype))
        return result.to(x.dtype).reshape(x.shape)

    def _start(self, matrix: Tensor) -> Tensor:
        if self.training:
            shape = (matrix.shape[0], *self.eval_bases.shape[1:])
            return F.normalize(torch.rand(shape, dtype=matrix.dtype, device=matrix.device), dim=1)
        return self.eval_bases.expand(matrix.shape[0], -1, -1)

    def _approximate(self, matrix: Tensor, bases: Tensor) -> Tensor:
        coefficients = (matrix.mT @ bases).softmax(dim=-1)
        for _ in range(TRAIN_STEPS if self.training else EVAL_STEPS):
            coefficients = _update_coefficients(matrix, bases, coefficients)
            scale = bases @ (coefficients.mT @ coefficients)
            bases = bases * (matrix @ coefficients) / (scale + EPSILON)
        coefficients = _update_coefficients(matrix, bases, coefficients)
        return bases @ coefficients.mT


def _update_coefficients(matrix: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
    scale = coefficients @ (bases.mT @ bases)
    return coefficients * (matrix.mT @ bases) / (scale + EPSILON)


class ConvNorm(nn.Module):
    """1x1 convolution without bias, and group norm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = _conv1x1(in_channels, channels, bias=False)
        self.gn = nn.GroupNorm(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.gn(self.conv(x))


class BareConv(nn.Module):
    """1x1 convolution; a module of its own only for the authors' key names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv1x1(channels, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _conv1x1(in_channels: int, channels: int, bias: bool) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, channels, 1, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class Hamburger(nn.Module):
    """``relu(x + out(core(relu(in(x)))))``: the factorisation between two 1x1 convolutions."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.ham_in = BareConv(channels)
        self.ham = NMF2D(channels, rank)
        self.ham_out = ConvNorm(channels, channels)

    def forward(self, x: Tensor, bases: Tensor | None = None) -> Tensor:
        return F.relu(x + self.ham_out(self.ham(F.relu(self.ham_in(x)), bases)))


class LightHamHead(NotScriptable, nn.Module):
    """Segmentation head of SegNeXt.

    With ``fusion="bilinear"`` this is the original head: all maps are resized bilinearly to the finest and
    concatenated. With any other fusion the maps are joined from coarse to fine, each step concatenating
    the fine map and the upsampled coarser ones. With ``"freqfusion"`` this is the released FreqFusion head:
    ``(lr_channels + hr_channels) // compress_ratio`` compressed channels, ``direction_feat="sim"``, no
    Hamming window, feature resampling on, and channels concatenated group by group (group 0 of the fine
    map, group 0 of the coarse map, group 1 of the fine map, ...), in plain order without resampling.

    Args:
        in_channels: channels of the maps, fine to coarse.
        num_classes: number of classes K.
        channels: channels after the squeeze and before the classifier; a multiple of 32.
        ham_channels: channels of the Hamburger; a multiple of 32.
        ham_rank: number of bases of the Hamburger.
        fusion: ``"bilinear"`` or another name of :func:`freqfusion.fusion.list_fusions`.
        compress_ratio: FreqFusion alone, see above.
        feature_resample_group: FreqFusion alone: channel groups that move independently.
        dropout: probability of dropping a whole channel before the classifier.
        fusion_options: further arguments of the fusion method; they override the settings named above.

    Raises:
        ValueError: for fewer than two maps, an unknown fusion, options for the plain head, or channels
            that do not divide into the groups.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 256,
        ham_channels: int = 256,
        ham_rank: int = 16,
        fusion: str = "bilinear",
        compress_ratio: int = 4,
        feature_resample_group: int = 4,
        dropout: float = 0.1,
        fusion_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if len(in_channels) < 2:
            raise ValueError(f"in_channels must name at least two maps, got {tuple(in_channels)}")
        options = dict(fusion_options or {})
        if fusion == "bilinear" and options:
            raise ValueError(f"the plain head (fusion='bilinear') takes no fusion_options, got {options}")
        self.in_channels = tuple(in_channels)
        self.num_classes = num_classes
        self.cascade = fusion != "bilinear"
        self.interleave = 1
        if fusion == "freqfusion":
            options = {
                "feature_resample": True,
                "feature_resample_group": feature_resample_group,
                "hamming_window": False,
                "direction_feat": "sim",
                **options,
            }
            if options["feature_resample"]:
                self.interleave = options["feature_resample_group"]

        self.squeeze = ConvNorm(sum(in_channels), ham_channels)
        self.hamburger = Hamburger(ham_channels, ham_rank)
        self.align = ConvNorm(ham_channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

        self.freqfusions = nn.ModuleList()
        if self.cascade:
            for hr_channels, lr_channels in cascade_channels(in_channels):
                if hr_channels % self.interleave:
                    raise ValueError(
                        f"feature_resample_group={self.interleave} must divide the channels of every map, "
                        f"got {tuple(in_channels)}; choose another group count"
                    )
                step = dict(options)
                if fusion == "freqfusion":
                    step.setdefault("compressed_channels", (lr_channels + hr_channels) // compress_ratio)
                self.freqfusions.append(create_fitting_fusion(fusion, hr_channels, lr_channels, step))

    def forward(self, features: Sequence[Tensor], bases: Tensor | None = None) -> Tensor:
        """Class scores at the size of the finest map.

        Args:
            features: maps ``(B, in_channels[i], H_i, W_i)``, fine to coarse, any sizes.
            bases: start values of the factorisation, see :class:`NMF2D`.

        Returns:
            ``(B, num_classes, H_0, W_0)``.
        """
        return self.conv_seg(self.dropout(self.embed(features, bases)))

    def embed(self, features: Sequence[Tensor], bases: Tensor | None = None) -> Tensor:
        """The features that the classifier sees: ``(B, channels, H_0, W_0)``; see :meth:`forward`."""
        refuse_torchscript()
        if len(features) != len(self.in_channels):
            raise ValueError(f"got {len(features)} maps, this head was built for {len(self.in_channels)}")
        if self.cascade:
            joined = fuse_cascade(self.freqfusions, features, self.interleave)
        else:
            joined = self._resize(features)
        x = F.relu(self.squeeze(joined))
        x = self.hamburger(x, bases)
        return F.relu(self.align(x))

    def _resize(self, features: Sequence[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        resized = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in features[1:]]
        return torch.cat([features[0], *resized], dim=1)
