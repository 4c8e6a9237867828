"""What fusion does to features, measured over a set of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from freqfusion.analysis.explorer import Scene, thin
from freqfusion.analysis.similarity import FeatureSimilarity, SimilarityResult
from freqfusion.analysis.spectra import (
    Energy,
    KernelSpectrum,
    high_frequency_share,
    radial_power_spectrum,
)
from freqfusion.drawing.figures import Colour
from freqfusion.metrics.boundary_distance import BoundaryDistance, BoundaryDistanceResult

BEFORE, AFTER = "before", "after"
"""Variants of a level: the coarse map enlarged bilinearly, as standard fusion does, and as the fusion gives it."""
FREQUENCY_BINS = 20
"""Equal parts of the frequencies from 0 to 0.5 cycles per pixel."""


@dataclass(frozen=True)
class Internals:
    """What a FreqFusion module did to one image at a site."""

    kernels: Mapping[str, KernelSpectrum]
    """Frequency response by name of the filter."""
    offsets: Tensor | None
    """``(2, H, W)`` in coarse pixels, along x and along y, mean over the groups."""
    coarse_size: tuple[int, int]
    """Height and width of the coarse map."""
    detail: Tensor | None
    """``(H, W)``: by how much each pixel of the fine map changed, root mean square over the channels."""


@dataclass(frozen=True)
class Observation:
    """An image and the features that a network, or several, made of it."""

    name: str
    maps: Mapping[str, Mapping[str, Tensor]]
    """By level and variant, each ``(C, h, w)``; the last level is the finest."""
    labels: Tensor
    """``(H, W)`` class indices."""
    image: Tensor | None = None
    """``(3, H, W)`` uint8."""
    predictions: Mapping[str, Tensor] = field(default_factory=dict)
    """By model, each ``(H, W)``."""
    internals: Mapping[str, Mapping[str, Internals | None]] = field(default_factory=dict)
    """By level and model; None where its fusion is another method. Empty if no model was looked into."""


class Spectra:
    """Radial spectra and energies of maps, added up over images of any size."""

    def __init__(self) -> None:
        self.power = np.zeros(FREQUENCY_BINS)
        self.modes = np.zeros(FREQUENCY_BINS)
        self.energies: dict[str, Energy] = {}

    def update(self, features: Tensor, labels: Tensor, ignore_index: int) -> None:
        """Add maps ``(B, C, h, w)``."""
        spectrum = radial_power_spectrum(features)
        place = np.minimum(spectrum.frequency.numpy() * (2 * FREQUENCY_BINS), FREQUENCY_BINS).astype(int)
        inside = place < FREQUENCY_BINS  # the corners of the square of frequencies lie beyond one half
        modes = spectrum.modes.numpy()[inside]
        np.add.at(self.power, place[inside], spectrum.power.numpy()[inside] * modes)
        np.add.at(self.modes, place[inside], modes)
        for region, energy in high_frequency_share(features, labels, ignore_index=ignore_index).items():
            before = self.energies.get(region, Energy(0.0, 0.0))
            self.energies[region] = Energy(before.high + energy.high, before.low + energy.low)

    def curve(self) -> list[tuple[float, float]]:
        """Frequency in cycles per pixel and power relative to the mean; nothing for constant features."""
        mean = self.power.sum() / max(self.modes.sum(), 1)
        return [
            ((place + 0.5) / (2 * FREQUENCY_BINS), float(self.power[place] / self.modes[place] / mean))
            for place in range(FREQUENCY_BINS)
            if self.power[place] > 0
        ]


class Inside:
    """What FreqFusion modules do at a site: kernel responses added up over images, the rest of the first image.

    Args:
        first: of the first image.
        image: its pixels ``(H, W, 3)``, if known.
    """

    def __init__(self, first: Internals, image: np.ndarray[Any, Any] | None) -> None:
        self.first = first
        self.image = image
        self.images = 0
        self._sums = {name: np.zeros(tuple(x.magnitude.shape)) for name, x in first.kernels.items()}

    def update(self, internals: Internals) -> None:
        """Add an image, the first one too."""
        self.images += 1
        for name, spectrum in internals.kernels.items():
            self._sums[name] += spectrum.magnitude.numpy()

    @property
    def responses(self) -> dict[str, np.ndarray[Any, Any]]:
        """Mean frequency response of each filter."""
        return {name: total / self.images for name, total in self._sums.items()}


class FeatureStudy:
    """Takes images one after the other and adds up what is measured on them.

    Args:
        classes: names by index.
        palette: their RGB colours.
        ignore_index: the label of pixels without truth.

    Attributes:
        images: how many there were.
        first: name of the first.
        scenes: the images to show.
        similarity: by level and variant.
        spectra: by level and variant.
        boundaries: by model; empty without predictions.
        inside: by level and model; None where its fusion is another method.
    """

    def __init__(self, classes: Sequence[str], palette: Sequence[Colour], ignore_index: int = 255) -> None:
        self.classes = tuple(classes)
        self.palette = tuple(palette)
        self.ignore_index = ignore_index
        self.images = 0
        self.first = ""
        self.scenes: list[Scene] = []
        self.similarity: dict[str, dict[str, FeatureSimilarity]] = {}
        self.spectra: dict[str, dict[str, Spectra]] = {}
        self.boundaries: dict[str, BoundaryDistance] = {}
        self.inside: dict[str, dict[str, Inside | None]] = {}

    def add(self, observation: Observation, *, show: bool = False) -> None:
        """Measure an image; ``show`` it in the explorer.

        Raises:
            TypeError, ValueError: for features or labels that cannot be measured (see
                :meth:`~freqfusion.analysis.similarity.FeatureSimilarity.update`), or other levels or variants than
                before.
        """
        found = {level: list(maps) for level, maps in observation.maps.items()}
        if not self.similarity:
            self.similarity = {
                level: {name: FeatureSimilarity(len(self.classes), self.ignore_index) for name in names}
                for level, names in found.items()
            }
            self.spectra = {level: {name: Spectra() for name in names} for level, names in found.items()}
            if len({tuple(names) for names in found.values()}) != 1 or not self.variants:
                raise ValueError(f"all levels must have the same variants, at least one; got {found}")
        if found != {level: list(self.variants) for level in self.similarity}:
            raise ValueError(
                f"all images must have the same levels and variants: {observation.name} has {found}, expected "
                f"{', '.join(self.variants)} at {', '.join(self.similarity)}"
            )
        for level, maps in observation.maps.items():
            for variant, features in maps.items():
                labels = observation.labels[None].to(features.device)
                try:
                    self.similarity[level][variant].update(features[None], labels)
                    self.spectra[level][variant].update(features[None], labels, self.ignore_index)
                except ValueError as error:
                    raise ValueError(f"{observation.name}, {level}, {variant}: {error}") from error
        for model, prediction in observation.predictions.items():
            distances = self.boundaries.setdefault(
                model, BoundaryDistance(len(self.classes), self.ignore_index)
            )
            distances.update(prediction[None].cpu(), observation.labels[None].cpu())
        for level, found_inside in observation.internals.items():
            known = self.inside.setdefault(level, {})
            for model, internals in found_inside.items():
                if model not in known:
                    known[model] = None if internals is None else Inside(internals, _pixels(observation))
                inside = known[model]
                if inside is not None and internals is not None:
                    inside.update(internals)
        self.first = self.first or observation.name
        self.images += 1
        if show:
            self.scenes.append(_scene(observation))

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the maps of each level."""
        return tuple(next(iter(self.similarity.values()), ()))

    @property
    def pair(self) -> tuple[str, str]:
        """The variants that the headline compares and the explorer shows first."""
        fused = [name for name in self.variants if name.endswith(AFTER)]
        return (fused[0], fused[-1]) if len(fused) > 1 else (self.variants[0], self.variants[-1])

    def results(self) -> dict[str, dict[str, SimilarityResult]]:
        """Similarities by level and variant.

        Raises:
            ValueError: before the first image, or if no pixel has a class.
        """
        if not self.images:
            raise ValueError("there is no image to measure")
        return {
            level: {name: similarity.compute() for name, similarity in maps.items()}
            for level, maps in self.similarity.items()
        }

    def displacements(self) -> dict[str, BoundaryDistanceResult]:
        """How far predicted boundaries are off, by model; nothing without predictions."""
        return {model: distances.compute() for model, distances in self.boundaries.items()}

    @property
    def boundary_width(self) -> int | float:
        """Of :class:`~freqfusion.analysis.similarity.FeatureSimilarity`."""
        return next(iter(self.similarity.values()))[self.variants[0]].boundary_width


def _pixels(observation: Observation) -> np.ndarray[Any, Any] | None:
    """The image ``(H, W, 3)``."""
    return None if observation.image is None else observation.image.permute(1, 2, 0).cpu().numpy()


def _scene(observation: Observation) -> Scene:
    return Scene(
        name=observation.name,
        maps={
            level: {name: thin(features) for name, features in maps.items()}
            for level, maps in observation.maps.items()
        },
        labels=observation.labels.cpu().numpy(),
        image=_pixels(observation),
        predictions={name: labels.cpu().numpy() for name, labels in observation.predictions.items()},
    )
