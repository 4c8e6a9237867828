"""Heads on regions of interest: torchvision's, with the pooling, losses and parameters of the published detectors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align

from freqfusion.models.detection.proposals import at_least_single

FINEST_SCALE = 56
"""Regions of less than twice this side, in pixels, are pooled from the finest level."""
MASK_SIDE = 28
"""Side of a predicted mask."""

Features = dict[str, Tensor]


class PyramidRoIAlign(nn.Module):
    """RoIAlign from the level that fits a region's size.

    A region of area ``w h`` is pooled from level ``floor(log2(sqrt(w h) / 56 + 1e-6))``. Sampling points are
    shifted by half a pixel (``aligned``), and there are as many in a bin as it covers pixels. torchvision's
    ``MultiScaleRoIAlign`` does neither.

    Args:
        output_size: side of the result.
        strides: of the levels to pool from, from the finest on, in pixels.

    Source: Lin et al., CVPR 2017, equation 1; He et al., ICCV 2017; mmdetection's ``SingleRoIExtractor``.
    """

    def __init__(self, output_size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = tuple(strides)

    def forward(self, features: Features, boxes: list[Tensor]) -> Tensor:
        """Pool all images' regions.

        Args:
            features: levels ``"0"``, ``"1"``, ... ``(B, C, H_i, W_i)``.
            boxes: ``(N_b, 4)`` of each image, x1 y1 x2 y2 in pixels.

        Returns:
            ``(sum N_b, C, output_size, output_size)``.
        """
        levels = [at_least_single(features[str(i)]) for i in range(len(self.strides))]
        every = torch.cat(boxes).to(levels[0].dtype)
        images = torch.cat([x.new_full((len(x), 1), b) for b, x in enumerate(boxes)]).to(every.dtype)
        sides = ((every[:, 2] - every[:, 0]) * (every[:, 3] - every[:, 1])).sqrt()
        chosen = (sides / FINEST_SCALE + 1e-6).log2().floor().clamp(0, len(levels) - 1)
        pooled = levels[0].new_zeros(len(every), levels[0].shape[1], self.output_size, self.output_size)
        for i, (level, stride) in enumerate(zip(levels, self.strides, strict=True)):
            here = torch.where(chosen == i)[0]
            regions = torch.cat((images[here], every[here]), dim=1)
            aligned = roi_align(level, regions, self.output_size, 1 / stride, aligned=True)
            pooled = pooled.index_put((here,), aligned)
        return pooled


class BoxPredictor(nn.Module):
    """Class scores and box changes of regions, with the parameters of the published detectors.

    They have the background last and no box changes for it. The results are torchvision's: background first.

    Args:
        in_channels: channels of a region's feature.
        num_classes: K, without background.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(in_channels, 4 * num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, in_channels)`` to scores ``(N, K + 1)`` and box changes ``(N, 4 (K + 1))``."""
        scores = at_least_single(self.cls_score(x)).roll(1, dims=1)
        return scores, F.pad(at_least_single(self.bbox_pred(x)), (4, 0))


class MaskPredictor(nn.Sequential):
    """Masks of twice the side, one per class, none for the background.

    Args:
        in_channels: channels of a region's feature.
        num_classes: K.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        upsample = nn.ConvTranspose2d(in_channels, in_channels, 2, stride=2)
        logits = nn.Conv2d(in_channels, num_classes, 1)
        super().__init__(upsample, nn.ReLU(inplace=True), logits)
        for layer in (upsample, logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None  # it has one by default
            nn.init.zeros_(layer.bias)


def create_box_head(channels: int, width: int) -> TwoMLPHead:
    """Two layers of ``width`` on regions ``(N, channels, 7, 7)``."""
    head = TwoMLPHead(channels * 7 * 7, width)
    for layer in (head.fc6, head.fc7):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return head


def create_mask_head(channels: int) -> MaskRCNNHeads:
    """Four 3x3 convolutions on regions ``(N, channels, 14, 14)``."""
    return MaskRCNNHeads(channels, (channels,) * 4, dilation=1)


class ObjectHeads(RoIHeads):
    """torchvision's heads for boxes and, if there is a mask head, masks; matching and sampling are torchvision's.

    Losses are those of the published detectors' mmdetection configurations: cross entropy of the class, L1 of
    the box changes (torchvision: smooth L1), binary cross entropy of the mask, whose truth is pooled with aligned
    sampling points (torchvision: not aligned).
    """

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, or in training losses.

        Args:
            features: the pyramid, finest level first.
            proposals: boxes ``(N, 4)`` of each image, in pixels.
            image_shapes: height and width of each image, without padding.
            targets: in training ``boxes`` ``(G, 4)``, ``labels`` ``(G,)`` from 1 on and, with a mask head,
                ``masks`` ``(G, H, W)``.

        Returns:
            For each image ``boxes``, ``labels``, ``scores`` and, with a mask head, ``masks`` ``(D, 1, 28, 28)``,
            probabilities within the boxes (empty in training); and the losses by name (empty otherwise).
        """
        if self.training:
            return [], self._losses(features, proposals, targets)
        scores, changes = self.classify(features, proposals)
        found = self.postprocess_detections(scores, changes, proposals, image_shapes)
        detections = [
            {"boxes": boxes, "labels": labels, "scores": best}
            for boxes, best, labels in zip(*found, strict=True)
        ]
        if self.has_mask():
            self.add_masks(features, detections)
        return detections, {}

    def classify(self, features: Features, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores ``(N, K + 1)``, background first, and box changes ``(N, 4 (K + 1))`` of all images' regions."""
        scores, changes = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))
        return scores, changes

    def add_masks(self, features: Features, detections: list[dict[str, Tensor]]) -> None:
        """Give detections ``masks`` ``(D, 1, 28, 28)``, that of each one's class."""
        logits = self._mask_logits(
            features, [d["boxes"] for d in detections], [d["labels"] for d in detections]
        )
        for detection, masks in zip(
            detections, logits.sigmoid().split([len(d["boxes"]) for d in detections]), strict=True
        ):
            detection["masks"] = masks[:, None]

    def _mask_logits(self, features: Features, boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
        """``(N, 28, 28)`` of all images' boxes, for the classes ``labels`` from 1 on."""
        logits = at_least_single(self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))))
        every = torch.cat(labels) - 1
        return logits[torch.arange(len(every), device=every.device), every]

    def _losses(
        self, features: Features, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> dict[str, Tensor]:
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        assert targets is not None  # select_training_samples has checked it
        scores, changes = self.classify(features, proposals)
        truth = torch.cat(labels)
        positive = truth > 0
        own = changes.unflatten(1, (-1, 4))[positive, truth[positive]]
        box_loss = F.l1_loss(own, torch.cat(wanted)[positive], reduction="sum") / max(1, len(truth))
        losses = {"loss_classifier": F.cross_entropy(scores, truth), "loss_box_reg": box_loss}
        if self.has_mask():
            inside = [label > 0 for label in labels]
            boxes = [box[i] for box, i in zip(proposals, inside, strict=True)]
            logits = self._mask_logits(
                features, boxes, [label[i] for label, i in zip(labels, inside, strict=True)]
            )
            masks = torch.cat(
                [
                    _pooled_masks(target["masks"], box, which[i], logits.dtype)
                    for target, box, which, i in zip(targets, boxes, matched, inside, strict=True)
                ]
            )
            loss = F.binary_cross_entropy_with_logits(logits, masks, reduction="sum")
            losses["loss_mask"] = loss / max(1, masks.numel())
        return losses


def _pooled_masks(masks: Tensor, boxes: Tensor, which: Tensor, dtype: torch.dtype) -> Tensor:
    """What the masks ``masks[which]`` ``(H, W)`` show within boxes: ``(N, 28, 28)`` of 0 and 1."""
    regions = torch.cat((which[:, None].to(boxes), boxes), dim=1)
    pooled = roi_align(masks[:, None].to(boxes.dtype), regions, MASK_SIDE, aligned=True)
    return (pooled[:, 0] >= 0.5).to(dtype)
