"""The numbers of a study as rows: for the console, the page and CSV files."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from freqfusion.analysis.measure import FeatureStudy
from freqfusion.drawing.page_parts import Table
from freqfusion.metrics.boundary_distance import DIRECTIONS, BoundaryDisplacement

CLASSES_SHOWN = 20
"""Classes in a figure, those with the most pixels; the CSV has all."""
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


def similarity_rows(study: FeatureStudy) -> list[dict[str, Any]]:
    """A row per level, variant, region and class."""
    return [
        {"level": level, "variant": variant, **row}
        for level, maps in study.results().items()
        for variant, result in maps.items()
        for row in result.rows(study.classes)
    ]


def displacement_rows(study: FeatureStudy) -> list[dict[str, Any]]:
    """A row a model, direction and class; none without predictions."""
    return [
        {"model": model, **row}
        for model, result in study.displacements().items()
        for row in result.rows(study.classes)
    ]


def summary(study: FeatureStudy) -> list[dict[str, Any]]:
    """A row per level and variant: the measures over all pixels and over the boundary's; None if undefined."""
    return [
        {"level": level, "variant": variant}
        | {
            f"{measure}_{region}": getattr(result.pixel_mean[region], measure)
            for region in REGIONS
            for measure in MEASURES
        }
        | {f"high_{region}": study.spectra[level][variant].energies[region].share for region in REGIONS}
        for level, maps in study.results().items()
        for variant, result in maps.items()
    ]


def similarity_tables(study: FeatureStudy) -> list[Table]:
    """The summary as a table a region."""
    levels = list(study.similarity)
    names = MEASURES | {"high": "high frequencies"}
    listed = "; ".join(f"{number}: {level}" for number, level in enumerate(levels, 1))
    note = f"Levels: {listed}. {DEFINITIONS.format(width=study.boundary_width)}"
    tables: list[Table] = []
    for region, title in REGIONS.items():
        rows = [
            [
                f"{levels.index(row['level']) + 1}, {row['variant']}",
                *(_number(row[f"{key}_{region}"], key) for key in names),
            ]
            for row in summary(study)
        ]
        is_last = len(tables) == len(REGIONS) - 1
        tables.append(Table([f"{title}: level", *names.values()], rows, note=note if is_last else ""))
    return tables


def displacement_tables(study: FeatureStudy) -> list[Table]:
    """Of all classes together, and class by class in either direction; no table without predictions."""
    results = study.displacements()
    if not results:
        return []
    words = {direction: direction.replace("_", " ") for direction in DIRECTIONS}
    within = next(iter(study.boundaries.values())).within
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
            row(study.classes[index], model, result.per_class[direction][index])
            for index in largest
            for model, result in results.items()
            if index in result.per_class[direction]
        ]
        if rows:
            few = note if len(pixels) > CLASSES_SHOWN else ""
            tables.append(Table([f"{words[direction]}: class", *columns], rows, note=few))
    return tables


def headline(study: FeatureStudy) -> str:
    """The outcome at the finest level in one sentence."""
    level = list(study.similarity)[-1]
    rows = {row["variant"]: row for row in summary(study) if row["level"] == level}
    left, right = (rows[name] for name in study.pair)
    if left["accuracy_all"] is None or right["accuracy_all"] is None:
        return "No pixel could be compared with another class"
    text = (
        f"SimAcc at the finest level: {study.pair[0]} {100 * left['accuracy_all']:.1f} %, {study.pair[1]} "
        f"{100 * right['accuracy_all']:.1f} %"
    )
    if left["accuracy_boundary"] is not None and right["accuracy_boundary"] is not None:
        text += (
            f"; along boundaries {100 * left['accuracy_boundary']:.1f} % and "
            f"{100 * right['accuracy_boundary']:.1f} %"
        )
    return text


def _number(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if key.startswith(("accuracy", "high")) else f"{value:.3f}"


def csv_bytes(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A CSV file; an empty cell for None."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return text.getvalue().encode("utf-8")
