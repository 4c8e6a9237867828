"""The results of a study as files: numbers, figures and a page with an explorer."""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from freqfusion.analysis.explorer import build_explorer
from freqfusion.analysis.measure import AFTER, BEFORE, FeatureStudy, Inside, Internals
from freqfusion.analysis.similarity import SimilarityResult
from freqfusion.analysis.tables import (
    CLASSES_SHOWN,
    MEASURES,
    REGIONS,
    csv_bytes,
    displacement_rows,
    displacement_tables,
    headline,
    similarity_rows,
    similarity_tables,
    summary,
)
from freqfusion.drawing.figures import (
    figure_bytes,
    plot_arrows,
    plot_curves,
    plot_heat,
    plot_histograms,
    plot_paired_bars,
)
from freqfusion.drawing.page_parts import (
    Code,
    Curves,
    Drawing,
    Html,
    Report,
    Section,
    Swatches,
    Text,
    write_report,
)

ARROWS = 24
"""Arrows along the longer side of an image, at most."""
INTERNALS = (
    "Kernel response: magnitude of the frequency response of the learned kernels, mean over all of an image and over "
    "the images, in cycles per pixel of the map that they filter; the high-pass filter is what its kernels leave of "
    "the fine map. Offsets: an arrow leads from a pixel towards where its feature is taken from, mean over the "
    "groups; some of the pixels are shown, evenly spread, and the key gives the length. Added detail: by how much "
    "the high-pass filter changes the fine map, root mean square over the channels. Offsets and detail are those of "
    "the first image, {image}."
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


def write_study(study: FeatureStudy, out: Path, source: str, command: str = "") -> None:
    """Write ``report.html``, ``similarity.csv``, ``results.json`` and ``figures/`` into a folder.

    With predictions, also ``boundary_displacement.csv``.

    Args:
        study: what was measured.
        out: the folder.
        source: what it was measured on, for the page.
        command: how to do it again, for the page.

    Raises:
        ValueError: before the first image, if no pixel has a class, or if too many images are shown.
    """
    results = study.results()
    charts = {
        level: list(_charts(study, number, level, maps))
        for number, (level, maps) in enumerate(results.items(), 1)
    }
    inside = {level: list(_inside_charts(study, number, level)) for number, level in enumerate(results, 1)}
    for chart in chain(*charts.values(), *inside.values()):
        figure = chart.draw(False)
        for file_format in ("png", "svg"):
            data = figure_bytes(figure, file_format)
            write_atomically(out / "figures" / f"{chart.name}.{file_format}", data)
        write_atomically(out / "figures" / f"{chart.name}.csv", csv_bytes(chart.header, chart.rows))
    rows = similarity_rows(study)
    write_atomically(out / "similarity.csv", csv_bytes(list(rows[0]), [list(row.values()) for row in rows]))
    displacements = displacement_rows(study)
    if displacements:
        cells = [list(row.values()) for row in displacements]
        write_atomically(out / "boundary_displacement.csv", csv_bytes(list(displacements[0]), cells))
    content = {
        "source": source,
        "command": command,
        "images": study.images,
        "classes": study.classes,
        "boundary_width": study.boundary_width,
        "summary": summary(study),
        "boundary_displacement": displacements,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(out / "results.json", (text + "\n").encode())
    write_report(out / "report.html", _report(study, source, command, charts, inside))


def _report(
    study: FeatureStudy,
    source: str,
    command: str,
    charts: Mapping[str, Sequence[Chart]],
    inside: Mapping[str, Sequence[Chart]],
) -> Report:
    sections = [Section("", similarity_tables(study))]
    if study.scenes:
        explorer = build_explorer(study.scenes, study.classes, study.palette, study.pair)
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
                    Swatches(study.classes, study.palette),
                ],
            )
        )
    sections.append(
        Section(
            "Boundary displacement",
            displacement_tables(study) or [Text("Not measured: there are no predictions.")],
        )
    )
    note = INTERNALS.format(image=study.first)
    for level, of_level in reversed(list(charts.items())):
        blocks = [Curves([Drawing(chart.description, chart.draw) for chart in of_level])]
        if inside[level]:
            drawings = [Drawing(chart.description, chart.draw) for chart in inside[level]]
            blocks.append(Curves(drawings, note))
            note = ""  # once is enough
        sections.append(Section(f"Level {list(charts).index(level) + 1}: {level}", blocks))
    many = len(study.classes) > CLASSES_SHOWN
    sections.append(
        Section(
            "How it was done",
            [
                Text(
                    f"{study.images} images of {source}. Each went through the network once and whole. At "
                    "every site where a coarse map meets a fine one, the coarse map enlarged bilinearly, as "
                    f"standard fusion does, is called {BEFORE}; what the decoder gets in its place, {AFTER}. The "
                    "coarse map of a later site already holds what earlier fusions did. Features are brought to "
                    "the size of the labels bilinearly."
                    + (f" Figures show the {CLASSES_SHOWN} largest classes." if many else "")
                )
                if any(name.endswith(AFTER) for name in study.variants)
                else Text(
                    f"{study.images} images of {source}. Features are brought to the size of the labels "
                    "bilinearly."
                ),
                *_without_internals(study),
                *([Code(command)] if command else []),
            ],
        )
    )
    return Report(
        title="freqfusion analyze",
        headline=headline(study),
        lede=f"How alike are features within a class, and how different between classes? {study.images} images, "
        f"{len(study.similarity)} levels.",
        sections=sections,
        footer=f"freqfusion {freqfusion.__version__}, PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}.",
    )


def _without_internals(study: FeatureStudy) -> list[Text]:
    """A sentence on the models that have sites of other methods."""
    names = {model for found in study.inside.values() for model, x in found.items() if x is None}
    if not names:
        return []
    return [
        Text(
            "Learned kernels, offsets and added detail are shown of FreqFusion modules; fusions of other methods "
            f"have none ({', '.join(sorted(names))})."
        )
    ]


def _charts(
    study: FeatureStudy, number: int, level: str, maps: Mapping[str, SimilarityResult]
) -> Iterator[Chart]:
    for measure in ("intra", "margin"):
        yield from _class_chart(study, number, maps, measure)
    for region in REGIONS:
        yield from _histogram(number, maps, region)
    yield from _distance_chart(number, maps)
    yield from _spectrum_chart(study, number, level)


def _inside_charts(study: FeatureStudy, number: int, level: str) -> Iterator[Chart]:
    models = study.inside.get(level, {})
    for place, (model, inside) in enumerate(models.items(), 1):
        if inside is not None:
            several = len(models) > 1
            suffix, words = (f"_model{place}", f", {model}") if several else ("", "")
            yield from _of_site(inside, f"level{number}", suffix, words)


def _class_chart(
    study: FeatureStudy, number: int, maps: Mapping[str, SimilarityResult], measure: str
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
    shown = {study.classes[index]: every[index] for index in sorted(largest)}
    yield Chart(
        f"level{number}_{measure}_by_class",
        f"{title}: {', '.join(maps)}",
        lambda dark: plot_paired_bars(shown, title=title, x_label="cosine similarity", dark=dark),
        ["class_index", "class", "pixels", *maps],
        [
            [index, study.classes[index], pixels[index], *(every[index].get(name) for name in maps)]
            for index in every
        ],
    )


def _histogram(number: int, maps: Mapping[str, SimilarityResult], region: str) -> Iterator[Chart]:
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


def _distance_chart(number: int, maps: Mapping[str, SimilarityResult]) -> Iterator[Chart]:
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


def _spectrum_chart(study: FeatureStudy, number: int, level: str) -> Iterator[Chart]:
    curves = {name: spectra.curve() for name, spectra in study.spectra[level].items()}
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


def _draw_histograms(
    counts: Mapping[str, Sequence[float]], edges: Sequence[float], title: str, dark: bool
) -> Figure:
    return plot_histograms(counts, edges, title=title, x_label="SimMargin", dark=dark)


def _of_site(inside: Inside, prefix: str, suffix: str, model: str) -> Iterator[Chart]:
    """Kernels, offsets and detail, as far as the module has them."""
    title = "Kernel response" + model
    responses = inside.responses
    frequency = next(iter(inside.first.kernels.values())).frequency.tolist()
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
    if inside.image is None:
        return
    if inside.first.offsets is not None:
        yield _arrows(inside.first, inside.image, f"{prefix}_offsets{suffix}", model)
    if inside.first.detail is not None:
        yield _detail(inside.first.detail, inside.image, f"{prefix}_detail{suffix}", model)


def _arrows(first: Internals, image: np.ndarray[Any, Any], name: str, model: str) -> Chart:
    offsets, coarse_size = first.offsets, first.coarse_size
    assert offsets is not None
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
    coarse = np.array([image.shape[1] / coarse_size[1], image.shape[0] / coarse_size[0]])
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


def _detail(detail: Tensor, image: np.ndarray[Any, Any], name: str, model: str) -> Chart:
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
