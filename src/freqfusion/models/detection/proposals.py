"""The region proposal network: torchvision's, with the anchors and the loss of the published detectors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

SCALE = 8
"""Side of a square anchor in strides of its level."""
RATIOS = (0.5, 1.0, 2.0)
"""Heights relative to widths; the area does not change."""


def at_least_single(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where it is more precise: boxes of a thousand pixels need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Anchors(AnchorGenerator):
    """Anchors around the pixels of the pyramid's levels, at the levels' nominal strides and not rounded.

    torchvision rounds the anchors to whole pixels and takes the quotient of image and map size for the stride.

    Args:
        strides: of the levels, in pixels.
    """

    def __init__(self, strides: Sequence[int]) -> None:
        self.strides = tuple(strides)
        super().__init__(tuple((SCALE * stride,) for stride in strides), (RATIOS,) * len(strides))

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # torchvision's signature
    ) -> Tensor:
        """Boxes ``(A, 4)`` around the origin, one per ratio."""
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt() * scales[0]
        widths = scales[0] ** 2 / heights
        return torch.stack((-widths, -heights, widths, heights), dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of every image, ``(N, 4)`` each, in pixels of the padded image."""
        like = at_least_single(feature_maps[0][:0])
        self.set_cell_anchors(like.dtype, like.device)
        sizes = [list(x.shape[-2:]) for x in feature_maps]
        steps = [[torch.tensor(stride, device=like.device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(sizes, steps))
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's head; its scores and box changes leave autocast's half precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores ``(B, A, H_i, W_i)`` and box changes ``(B, 4 A, H_i, W_i)`` of every level."""
        scores, changes = super().forward(x)
        return [at_least_single(s) for s in scores], [at_least_single(c) for c in changes]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's network, with the absolute error of the box changes as its loss.

    torchvision has a smooth L1 loss there; the published detectors' mmdetection configurations have L1.
    """

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy of sampled anchors, and L1 of the positive ones' changes over the number of sampled ones."""
        masks = [torch.cat(part).bool() for part in self.fg_bg_sampler(labels)]
        positive, sampled = masks[0], masks[0] | masks[1]
        truth = torch.cat(labels)
        changes = torch.cat(regression_targets)
        loss_objectness = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], truth[sampled])
        loss_boxes = F.l1_loss(pred_bbox_deltas[positive], changes[positive], reduction="sum")
        return loss_objectness, loss_boxes / sampled.sum().clamp_min(1)
