"""Feature similarity: how alike the features of a class are, and how well classes are told apart.

With ``Y(p)`` the feature vector of pixel p, ``c(p)`` its true class and ``mu_c`` the centre of class c, the mean of
``Y`` over the pixels of c (of one image, or of the whole data set):

- ``IntraSim(p) = cos(Y(p), mu_c(p))``
- ``InterSim(p) = max over c' != c(p) of cos(Y(p), mu_c')``: the nearest other class that has a centre
- ``SimMargin(p) = IntraSim(p) - InterSim(p)``
- ``SimAcc`` = share of pixels with ``SimMargin(p) > 0``: the nearest class centre is that of their own class

each as a mean over the pixels of a region: all, the boundary band (within ``boundary_width`` pixels of another
class), and the interior (the rest).

Source: Chen et al., "Frequency-aware Feature Fusion for Dense Image Prediction", TPAMI 2024, Table I and Figs. 1, 2
and 7. How several other classes become one InterSim is not published; the nearest is taken because SimAcc then is
the share of positive margins. ``protocol="official"`` repeats what the authors' released tool computes instead.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.metrics.boundary_distance import distance_to_boundary
from freqfusion.metrics.functional import boundary_width_in_pixels
from freqfusion.ops.resize import resize

Centres = Literal["image", "dataset"]
Interpolation = Literal["nearest", "bilinear"]
Protocol = Literal["paper", "official"]

HISTOGRAM_BINS = 50
_CHUNK = 2**24
"""Numbers in the largest temporary array."""
_COLUMNS = (
    "images",
    "pixels",
    "intra",
    "intra_squares",
    "compared",
    "inter",
    "inter_squares",
    "margin",
    "judged_images",
    "judged",
    "correct",
)


@dataclass(frozen=True)
class SimilarityScores:
    """The four measures of a class, a mean or a distance. What is not defined is None, never NaN."""

    intra: float | None
    """IntraSim, -1 to 1."""
    intra_std: float | None
    """Its standard deviation (unbiased); None for fewer than two values."""
    inter: float | None
    """InterSim, -1 to 1; None without another class to compare with."""
    inter_std: float | None
    """Its standard deviation (unbiased)."""
    margin: float | None
    """SimMargin, -2 to 2. The released tool has none."""
    accuracy: float | None
    """SimAcc, 0 to 1."""
    pixels: int
    """Pixels with an IntraSim."""
    compared: int
    """Pixels with an InterSim (with ``protocol="official"``: pairs of centres)."""
    images: int
    """Images with such pixels of the class; of a mean: all images."""


@dataclass(frozen=True)
class SimilarityResult:
    """Scores by region: ``"all"``, ``"interior"`` (not with ``protocol="official"``) and ``"boundary"``."""

    per_class: dict[str, dict[int, SimilarityScores]]
    """Of the classes that occur in a region."""
    class_mean: dict[str, SimilarityScores]
    """Mean over classes, each with the same weight, where the class has the measure."""
    pixel_mean: dict[str, SimilarityScores]
    """Over all pixels, each with the same weight. The released tool has only its accuracy."""
    by_distance: dict[int, SimilarityScores]
    """Over the pixels at each chessboard distance to another class, from 1; the last entry, ``max_distance + 1``,
    holds all that are further away. Empty with ``protocol="official"``."""
    intra_histogram: dict[str, list[int]]
    """Pixels by IntraSim in each region, in bins between ``intra_edges``. Empty with ``protocol="official"``."""
    margin_histogram: dict[str, list[int]]
    """The same by SimMargin, between ``margin_edges``."""
    images: int
    protocol: Protocol
    centres: Centres

    intra_edges = tuple(-1 + 2 * i / HISTOGRAM_BINS for i in range(HISTOGRAM_BINS + 1))
    margin_edges = tuple(-2 + 4 * i / HISTOGRAM_BINS for i in range(HISTOGRAM_BINS + 1))

    def rows(self, class_names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One row a region and class, and the two means; for tables and CSV."""
        rows = []
        for region, scores in self.per_class.items():
            named: list[tuple[Any, SimilarityScores]] = [
                (class_names[k] if class_names else k, score) for k, score in scores.items()
            ]
            named += [("class mean", self.class_mean[region]), ("pixel mean", self.pixel_mean[region])]
            rows += [{"region": region, "class": name, **asdict(score)} for name, score in named]
        return rows


class SimilarityMaps(NamedTuple):
    """Similarities of single pixels, each ``(B, H, W)``."""

    intra: Tensor
    """IntraSim, float32 (float64 for float64 features); 0 where not ``scored``."""
    margin: Tensor
    """SimMargin; 0 where not ``compared``."""
    scored: Tensor
    """bool: the pixel has a class."""
    compared: Tensor
    """bool: it has one, and there is another class to compare with."""


class _Sums:
    """Sums by class (or by distance), float64 on the CPU."""

    def __init__(self, length: int) -> None:
        self.values = {column: torch.zeros(length, dtype=torch.float64) for column in _COLUMNS}

    def add(self, column: str, index: Tensor, values: Tensor | None = None) -> None:
        sums = self.values[column]
        sums += torch.bincount(index, values if values is None else values.double(), minlength=len(sums))

    def add_pixels(self, index: Tensor, intra: Tensor, inter: Tensor | None) -> None:
        self.add("images", index.unique())
        self.add("pixels", index)
        self.add("intra", index, intra)
        self.add("intra_squares", index, intra.double().square())
        if inter is not None:
            self.add("compared", index)
            self.add("inter", index, inter)
            self.add("inter_squares", index, inter.double().square())
            self.add("margin", index, intra.double() - inter.double())
            self.add("judged", index)
            self.add("correct", index[intra > inter])

    def scores(self, index: int | slice, images: int | None = None) -> SimilarityScores:
        """Of one class or distance, or of all (a slice) as one."""
        total = {column: float(values[index].sum()) for column, values in self.values.items()}
        pixels, compared = int(total["pixels"]), int(total["compared"])
        return SimilarityScores(
            intra=_ratio(total["intra"], pixels),
            intra_std=_deviation(total["intra"], total["intra_squares"], pixels),
            inter=_ratio(total["inter"], compared),
            inter_std=_deviation(total["inter"], total["inter_squares"], compared),
            margin=_ratio(total["margin"], compared),
            accuracy=_ratio(total["correct"], int(total["judged"])),
            pixels=pixels,
            compared=compared,
            images=int(total["images"]) if images is None else images,
        )


class _Scored(NamedTuple):
    """The pixels of an image that have a class; places, classes and similarities on the CPU."""

    places: Tensor
    """``(P,)`` into the flattened map."""
    classes: Tensor
    """``(P,)``"""
    intra: Tensor
    """``(P,)``"""
    inter: Tensor | None
    """``(P,)``, or None without another class."""
    labels: Tensor
    """``(H, W)`` on the grid where features and labels meet."""


class FeatureSimilarity:
    """IntraSim, InterSim, SimMargin and SimAcc over any number of images; definitions in the module's docstring.

    Only sums are kept, so memory does not grow with the images. Features are brought to the size of the labels
    (or ``size``) image by image and scored where they are, on a GPU if they are on one; several levels are
    resized and concatenated first. Half precision is scored in float32, class centres are summed in float64
    (float32 on MPS).

    ``protocol="paper"``: class centres are means over all pixels of the class; a pixel is compared with the nearest
    other centre; a tie is a miss. ``protocol="official"`` repeats the released tool, figure for figure: centres of
    each image, for the boundary from the pixels off the boundary only (a class without such pixels is not scored);
    boundary by a Laplacian of the class indices, dilated (the tool's ``edge_k`` is ``2 * boundary_width - 1``);
    InterSim between pairs of class centres, under the smaller index; a tie is a hit; IntraSim and accuracy only of
    classes in two images or more, InterSim only of classes with two pairs or more, means of the two similarities only
    over two classes or more; features and labels of any proportions, each stretched to the grid. The tool prints its
    two accuracies under each other's names; here ``class_mean`` and ``pixel_mean`` are what they say. Where the tool
    stops with a division by zero, the value is None.

    Args:
        num_classes: K, at most 2**24 (255 for ``protocol="official"``).
        ignore_index: the label of pixels without truth. If it is among ``0..K-1``, that class is left out.
        boundary_width: width of the boundary band on each side, in pixels of the grid, chessboard distance; a
            float is a share of the grid's diagonal. 3 is the released tool's default.
        centres: ``"image"``: of each image by itself. ``"dataset"``: of all images; first give every batch to
            :meth:`fit_centres`, then every batch to :meth:`update`.
        protocol: ``"paper"`` or ``"official"``.
        size: grid ``(H, W)`` to measure on; labels are brought there by nearest interpolation, features by ``mode``.
            By default that of the labels. The released tool uses (256, 512).
        mode: interpolation of the features, ``"bilinear"`` or ``"nearest"``.
        max_distance: up to which distance from the boundary ``by_distance`` tells pixels apart.

    Raises:
        ValueError: for options out of range, or official dataset centres.

    Example:
        >>> features = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]])
        >>> similarity = FeatureSimilarity(num_classes=2, boundary_width=1)
        >>> similarity.update(features, torch.tensor([[[0, 0, 0, 1]]]))
        >>> scores = similarity.compute().per_class["all"]
        >>> round(scores[0].intra, 4), round(scores[0].accuracy, 4), round(scores[1].intra, 4)
        (0.7454, 0.6667, 1.0)
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        boundary_width: int | float = 3,
        centres: Centres = "image",
        protocol: Protocol = "paper",
        size: tuple[int, int] | None = None,
        mode: Interpolation = "bilinear",
        max_distance: int = 16,
    ) -> None:
        for name, value, choices in (
            ("centres", centres, get_args(Centres)),
            ("protocol", protocol, get_args(Protocol)),
            ("mode", mode, get_args(Interpolation)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        most = 255 if protocol == "official" else 2**24
        if not 1 <= num_classes <= most:
            raise ValueError(f"num_classes must be from 1 to {most} for {protocol=}, got {num_classes}")
        if protocol == "official" and centres != "image":
            raise ValueError('the released tool has class centres of each image only; use centres="image"')
        if size is not None and min(size) < 1:
            raise ValueError(f"size must have sides of at least 1 pixel, got {size}")
        if max_distance < 1:
            raise ValueError(f"max_distance must be at least 1 pixel, got {max_distance}")
        boundary_width_in_pixels(boundary_width, 1, 1)  # refuses a wrong width now
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.boundary_width = boundary_width
        self.centres: Centres = centres
        self.protocol: Protocol = protocol
        self.size = size
        self.mode = mode
        self.max_distance = max_distance
        regions = ("all", "boundary") if protocol == "official" else ("all", "interior", "boundary")
        self._sums = {region: _Sums(num_classes) for region in regions}
        self._by_distance = _Sums(max_distance + 1)
        self._histograms = {
            region: {name: torch.zeros(HISTOGRAM_BINS, dtype=torch.int64) for name in ("intra", "margin")}
            for region in regions
        }
        self._images = 0
        self._centre_sums: Tensor | None = None
        self._centre_pixels = torch.zeros(num_classes, dtype=torch.float64)

    @torch.no_grad()
    def fit_centres(self, features: Tensor | Sequence[Tensor], labels: Tensor) -> None:
        """Add a batch to the class centres of the data set; takes and raises what :meth:`update` does."""
        if self.centres != "dataset":
            raise ValueError('fit_centres is for centres="dataset"; with centres="image" call update only')
        if self._images:
            raise ValueError("fit_centres was called after update; fit the centres on all images first")
        for pixels, classes, _, _ in self._pixels(features, labels):
            present, sums, counts = _class_sums(pixels, classes)
            if self._centre_sums is None:
                self._centre_sums = torch.zeros(self.num_classes, len(pixels), dtype=torch.float64)
            if self._centre_sums.shape[1] != len(pixels):
                raise ValueError(
                    f"the features have {len(pixels)} channels, those before had {self._centre_sums.shape[1]}"
                )
            self._centre_sums[present.cpu()] += sums.cpu()
            self._centre_pixels[present.cpu()] += counts.cpu()

    @torch.no_grad()
    def update(self, features: Tensor | Sequence[Tensor], labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: ``(B, C, h, w)``, floating point, of any stride; or several levels, finest first or not, which
                are resized to the grid and concatenated.
            labels: ``(B, H, W)``, integers in ``0..K-1`` or ``ignore_index``; moved to the features' device.

        Raises:
            TypeError: for features that are not floating point, or labels that are.
            ValueError: for wrong shapes, sizes that no single stride explains (other images? ``protocol="official"``
                takes them), labels that are no class, features that are not finite, or dataset centres that are
                missing.
        """
        if self.protocol == "official":
            self._update_official(features, labels)
            return
        for scored in self._scored(features, labels):
            self._images += 1
            height, width = scored.labels.shape
            band = boundary_width_in_pixels(self.boundary_width, height, width)
            reach = max(band, self.max_distance)
            distance = distance_to_boundary(scored.labels[None], reach, self.ignore_index)
            distance = distance.flatten().cpu()[scored.places]
            for region, inside in (
                ("all", torch.ones_like(distance, dtype=torch.bool)),
                ("interior", distance > band),
                ("boundary", distance <= band),
            ):
                intra = scored.intra[inside]
                inter = None if scored.inter is None else scored.inter[inside]
                self._sums[region].add_pixels(scored.classes[inside], intra, inter)
                histograms = self._histograms[region]
                histograms["intra"] += _histogram(intra, 1)
                if inter is not None:
                    histograms["margin"] += _histogram(intra - inter, 2)
            nearest = distance.clamp(max=self.max_distance + 1) - 1
            self._by_distance.add_pixels(nearest, scored.intra, scored.inter)

    @torch.no_grad()
    def maps(self, features: Tensor | Sequence[Tensor], labels: Tensor) -> SimilarityMaps:
        """IntraSim and SimMargin of every pixel of a batch, on the CPU; nothing is added to the sums.

        Takes and raises what :meth:`update` does. Always after the definitions of ``protocol="paper"``.
        """
        stacks: tuple[list[Tensor], ...] = ([], [], [], [])
        for scored in self._scored(features, labels):
            shape, places = scored.labels.shape, scored.places

            def spread(values: Tensor, shape: torch.Size = shape, places: Tensor = places) -> Tensor:
                filled = torch.zeros(shape.numel(), dtype=values.dtype)
                filled[places] = values
                return filled.view(shape)

            scored_here = torch.ones(len(places), dtype=torch.bool)
            margin, compared = torch.zeros_like(scored.intra), torch.zeros_like(scored_here)
            if scored.inter is not None:
                margin, compared = scored.intra - scored.inter, scored_here
            for stack, values in zip(stacks, (scored.intra, margin, scored_here, compared), strict=True):
                stack.append(spread(values))
        if not stacks[0]:
            raise ValueError("the batch is empty: there is no map to make")
        return SimilarityMaps(*(torch.stack(stack) for stack in stacks))

    def compute(self) -> SimilarityResult:
        """Scores of all batches so far.

        Raises:
            ValueError: if no pixel has been scored: no image came, or all their pixels are ignored.
        """
        if not self._sums["all"].values["pixels"].any():
            raise ValueError(
                f"no pixel with a class in {self._images} images: there is nothing to score; are the labels right, "
                f"and is ignore_index={self.ignore_index} the label of ignored pixels?"
            )
        official = self.protocol == "official"
        per_class, class_mean, pixel_mean = {}, {}, {}
        for region, sums in self._sums.items():
            seen = (sums.values["pixels"] + sums.values["judged_images"]).nonzero().flatten().tolist()
            scores = {k: sums.scores(k) for k in seen}
            if official:
                scores = {k: _as_printed(score, sums, k) for k, score in scores.items()}
            per_class[region] = scores
            class_mean[region] = _mean(list(scores.values()), self._images, at_least=2 if official else 1)
            pixel_mean[region] = sums.scores(slice(None), self._images)
            if official:
                counted = sums.values["judged_images"] > 1
                correct, judged = (float(sums.values[x][counted].sum()) for x in ("correct", "judged"))
                pixel_mean[region] = SimilarityScores(
                    None, None, None, None, None, _ratio(correct, int(judged)), int(judged), 0, self._images
                )
        histograms = {} if official else self._histograms
        distances = () if official else range(self.max_distance + 1)
        return SimilarityResult(
            per_class=per_class,
            class_mean=class_mean,
            pixel_mean=pixel_mean,
            by_distance={d + 1: self._by_distance.scores(d) for d in distances},
            intra_histogram={region: counts["intra"].tolist() for region, counts in histograms.items()},
            margin_histogram={region: counts["margin"].tolist() for region, counts in histograms.items()},
            images=self._images,
            protocol=self.protocol,
            centres=self.centres,
        )

    def _grids(self, features: Tensor | Sequence[Tensor], labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each image its features ``(C, H, W)`` and labels ``(H, W)`` on the grid."""
        levels = [features] if isinstance(features, Tensor) else list(features)
        check_inputs(
            levels, labels, self.num_classes, self.ignore_index, any_proportion=self.protocol == "official"
        )
        labels = labels.to(levels[0].device).long()
        size = self.size or tuple(labels.shape[-2:])
        labels = resize_labels(labels, size)
        wide = any(level.dtype == torch.float64 for level in levels)
        for image in range(len(labels)):
            grids = [
                resize(level[image : image + 1].to(torch.float64 if wide else torch.float32), size, self.mode)
                for level in levels
            ]
            grid = grids[0] if len(grids) == 1 else torch.cat(grids, dim=1)
            yield grid[0], labels[image]

    def _pixels(
        self, features: Tensor | Sequence[Tensor], labels: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each image with classes features ``(C, P)``, classes ``(P,)``, index ``(P,)``, labels ``(H, W)``.

        Pixels are in the order of their classes; ignored ones are left out.
        """
        for grid, image in self._grids(features, labels):
            pixels, classes, index = _by_class(grid, image, self.ignore_index)
            yield pixels, classes, index, image

    def _scored(self, features: Tensor | Sequence[Tensor], labels: Tensor) -> Iterator[_Scored]:
        if self.centres == "dataset" and self._centre_sums is None:
            raise ValueError('centres="dataset" needs them first: call fit_centres with every batch before')
        for pixels, classes, index, image in self._pixels(features, labels):
            if self._centre_sums is None:
                present, sums, counts = _class_sums(pixels, classes)
                centres = sums / counts[:, None]
            else:
                if self._centre_sums.shape[1] != len(pixels):
                    raise ValueError(
                        f"the features have {len(pixels)} channels, the centres {self._centre_sums.shape[1]}"
                    )
                present = self._centre_pixels.nonzero().flatten()
                centres = self._centre_sums[present] / self._centre_pixels[present, None]
                missing = set(classes.unique().tolist()) - set(present.tolist())
                if missing:
                    raise ValueError(
                        f"the classes {sorted(missing)[:10]} have no centre: fit_centres saw no pixel of them; give "
                        "it the images that update gets"
                    )
                present = present.to(classes.device)
            own = torch.searchsorted(present, classes)
            intra, inter = _similarities(pixels, own, centres.to(pixels))
            yield _Scored(
                index.cpu(), classes.cpu(), intra.cpu(), None if inter is None else inter.cpu(), image
            )

    def _update_official(self, features: Tensor | Sequence[Tensor], labels: Tensor) -> None:
        for grid, image in self._grids(features, labels):
            self._images += 1
            band = boundary_width_in_pixels(self.boundary_width, *image.shape)
            edge = _official_edges(image, 2 * band - 1, self.ignore_index)
            nothing = image.new_tensor(self.ignore_index)
            for region, inside, scored in (
                ("all", image, image),
                ("boundary", image.where(~edge, nothing), image.where(edge, nothing)),
            ):
                sums = self._sums[region]
                present, totals, counts = _class_sums(*_by_class(grid, inside, self.ignore_index)[:2])
                centres = (totals / counts[:, None]).to(grid)
                pixels, classes, _ = _by_class(grid, scored, self.ignore_index)
                known = torch.isin(classes, present)
                pixels, classes = pixels[:, known], classes[known]
                intra, inter = _similarities(pixels, torch.searchsorted(present, classes), centres)
                missed = torch.zeros_like(classes, dtype=torch.bool) if inter is None else inter > intra
                classes, intra = classes.cpu(), intra.cpu()
                sums.add("images", classes.unique())
                sums.add("pixels", classes)
                sums.add("intra", classes, intra)
                sums.add("intra_squares", classes, intra.double().square())
                sums.add("judged_images", present.cpu())
                sums.add("judged", classes)
                sums.add("correct", classes[~missed.cpu()])
                units = _unit(centres.T).T
                first, second = torch.triu_indices(len(units), len(units), 1, device=units.device)
                pairs, smaller = (units @ units.T)[first, second].cpu(), present[first].cpu()
                sums.add("compared", smaller)
                sums.add("inter", smaller, pairs)
                sums.add("inter_squares", smaller, pairs.double().square())


def similarity_map(
    features: Tensor | Sequence[Tensor],
    labels: Tensor,
    ignore_index: int = 255,
    mode: Interpolation = "bilinear",
) -> SimilarityMaps:
    """IntraSim and SimMargin of every pixel, with class centres of each image.

    Args:
        features: ``(B, C, h, w)``, floating point; or several levels, which are resized and concatenated.
        labels: ``(B, H, W)``, integers from 0, or ``ignore_index``.
        ignore_index: the label of pixels without truth.
        mode: interpolation of the features to the size of the labels.

    Returns:
        Maps ``(B, H, W)`` on the CPU.

    Raises:
        TypeError: for features that are not floating point, or labels that are.
        ValueError: as :meth:`FeatureSimilarity.update`; and for an empty batch.

    Example:
        >>> features = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]])
        >>> maps = similarity_map(features, torch.tensor([[[0, 0, 1, 255]]]))
        >>> maps.margin.tolist(), maps.compared.tolist()
        ([[[1.0, 1.0, 1.0, 0.0]]], [[[True, True, True, False]]])
    """
    kept = labels[labels != ignore_index]
    num_classes = int(kept.max()) + 1 if kept.numel() else 1
    return FeatureSimilarity(max(1, num_classes), ignore_index, mode=mode).maps(features, labels)


def resize_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest interpolation of ``(B, H, W)`` labels: row r of h takes ``floor(r * H / h)``, rounded as OpenCV does.

    >>> resize_labels(torch.tensor([[[1, 2, 3, 4, 5]]]), (1, 3)).tolist()
    [[[1, 2, 4]]]
    """
    rows, columns = (
        (torch.arange(grid, dtype=torch.float64) * (1 / (grid / side))).long().clamp(max=side - 1)
        for grid, side in zip(size, labels.shape[-2:], strict=True)
    )
    return labels[:, rows[:, None].to(labels.device), columns.to(labels.device)]


def check_inputs(
    levels: Sequence[Tensor],
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    any_proportion: bool = False,
) -> None:
    """Refuse features and labels that cannot belong together or cannot be scored.

    ``any_proportion``: take features whose sides are not those of the labels by one stride.
    """
    if not levels:
        raise ValueError("features must hold at least one level")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must hold class indices (an integer dtype), got {labels.dtype}")
    if labels.ndim != 3 or 0 in labels.shape[1:]:
        raise ValueError(f"labels must have the shape (B, H, W), got {tuple(labels.shape)}")
    for number, level in enumerate(levels):
        if level.ndim != 4 or 0 in level.shape[1:]:
            raise ValueError(
                f"features must have the shape (B, C, h, w), got {tuple(level.shape)} (level {number})"
            )
        if not level.is_floating_point():
            raise TypeError(
                f"features must be floating point, got {level.dtype} (level {number}); convert with .float()"
            )
        if level.device != levels[0].device:
            raise ValueError(
                f"the levels are on {levels[0].device} and {level.device}; move them to one device"
            )
        if len(level) != len(labels):
            raise ValueError(
                f"{len(level)} feature maps (level {number}) and {len(labels)} label maps: they must be of the same "
                "images, in the same order"
            )
        if not any_proportion and not _one_stride(level.shape[-2:], labels.shape[-2:]):
            raise ValueError(
                f"features of size {tuple(level.shape[-2:])} (level {number}) and labels of size "
                f"{tuple(labels.shape[-2:])} differ in their proportions: are they of the same image? If the network "
                "saw a padded or squeezed image, bring its labels to the same form"
            )
        finite = torch.isfinite(level).flatten(1).all(1)
        if not finite.all():
            images = (~finite).nonzero().flatten().tolist()[:10]
            raise ValueError(
                f"the features of images {images} of the batch (level {number}) hold NaN or infinite values, which "
                "have no similarity; find out where the network produces them"
            )
    labels = labels.long()
    strange = labels[(labels != ignore_index) & ((labels < 0) | (labels >= num_classes))]
    if strange.numel():
        raise ValueError(
            f"labels hold {strange.unique().tolist()[:10]}, expected 0..{num_classes - 1} or {ignore_index} "
            "(ignored); set num_classes or ignore_index to those of the data"
        )


def _one_stride(size: Sequence[int], full: Sequence[int]) -> bool:
    """Whether one stride leads from ``full`` to ``size``, if each side may be rounded by up to a pixel."""
    lowest = max(side / (small + 1) for small, side in zip(size, full, strict=True))
    highest = min(
        side / (small - 1) if small > 1 else math.inf for small, side in zip(size, full, strict=True)
    )
    return lowest <= highest


def _by_class(grid: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``(C, P)``, classes ``(P,)`` and index ``(P,)`` of the pixels that have a class, sorted by class."""
    flat = labels.flatten()
    kept = (flat != ignore_index).nonzero().flatten()
    classes, order = flat[kept].sort(stable=True)
    index = kept[order]
    return grid.flatten(1)[:, index], classes, index


def _class_sums(pixels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes ``(k,)``, ascending, sums of their vectors ``(k, C)`` and pixel counts ``(k,)``; pixels by class."""
    present, counts = classes.unique_consecutive(return_counts=True)
    dtype = torch.float32 if pixels.device.type == "mps" else torch.float64  # MPS has no float64
    sums = [part.sum(1, dtype=dtype) for part in pixels.split(counts.tolist(), dim=1)]
    return present, torch.stack(sums) if sums else pixels.new_zeros(0, len(pixels), dtype=dtype), counts


def _unit(vectors: Tensor) -> Tensor:
    """Columns of length 1; zero stays zero. Scaled first, so that squares neither overflow nor vanish."""
    scaled = vectors / vectors.abs().amax(0).clamp_min(torch.finfo(vectors.dtype).tiny)
    return F.normalize(scaled, dim=0)


def _similarities(pixels: Tensor, own: Tensor, centres: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cosines ``(P,)`` with the own centre and with the nearest other one; None where there is only one centre.

    The cosine with a zero vector is 0.

    Args:
        pixels: ``(C, P)``.
        own: ``(P,)`` rows of the own centres.
        centres: ``(k, C)``.
    """
    units = _unit(centres.T).T
    step = max(1, _CHUNK // max(pixels.shape[0], len(units), 1))
    intra, inter = pixels.new_zeros(len(own)), pixels.new_zeros(len(own))
    with torch.autocast(pixels.device.type, enabled=False):
        for start in range(0, len(own), step):
            part = slice(start, start + step)
            cosines = (units @ _unit(pixels[:, part])).clamp_(-1, 1)
            intra[part] = cosines.gather(0, own[None, part])[0]
            cosines.scatter_(0, own[None, part], -math.inf)
            inter[part] = cosines.amax(0)
    return intra, inter if len(units) > 1 else None


def _official_edges(labels: Tensor, edge_k: int, ignore_index: int) -> Tensor:
    """The released tool's boundary band, bool ``(H, W)``.

    Where the Laplacian of the class indices (four neighbours, mirrored at the border, ignored pixels 255) is not
    zero, widened by a square of ``edge_k``, without what lies within that square of an ignored pixel. On a real
    boundary the Laplacian can be zero: class 1 between 0 and 2.
    """
    ids = labels.where(labels != ignore_index, 255)

    def neighbours(side: int, take: Callable[[Tensor], Tensor]) -> Tensor:
        place = torch.arange(side, device=labels.device)
        before, after = (place - 1).abs().clamp(max=side - 1), side - 1 - (side - 2 - place).abs()
        return take(before) + take(after.clamp(min=0))

    height, width = ids.shape
    around = neighbours(height, lambda rows: ids[rows]) + neighbours(width, lambda columns: ids[:, columns])

    def dilate(mask: Tensor) -> Tensor:
        return F.max_pool2d(mask[None, None].float(), edge_k, stride=1, padding=edge_k // 2)[0, 0] > 0

    return dilate(around != 4 * ids) & ~dilate(labels == ignore_index)


def _histogram(values: Tensor, limit: int) -> Tensor:
    """Counts of :data:`HISTOGRAM_BINS` equal bins from ``-limit`` to ``limit``."""
    bins = ((values.double() + limit) * (HISTOGRAM_BINS / (2 * limit))).long()
    return torch.bincount(bins.clamp(0, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _deviation(total: float, squares: float, count: int) -> float | None:
    return math.sqrt(max(0.0, squares - total * total / count) / (count - 1)) if count > 1 else None


def _as_printed(score: SimilarityScores, sums: _Sums, k: int) -> SimilarityScores:
    """What the released tool prints of a class: measures of too few images or pairs are left out."""
    often, paired = score.images > 1, score.compared > 1
    return SimilarityScores(
        intra=score.intra if often else None,
        intra_std=score.intra_std if often else None,
        inter=score.inter if paired else None,
        inter_std=score.inter_std if paired else None,
        margin=None,
        accuracy=score.accuracy if sums.values["judged_images"][k] > 1 else None,
        pixels=score.pixels,
        compared=score.compared,
        images=score.images,
    )


def _mean(scores: Sequence[SimilarityScores], images: int, at_least: int) -> SimilarityScores:
    """Mean over classes; of the similarities only if ``at_least`` so many have the measure."""

    def mean(measure: str, needed: int) -> float | None:
        values = [value for score in scores if (value := getattr(score, measure)) is not None]
        return sum(values) / len(values) if len(values) >= needed else None

    return SimilarityScores(
        intra=mean("intra", at_least),
        intra_std=mean("intra_std", at_least),
        inter=mean("inter", at_least),
        inter_std=mean("inter_std", at_least),
        margin=mean("margin", 1),
        accuracy=mean("accuracy", 1),
        pixels=sum(score.pixels for score in scores),
        compared=sum(score.compared for score in scores),
        images=images,
    )
