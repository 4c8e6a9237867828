"""Counts and scores of label maps as plain functions of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_labels(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse label maps that cannot be scored.

    Raises:
        TypeError: for floating-point maps.
        ValueError: for other than three dimensions, different shapes or a truth label that is no class.
    """
    for name, labels in (("pred", pred), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(
                f"{name} must hold class indices (an integer dtype), got {labels.dtype}; use argmax(1)"
            )
        if labels.ndim != 3:
            raise ValueError(f"{name} must have the shape (B, H, W), got {tuple(labels.shape)}")
    if pred.shape != target.shape:
        raise ValueError(
            f"pred has the shape {tuple(pred.shape)} and target {tuple(target.shape)}; "
            "resize the prediction to the size of the truth first"
        )
    strange = target[(target != ignore_index) & ((target < 0) | (target >= num_classes))]
    if strange.numel():
        raise ValueError(
            f"target holds the labels {strange.unique().tolist()[:10]}, expected 0..{num_classes - 1} or "
            f"{ignore_index} (ignored); set num_classes or ignore_index to those of the data"
        )


def confusion_counts(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels by true and predicted class.

    Args:
        pred: ``(B, H, W)``, integers. A value outside ``0..K-1`` is a miss of the true class and a false
            alarm of none.
        target: ``(B, H, W)``, integers in ``0..K-1`` or ``ignore_index``; ignored pixels are left out.
        num_classes: K.
        ignore_index: the label of pixels without truth.

    Returns:
        ``(K, K + 1)`` int64; rows are the truth, and the last column counts predictions outside ``0..K-1``.

    Raises:
        TypeError: for floating-point maps.
        ValueError: for wrong shapes or a truth label that is no class.

    Example:
        >>> pred, target = torch.tensor([[[0, 0, 1, 7]]]), torch.tensor([[[0, 1, 1, 1]]])
        >>> confusion_counts(pred, target, num_classes=2).tolist()
        [[1, 0, 0], [1, 1, 1]]
    """
    check_labels(pred, target, num_classes, ignore_index)
    kept = target != ignore_index
    true, guess = target[kept].long(), pred[kept].long()
    guess = guess.where((guess >= 0) & (guess < num_classes), num_classes)
    cells = torch.bincount(true * (num_classes + 1) + guess, minlength=num_classes * (num_classes + 1))
    return cells.view(num_classes, num_classes + 1)


def boundary_width_in_pixels(boundary_width: int | float, height: int, width: int) -> int:
    """Resolve a boundary width for images of one size.

    An int is pixels, a float the share of the image diagonal, rounded to the nearest pixel (halves to even)
    and at least 1, as in the published code of Cheng et al., CVPR 2021.

    Raises:
        ValueError: for an int below 1 or a float outside (0, 1).

    Example:
        >>> boundary_width_in_pixels(0.02, 360, 480), boundary_width_in_pixels(3, 360, 480)
        (12, 3)
    """
    if isinstance(boundary_width, int):
        if boundary_width < 1:
            raise ValueError(f"boundary_width must be at least 1 pixel, got {boundary_width}")
        return boundary_width
    if not 0 < boundary_width < 1:
        raise ValueError(
            f"boundary_width as a float is a share of the image diagonal in (0, 1), got {boundary_width}; "
            "give an int for pixels"
        )
    return max(1, round(boundary_width * (height**2 + width**2) ** 0.5))


def boundary_band(labels: Tensor, width: int) -> Tensor:
    """Mark the pixels within ``width`` of the contour of their own region, on its inner side.

    A pixel is outside the band exactly if the ``(2 width + 1)``-square window around it lies in the image and
    holds its own label only, which is what ``width`` erosions of each class mask with a 3x3 square leave. One
    comparison of the window's minimum and maximum answers for all classes at once.

    Args:
        labels: ``(B, H, W)``, integers from 0 to 2**24.
        width: d, at least 1, in pixels.

    Returns:
        ``(B, H, W)`` bool.

    Example:
        >>> boundary_band(torch.zeros(1, 4, 5, dtype=torch.int64), 1).int().tolist()
        [[[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]]
    """
    ringed = F.pad(labels[:, None].float(), (1, 1, 1, 1), value=-1.0)  # outside the image is no class

    def window_maximum(x: Tensor) -> Tensor:
        x = F.max_pool2d(x, (2 * width + 1, 1), stride=1, padding=(width, 0))
        return F.max_pool2d(x, (1, 2 * width + 1), stride=1, padding=(0, width))

    return (window_maximum(ringed) != -window_maximum(-ringed))[:, 0, 1:-1, 1:-1]


def boundary_counts(
    pred: Tensor,
    target: Tensor,
    num_classes: int,
    ignore_index: int = 255,
    boundary_width: int | float = 0.02,
) -> tuple[Tensor, Tensor]:
    """Count the intersection and union of the classes' boundary bands.

    With ``G_k`` and ``P_k`` the true and predicted mask of class k, and ``X^d`` the pixels of ``X`` within
    distance d (chessboard) of its contour, Boundary IoU (Cheng et al., "Boundary IoU: Improving
    Object-Centric Image Segmentation Evaluation", CVPR 2021, equation 2) is
    ``|G_k^d & P_k^d| / |G_k^d | P_k^d|``. As in the paper's code the image border counts as contour.
    Ignored pixels are taken out of both masks before the contours are drawn, so that a prediction is neither
    rewarded nor punished for what it says there.

    Args:
        pred: ``(B, H, W)``, integers; values outside ``0..K-1`` belong to no class.
        target: ``(B, H, W)``, integers in ``0..K-1`` or ``ignore_index``.
        num_classes: K.
        ignore_index: the label of pixels without truth.
        boundary_width: d; an int in pixels, a float as a share of the image diagonal
            (see :func:`boundary_width_in_pixels`).

    Returns:
        Intersection and union in pixels, each ``(K,)`` int64.

    Raises:
        TypeError: for floating-point maps.
        ValueError: for wrong shapes, labels or width.

    Example:
        >>> target = torch.zeros(1, 6, 6, dtype=torch.int64)
        >>> target[:, :, 3:] = 1
        >>> intersection, union = boundary_counts(target.roll(1, 2), target, 2, boundary_width=1)
        >>> intersection.tolist(), union.tolist()
        ([4, 8], [24, 24])
    """
    check_labels(pred, target, num_classes, ignore_index)
    width = boundary_width_in_pixels(boundary_width, *target.shape[-2:])
    pred, target = pred.long(), target.long()
    nothing = num_classes
    kept = target != ignore_index
    target = target.where(kept, nothing)
    pred = pred.where(kept & (pred >= 0) & (pred < num_classes), nothing)
    target = target.where(boundary_band(target, width), nothing)
    pred = pred.where(boundary_band(pred, width), nothing)

    def pixels(labels: Tensor) -> Tensor:
        return torch.bincount(labels.flatten(), minlength=num_classes + 1)[:num_classes]

    intersection = pixels(target.where(target == pred, nothing))
    return intersection, pixels(target) + pixels(pred) - intersection


def score_counts(
    confusion: Tensor, boundary_intersection: Tensor, boundary_union: Tensor
) -> dict[str, Tensor]:
    """Turn summed counts into scores.

    With ``n_ij`` pixels of class i predicted as j, ``t_i`` the row sum (misses outside every class included)
    and ``p_j`` the column sum: ``IoU_i = n_ii / (t_i + p_i - n_ii)``, pixel accuracy
    ``sum n_ii / sum t_i``, mean accuracy the mean of ``n_ii / t_i`` over the classes of the truth.

    Args:
        confusion: ``(K, K + 1)`` of :func:`confusion_counts`, summed over the set.
        boundary_intersection: ``(K,)`` of :func:`boundary_counts`, summed over the set.
        boundary_union: ``(K,)``, of the same function, summed over the set.

    Returns:
        ``miou``, ``pixel_accuracy``, ``mean_accuracy``, ``boundary_iou`` (scalars in [0, 1], float64 except
        on MPS); ``iou`` and ``boundary_iou_per_class`` ``(K,)``; ``confusion`` ``(K, K)`` int64, rows the
        truth; ``unassigned`` ``(K,)`` int64, pixels of each true class predicted as none. A class in neither
        truth nor prediction is NaN and left out of the means; with no class at all the means are NaN.
    """
    dtype = torch.float32 if confusion.device.type == "mps" else torch.float64  # MPS has no float64
    classes = confusion[:, :-1]
    hits, true, guessed = classes.diagonal(), confusion.sum(1), classes.sum(0)

    def ratio(part: Tensor, whole: Tensor) -> Tensor:
        return part.to(dtype) / whole.to(dtype)  # 0 / 0 is the NaN of an absent class

    iou = ratio(hits, true + guessed - hits)
    boundary_iou = ratio(boundary_intersection, boundary_union)
    return {
        "miou": iou.nanmean(),
        "pixel_accuracy": ratio(hits.sum(), true.sum()),
        "mean_accuracy": ratio(hits, true).nanmean(),
        "boundary_iou": boundary_iou.nanmean(),
        "iou": iou,
        "boundary_iou_per_class": boundary_iou,
        "confusion": classes.clone(),
        "unassigned": confusion[:, -1].clone(),
    }
