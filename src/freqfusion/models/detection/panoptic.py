"""Panoptic FPN: Mask R-CNN with a semantic branch, and the heuristic merge of both."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image, nms

from freqfusion.models.detection.backbone import PyramidBackbone
from freqfusion.models.detection.heads import Features
from freqfusion.models.detection.proposals import at_least_single
from freqfusion.models.detection.rcnn import RCNN
from freqfusion.ops._constants import Constants

IGNORE_INDEX = 255
OUTPUT_STRIDE = 4
SEMANTIC_LOSS_WEIGHT = 0.5
NO_STUFF = -1


class SemanticBranch(nn.Module):
    """Class scores from a pyramid: convolutions upsample every level to the finest, then all are summed.

    The level of stride ``4 * 2**i`` goes through ``max(i, 1)`` 3x3 convolutions with group norm and ReLU, each (but
    the finest level's) followed by bilinear upsampling to the next finer level.

    Args:
        in_channels: channels of the pyramid.
        channels: channels within the branch, a multiple of 32.
        num_classes: number of scores.
        levels: how many of the finest levels are used.

    Source: Kirillov et al., "Panoptic feature pyramid networks", CVPR 2019, figure 3.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, levels: int = 4) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level in range(levels):
            widths = [in_channels] + [channels] * max(level, 1)
            self.levels.append(
                nn.ModuleList(
                    nn.Sequential(
                        nn.Conv2d(before, after, 3, padding=1, bias=False),
                        nn.GroupNorm(32, after),
                        nn.ReLU(inplace=True),
                    )
                    for before, after in pairwise(widths)
                )
            )
        self.logits = nn.Conv2d(channels, num_classes, 1)
        for module in self.levels.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.normal_(self.logits.weight, std=0.01)
        assert self.logits.bias is not None
        nn.init.zeros_(self.logits.bias)

    def forward(self, features: Features) -> Tensor:
        """Levels ``"0"``, ``"1"``, ... ``(B, in_channels, H_i, W_i)`` to scores ``(B, num_classes, H_0, W_0)``."""
        sizes = [features[str(i)].shape[-2:] for i in range(len(self.levels))]
        total: Tensor | None = None
        for level, blocks in enumerate(self.levels):
            x = features[str(level)]
            assert isinstance(blocks, nn.ModuleList)
            for step, block in enumerate(blocks):
                x = block(x)
                if level:
                    x = F.interpolate(x, size=sizes[level - 1 - step], mode="bilinear", align_corners=False)
            total = x if total is None else total + x
        return self.logits(total)


def merge_panoptic(
    masks: Tensor,
    labels: Tensor,
    scores: Tensor,
    semantic: Tensor,
    *,
    overlap: float = 0.5,
    stuff_area: int = 4096,
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-overlapping segments from instances and a semantic map: instances first, by score, then stuff.

    An instance of whose mask more than ``overlap`` is taken by better ones is dropped; else it gets what is left.
    Stuff fills the pixels that no instance has; a class of fewer than ``stuff_area`` pixels becomes void.

    Args:
        masks: ``(D, H, W)`` bool.
        labels: ``(D,)``.
        scores: ``(D,)``.
        semantic: ``(H, W)`` class of every pixel in the same numbering as ``labels``; -1 is none.
        overlap: share of a mask.
        stuff_area: in pixels.

    Returns:
        ``(H, W)`` int64 with 0 for void and j for the j-th segment; the segments' labels ``(S,)`` int64; and their
        scores ``(S,)``, 1 for stuff.

    Source: Kirillov et al., "Panoptic segmentation", CVPR 2019, section 7; thresholds of mmdetection's
    ``HeuristicFusionHead`` as configured for Panoptic FPN.
    """
    segments = torch.zeros_like(semantic)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        mask = masks[i]
        free = mask & (segments == 0)
        area, left = int(mask.sum()), int(free.sum())
        if area == 0 or area - left > overlap * area or left == 0:
            continue
        kept.append(i)
        segments[free] = len(kept)
    stuff = torch.where(segments == 0, semantic, NO_STUFF)
    found, areas = stuff[stuff >= 0].unique(return_counts=True)
    found = found[areas >= stuff_area]
    for j, label in enumerate(found.tolist()):
        segments[stuff == label] = len(kept) + j + 1
    return segments, torch.cat((labels[kept], found)), torch.cat((scores[kept], scores.new_ones(len(found))))


class PanopticFPN(Constants, RCNN):
    """Mask R-CNN for the things, a semantic branch for the stuff, and their merge.

    Called as :class:`RCNN`, with labels from 1 to K in the numbering of all classes, of which targets' boxes and
    detections have things only. Targets have ``semantic`` ``(H, W)`` too: class indices from 0, 255 where there is no
    truth. Results have, beside the detections, ``segments`` ``(H, W)`` int64 (0 is void, j the j-th segment),
    ``segment_labels`` ``(S,)`` from 0 to K - 1 and ``segment_scores`` ``(S,)``, 1 for stuff.

    Args:
        backbone: see :class:`RCNN`.
        things: for each of the K classes whether it is a thing.
        semantic_channels: channels within the semantic branch.
        panoptic_score_thresh: least score of an instance to be merged, at least 0.5.
        panoptic_stuff_area: fewer pixels than these of a stuff class become void; made for images of COCO's size.
        **options: of :class:`RCNN`.

    Raises:
        ValueError: if all classes are things or none is.

    Source: Kirillov et al., "Panoptic feature pyramid networks", CVPR 2019; configuration ``panoptic_fpn_r50_fpn_1x``
    of mmdetection 2.28: the semantic branch has one class for all things, its loss counts half, and the instances
    merged have scores of 0.6 at least and overlap by an IoU of 0.5 at most, whatever their classes.
    """

    thing_labels: Tensor
    stuff_labels: Tensor
    thing_numbers: Tensor
    semantic_numbers: Tensor

    def __init__(
        self,
        backbone: PyramidBackbone,
        things: Sequence[bool],
        *,
        semantic_channels: int = 128,
        panoptic_score_thresh: float = 0.6,
        panoptic_stuff_area: int = 4096,
        **options: Any,
    ) -> None:
        thing_labels = [label for label, thing in enumerate(things) if thing]
        stuff_labels = [label for label, thing in enumerate(things) if not thing]
        if not thing_labels or not stuff_labels:
            raise ValueError(
                f"panoptic segmentation needs things and stuff, got {len(thing_labels)} things among "
                f"{len(things)} classes; use Mask R-CNN or a semantic network"
            )
        if len(things) > IGNORE_INDEX:
            raise ValueError(f"got {len(things)} classes, at most {IGNORE_INDEX} fit a map of 8 bits")
        super().__init__(backbone, len(thing_labels), masks=True, **options)
        self.num_classes = len(things)
        self.things = [bool(thing) for thing in things]
        self.finds = "segments"
        branches = len(stuff_labels) + 1
        self.semantic_branch = SemanticBranch(backbone.out_channels, semantic_channels, branches)
        if not 0.5 <= panoptic_score_thresh <= 1:  # below one half a region may have several classes
            raise ValueError(f"panoptic_score_thresh must be from 0.5 to 1, got {panoptic_score_thresh}")
        self.panoptic_score_thresh = panoptic_score_thresh
        self.panoptic_stuff_area = panoptic_stuff_area
        # between the numbering of all classes and those of the two branches
        numbers = dict.fromkeys(range(IGNORE_INDEX + 1), IGNORE_INDEX)
        numbers |= dict.fromkeys(thing_labels, len(stuff_labels))
        numbers |= {label: number for number, label in enumerate(stuff_labels)}
        for name, table in (
            ("thing_labels", thing_labels),
            ("stuff_labels", [*stuff_labels, NO_STUFF]),
            (
                "thing_numbers",
                [thing_labels.index(x) if x in thing_labels else -1 for x in range(len(things))],
            ),
            ("semantic_numbers", [numbers[label] for label in range(IGNORE_INDEX + 1)]),
        ):
            self.register_constant(name, torch.tensor(table, device="cpu"))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses by name in training, else a dict for each image; see the class."""
        if self.training and targets is None:
            raise ValueError("a panoptic network in training mode needs targets; call eval() to predict")
        sizes = [(x.shape[-2], x.shape[-1]) for x in images]
        if targets is not None:
            targets = [self._objects(target) for target in targets]
        batch, targets = self.transform(images, targets)
        features: Features = self.backbone(batch.tensors)
        scores = at_least_single(self.semantic_branch(features))
        if self.training and targets is not None:
            return self._losses(batch, features, scores, targets)
        proposals, _ = self.rpn(batch, features)
        detections, _ = self.roi_heads(features, proposals, batch.image_sizes)
        chosen = self._instances(features, proposals, batch.image_sizes)
        detections = self.transform.postprocess(detections, batch.image_sizes, sizes)
        chosen = self.transform.postprocess(chosen, batch.image_sizes, sizes)
        scores = F.interpolate(scores, size=batch.tensors.shape[-2:], mode="bilinear", align_corners=False)
        for detection, instances, score, shape, size in zip(
            detections, chosen, scores, batch.image_sizes, sizes, strict=True
        ):
            score = score[None, :, : shape[0], : shape[1]]
            score = F.interpolate(score, size=size, mode="bilinear", align_corners=False)[0]
            segments, labels, best = merge_panoptic(
                instances["masks"][:, 0],
                self.thing_labels[instances["labels"] - 1],
                instances["scores"],
                self.stuff_labels[score.argmax(0)],
                stuff_area=self.panoptic_stuff_area,
            )
            detection |= {"segments": segments, "segment_labels": labels, "segment_scores": best}
            detection["labels"] = self.thing_labels[detection["labels"] - 1] + 1
        return detections

    def _losses(
        self, batch: ImageList, features: Features, scores: Tensor, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        proposals, losses = self.rpn(batch, features, targets)
        losses |= self.roi_heads(features, proposals, batch.image_sizes, targets)[1]
        height, width = batch.tensors.shape[-2:]
        truth = torch.stack(
            [
                F.pad(x, (0, width - x.shape[1], 0, height - x.shape[0]), value=IGNORE_INDEX)
                for x in (target["semantic"].long() for target in targets)
            ]
        )
        truth = self.semantic_numbers[truth[:, ::OUTPUT_STRIDE, ::OUTPUT_STRIDE]]
        # averaged over all pixels, those without truth too, as mmdetection does
        total = F.cross_entropy(scores, truth, ignore_index=IGNORE_INDEX, reduction="sum")
        losses["loss_semantic"] = SEMANTIC_LOSS_WEIGHT * total / truth.numel()
        return losses

    def _objects(self, target: dict[str, Tensor]) -> dict[str, Tensor]:
        """The target in the numbering of the box heads, checked; torchvision's checks are in its ``forward``."""
        boxes, labels = target["boxes"], target["labels"]
        flat = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
        if flat.any():
            raise ValueError(
                f"boxes must be x1 y1 x2 y2 with x1 < x2 and y1 < y2, got {boxes[flat][0].tolist()}"
            )
        known = (labels >= 1) & (labels <= self.num_classes)
        numbers = self.thing_numbers[labels.clamp(1, self.num_classes) - 1]
        wrong = labels[~known | (numbers < 0)]
        if len(wrong):
            raise ValueError(
                f"labels of objects must be those of things, from 1 to {self.num_classes}, got {wrong.tolist()}; "
                "stuff is in the semantic map alone"
            )
        return {**target, "labels": numbers + 1}

    def _instances(
        self, features: Features, proposals: list[Tensor], shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections to be merged, with masks: non-maximum suppression is over all classes together."""
        heads = self.roi_heads
        scores, changes = heads.classify(features, proposals)
        # torchvision leaves the boxes of no proposals flat: there are none where weights turned NaN
        boxes = heads.box_coder.decode(changes, proposals).reshape(*scores.shape, 4)
        probabilities = scores.softmax(-1)
        counts = [len(x) for x in proposals]
        instances = []
        for box, probability, shape in zip(
            boxes.split(counts), probabilities.split(counts), shapes, strict=True
        ):
            best, label = probability[:, 1:].max(1)  # above one half a region has a single class
            label = label + 1
            sure = best > self.panoptic_score_thresh
            best, label = best[sure], label[sure]
            own = clip_boxes_to_image(box[sure, label], shape)
            keep = nms(own, best, heads.nms_thresh)[: heads.detections_per_img]
            instances.append({"boxes": own[keep], "labels": label[keep], "scores": best[keep]})
        heads.add_masks(features, instances)
        return instances
