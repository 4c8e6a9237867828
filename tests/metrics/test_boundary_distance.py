"""Boundary displacement against hand-counted cases and an oracle that looks at every pair of pixels."""

import math
import sys

import numpy as np
import pytest
import torch

from freqfusion.metrics.boundary_distance import (
    DIRECTIONS,
    RESOLUTION,
    BoundaryDistance,
    distance_to_boundary,
)


def blocks(generator: np.random.Generator, height: int, width: int, classes: int, block: int) -> np.ndarray:
    coarse = generator.integers(0, classes, (height // block + 1, width // block + 1))
    return np.kron(coarse, np.ones((block, block), int))[:height, :width]


def naive_distance_to_boundary(labels: np.ndarray, limit: int, ignore: int) -> np.ndarray:
    result = np.full(labels.shape, limit + 1)
    for y, x in np.ndindex(labels.shape):
        if labels[y, x] == ignore:
            continue
        for v, u in np.ndindex(labels.shape):
            if labels[v, u] not in (ignore, labels[y, x]):
                result[y, x] = min(result[y, x], max(abs(y - v), abs(x - u)))
    return result


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 12), (13, 5)])
def test_distance_to_boundary(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(shape))
    labels = np.stack([blocks(generator, *shape, 4, 4) for _ in range(3)])
    labels[generator.random(labels.shape) < 0.1] = 255
    actual = distance_to_boundary(torch.from_numpy(labels), 4)
    expected = np.stack([naive_distance_to_boundary(image, 4, 255) for image in labels])
    assert np.array_equal(actual.numpy(), expected)


def test_distance_to_boundary_refuses_nothing_to_look_for() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        distance_to_boundary(torch.zeros(1, 2, 2, dtype=torch.int64), 0)


class TestDisplacement:
    @pytest.fixture(autouse=True)
    def needs_scipy(self) -> None:
        pytest.importorskip("scipy")

    def oracle(
        self, preds: np.ndarray, targets: np.ndarray, classes: int
    ) -> dict[str, dict[int, list[float]]]:
        """Distances by direction and class; infinite without a counterpart."""
        found: dict[str, dict[int, list[float]]] = {direction: {} for direction in DIRECTIONS}
        for pred, target in zip(preds, targets, strict=True):
            seen = [np.where(target == 255, 255, x) for x in (target, pred)]
            edges = [naive_distance_to_boundary(x, 1, 255) == 1 for x in seen]
            for k in range(classes):
                sides = [np.argwhere(edge & (x == k)) for edge, x in zip(edges, seen, strict=True)]
                for direction, here, there in (
                    (DIRECTIONS[0], sides[0], sides[1]),
                    (DIRECTIONS[1], sides[1], sides[0]),
                ):
                    for point in here:
                        nearest = min((math.dist(point, other) for other in there), default=math.inf)
                        for name in (direction, "both"):
                            found[name].setdefault(k, []).append(nearest)
        return found

    @pytest.mark.parametrize("seed", range(4))
    def test_against_every_pair_of_pixels(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        targets = np.stack([blocks(generator, 15, 18, 4, 6) for _ in range(3)])
        preds = np.where(generator.random(targets.shape) < 0.04, 7, np.roll(targets, seed, 2))
        targets[0, 3:5, 2:9] = 255
        metric = BoundaryDistance(num_classes=5, within=(0, 1, 2))
        for part in (slice(0, 1), slice(1, 3)):
            metric.update(torch.from_numpy(preds[part]), torch.from_numpy(targets[part]).to(torch.uint8))
        result = metric.compute()
        for direction, classes in self.oracle(preds, targets, 5).items():
            pooled = sorted(d for distances in classes.values() for d in distances)
            for score, distances in (
                *((result.per_class[direction][k], sorted(x)) for k, x in classes.items()),
                (result.overall[direction], pooled),
            ):
                matched = [d for d in distances if d < math.inf]
                assert (score.pixels, score.unmatched) == (len(distances), len(distances) - len(matched))
                for n, share in score.within.items():
                    assert share == pytest.approx(sum(d <= n for d in distances) / len(distances), abs=1e-12)
                if not matched:
                    assert (score.mean, score.percentile_95) == (None, None)
                    continue
                assert score.mean == pytest.approx(np.mean(matched), abs=1e-9)
                exact = np.percentile(matched, 95, method="inverted_cdf")
                assert abs(score.percentile_95 - exact) <= RESOLUTION / 2

    @pytest.mark.parametrize("shift", [0, 1, 3])
    def test_a_shifted_edge_is_that_far_away(self, shift: int) -> None:
        target = torch.zeros(1, 20, 30, dtype=torch.int64)
        pred = target.clone()
        target[:, :, 10:], pred[:, :, 10 + shift :] = 1, 1
        metric = BoundaryDistance(2)
        metric.update(pred, target)
        for score in metric.compute().overall.values():
            assert score.mean == score.percentile_95 == shift
            assert score.within[1] == float(shift <= 1)

    def test_missed_and_invented_objects_count_as_beyond_every_distance(self) -> None:
        target = torch.zeros(1, 12, 12, dtype=torch.int64)
        target[:, 4:8, 4:8] = 1
        pred = torch.zeros_like(target)
        metric = BoundaryDistance(3)
        metric.update(pred, target)
        result = metric.compute()
        missed = result.per_class["truth_to_prediction"][1]
        assert (missed.mean, missed.pixels, missed.unmatched, missed.within[5]) == (None, 12, 12, 0.0)
        nothing = result.overall["prediction_to_truth"]
        assert (nothing.mean, nothing.percentile_95, nothing.pixels, nothing.within[5]) == (
            None,
            None,
            0,
            None,
        )

    def test_neither_ignored_pixels_nor_the_border_make_a_boundary(self) -> None:
        target = torch.zeros(1, 12, 12, dtype=torch.int64)
        target[:, :, 6:] = 1
        target[:, :, 5:7] = 255  # a band over the boundary, as in Pascal VOC
        metric = BoundaryDistance(2)
        metric.update(torch.zeros_like(target).index_fill(2, torch.arange(6, 12), 1), target)
        result = metric.compute()
        assert result.per_class["both"] == {}
        assert result.overall["both"].pixels == 0

    def test_rows_have_no_nan(self) -> None:
        target = torch.zeros(2, 9, 9, dtype=torch.int64)
        target[0, 3:5], target[1] = 2, 255
        metric = BoundaryDistance(10_000, within=(2,))
        metric.update(torch.ones_like(target), target)
        rows = metric.compute().rows()
        assert list(rows[0]) == [
            "direction",
            "class",
            "mean",
            "percentile_95",
            "within_2",
            "pixels",
            "unmatched",
        ]
        assert [row["class"] for row in rows] == [0, 2, "all classes"] * 3
        assert not [x for row in rows for x in row.values() if isinstance(x, float) and math.isnan(x)]
        names = [str(k) for k in range(10_000)]
        assert metric.compute().rows(names)[1]["class"] == "2"

    def test_bad_input(self) -> None:
        labels = torch.zeros(1, 4, 4, dtype=torch.int64)
        metric = BoundaryDistance(2)
        with pytest.raises(ValueError, match="resize the prediction"):
            metric.update(labels[:, :2], labels)
        with pytest.raises(ValueError, match=r"labels \[9\]"):
            metric.update(labels, labels + 9)
        with pytest.raises(TypeError, match="argmax"):
            metric.update(labels.float(), labels)
        assert metric.compute().overall["both"].pixels == 0


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        BoundaryDistance(0)
    with pytest.raises(ValueError, match="within"):
        BoundaryDistance(2, within=(-1,))


def test_without_scipy_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ImportError, match=r"scipy is not installed.*pip install"):
        BoundaryDistance(2).update(labels, labels)
