"""Panoptic quality over a whole set, with void and crowd regions as the benchmark treats them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _check_segments(name: str, segments: Tensor, labels: Tensor, num_classes: int) -> None:
    for what, values, shape in (("segments", segments, ("H", "W")), ("labels", labels, ("N",))):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name}_{what} must have an integer dtype, got {values.dtype}")
        if values.ndim != len(shape):
            raise ValueError(
                f"{name}_{what} must have the shape ({', '.join(shape)}), got {tuple(values.shape)}"
            )
    strange = segments[(segments < 0) | (segments > len(labels))]
    if strange.numel():
        raise ValueError(
            f"{name}_segments holds the values {strange.unique().tolist()[:10]}, expected 0 (void) or the place, "
            f"from 1, of a segment among the {len(labels)} of {name}_labels; number the segments from 1 without gaps"
        )
    strange = labels[(labels < 0) | (labels >= num_classes)]
    if strange.numel():
        raise ValueError(
            f"{name}_labels holds the labels {strange.unique().tolist()[:10]}, expected 0..{num_classes - 1}; "
            "set num_classes to that of the data"
        )


def panoptic_counts(
    pred_segments: Tensor,
    pred_labels: Tensor,
    target_segments: Tensor,
    target_labels: Tensor,
    target_iscrowd: Tensor,
    num_classes: int,
) -> Tensor:
    """Match the segments of one image and count by class.

    A predicted and a true segment of one class match if their IoU is above 0.5, so that no segment has two matches
    (Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4.1). As in the benchmark's evaluator
    (github.com/cocodataset/panopticapi, evaluation.py):

    - pixels that are void in the truth are taken out of the predicted segment before its IoU is formed;
      pixels that are void in the prediction are not taken out of the true one;
    - a crowd of the truth is never matched and never missed;
    - an unmatched prediction of which more than half lies in void and the crowd of its own class is no false
      positive. Where an image has several crowds of a class, this is the last of them;
    - a true segment without a pixel is a miss; a predicted one is left out.

    ``torchmetrics.detection.PanopticQuality`` differs: it knows no crowd, and it takes pixels that the prediction
    leaves void out of the true segment and forgives the misses that they make.

    Args:
        pred_segments: ``(H, W)``, integers: j for the j-th predicted segment, from 1; 0 for void.
        pred_labels: ``(P,)``, integers: the class of each predicted segment, in ``0..K-1``.
        target_segments: ``(H, W)``, integers: the segments of the truth, from 1; 0 for void.
        target_labels: ``(T,)``, integers: the class of each true segment.
        target_iscrowd: ``(T,)`` bool: true segments that stand for a group.
        num_classes: K.

    Returns:
        ``(K, 4)`` float64, on the CPU: sum of the matches' IoU, matches (TP), false positives (FP), misses (FN).

    Raises:
        TypeError: for maps or labels that are no integers, or ``target_iscrowd`` that is not bool.
        ValueError: for wrong shapes, segments without a label, or labels that are no class.

    Example:
        >>> target = torch.tensor([[1, 1, 1, 1, 2, 2]])
        >>> pred = torch.tensor([[1, 1, 1, 0, 2, 2]])
        >>> crowd = torch.tensor([False, False])
        >>> panoptic_counts(pred, torch.tensor([0, 0]), target, torch.tensor([0, 1]), crowd, 2).tolist()
        [[0.75, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """
    _check_segments("pred", pred_segments, pred_labels, num_classes)
    _check_segments("target", target_segments, target_labels, num_classes)
    if pred_segments.shape != target_segments.shape:
        raise ValueError(
            f"pred_segments has the shape {tuple(pred_segments.shape)} and target_segments "
            f"{tuple(target_segments.shape)}; bring the prediction to the size of the truth first"
        )
    if target_iscrowd.dtype != torch.bool:
        raise TypeError(f"target_iscrowd must be bool, got {target_iscrowd.dtype}")
    if target_iscrowd.shape != target_labels.shape:
        raise ValueError(
            f"target_iscrowd needs one entry for each of the {len(target_labels)} true segments, got the shape "
            f"{tuple(target_iscrowd.shape)}"
        )
    rows, columns = len(target_labels) + 1, len(pred_labels) + 1
    cells = target_segments.long() * columns + pred_segments.long()
    # few numbers from here on; not every device has float64
    pixels = torch.bincount(cells.flatten(), minlength=rows * columns).view(rows, columns).cpu().double()
    pred_labels, target_labels = pred_labels.long().cpu(), target_labels.long().cpu()
    crowd = target_iscrowd.cpu()

    both, void, pred_area = pixels[1:, 1:], pixels[0, 1:], pixels.sum(0)[1:]
    iou = both / (pixels.sum(1)[1:, None] + pred_area - void - both)
    match = (iou > 0.5) & (target_labels[:, None] == pred_labels) & ~crowd[:, None]

    crowd_of_class = torch.zeros(num_classes, dtype=torch.int64)  # its row in ``pixels``; 0, void, for none
    crowd_of_class.scatter_reduce_(0, target_labels[crowd], crowd.nonzero()[:, 0] + 1, "amax")
    row = crowd_of_class[pred_labels]
    ignored = void + torch.where(row > 0, pixels[row, torch.arange(1, columns)], 0)
    false_positive = ~match.any(0) & (pred_area > 0) & (ignored <= 0.5 * pred_area)
    missed = ~match.any(1) & ~crowd

    def by_class(labels: Tensor, weights: Tensor) -> Tensor:
        counts = torch.bincount(labels, weights.double(), minlength=num_classes)
        return counts.double()  # of nothing, bincount forgets the weights' dtype

    return torch.stack(
        [
            by_class(target_labels, torch.where(match, iou, 0).sum(1)),
            by_class(target_labels, match.any(1)),
            by_class(pred_labels, false_positive),
            by_class(target_labels, missed),
        ],
        dim=1,
    )


def score_panoptic(counts: Tensor, is_thing: Sequence[bool]) -> dict[str, Tensor]:
    """Turn summed counts into panoptic quality.

    ``PQ = sum IoU / (TP + FP / 2 + FN / 2)``, which is the product of segmentation quality ``SQ = sum IoU / TP``
    and recognition quality ``RQ = TP / (TP + FP / 2 + FN / 2)`` (Kirillov et al., CVPR 2019, equations 1 and 2),
    by class; the mean over the classes is the score.

    Args:
        counts: ``(K, 4)`` of :func:`panoptic_counts`, summed over the set.
        is_thing: for each of the K classes whether it has instances; else it is stuff.

    Returns:
        ``pq``, ``sq``, ``rq`` over all classes, the same with ``_things`` and ``_stuff`` over these (scalars in
        [0, 1], dtype of ``counts``), and with ``_per_class`` ``(K,)``. A class with no TP, FP or FN is NaN and left
        out of the means; with no class at all a mean is NaN. SQ without a match is 0, as in the benchmark.

    Raises:
        ValueError: if ``counts`` does not have one row per class.
    """
    if counts.shape != (len(is_thing), 4):
        raise ValueError(
            f"counts must have the shape ({len(is_thing)}, 4), a row for each entry of is_thing, got "
            f"{tuple(counts.shape)}"
        )
    iou, true_positive, false_positive, missed = counts.unbind(1)
    whole = true_positive + (false_positive + missed) / 2
    pq = iou / whole  # 0 / 0 is the NaN of an absent class
    rq = true_positive / whole
    sq = torch.where(true_positive > 0, iou / true_positive, torch.where(whole > 0, 0.0, torch.nan))
    things = torch.tensor(is_thing, dtype=torch.bool, device=counts.device)
    scores = {}
    for suffix, chosen in (("", torch.ones_like(things)), ("_things", things), ("_stuff", ~things)):
        for name, values in (("pq", pq), ("sq", sq), ("rq", rq)):
            scores[name + suffix] = values[chosen].nanmean()
    return scores | {"pq_per_class": pq, "sq_per_class": sq, "rq_per_class": rq}
