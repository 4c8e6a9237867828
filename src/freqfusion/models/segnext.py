"""SegNeXt (Guo et al., NeurIPS 2022, arXiv 2209.08575), with the head's fusion method chosen by name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from freqfusion.decoders.ham import LightHamHead
from freqfusion.models.base import Segmenter
from freqfusion.models.mscan import MSCAN

HEAD_SIZES: dict[str, tuple[int, int]] = {"t": (256, 16), "s": (256, 16), "b": (512, 64), "l": (1024, 64)}
"""Channels and factorisation rank of each variant's head (SegNeXt's released configurations)."""


class SegNeXt(Segmenter):
    """MSCAN backbone and light Hamburger head; state-dict keys are the authors'.

    Args:
        variant: ``"t"``, ``"s"``, ``"b"`` or ``"l"``.
        num_classes: number of classes K.
        fusion: ``"freqfusion"``, ``"bilinear"`` (the original head) or another fusion method's name.
        compress_ratio: see :class:`~freqfusion.decoders.ham.LightHamHead`.
        feature_resample_group: see :class:`~freqfusion.decoders.ham.LightHamHead`.
        dropout: channel dropout before the classifier.
        fusion_options: further arguments of the fusion method.

    Raises:
        ValueError: for an unknown variant or fusion.
    """

    backbone: MSCAN
    decode_head: LightHamHead

    def __init__(
        self,
        variant: str,
        num_classes: int,
        fusion: str = "freqfusion",
        *,
        compress_ratio: int = 4,
        feature_resample_group: int = 4,
        dropout: float = 0.1,
        fusion_options: Mapping[str, Any] | None = None,
    ) -> None:
        backbone = MSCAN(variant)
        channels, rank = HEAD_SIZES[variant]
        head = LightHamHead(
            backbone.out_channels[1:],
            num_classes,
            channels=channels,
            ham_channels=channels,
            ham_rank=rank,
            fusion=fusion,
            compress_ratio=compress_ratio,
            feature_resample_group=feature_resample_group,
            dropout=dropout,
            fusion_options=fusion_options,
        )
        super().__init__(backbone, head, num_classes)

    def decode(self, image: Tensor) -> Tensor:
        """Class scores at stride 8: ``(B, num_classes, ceil(H / 8), ceil(W / 8))``."""
        return self.decode_head(self.backbone(image)[1:])
