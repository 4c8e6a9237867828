"""Faster R-CNN and Mask R-CNN as published with FreqFusion, built from torchvision's parts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from freqfusion.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from freqfusion.models.detection.backbone import PyramidBackbone
from freqfusion.models.detection.contract import Detector
from freqfusion.models.detection.heads import (
    BoxPredictor,
    MaskPredictor,
    ObjectHeads,
    PyramidRoIAlign,
    create_box_head,
    create_mask_head,
)
from freqfusion.models.detection.proposals import Anchors, ProposalHead, ProposalNetwork
from freqfusion.models.inference import fitting_size
from freqfusion.ops._sampling import grid_sample

STRIDES = (4, 8, 16, 32, 64)
"""Strides of the pyramid's levels; regions of interest are pooled from all but the last."""
MASK_THRESHOLD = 0.5


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of boxes as masks of the image, sampled bilinearly at the pixels' centres.

    torchvision rounds the boxes to whole pixels first.

    Args:
        masks: probabilities ``(N, 1, m, m)`` within the boxes.
        boxes: ``(N, 4)``, x1 y1 x2 y2 in pixels.
        size: height and width of the image.

    Returns:
        ``(N, 1, H, W)`` bool, where the probability is at least one half.
    """
    height, width = size
    pasted = torch.zeros(len(masks), 1, height, width, dtype=torch.bool, device=masks.device)
    # one pixel around a box, where the masks fade out; the rest of the image is empty
    corners = torch.cat((boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1), dim=1).long().tolist()
    for i, (left, top, right, bottom) in enumerate(corners):
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if right <= left or bottom <= top:
            continue
        x1, y1, x2, y2 = boxes[i]
        x = (torch.arange(left, right, device=boxes.device) + 0.5 - x1) / (x2 - x1).clamp_min(1e-6) * 2 - 1
        y = (torch.arange(top, bottom, device=boxes.device) + 0.5 - y1) / (y2 - y1).clamp_min(1e-6) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].to(masks.dtype)
        probability = grid_sample(masks[i : i + 1], grid)
        pasted[i, :, top:bottom, left:right] = probability[0] >= MASK_THRESHOLD
    return pasted


class DetectionTransform(GeneralizedRCNNTransform):
    """torchvision's normalisation, resizing and padding, with the arithmetic of the published detectors.

    Sizes are rounded to the nearest pixel, see
    :func:`~freqfusion.models.inference.fitting_size`, and masks pasted as :func:`paste_masks` does.
    In training the shorter side is drawn from ``min_size``, at test time it is the last of them; with
    ``_skip_resize`` training images are taken as they are.
    """

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image ``(3, H, W)`` with its target's boxes, masks and semantic labels."""
        if self.training and self._skip_resize:
            return image, target
        height, width = image.shape[-2:]
        min_size = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        size = fitting_size(height, width, min_size, self.max_size)
        image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        if target is None:
            return image, target
        target = {**target, "boxes": resize_boxes(target["boxes"], [height, width], list(size))}
        for name in ("masks", "semantic"):
            if name in target:
                labels = target[name]
                labels = labels[None] if labels.ndim == 2 else labels
                resized = F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0]
                target[name] = resized.to(labels.dtype).view(*target[name].shape[:-2], *size)
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Boxes and masks in the pixels of the images as they came."""
        if self.training:  # there are none
            return result
        for detection, shape, size in zip(result, image_shapes, original_image_sizes, strict=True):
            detection["boxes"] = resize_boxes(detection["boxes"], list(shape), list(size))
            if "masks" in detection:
                detection["masks"] = paste_masks(detection["masks"], detection["boxes"], size)
        return result


class RCNN(GeneralizedRCNN, Detector):
    """Faster R-CNN or, with masks, Mask R-CNN on a feature pyramid; called as torchvision's are.

    What differs from torchvision's models of these names, because the published ones have it so: anchors that
    are not rounded, L1 losses of boxes, RoIAlign with aligned and adaptive sampling points, no box changes and mask
    for the background, sizes rounded to the nearest pixel, masks pasted without rounding their boxes.

    In training ``model(images, targets)`` returns losses by name; in evaluation ``model(images)`` returns a dict
    for each image: ``boxes`` ``(D, 4)`` x1 y1 x2 y2 in its pixels, ``labels`` ``(D,)`` from 1 to ``num_classes``,
    ``scores`` ``(D,)`` and, for Mask R-CNN, ``masks`` ``(D, 1, H, W)`` bool. Images are ``(3, H, W)``, RGB in [0, 1],
    of any sizes; targets are dicts of ``boxes``, ``labels`` and, for Mask R-CNN, ``masks`` ``(G, H, W)``.

    Args:
        backbone: encoder and pyramid with levels at the strides 4, 8, 16, 32 and 64.
        num_classes: K, without background.
        masks: predict masks too.
        min_size: side in pixels to which the shorter side of an image is resized, or several, of which training
            draws one and evaluation takes the last.
        max_size: limit of the longer side.
        size_divisible: images are padded so that their sides are multiples of it.
        head_channels: width of the fully connected layers on regions.
        rpn_pre_nms_top_n: proposals of a level before non-maximum suppression, in training and in evaluation.
        rpn_post_nms_top_n: proposals of an image after it.
        rpn_batch_size_per_image: anchors sampled for the loss.
        box_batch_size_per_image: regions sampled for the loss, a quarter of them positive at most.
        box_score_thresh: least score of a detection.
        box_nms_thresh: IoU above which the lesser of two detections of one class is dropped.
        box_detections_per_img: the most detections of an image.

    Source: Ren et al., NeurIPS 2015; He et al., "Mask R-CNN", ICCV 2017; settings of the configurations
    ``faster_rcnn_r50_fpn`` and ``mask_rcnn_r50_fpn`` of mmdetection 2.28, on which the FreqFusion release builds.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        *,
        masks: bool = False,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        size_divisible: int = 32,
        head_channels: int = 1024,
        rpn_pre_nms_top_n: tuple[int, int] = (2000, 1000),
        rpn_post_nms_top_n: tuple[int, int] = (1000, 1000),
        rpn_batch_size_per_image: int = 256,
        box_batch_size_per_image: int = 512,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = 100,
    ) -> None:
        channels = backbone.out_channels

        def by_phase(numbers: tuple[int, int]) -> dict[str, int]:
            return dict(zip(("training", "testing"), numbers, strict=True))

        anchors = Anchors(STRIDES)
        rpn = ProposalNetwork(
            anchors,
            ProposalHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=rpn_batch_size_per_image,
            positive_fraction=0.5,
            pre_nms_top_n=by_phase(rpn_pre_nms_top_n),
            post_nms_top_n=by_phase(rpn_post_nms_top_n),
            nms_thresh=0.7,
        )
        mask_parts: dict[str, Any] = {}
        if masks:
            mask_parts = {
                "mask_roi_pool": PyramidRoIAlign(14, STRIDES[:-1]),
                "mask_head": create_mask_head(channels),
                "mask_predictor": MaskPredictor(channels, num_classes),
            }
        heads = ObjectHeads(
            PyramidRoIAlign(7, STRIDES[:-1]),
            create_box_head(channels, head_channels),
            BoxPredictor(head_channels, num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=box_batch_size_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=box_score_thresh,
            nms_thresh=box_nms_thresh,
            detections_per_img=box_detections_per_img,
            **mask_parts,
        )
        transform = DetectionTransform(
            min_size, max_size, list(IMAGENET_MEAN), list(IMAGENET_STD), size_divisible=size_divisible
        )
        super().__init__(backbone, rpn, heads, transform)
        self.num_classes = num_classes
        self.things = [True] * num_classes
        self.finds = "instances" if masks else "boxes"
