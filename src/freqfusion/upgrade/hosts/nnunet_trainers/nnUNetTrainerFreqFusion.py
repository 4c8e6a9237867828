"""Trainers for nnU-Net v2, which finds this folder by its variable ``nnUNet_extTrainer``."""

from collections.abc import Mapping
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from freqfusion.upgrade import upgrade_


class nnUNetTrainerFreqFusion(nnUNetTrainer):
    """nnU-Net's trainer, with FreqFusion where its decoder brings coarse maps up.

    Plans, loss, deep supervision, schedule and inference are nnU-Net's own, for ``2d``, ``3d_lowres`` and
    ``3d_fullres``, strides that differ by axis included. The network starts with the outputs of the plain one. A
    subclass in a folder of your own changes the attributes, or sets ``num_epochs`` as for nnU-Net's trainer.

    Attributes:
        fusion: The method, as in :func:`freqfusion.upgrade_`; in 3D one of ``list_fusions(spatial_dims=3)``.
        upgrade_options: Further arguments of :func:`freqfusion.upgrade_`.
    """

    fusion: str = "freqfusion"
    upgrade_options: Mapping[str, Any] = {}

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnU-Net's network by the plans, upgraded; for training and for inference."""
        network: nn.Module = super().build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        return upgrade_(network, cls.fusion, **cls.upgrade_options)
