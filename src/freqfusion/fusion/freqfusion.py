"""FreqFusion: adaptive low-pass filter, offset generator and adaptive high-pass filter."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freqfusion.fusion import _nhwc
from freqfusion.fusion.base import Convolution, FusedFeatures, Fusion, convolution
from freqfusion.ops import carafe, local_similarity, normalize_kernels, resample
from freqfusion.ops._checks import check_groups, check_kernel_size, checked_options, is_channels_last
from freqfusion.ops.carafe.logits import add_low_pass, carafe_from_logits
from freqfusion.ops.carafe.op import carafe_channels_last
from freqfusion.ops.normalized_similarity.op import normalized_similarity
from freqfusion.ops.resample.directed import directed_offsets, directed_resample
from freqfusion.ops.resize import resize, shuffle

DirectionFeat = Literal["sim_concat", "sim"]
Init = Literal["paper", "official"]
PaddingMode = Literal["zeros", "reflect"]
UpsampleMode = Literal["nearest", "bilinear"]

Sums = tuple[Tensor, Tensor]
"""A map, and sums of it: see :func:`freqfusion.ops.convolution.op.convolution`."""
SIMILARITY_CHANNELS = 8
"""A 3x3 neighbourhood without its centre, of an image."""


class OffsetGenerator(nn.Module):
    """Predicts where each fine pixel should read the coarse map, and reads it there.

    Direction and magnitude are predicted from features of both resolutions and from the cosine similarity of
    every pixel with its eight neighbours two pixels away: a pixel that differs from its neighbours is moved to
    a more consistent place. Parameter names are the released code's; its constant ``init_pos`` is accepted in
    a state dict and dropped, for the sub-pixel positions follow from the sizes here.

    Args:
        in_channels: channels of both compressed maps.
        groups: groups of channels that move together.
        kernel_size: odd side of the predicting convolutions.
        use_direct_scale: predict magnitudes; otherwise offsets are a quarter of the direction.
        norm: group normalisation (8 channels per group) of the compressed maps first.
        direction_feat: ``"sim_concat"`` predicts from features and similarities, ``"sim"`` the direction from
            the similarities alone and the magnitude from the features alone.
        spatial_dims: 3 for volumes, where a voxel has 26 neighbours, 8 sub-voxels and displacements along 3 axes.

    Source: Chen et al., TPAMI 2024, offset generator; sub-pixel layout after DySample's "lp" style
    (Liu et al., ICCV 2023).
    """

    @checked_options
    def __init__(
        self,
        in_channels: int,
        groups: int = 4,
        kernel_size: int = 1,
        use_direct_scale: bool = True,
        norm: bool = True,
        direction_feat: DirectionFeat = "sim_concat",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        check_kernel_size("kernel_size", kernel_size)
        if direction_feat not in get_args(DirectionFeat):
            raise ValueError(f'direction_feat must be "sim_concat" or "sim", got {direction_feat!r}')
        if norm and (in_channels < 8 or in_channels % (in_channels // 8)):
            raise ValueError(
                f"{in_channels} compressed channels cannot be normalised in {in_channels // 8} groups (of 8 "
                "channels); choose a multiple of 8 or switch the normalisation off (feature_resample_norm=False)"
            )
        self.groups = groups
        self.direction_feat = direction_feat
        self.takes_sums = norm and direction_feat == "sim_concat"
        neighbours = 3**spatial_dims - 1
        features = in_channels + neighbours
        direction_in = neighbours if direction_feat == "sim" else features
        scale_in = in_channels if direction_feat == "sim" else features

        def predictor(channels: int, subpixels: int) -> Convolution:
            out_channels = spatial_dims * groups * subpixels
            conv = convolution(spatial_dims)
            return conv(channels, out_channels, kernel_size, padding=kernel_size // 2)

        subpixels = 2**spatial_dims  # a coarse pixel predicts the offsets of its sub-pixels
        self.offset = predictor(direction_in, subpixels)
        self.direct_scale = predictor(scale_in, subpixels) if use_direct_scale else None
        self.hr_offset = predictor(direction_in, 1)
        self.hr_direct_scale = predictor(scale_in, 1) if use_direct_scale else None
        self.norm_hr = nn.GroupNorm(in_channels // 8, in_channels) if norm else None
        self.norm_lr = nn.GroupNorm(in_channels // 8, in_channels) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small directions (normal, std 0.001) and zero scales (magnitude one half): sampling starts in place."""
        for direction in (self.offset, self.hr_offset):
            nn.init.normal_(direction.weight, std=0.001)
            nn.init.zeros_(_bias(direction))
        for scale in (self.direct_scale, self.hr_direct_scale):
            if scale is not None:
                nn.init.zeros_(scale.weight)
                nn.init.zeros_(_bias(scale))

    def offsets(self, hr_feat: Tensor, lr_feat: Tensor) -> Tensor:
        """Offsets ``(B, 2 * groups, H, W)`` in coarse pixels: displacements along x of each group, then y.

        Args:
            hr_feat: ``(B, in_channels, H, W)`` compressed fine map.
            lr_feat: ``(B, in_channels, h, w)`` compressed coarse map.
        """
        fine, coarse = self._predictions(hr_feat, lr_feat, ())
        if self.direct_scale is None:
            return (resize(shuffle(coarse, 2), fine.shape[2:], "nearest") + fine) * 0.25
        return directed_offsets(fine, coarse)

    def _predictions(self, hr_feat: Tensor, lr_feat: Tensor, known: Sequence[Sums]) -> tuple[Tensor, Tensor]:
        """Directions and, unless they are fixed, magnitudes as :func:`directed_resample` takes them."""
        if self.direction_feat == "sim_concat":
            hr_feat = hr_direction = _with_similarity(hr_feat, self.norm_hr, known)
            lr_feat = lr_direction = _with_similarity(lr_feat, self.norm_lr, known)
        else:
            if self.norm_hr is not None and self.norm_lr is not None:
                hr_feat, lr_feat = self.norm_hr(hr_feat), self.norm_lr(lr_feat)
            hr_direction, lr_direction = local_similarity(hr_feat), local_similarity(lr_feat)
        if self.direct_scale is None or self.hr_direct_scale is None:
            return self.hr_offset(hr_direction), self.offset(lr_direction)
        if self.direction_feat == "sim_concat":
            coarse = _convolve_both(lr_feat, self.offset, self.direct_scale)
            return _convolve_both(hr_feat, self.hr_offset, self.hr_direct_scale), coarse
        coarse = torch.cat((self.offset(lr_direction), self.direct_scale(lr_feat)), dim=1)
        return torch.cat((self.hr_offset(hr_direction), self.hr_direct_scale(hr_feat)), dim=1), coarse

    def forward(
        self,
        hr_feat: Tensor,
        lr_feat: Tensor,
        feat_to_sample: Tensor,
        known: Sequence[Sums] = (),
        channels_last: bool | None = None,
    ) -> Tensor:
        """Resample ``feat_to_sample`` ``(B, C, *, *)``, at either size, to ``(B, C, H, W)``.

        The sums that its normalisation needs are taken from those that are ``known``, if they are. With
        ``channels_last``, channels lie innermost in the result or not, where magnitudes are predicted.
        """
        unit_size = tuple(lr_feat.shape[2:])
        if self.direct_scale is None:
            return resample(feat_to_sample, self.offsets(hr_feat, lr_feat), self.groups, unit_size)
        fine, coarse = self._predictions(hr_feat, lr_feat, known)
        return directed_resample(feat_to_sample, fine, coarse, self.groups, unit_size, channels_last)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "init_pos", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FreqFusion(Fusion):
    """Frequency-aware feature fusion of one coarse and one fine map.

    Three parts work from compressed copies of both maps. The adaptive low-pass filter predicts a kernel for
    every fine pixel and reassembles the coarse map with it, which smooths it inside objects while it is
    upsampled. The offset generator then moves samples of that map to nearby places that are more consistent.
    The adaptive high-pass filter adds the detail of the fine map that downsampling lost. Add or concatenate
    the two maps afterwards; their channels are unchanged and may differ.

    Works at any size of the fine map that is not smaller than the coarse one, odd sizes included; at exactly
    twice the size it equals the released code, whose checkpoints load strictly.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        scale_factor: only 1, the released default; other values raise there too.
        lowpass_kernel: odd side of the low-pass kernels.
        highpass_kernel: odd side of the high-pass kernels.
        up_group: groups of channels with kernels of their own; must divide all three channel counts.
        encoder_kernel: odd side of the convolutions that predict kernels and offsets.
        encoder_dilation: dilation of those that predict kernels.
        compressed_channels: channels of the compressed maps.
        align_corners: for ``upsample_mode="bilinear"``.
        upsample_mode: plain interpolation used when ``semi_conv`` is off.
        feature_resample: use the offset generator. On by default, as in the paper and all its experiments;
            the released class has it off by default.
        feature_resample_group: groups of channels that move together; must divide ``lr_channels``.
        comp_feat_upsample: enhanced initial fusion: sharpen the compressed fine map with its own high-pass
            kernels and upsample the coarse logits with low-pass kernels, instead of nearest interpolation.
        use_high_pass: refine the fine map; off, it passes unchanged.
        use_low_pass: only True; the released code has the argument and ignores it.
        hr_residual: add the high-pass response to the fine map rather than replace it.
        semi_conv: predict kernels at both resolutions and add them; off, from the sum of the compressed maps.
        hamming_window: multiply kernels by a Hamming window. The published SegNeXt and Mask2Former models
            have it off.
        feature_resample_norm: normalise the compressed maps in the offset generator.
        padding_mode: border of the reassembly: ``"zeros"`` as the published checkpoints were trained with,
            ``"reflect"`` as the released pure-PyTorch fallback does.
        direction_feat: ``"sim_concat"``, or ``"sim"`` as in the published SegNeXt; see
            :class:`OffsetGenerator`.
        use_checkpoint: recompute activations in the backward pass instead of keeping them.
        init: ``"paper"`` starts with offsets near zero (direction std 0.001, zero scales) as the offset
            generator's authors intended. ``"official"`` repeats the released constructor, whose last step, a
            Xavier pass over every convolution, overwrites those small values, so that training starts from
            large random offsets. (To start from what a network did before, see :func:`freqfusion.upgrade_`.)

    Raises:
        ValueError: for options that do not fit together; the message says which would.

    Source: Chen, Fu, Gu, Yan, Harada, Huang, "Frequency-aware Feature Fusion for Dense Image Prediction",
    TPAMI 2024, section 3; option names and parameter names from the authors' release.

    >>> fusion = FreqFusion(hr_channels=16, lr_channels=32)
    >>> _, hr_feat, lr_feat = fusion(hr_feat=torch.rand(1, 16, 27, 33), lr_feat=torch.rand(1, 32, 14, 17))
    >>> tuple(hr_feat.shape), tuple(lr_feat.shape)
    ((1, 16, 27, 33), (1, 32, 27, 33))
    """

    hamming_lowpass: Tensor
    hamming_highpass: Tensor

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        scale_factor: int = 1,
        lowpass_kernel: int = 5,
        highpass_kernel: int = 3,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
        align_corners: bool = False,
        upsample_mode: UpsampleMode = "nearest",
        feature_resample: bool = True,
        feature_resample_group: int = 4,
        comp_feat_upsample: bool = True,
        use_high_pass: bool = True,
        use_low_pass: bool = True,
        hr_residual: bool = True,
        semi_conv: bool = True,
        hamming_window: bool = True,
        feature_resample_norm: bool = True,
        padding_mode: PaddingMode = "zeros",
        direction_feat: DirectionFeat = "sim_concat",
        use_checkpoint: bool = False,
        init: Init = "paper",
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        for name, kernel in (
            ("lowpass_kernel", lowpass_kernel),
            ("highpass_kernel", highpass_kernel),
            ("encoder_kernel", encoder_kernel),
        ):
            check_kernel_size(name, kernel)
        for name, value, choices in (
            ("upsample_mode", upsample_mode, get_args(UpsampleMode)),
            ("padding_mode", padding_mode, get_args(PaddingMode)),
            ("init", init, get_args(Init)),
            ("scale_factor", scale_factor, (1,)),
            ("use_low_pass", use_low_pass, (True,)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        for name, channels in (
            ("hr_feat (up_group)", hr_channels),
            ("lr_feat (up_group)", lr_channels),
            ("the compressed maps (up_group)", compressed_channels),
        ):
            check_groups(name, channels, up_group)
        if feature_resample:
            check_groups("lr_feat (feature_resample_group)", lr_channels, feature_resample_group)

        self.lowpass_kernel = lowpass_kernel
        self.highpass_kernel = highpass_kernel
        self.up_group = up_group
        self.align_corners = align_corners
        self.upsample_mode = upsample_mode
        self.comp_feat_upsample = comp_feat_upsample
        self.use_high_pass = self.refines_hr = use_high_pass
        self.hr_residual = hr_residual
        self.semi_conv = semi_conv
        self.padding_mode = padding_mode
        self.use_checkpoint = use_checkpoint

        dims, conv = self.spatial_dims, convolution(self.spatial_dims)

        def encoder(kernel: int) -> Convolution:
            padding = (encoder_kernel - 1) * encoder_dilation // 2
            taps = kernel**dims * up_group
            return conv(compressed_channels, taps, encoder_kernel, padding=padding, dilation=encoder_dilation)

        self.hr_channel_compressor = conv(hr_channels, compressed_channels, 1)
        self.lr_channel_compressor = conv(lr_channels, compressed_channels, 1)
        self.content_encoder = encoder(lowpass_kernel)
        self.content_encoder2 = encoder(highpass_kernel) if use_high_pass else None
        self.dysampler = (
            OffsetGenerator(
                compressed_channels,
                feature_resample_group,
                kernel_size=encoder_kernel,
                norm=feature_resample_norm,
                direction_feat=direction_feat,
                spatial_dims=dims,
            )
            if feature_resample
            else None
        )
        self.register_buffer("hamming_lowpass", _window(lowpass_kernel, hamming_window, dims))
        self.register_buffer("hamming_highpass", _window(highpass_kernel, hamming_window, dims))
        self._initialise(init)

    def _initialise(self, init: Init) -> None:
        for module in self.modules():
            if isinstance(module, Convolution):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(_bias(module))
        for encoder in (self.content_encoder, self.content_encoder2):
            if encoder is not None:
                nn.init.normal_(encoder.weight, std=0.001)
        if self.dysampler is not None and init != "official":
            self.dysampler.reset_parameters()

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        if self.use_checkpoint and torch.is_grad_enabled():
            return FusedFeatures(*checkpoint(self._fuse, hr_feat, lr_feat, use_reentrant=False))
        return self._fuse(hr_feat, lr_feat)

    def _fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        size = hr_feat.shape[2:]
        known: list[Sums] | None = [] if self.dysampler is not None and self.dysampler.takes_sums else None
        compressed_hr, compressed_lr, lowpass, highpass_logits = self._predict(hr_feat, lr_feat, known)
        fused_lr = lr_feat if self.semi_conv else self._interpolate(lr_feat, size)
        innermost = self._reads_innermost(lr_feat, size)
        if innermost:
            rest = (self.lowpass_kernel, self.up_group, self.padding_mode)
            fused_lr = carafe_channels_last(fused_lr, lowpass, *rest)
        else:
            fused_lr = self._reassemble(fused_lr, lowpass, self.lowpass_kernel)
        fused_hr = hr_feat
        if highpass_logits is not None:
            fused_hr = self._sharpen(hr_feat, highpass_logits, self.hr_residual)
        if self.dysampler is not None:
            last = is_channels_last(lr_feat) if innermost else None
            fused_lr = self.dysampler(compressed_hr, compressed_lr, fused_lr, known or (), last)
        return FusedFeatures(lowpass, fused_hr, fused_lr)

    def _reads_innermost(self, lr_feat: Tensor, size: Sequence[int]) -> bool:
        """Whether the map that is resampled has its channels innermost although ``lr_feat`` has not.

        The kernel that reads four pixels for each of the result then reads them whole, and writes rows.
        """
        moves = self.dysampler is not None and self.dysampler.direct_scale is not None
        if not moves or lr_feat.dtype not in _nhwc.HALF or not _nhwc.wanted(lr_feat):
            return False
        return size[0] == 2 * lr_feat.shape[2] and size[1] == 2 * lr_feat.shape[3]

    def predict(self, hr_feat: Tensor, lr_feat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the maps are fused by: both compressed maps (the fine one sharpened), kernels and high-pass logits.

        Args:
            hr_feat: ``(B, hr_channels, H, W)``.
            lr_feat: ``(B, lr_channels, h, w)``.

        Returns:
            ``(B, compressed_channels, H, W)`` and ``(B, compressed_channels, h, w)``; low-pass kernels
            ``(B, up_group * lowpass_kernel**2, H, W)``; logits ``(B, up_group * highpass_kernel**2, H, W)`` or None.
        """
        return self._predict(hr_feat, lr_feat, None)

    def _predict(
        self, hr_feat: Tensor, lr_feat: Tensor, known: list[Sums] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        hr, lr = (
            _compress(self.hr_channel_compressor, hr_feat),
            _compress(self.lr_channel_compressor, lr_feat),
        )
        if not self.semi_conv:
            return hr, lr, *self._kernels_from_sum(hr, lr)
        if not self.comp_feat_upsample:
            return hr, lr, *self._kernels_from_both(hr, lr)
        hr, lowpass, highpass_logits = self._kernels_enhanced(hr, lr, known)
        return hr, lr, lowpass, highpass_logits

    def _kernels_enhanced(
        self, hr: Tensor, lr: Tensor, known: list[Sums] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Enhanced initial fusion: sharpened fine map, low-pass kernels and high-pass logits."""
        highpass_logits: Tensor | None = None
        if self.content_encoder2 is not None:
            highpass_logits = _convolve(self.content_encoder2, hr)  # of the map before it is sharpened
            hr = self._sharpen(hr, highpass_logits, residual=True)
            coarse_lowpass, coarse_highpass = self._coarse_logits(lr, self.content_encoder2, known)
        else:
            coarse_lowpass = _convolve(self.content_encoder, lr, known)
        lowpass_logits = _convolve(self.content_encoder, hr, known)
        lowpass_logits, _ = self._add_low_pass(lowpass_logits, coarse_lowpass, lowpass_logits)
        if highpass_logits is None:
            return hr, self._lowpass_kernels(lowpass_logits), None
        highpass_logits, lowpass = self._add_low_pass(
            highpass_logits, coarse_highpass, lowpass_logits, keep=True
        )
        assert lowpass is not None
        return hr, lowpass, highpass_logits

    def _coarse_logits(
        self, lr: Tensor, highpass_encoder: Convolution, known: list[Sums] | None
    ) -> tuple[Tensor, Tensor]:
        """Coarse logits of the low-pass and of the high-pass, ``(B, up_group * kernel**2, h, w)`` each."""
        if is_channels_last(lr):  # results that lie side by side are worth a second pass over a small map
            return _convolve(self.content_encoder, lr, known), _convolve(highpass_encoder, lr)
        both = _convolve_both(lr, self.content_encoder, highpass_encoder)
        lowpass, highpass = both.split((self.content_encoder.out_channels, highpass_encoder.out_channels), 1)
        return lowpass, highpass

    def _kernels_from_both(self, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor | None]:
        """Plain initial fusion: logits of both resolutions, the coarse ones by nearest interpolation."""

        def logits(encoder: nn.Module) -> Tensor:
            return encoder(hr) + resize(encoder(lr), hr.shape[2:], "nearest")

        lowpass = self._lowpass_kernels(logits(self.content_encoder))
        return lowpass, None if self.content_encoder2 is None else logits(self.content_encoder2)

    def _kernels_from_sum(self, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the sum of both compressed maps."""
        fused = hr + resize(lr, hr.shape[2:], "nearest")
        lowpass = self._lowpass_kernels(self.content_encoder(fused))
        return lowpass, None if self.content_encoder2 is None else self.content_encoder2(fused)

    def _lowpass_kernels(self, logits: Tensor) -> Tensor:
        return self._normalise(logits, self.lowpass_kernel, self.hamming_lowpass)

    def _sharpen(self, x: Tensor, highpass_logits: Tensor, residual: bool) -> Tensor:
        """``x`` minus its low-pass, plus ``x`` again if ``residual``, as one reassembly."""
        window, gain = _window_or_none(self.hamming_highpass), 2 if residual else 1
        kernel_size, groups = self.highpass_kernel, self.up_group
        return carafe_from_logits(x, highpass_logits, kernel_size, groups, window, gain, self.padding_mode)

    def _normalise(self, logits: Tensor, kernel_size: int, hamming: Tensor) -> Tensor:
        return normalize_kernels(logits, kernel_size, self.up_group, _window_or_none(hamming))

    def _add_low_pass(
        self, plus: Tensor, x: Tensor, logits: Tensor, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``plus`` and the low-pass of ``x`` by the kernels of ``logits``; and these if ``keep``."""
        window, kernel_size, groups = (
            _window_or_none(self.hamming_lowpass),
            self.lowpass_kernel,
            self.up_group,
        )
        return add_low_pass(plus, x, logits, kernel_size, groups, window, self.padding_mode, keep)

    def _reassemble(self, x: Tensor, kernels: Tensor, kernel_size: int) -> Tensor:
        return carafe(x, kernels, kernel_size, self.up_group, self.padding_mode)

    def _interpolate(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return resize(x, size, self.upsample_mode, self.align_corners)


class FreqFusion3d(FreqFusion):
    """:class:`FreqFusion` for volumes ``(B, C, D, H, W)``. There is no official form in 3D: this is an extension.

    All formulas are those in 2D with one axis more: kernels of ``k**3`` taps with a separable Hamming window,
    cosines with 26 neighbours two voxels away, trilinear resampling by offsets along three axes, which come from 8
    sub-voxels a coarse voxel, and the same start. Strides may differ by axis (1 x 2 x 2): along one without a stride
    the offsets of the first sub-voxel serve. Parameter names are those in 2D too. The defaults are smaller, for a
    kernel of 5 would have 125 taps.

    Weights that are a 2D module's in the middle slice, with logits of all other taps far below, give the results of
    that module in every slice.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        lowpass_kernel: odd side of the low-pass kernels.
        compressed_channels: channels of the compressed maps.
        options: further arguments of :class:`FreqFusion`; ``upsample_mode="bilinear"`` is trilinear.

    Source: after Chen et al., TPAMI 2024.

    >>> fusion = FreqFusion3d(hr_channels=8, lr_channels=16)
    >>> fused = fusion(hr_feat=torch.rand(1, 8, 5, 9, 11), lr_feat=torch.rand(1, 16, 5, 5, 6))
    >>> tuple(fused.lr_feat.shape)
    (1, 16, 5, 9, 11)
    """

    spatial_dims = 3

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        lowpass_kernel: int = 3,
        compressed_channels: int = 32,
        **options: Any,
    ) -> None:
        options |= {"lowpass_kernel": lowpass_kernel, "compressed_channels": compressed_channels}
        super().__init__(hr_channels, lr_channels, **options)


def _window(kernel_size: int, hamming: bool, dims: int) -> Tensor:
    """Hamming window ``(1, 1, k, k)`` as stored in the official checkpoints, or the ``(1,)`` one of "no window"."""
    if not hamming:
        return torch.ones(1)
    # on the CPU: not every device has doubles
    line = torch.hamming_window(kernel_size, periodic=False, dtype=torch.float64, device="cpu")
    window = line
    for _ in range(dims - 1):
        window = window[..., None] * line
    return window.float()[None, None].to(torch.get_default_device())


def _window_or_none(window: Tensor) -> Tensor | None:
    return window if window.numel() > 1 else None


def _compress(layer: Convolution, x: Tensor) -> Tensor:
    if _nhwc.wanted(x) and _is_plain(layer):
        return _nhwc.compress(layer, x)
    compressed: Tensor = layer(x)
    return compressed


def _convolve(layer: Convolution, x: Tensor, known: list[Sums] | None = None) -> Tensor:
    """``layer(x)``; where sums of ``x`` are at hand then, ``known`` gets them."""
    if _nhwc.wanted(x) and _is_plain(layer):
        out, sums = _nhwc.convolve(x, layer.weight, _bias(layer), layer.dilation[0], known is not None)
        if known is not None and sums is not None:
            known.append((x, sums))
        return out
    convolved: Tensor = layer(x)
    return convolved


def _convolve_both(x: Tensor, first: Convolution, second: Convolution) -> Tensor:
    """Channels of both convolutions of ``x``, which have all but their channels in common, in one pass over it."""
    if not (_is_plain(first) and _is_plain(second)):
        return torch.cat((first(x), second(x)), dim=1)
    weight, bias = torch.cat((first.weight, second.weight)), torch.cat((_bias(first), _bias(second)))
    if _nhwc.wanted(x):
        return _nhwc.convolve(x, weight, bias, first.dilation[0])[0]
    convolve = F.conv2d if x.ndim == 4 else F.conv3d
    return convolve(x, weight, bias, padding=first.padding, dilation=first.dilation)


def _with_similarity(x: Tensor, norm: nn.GroupNorm | None, known: Sequence[Sums]) -> Tensor:
    """``x``, normalised if there is a ``norm``, and its similarities, ``(B, C + 8, H, W)`` or 26 more of a volume."""
    if norm is not None and _is_plain(norm):
        sums = next((sums for of, sums in known if of is x), None)
        joined = normalized_similarity(x, norm.weight, norm.bias, norm.num_groups, norm.eps, sums)
    else:
        x = x if norm is None else norm(x)
        joined = torch.cat((x, local_similarity(x)), dim=1)
    return _nhwc.to_nhwc(joined)


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling it does what its class says: adapters, sharding and hooks want to be called."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) in (nn.Conv2d, nn.Conv3d, nn.GroupNorm) and not (hooks or layer._backward_hooks)


def _bias(layer: Convolution) -> Tensor:
    assert layer.bias is not None
    return layer.bias
