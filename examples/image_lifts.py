"""Two ways of lifting tokens that are popular for frozen features, as fusion methods to compare with FreqFusion.

    freqfusion fit --import examples/image_lifts.py --config camvid/vit_freqfusion --model.fusion attention_lift ...

``attention_lift``: as in NAF, a fine pixel attends to the coarse pixels around it; its query comes from the fine map,
keys are means of the queries. ``bilateral_lift``: weights fall with the distance in space and between fine maps.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

import freqfusion
from freqfusion.features import JointBilateralFeatures
from freqfusion.ops import carafe, normalize_kernels, window_similarity

KERNEL_SIZE = 5


class AttentionLift(freqfusion.Fusion):
    def __init__(self, hr_channels: int, lr_channels: int) -> None:
        super().__init__(hr_channels, lr_channels)
        self.query = nn.Conv2d(hr_channels, hr_channels, 1)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> freqfusion.FusedFeatures:
        query = self.query(hr_feat)
        key = F.adaptive_avg_pool2d(query, lr_feat.shape[-2:]) / math.sqrt(query.shape[1])
        kernels = normalize_kernels(window_similarity(query, key, KERNEL_SIZE, "reflect"), KERNEL_SIZE)
        lifted = carafe(lr_feat, kernels, KERNEL_SIZE, padding_mode="reflect")
        return freqfusion.FusedFeatures(kernels, hr_feat, lifted)


class BilateralLift(freqfusion.Fusion):
    def __init__(self, hr_channels: int, lr_channels: int) -> None:
        super().__init__(hr_channels, lr_channels)
        self.filter = JointBilateralFeatures(sigma_range=0.5, radius=KERNEL_SIZE // 2)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> freqfusion.FusedFeatures:
        coarse, fine = lr_feat.shape[-2:], hr_feat.shape[-2:]
        guide = F.normalize(hr_feat, dim=1)  # squared distances are 0 to 4
        kernels = self.filter.kernels(guide, (coarse[0], coarse[1]), (fine[0], fine[1])).to(hr_feat.dtype)
        return freqfusion.FusedFeatures(kernels, hr_feat, carafe(lr_feat, kernels, KERNEL_SIZE))


freqfusion.register_fusion("attention_lift", AttentionLift, guided=True)
freqfusion.register_fusion("bilateral_lift", BilateralLift, guided=True)
