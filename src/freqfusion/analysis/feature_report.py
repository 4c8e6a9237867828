"""What fusion does to features, measured over a set of images: numbers, figures and a page with an explorer."""

import csv
import io
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import freqfusion
from freqfusion._files import write_atomically
from freqfusion.analysis.explorer import Scene, build_explorer, thin
from freqfusion.analysis.similarity import FeatureSimilarity, SimilarityResult
from freqfusion.analysis.spectra import (
    Energy,
    KernelSpectrum,
    high_frequency_share,
    radial_power_spectrum,
)
from freqfusion.drawing.figures import (
    Colour,
    figure_bytes,
    plot_arrows,
    plot_curves,
    plot_heat,
    plot_histograms,
    plot_paired_bars,
)
from freqfusion.drawing.page import (
    Code,
    Curves,
    Drawing,
    Html,
    Report,
    Section,
    Swatches,
    Table,
    Text,
    write_report,
)
from freqfusion.metrics.boundary_distance import (
    DIRECTIONS,
    BoundaryDisplacement,
    BoundaryDistance,
    BoundaryDistanceResult,
)

BEFORE, AFTER = "before", "after"
"""Variants of a level: the coarse map enlarged bilinearly, as standard fusion does, and as the fusion gives it."""
CLASSES_SHOWN = 20
"""Classes in a figure, those with the most pixels; the CSV has all."""
FREQUENCY_BINS = 20
"""Equal parts of the frequencies from 0 to 0.5 cycles per pixel."""
ARROWS = 24
"""Arrows along the longer side of an image, at most."""
REGIONS = {"all": "all pixels", "boundary": "boundary pixels"}
MEASURES = {"intra": "IntraSim", "margin": "SimMargin", "accuracy": "SimAcc"}
DEFINITIONS = (
    "IntraSim: cosine similarity of a pixel's feature with the mean feature of its class in the image. SimMargin: "
    "that minus the similarity with the nearest other class's mean. SimAcc: share of pixels whose SimMargin is "
    "above 0. All three are means over pixels; similarity.csv has them class by class too. Boundary: pixels within "
    "{width} pixels of another class. Higher is better, but they judge features, not predictions. High frequencies: "
    "their share in the energy of the features; the boundary is one pixel of the map wide here."
)
DISPLACEMENT = (
    "Distance of each boundary pixel of a class to the nearest boundary pixel of that class on the other side, in "
    "pixels of the labels: mean, 95th percentile, and share of the pixels that are at most so far off; from truth to "
    "prediction, from prediction to truth, and both pooled. Unmatched are pixels in images where the other side has "
    "no boundary of the class, an object missed or invented; they are beyond every distance, and in no mean or "
    "percentile."
)
INTERNALS = (
    "Kernel response: magnitude of the frequency response of the learned kernels, mean over all of an image and over "
    "the images, in cycles per pixel of the map that they filter; the high-pass filter is what its kernels leave of "
    "the fine map. Offsets: an arrow leads from a pixel towards where its feature is taken from, mean over the "
    "groups; some of the pixels are shown, evenly spread, and the key gives the length. Added detail: by how much "
    "the high-pass filter changes the fine map, root mean square over the channels. Offsets and detail are those of "
    "the first image, {image}."
)


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


class _Spectra:
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


class _Inside:
    """What FreqFusion modules do at a site: kernel responses added up over images, the rest of the first image.

    Args:
        first: of the first image.
        image: its pixels ``(H, W, 3)``, if known.
    """

    def __init__(self, first: Internals, image: np.ndarray[Any, Any] | None) -> None:
        self.first = first
        self.image = image
        self._images = 0
        self._sums = {name: np.zeros(tuple(x.magnitude.shape)) for name, x in first.kernels.items()}

    def update(self, internals: Internals) -> None:
        """Add an image, the first one too."""
        self._images += 1
        for name, spectrum in internals.kernels.items():
            self._sums[name] += spectrum.magnitude.numpy()

    def charts(self, prefix: str, suffix: str, model: str) -> Iterator["Chart"]:
        """Kernels, offsets and detail, as far as the module has them."""
        title = "Kernel response" + model
        responses = {name: total / self._images for name, total in self._sums.items()}
        frequency = next(iter(self.first.kernels.values())).frequency.tolist()
        yield Chart(
            f"{prefix}_kernels{suffix}",
            f"{title}: {', '.join(responses)}",
            lambda dark: plot_heat(
                responses,
                title=title,
                value_label="magnitude",
                extent=(-0.5, 0.5, -0.5, 0.5),
                x_label="cycles per pixel",
                y_label="cycles per pixel",
                dark=dark,
            ),
            ["filter", "vertical_frequency", "horizontal_frequency", "magnitude"],
            [
                [name, frequency[row], frequency[column], float(value)]
                for name, response in responses.items()
                for (row, column), value in np.ndenumerate(response)
            ],
        )
        if self.image is None:
            return
        if self.first.offsets is not None:
            yield self._arrows(self.first.offsets, self.image, f"{prefix}_offsets{suffix}", model)
        if self.first.detail is not None:
            yield self._detail(self.first.detail, self.image, f"{prefix}_detail{suffix}", model)

    def _arrows(self, offsets: Tensor, image: np.ndarray[Any, Any], name: str, model: str) -> "Chart":
        title = "Offsets" + model
        height, width = offsets.shape[1:]
        step = -(-max(height, width) // ARROWS)
        rows, columns = (
            grid.flatten()
            for grid in np.meshgrid(
                np.arange(step // 2, height, step), np.arange(step // 2, width, step), indexing="ij"
            )
        )
        along = offsets[:, rows, columns].T.numpy()
        pixel = np.array([image.shape[1] / width, image.shape[0] / height])
        coarse = np.array(
            [image.shape[1] / self.first.coarse_size[1], image.shape[0] / self.first.coarse_size[0]]
        )
        places = (np.stack([columns, rows], axis=1) + 0.5) * pixel - 0.5
        return Chart(
            name,
            f"{title}: arrows over the image",
            lambda dark: plot_arrows(
                image,
                places,
                along * coarse,
                title=title,
                unit=float(coarse[0]),
                unit_name="coarse pixels",
                dark=dark,
            ),
            ["row", "column", "x", "y"],
            [
                [row, column, *arrow]
                for row, column, arrow in zip(rows.tolist(), columns.tolist(), along.tolist(), strict=True)
            ],
        )

    def _detail(self, detail: Tensor, image: np.ndarray[Any, Any], name: str, model: str) -> "Chart":
        title = "Added detail" + model
        values = detail.numpy()
        return Chart(
            name,
            f"{title}: the image, and where the high-pass filter changes the fine map",
            lambda dark: plot_heat(
                {"detail": values}, title=title, value_label="root mean square", image=image, dark=dark
            ),
            ["row", "column", "detail"],
            [[row, column, float(value)] for (row, column), value in np.ndenumerate(values)],
        )


@dataclass(frozen=True)
class Chart:
    """A figure with its numbers."""

    name: str
    """Of its files, without suffix."""
    description: str
    draw: Callable[[bool], Figure]
    """For a dark page (True) or a light one."""
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


class FeatureStudy:
    """Takes images one after the other, and writes what was found.

    Args:
        classes: names by index.
        palette: their RGB colours.
        source: what was measured, for the page.
        command: how to do it again, for the page.
        ignore_index: the label of pixels without truth.
    """

    def __init__(
        self,
        classes: Sequence[str],
        palette: Sequence[Colour],
        source: str,
        command: str = "",
        ignore_index: int = 255,
    ) -> None:
        self.classes = tuple(classes)
        self.palette = tuple(palette)
        self.source = source
        self.command = command
        self.ignore_index = ignore_index
        self._images = 0
        self._scenes: list[Scene] = []
        self._similarity: dict[str, dict[str, FeatureSimilarity]] = {}
        self._spectra: dict[str, dict[str, _Spectra]] = {}
        self._boundaries: dict[str, BoundaryDistance] = {}
        self._inside: dict[str, dict[str, _Inside | None]] = {}
        self._first = ""

    def add(self, observation: Observation, *, show: bool = False) -> None:
        """Measure an image; ``show`` it in the explorer.

        Raises:
            TypeError, ValueError: for features or labels that cannot be measured (see
                :meth:`~freqfusion.analysis.similarity.FeatureSimilarity.update`), or other levels or variants than
                before.
        """
        found = {level: list(maps) for level, maps in observation.maps.items()}
        if not self._similarity:
            self._similarity = {
                level: {name: FeatureSimilarity(len(self.classes), self.ignore_index) for name in names}
                for level, names in found.items()
            }
            self._spectra = {level: {name: _Spectra() for name in names} for level, names in found.items()}
            if len({tuple(names) for names in found.values()}) != 1 or not self.variants:
                raise ValueError(f"all levels must have the same variants, at least one; got {found}")
        if found != {level: list(self.variants) for level in self._similarity}:
            raise ValueError(
                f"all images must have the same levels and variants: {observation.name} has {found}, expected "
                f"{', '.join(self.variants)} at {', '.join(self._similarity)}"
            )
        for level, maps in observation.maps.items():
            for variant, features in maps.items():
                labels = observation.labels[None].to(features.device)
                try:
                    self._similarity[level][variant].update(features[None], labels)
                    self._spectra[level][variant].update(features[None], labels, self.ignore_index)
                except ValueError as error:
                    raise ValueError(f"{observation.name}, {level}, {variant}: {error}") from error
        for model, prediction in observation.predictions.items():
            distances = self._boundaries.setdefault(
                model, BoundaryDistance(len(self.classes), self.ignore_index)
            )
            distances.update(prediction[None].cpu(), observation.labels[None].cpu())
        for level, found_inside in observation.internals.items():
            known = self._inside.setdefault(level, {})
            for model, internals in found_inside.items():
                if model not in known:
                    known[model] = None if internals is None else _Inside(internals, _pixels(observation))
                inside = known[model]
                if inside is not None and internals is not None:
                    inside.update(internals)
        self._first = self._first or observation.name
        self._images += 1
        if show:
            self._scenes.append(_scene(observation))

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the maps of each level."""
        return tuple(next(iter(self._similarity.values()), ()))

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
        if not self._images:
            raise ValueError("there is no image to measure")
        return {
            level: {name: similarity.compute() for name, similarity in maps.items()}
            for level, maps in self._similarity.items()
        }

    def write(self, out: Path) -> None:
        """Write ``report.html``, ``similarity.csv``, ``results.json`` and ``figures/`` into a folder.

        With predictions, also ``boundary_displacement.csv``.

        Raises:
            ValueError: before the first image, if no pixel has a class, or if too many images are shown.
        """
        results = self.results()
        charts = {
            level: list(self._charts(number, level, maps))
            for number, (level, maps) in enumerate(results.items(), 1)
        }
        inside = {level: list(self._inside_charts(number, level)) for number, level in enumerate(results, 1)}
        for chart in chain(*charts.values(), *inside.values()):
            figure = chart.draw(False)
            for file_format in ("png", "svg"):
                data = figure_bytes(figure, file_format)
                write_atomically(out / "figures" / f"{chart.name}.{file_format}", data)
            write_atomically(out / "figures" / f"{chart.name}.csv", _csv(chart.header, chart.rows))
        rows = [
            {"level": level, "variant": variant, **row}
            for level, maps in results.items()
            for variant, result in maps.items()
            for row in result.rows(self.classes)
        ]
        write_atomically(out / "similarity.csv", _csv(list(rows[0]), [list(row.values()) for row in rows]))
        displacements = [
            {"model": model, **row}
            for model, result in self.displacements().items()
            for row in result.rows(self.classes)
        ]
        if displacements:
            cells = [list(row.values()) for row in displacements]
            write_atomically(out / "boundary_displacement.csv", _csv(list(displacements[0]), cells))
        content = {
            "source": self.source,
            "command": self.command,
            "images": self._images,
            "classes": self.classes,
            "boundary_width": self._boundary_width,
            "summary": self.summary(),
            "boundary_displacement": displacements,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(out / "results.json", (text + "\n").encode())
        write_report(out / "report.html", self._report(results, charts, inside))

    def summary(self) -> list[dict[str, Any]]:
        """A row a level and variant: the measures over all pixels and over the boundary's; None if undefined."""
        return [
            {"level": level, "variant": variant}
            | {
                f"{measure}_{region}": getattr(result.pixel_mean[region], measure)
                for region in REGIONS
                for measure in MEASURES
            }
            | {f"high_{region}": self._spectra[level][variant].energies[region].share for region in REGIONS}
            for level, maps in self.results().items()
            for variant, result in maps.items()
        ]

    def tables(self) -> list[Table]:
        """The summary as a table a region."""
        levels = list(self._similarity)
        names = MEASURES | {"high": "high frequencies"}
        listed = "; ".join(f"{number}: {level}" for number, level in enumerate(levels, 1))
        note = f"Levels: {listed}. {DEFINITIONS.format(width=self._boundary_width)}"
        tables: list[Table] = []
        for region, title in REGIONS.items():
            rows = [
                [
                    f"{levels.index(row['level']) + 1}, {row['variant']}",
                    *(_number(row[f"{key}_{region}"], key) for key in names),
                ]
                for row in self.summary()
            ]
            is_last = len(tables) == len(REGIONS) - 1
            tables.append(Table([f"{title}: level", *names.values()], rows, note=note if is_last else ""))
        return tables

    def displacements(self) -> dict[str, BoundaryDistanceResult]:
        """How far predicted boundaries are off, by model; nothing without predictions."""
        return {model: distances.compute() for model, distances in self._boundaries.items()}

    def displacement_tables(self) -> list[Table]:
        """Of all classes together, and class by class in either direction; no table without predictions."""
        results = self.displacements()
        if not results:
            return []
        words = {direction: direction.replace("_", " ") for direction in DIRECTIONS}
        within = next(iter(self._boundaries.values())).within
        columns = ["mean", "95 %", *(f"≤ {n} px" for n in within), "pixels", "unmatched"]

        def row(name: str, model: str, score: BoundaryDisplacement) -> list[str]:
            distances = ["-" if x is None else f"{x:.2f}" for x in (score.mean, score.percentile_95)]
            shares = ["-" if x is None else f"{100 * x:.1f} %" for x in score.within.values()]
            label = f"{name}, {model}" if len(results) > 1 else name
            return [label, *distances, *shares, str(score.pixels), str(score.unmatched)]

        overall = [
            row(words[direction], model, result.overall[direction])
            for direction in DIRECTIONS
            for model, result in results.items()
        ]
        tables = [Table(["boundaries", *columns], overall, note=DISPLACEMENT)]
        pixels: dict[int, int] = {}
        for result in results.values():
            for index, score in result.per_class["both"].items():
                pixels[index] = max(pixels.get(index, 0), score.pixels)
        largest = sorted(sorted(pixels, key=lambda index: -pixels[index])[:CLASSES_SHOWN])
        note = f"The {CLASSES_SHOWN} classes with the most boundary; boundary_displacement.csv has all."
        for direction in DIRECTIONS[:2]:
            rows = [
                row(self.classes[index], model, result.per_class[direction][index])
                for index in largest
                for model, result in results.items()
                if index in result.per_class[direction]
            ]
            if rows:
                few = note if len(pixels) > CLASSES_SHOWN else ""
                tables.append(Table([f"{words[direction]}: class", *columns], rows, note=few))
        return tables

    @property
    def _boundary_width(self) -> int | float:
        return next(iter(self._similarity.values()))[self.variants[0]].boundary_width

    def _charts(self, number: int, level: str, maps: Mapping[str, SimilarityResult]) -> Iterator[Chart]:
        for measure in ("intra", "margin"):
            yield from self._class_chart(number, maps, measure)
        for region in REGIONS:
            yield from self._histogram(number, maps, region)
        yield from self._distance_chart(number, maps)
        yield from self._spectrum_chart(number, level)

    def _inside_charts(self, number: int, level: str) -> Iterator[Chart]:
        models = self._inside.get(level, {})
        for place, (model, inside) in enumerate(models.items(), 1):
            if inside is not None:
                several = len(models) > 1
                suffix, words = (f"_model{place}", f", {model}") if several else ("", "")
                yield from inside.charts(f"level{number}", suffix, words)

    def _class_chart(
        self, number: int, maps: Mapping[str, SimilarityResult], measure: str
    ) -> Iterator[Chart]:
        """Bars a class; none where nothing is defined."""
        scores = {name: result.per_class["all"] for name, result in maps.items()}
        pixels = {
            index: max(scores[name][index].pixels for name in scores if index in scores[name])
            for index in sorted(set().union(*scores.values()))
        }

        def values(index: int) -> dict[str, float]:
            found = {name: getattr(scores[name][index], measure) for name in scores if index in scores[name]}
            return {name: value for name, value in found.items() if value is not None}

        every = {index: values(index) for index in pixels}
        largest = sorted((i for i in every if every[i]), key=lambda i: -pixels[i])[:CLASSES_SHOWN]
        if not largest:
            return
        title = f"{MEASURES[measure]} by class"
        shown = {self.classes[index]: every[index] for index in sorted(largest)}
        yield Chart(
            f"level{number}_{measure}_by_class",
            f"{title}: {', '.join(maps)}",
            lambda dark: plot_paired_bars(shown, title=title, x_label="cosine similarity", dark=dark),
            ["class_index", "class", "pixels", *maps],
            [
                [index, self.classes[index], pixels[index], *(every[index].get(name) for name in maps)]
                for index in every
            ],
        )

    def _histogram(self, number: int, maps: Mapping[str, SimilarityResult], region: str) -> Iterator[Chart]:
        counts = {name: result.margin_histogram[region] for name, result in maps.items()}
        counts = {name: entries for name, entries in counts.items() if sum(entries)}
        if not counts:
            return
        edges = next(iter(maps.values())).margin_edges
        used = np.flatnonzero(np.sum(list(counts.values()), axis=0))
        part = slice(int(used[0]), int(used[-1]) + 1)
        title = f"SimMargin of {REGIONS[region]}"
        yield Chart(
            f"level{number}_margin_histogram_{region}",
            f"{title}: {', '.join(counts)}",
            partial(
                _draw_histograms,
                {name: entries[part] for name, entries in counts.items()},
                edges[part.start : part.stop + 1],
                title,
            ),
            ["from", "to", *counts],
            [
                [low, high, *numbers]
                for low, high, *numbers in zip(edges[:-1], edges[1:], *counts.values(), strict=True)
            ],
        )

    def _distance_chart(self, number: int, maps: Mapping[str, SimilarityResult]) -> Iterator[Chart]:
        curves = {
            name: [
                (float(distance), score.margin)
                for distance, score in list(result.by_distance.items())[:-1]  # the last holds all beyond
                if score.margin is not None
            ]
            for name, result in maps.items()
        }
        if not any(curves.values()):
            return
        title = "SimMargin by distance to the boundary"
        distances = list(next(iter(maps.values())).by_distance)
        yield Chart(
            f"level{number}_margin_by_distance",
            f"{title}: {', '.join(curves)}",
            lambda dark: plot_curves(curves, title=title, x_label="pixels", y_label="SimMargin", dark=dark),
            ["distance", "pixels", *maps],
            [
                [
                    distance if distance < distances[-1] else f"{distance} and more",
                    next(iter(maps.values())).by_distance[distance].pixels,
                    *(result.by_distance[distance].margin for result in maps.values()),
                ]
                for distance in distances
            ],
        )

    def _spectrum_chart(self, number: int, level: str) -> Iterator[Chart]:
        curves = {name: spectra.curve() for name, spectra in self._spectra[level].items()}
        if not any(curves.values()):
            return
        title = "Power by frequency"
        yield Chart(
            f"level{number}_spectrum",
            f"{title}: {', '.join(curves)}",
            lambda dark: plot_curves(
                curves,
                title=title,
                x_label="cycles per pixel",
                y_label="power, relative to the mean",
                whole_steps=False,
                log_y=True,
                dark=dark,
            ),
            ["variant", "frequency", "power"],
            [[name, *point] for name, points in curves.items() for point in points],
        )

    def headline(self) -> str:
        """The outcome at the finest level in one sentence."""
        level = list(self._similarity)[-1]
        rows = {row["variant"]: row for row in self.summary() if row["level"] == level}
        left, right = (rows[name] for name in self.pair)
        if left["accuracy_all"] is None or right["accuracy_all"] is None:
            return "No pixel could be compared with another class"
        text = (
            f"SimAcc at the finest level: {self.pair[0]} {100 * left['accuracy_all']:.1f} %, {self.pair[1]} "
            f"{100 * right['accuracy_all']:.1f} %"
        )
        if left["accuracy_boundary"] is not None and right["accuracy_boundary"] is not None:
            text += (
                f"; along boundaries {100 * left['accuracy_boundary']:.1f} % and "
                f"{100 * right['accuracy_boundary']:.1f} %"
            )
        return text

    def _report(
        self,
        results: Mapping[str, Mapping[str, SimilarityResult]],
        charts: Mapping[str, Sequence[Chart]],
        inside: Mapping[str, Sequence[Chart]],
    ) -> Report:
        sections = [Section("", self.tables())]
        if self._scenes:
            explorer = build_explorer(self._scenes, self.classes, self.palette, self.pair)
            kept = [packed.kept for packed in explorer.packed.values()]
            sections.append(
                Section(
                    "Explorer",
                    [
                        Text(
                            "Click a pixel: each map shows how alike the features of all others are to it. Both maps "
                            "share one scale. A good map is bright on the class of the chosen pixel and dark "
                            "elsewhere, up to the outlines that the labels draw."
                        ),
                        Html(explorer.html),
                        Text(
                            f"Features are held here with 8 bits on at most {explorer.dims} principal axes, which "
                            f"keep {100 * min(kept):.1f} % to {100 * max(kept):.1f} % of a map's squared length; of "
                            "large maps some pixels were picked, evenly spread. Tables and figures are measured on "
                            "the whole features of every image."
                        ),
                        Swatches(self.classes, self.palette),
                    ],
                )
            )
        sections.append(
            Section(
                "Boundary displacement",
                self.displacement_tables() or [Text("Not measured: there are no predictions.")],
            )
        )
        note = INTERNALS.format(image=self._first)
        for level, of_level in reversed(list(charts.items())):
            blocks = [Curves([Drawing(chart.description, chart.draw) for chart in of_level])]
            if inside[level]:
                drawings = [Drawing(chart.description, chart.draw) for chart in inside[level]]
                blocks.append(Curves(drawings, note))
                note = ""  # once is enough
            sections.append(Section(f"Level {list(results).index(level) + 1}: {level}", blocks))
        many = len(self.classes) > CLASSES_SHOWN
        sections.append(
            Section(
                "How it was done",
                [
                    Text(
                        f"{self._images} images of {self.source}. Each went through the network once and whole. At "
                        "every site where a coarse map meets a fine one, the coarse map enlarged bilinearly, as "
                        f"standard fusion does, is called {BEFORE}; what the decoder gets in its place, {AFTER}. The "
                        "coarse map of a later site already holds what earlier fusions did. Features are brought to "
                        "the size of the labels bilinearly."
                        + (f" Figures show the {CLASSES_SHOWN} largest classes." if many else "")
                    )
                    if any(name.endswith(AFTER) for name in self.variants)
                    else Text(
                        f"{self._images} images of {self.source}. Features are brought to the size of the labels "
                        "bilinearly."
                    ),
                    *self._without_internals(),
                    *([Code(self.command)] if self.command else []),
                ],
            )
        )
        return Report(
            title="freqfusion analyze",
            headline=self.headline(),
            lede=f"How alike are features within a class, and how different between classes? {self._images} images, "
            f"{len(self._similarity)} levels.",
            sections=sections,
            footer=f"freqfusion {freqfusion.__version__}, PyTorch {torch.__version__}, Python "
            f"{platform.python_version()}.",
        )

    def _without_internals(self) -> list[Text]:
        """A sentence on the models that have sites of other methods."""
        names = {model for found in self._inside.values() for model, x in found.items() if x is None}
        if not names:
            return []
        return [
            Text(
                "Learned kernels, offsets and added detail are shown of FreqFusion modules; fusions of other methods "
                f"have none ({', '.join(sorted(names))})."
            )
        ]


def _draw_histograms(
    counts: Mapping[str, Sequence[float]], edges: Sequence[float], title: str, dark: bool
) -> Figure:
    return plot_histograms(counts, edges, title=title, x_label="SimMargin", dark=dark)


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


def _number(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if key.startswith(("accuracy", "high")) else f"{value:.3f}"


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return text.getvalue().encode("utf-8")
