"""Feature similarity against the released tool's figures, a pixel-by-pixel oracle, and bad input."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freqfusion.analysis import similarity as module
from freqfusion.analysis.similarity import FeatureSimilarity, SimilarityScores, similarity_map
from support import GOLDEN

CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label ids of the 19 classes."""

RUNS = [
    (name, run)
    for name in ("featsim_a", "featsim_a_clip")
    for run in json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
]


def golden(name: str, run: str) -> tuple[dict, list[torch.Tensor], torch.Tensor]:
    """What the tool printed, its features and its labels as classes."""
    printed = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))[run]
    config = printed["config"]
    with np.load(GOLDEN / f"{name}.npz") as archive:
        ids = archive["labels"][: config["num"]]
        maps = [torch.from_numpy(archive[f"feat/{x}"][: config["num"]]) for x in config["feature_sets"]]
    labels = np.full(ids.shape, 255)
    for k, label_id in enumerate(CITYSCAPES):
        labels[ids == label_id] = k
    if config["channel_clip"]:
        maps = [x[:, :256] for x in maps]
    return printed, maps, torch.from_numpy(labels)


def official(run: dict) -> tuple[FeatureSimilarity, str]:
    edge_k = run["config"]["edge_k"]
    width = (edge_k + 1) // 2 or 3
    similarity = FeatureSimilarity(
        19, protocol="official", boundary_width=width, mode=run["config"]["inter_mode"]
    )
    return similarity, "boundary" if edge_k else "all"


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_equals_the_released_tool(name: str, run: str) -> None:
    printed, maps, labels = golden(name, run)
    similarity, region = official(printed)
    for image in range(len(labels)):
        similarity.update([x[image : image + 1] for x in maps], labels[image : image + 1])
    result = similarity.compute()
    if "raised" in printed:  # the tool divides by zero after one image
        assert (result.class_mean[region].intra, result.pixel_mean[region].accuracy) == (None, None)
        assert result.class_mean[region].accuracy is None
        return
    mean, summary = result.class_mean[region], printed["summary"]
    actual = {
        "intra_mean_over_classes": mean.intra,
        "intra_std_mean": mean.intra_std,
        "inter_mean_over_classes": mean.inter,
        "inter_std_mean": mean.inter_std,
        "printed_as_pixel_average__is_class_mean_accuracy": mean.accuracy,
        "printed_as_category_average__is_pixel_accuracy": result.pixel_mean[region].accuracy,
    }
    assert actual == pytest.approx(summary, abs=1e-6)
    scores = result.per_class[region]
    assert set(scores) == {int(k) for k in printed["error"]}
    for k, expected in printed["intra"].items():
        score = scores[int(k)]
        assert (score.pixels, score.images) == (sum(expected["pixels"]), expected["images"])
        pair = (expected["mean_over_all_pixels"], expected["std_over_all_pixels"])
        wanted = pytest.approx(pair, abs=1e-6) if expected["counted"] else (None, None)
        assert (score.intra, score.intra_std) == wanted
    for k, expected in printed["inter"].items():
        score = scores[int(k)]
        assert score.compared == expected["pairs"]
        wanted = (
            pytest.approx((expected["mean"], expected["std"]), abs=1e-6)
            if expected["counted"]
            else (None, None)
        )
        assert (score.inter, score.inter_std) == wanted
    for k, expected in printed["error"].items():
        accuracy = scores[int(k)].accuracy
        if not expected["counted"]:
            assert accuracy is None
            continue
        wrong = (1 - accuracy) * sum(expected["all_pixels"])
        assert wrong == pytest.approx(sum(expected["error_pixels"]), abs=1e-6)


def test_official_edges_miss_a_cancelled_boundary_and_those_near_ignored_pixels() -> None:
    labels = torch.zeros(9, 12, dtype=torch.int64)
    labels[:, 4], labels[:, 5:] = 1, 2
    ramp = labels[4].clone()  # 0 0 0 0 1 2 2 ...: the Laplacian of column 4 is 0 + 2 - 2 * 1 = 0
    edges = module._official_edges(labels, 1, 255)
    assert ramp[3:6].tolist() == [0, 1, 2]
    assert edges[4].nonzero().flatten().tolist() == [3, 5]
    labels[0, 3] = 255
    edges = module._official_edges(labels, 3, 255)
    assert not edges[:2, 2:5].any()
    assert edges[3, 2:7].all()
    assert module._official_edges(labels[:1, :1], 5, 255).tolist() == [[False]]


def test_official_accuracy_counts_images_with_a_centre_and_similarity_those_with_edges() -> None:
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[0, :, 4:] = 1
    similarity = FeatureSimilarity(2, protocol="official", boundary_width=1)
    similarity.update(torch.nn.functional.one_hot(labels, 2).permute(0, 3, 1, 2).float(), labels)
    scores = similarity.compute().per_class["boundary"]
    assert (scores[0].intra, scores[0].accuracy, scores[0].pixels) == (None, 1, 8)
    assert (scores[1].intra, scores[1].accuracy) == (None, None)


def oracle(
    maps: list[np.ndarray], labels: list[np.ndarray], width: int, ignore: int, dataset: bool
) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """For each region and class the pairs (IntraSim, InterSim) of its pixels, one pixel at a time."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / lengths) if lengths else 0.0

    vectors: list[dict[int, list[np.ndarray]]] = [{} for _ in maps]
    for features, truth, found in zip(maps, labels, vectors, strict=True):
        for y, x in np.ndindex(truth.shape):
            if truth[y, x] != ignore:
                found.setdefault(int(truth[y, x]), []).append(features[:, y, x])
    if dataset:
        pooled: dict[int, list[np.ndarray]] = {}
        for found in vectors:
            for k, values in found.items():
                pooled.setdefault(k, []).extend(values)
        vectors = [pooled] * len(maps)
    pairs: dict[str, dict[int, list[tuple[float, float]]]] = {"all": {}, "interior": {}, "boundary": {}}
    for features, truth, found in zip(maps, labels, vectors, strict=True):
        centres = {k: np.mean(values, axis=0) for k, values in found.items()}
        for y, x in np.ndindex(truth.shape):
            k = int(truth[y, x])
            if k == ignore:
                continue
            window = truth[max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
            near = any(other not in (k, ignore) for other in window.flatten().tolist())
            others = [cosine(features[:, y, x], mu) for other, mu in centres.items() if other != k]
            pair = (cosine(features[:, y, x], centres[k]), max(others, default=math.nan))
            for region in ("all", "boundary" if near else "interior"):
                pairs[region].setdefault(k, []).append(pair)
    return pairs


def blocks(
    generator: np.random.Generator, height: int, width: int, classes: int, block: int = 4
) -> np.ndarray:
    coarse = generator.integers(0, classes, (height // block + 1, width // block + 1))
    return np.kron(coarse, np.ones((block, block), int))[:height, :width]


@pytest.mark.parametrize("centres", ["image", "dataset"])
@pytest.mark.parametrize("width", [1, 2])
def test_paper_protocol_against_the_definition(centres: str, width: int) -> None:
    generator = np.random.default_rng(width)
    labels = [blocks(generator, 11, 14, 4) for _ in range(3)]
    labels[0][2:4, 3:9] = 9
    maps = [generator.standard_normal((5, 11, 14)) + truth for truth in labels]
    similarity = FeatureSimilarity(5, ignore_index=9, boundary_width=width, centres=centres)
    batches = [
        (torch.from_numpy(np.stack(maps[part])), torch.from_numpy(np.stack(labels[part])))
        for part in (slice(0, 2), slice(2, 3))
    ]
    if centres == "dataset":
        for batch in batches:
            similarity.fit_centres(*batch)
    for batch in batches:
        similarity.update(*batch)
    result = similarity.compute()
    expected = oracle(maps, labels, width, 9, centres == "dataset")
    for region, classes in expected.items():
        assert set(result.per_class[region]) == set(classes)
        for k, pairs in classes.items():
            intra, inter = np.array(pairs).T
            score = result.per_class[region][k]
            assert score.pixels == score.compared == len(pairs)
            assert score.intra == pytest.approx(intra.mean(), abs=1e-12)
            assert score.intra_std == pytest.approx(intra.std(ddof=1), abs=1e-9)
            assert score.inter == pytest.approx(inter.mean(), abs=1e-12)
            assert score.margin == pytest.approx((intra - inter).mean(), abs=1e-12)
            assert score.accuracy == (intra > inter).mean()
        mean = result.class_mean[region]
        assert mean.margin == pytest.approx(
            np.mean([np.subtract(*np.array(x).T).mean() for x in classes.values()]), abs=1e-12
        )
        every = np.concatenate([np.array(x) for x in classes.values()])
        assert result.pixel_mean[region].intra == pytest.approx(every[:, 0].mean(), abs=1e-12)
        edges = np.array(result.intra_edges)
        assert result.intra_histogram[region] == np.histogram(every[:, 0], edges)[0].tolist()
        edges = np.array(result.margin_edges)
        assert result.margin_histogram[region] == np.histogram(every[:, 0] - every[:, 1], edges)[0].tolist()


def test_by_distance_divides_the_pixels() -> None:
    generator = np.random.default_rng(0)
    labels = torch.zeros(1, 20, 30, dtype=torch.int64)
    labels[:, :, 12:] = 1
    features = torch.from_numpy(generator.standard_normal((1, 4, 20, 30)))
    similarity = FeatureSimilarity(2, boundary_width=3, max_distance=5)
    similarity.update(features, labels)
    result = similarity.compute()
    assert [score.pixels for score in result.by_distance.values()] == [40] * 5 + [20 * 20]
    assert list(result.by_distance) == [1, 2, 3, 4, 5, 6]
    near = sum(result.by_distance[d].margin * 40 for d in (1, 2, 3)) / 120
    assert near == pytest.approx(result.pixel_mean["boundary"].margin, abs=1e-12)


def test_levels_are_resized_and_concatenated() -> None:
    torch.manual_seed(0)
    fine, coarse = torch.randn(2, 3, 16, 24), torch.randn(2, 5, 4, 6)
    labels = torch.randint(0, 3, (2, 32, 48))
    both = FeatureSimilarity(3)
    both.update([fine, coarse], labels)
    by_hand = FeatureSimilarity(3)
    up = [torch.nn.functional.interpolate(x, size=(32, 48), mode="bilinear") for x in (fine, coarse)]
    by_hand.update(torch.cat(up, 1), labels)
    assert both.compute() == by_hand.compute()


def test_size_and_half_precision() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(1, 3, 8, 12), torch.randint(0, 3, (1, 64, 96))
    small = FeatureSimilarity(3, size=(8, 12))
    small.update(features, labels)
    assert small.compute().pixel_mean["all"].pixels == 96
    by_hand = FeatureSimilarity(3)
    by_hand.update(features, labels[:, ::8, ::8])
    assert small.compute() == by_hand.compute()
    half = FeatureSimilarity(3, size=(8, 12))
    with torch.autocast("cpu", torch.bfloat16):
        half.update(features.bfloat16(), labels.to(torch.uint8))
    full = FeatureSimilarity(3, size=(8, 12))
    full.update(features.bfloat16().float(), labels)
    assert half.compute() == full.compute()


def test_maps_agree_with_the_scores() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(2, 4, 6, 9), torch.randint(0, 3, (2, 12, 18))
    labels[:, :3] = 255
    maps = similarity_map(features, labels)
    similarity = FeatureSimilarity(3)
    similarity.update(features, labels)
    result = similarity.compute()
    assert maps.scored.equal(labels != 255)
    assert not maps.intra[~maps.scored].any()
    for k, score in result.per_class["all"].items():
        assert float(maps.intra[labels == k].mean()) == pytest.approx(score.intra, abs=1e-6)
        assert float(maps.margin[labels == k].mean()) == pytest.approx(score.margin, abs=1e-6)
        assert float((maps.margin[labels == k] > 0).float().mean()) == pytest.approx(score.accuracy, abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e25]), chunk=st.integers(1, 64))
def test_scale_order_and_chunks_change_nothing(seed: int, scale: float, chunk: int) -> None:
    generator = np.random.default_rng(seed)
    features = torch.from_numpy(generator.standard_normal((3, 4, 8, 8))).float()
    labels = torch.from_numpy(np.stack([blocks(generator, 8, 8, 4, 3) for _ in range(3)]))
    once = FeatureSimilarity(4, boundary_width=1)
    once.update(features, labels)
    singly = FeatureSimilarity(4, boundary_width=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        for image in (2, 0, 1):
            singly.update(features[image : image + 1] * scale, labels[image : image + 1])
    for row, other in zip(once.compute().rows(), singly.compute().rows(), strict=True):
        assert row == pytest.approx(other, abs=1e-5)
        for name in ("intra", "inter"):
            assert row[name] is None or -1 <= row[name] <= 1


def test_perfect_and_worthless_features() -> None:
    labels = torch.from_numpy(blocks(np.random.default_rng(1), 12, 12, 3))[None]
    perfect = FeatureSimilarity(3)
    perfect.update(torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float(), labels)
    mean = perfect.compute().class_mean["all"]
    assert (mean.intra, mean.inter, mean.margin, mean.accuracy) == (1, 0, 1, 1)
    for worthless in (torch.zeros(1, 4, 12, 12), torch.ones(1, 4, 12, 12)):
        similarity = FeatureSimilarity(3)
        similarity.update(worthless, labels)
        mean = similarity.compute().class_mean["boundary"]
        assert (mean.margin, mean.accuracy) == (0, 0)
        released = FeatureSimilarity(3, protocol="official", boundary_width=1)
        released.update(worthless.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1))
        assert released.compute().class_mean["boundary"].accuracy == 1  # there a tie is a hit


def assert_no_nan(rows: list[dict]) -> None:
    assert not [
        row for row in rows for value in row.values() if isinstance(value, float) and math.isnan(value)
    ]


def test_a_single_class_has_no_inter_similarity() -> None:
    similarity = FeatureSimilarity(5)
    similarity.update(torch.rand(1, 3, 4, 4), torch.full((1, 8, 8), 2))
    result = similarity.compute()
    score = result.per_class["all"][2]
    assert score.intra == pytest.approx(0.9, abs=0.1)
    assert (score.inter, score.margin, score.accuracy, score.compared) == (None, None, None, 0)
    assert result.per_class["boundary"] == {}
    nothing = result.class_mean["boundary"]
    assert nothing == SimilarityScores(None, None, None, None, None, None, 0, 0, 1)
    assert_no_nan(result.rows())
    maps = similarity.maps(torch.rand(1, 3, 4, 4), torch.full((1, 8, 8), 2))
    assert maps.scored.all()
    assert not maps.compared.any()


def test_absent_classes_have_no_row() -> None:
    similarity = FeatureSimilarity(19)
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, 4:] = 7
    similarity.update(torch.rand(1, 3, 4, 4), labels)
    rows = similarity.compute().rows([f"class {k}" for k in range(19)])
    assert [row["class"] for row in rows if row["region"] == "all"] == [
        "class 0",
        "class 7",
        "class mean",
        "pixel mean",
    ]
    written = io.StringIO()
    writer = csv.DictWriter(written, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    assert "nan" not in written.getvalue()


@pytest.mark.parametrize("protocol", ["paper", "official"])
def test_ignored_images_and_one_pixel_maps(protocol: str) -> None:
    similarity = FeatureSimilarity(3, protocol=protocol)
    similarity.update(torch.rand(1, 3, 4, 4), torch.full((1, 8, 8), 255))
    similarity.update(torch.rand(0, 3, 4, 4), torch.zeros(0, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="no pixel with a class in 1 images"):
        similarity.compute()
    similarity.update(torch.rand(1, 3, 1, 1), torch.full((1, 1, 1), 2))
    result = similarity.compute()
    assert result.per_class["all"][2].pixels == 1
    assert result.images == 2
    assert_no_nan(result.rows())


def test_ten_thousand_classes() -> None:
    torch.manual_seed(0)
    labels = torch.arange(10_000)[torch.randperm(10_000)].view(1, 100, 100)
    similarity = FeatureSimilarity(10_000, ignore_index=-1)
    similarity.update(torch.randn(1, 4, 100, 100), labels)
    result = similarity.compute()
    assert len(result.per_class["all"]) == 10_000  # each its own centre
    assert result.class_mean["all"].accuracy == pytest.approx(1, abs=1e-2)
    assert result.class_mean["all"].intra == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("protocol", ["paper", "official"])
@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (
            torch.rand(2, 3, 8, 8),
            torch.zeros(1, 8, 8).long(),
            ValueError,
            "2 feature maps .* and 1 label maps",
        ),
        (
            torch.rand(1, 3, 8, 8),
            torch.full((1, 8, 8), 30),
            ValueError,
            r"labels hold \[30\], expected 0..18",
        ),
        (torch.rand(1, 3, 8, 8), torch.full((1, 8, 8), -3), ValueError, r"labels hold \[-3\]"),
        (
            torch.full((1, 3, 8, 8), torch.nan),
            torch.zeros(1, 8, 8).long(),
            ValueError,
            r"images \[0\] .* NaN",
        ),
        (torch.full((1, 3, 8, 8), torch.inf), torch.zeros(1, 8, 8).long(), ValueError, "infinite"),
        (torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8), TypeError, "integer dtype"),
        (torch.ones(1, 3, 8, 8).long(), torch.zeros(1, 8, 8).long(), TypeError, "floating point"),
        (torch.rand(3, 8, 8), torch.zeros(1, 8, 8).long(), ValueError, r"\(B, C, h, w\)"),
        (torch.rand(1, 0, 8, 8), torch.zeros(1, 8, 8).long(), ValueError, r"\(B, C, h, w\)"),
        (torch.rand(1, 3, 8, 8), torch.zeros(8, 8).long(), ValueError, r"\(B, H, W\)"),
        ([], torch.zeros(1, 8, 8).long(), ValueError, "at least one level"),
    ],
)
def test_bad_input(features, labels, error, message, protocol) -> None:
    similarity = FeatureSimilarity(19, protocol=protocol)
    with pytest.raises(error, match=message):
        similarity.update(features, labels)
    with pytest.raises(ValueError, match="no pixel with a class in 0 images"):
        similarity.compute()


@pytest.mark.parametrize(
    ("features", "labels"), [((8, 8), (8, 20)), ((16, 8), (32, 64)), ((20, 36), (64, 128))]
)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_features_of_other_proportions_are_the_released_tools_alone(
    features: tuple[int, int], labels: tuple[int, int], mode: str
) -> None:
    """The tool stretches features and labels to one grid, each by itself, whatever their sides."""
    maps = torch.randn(3, 5, *features)
    classes = torch.randint(0, 4, (3, *labels))
    with pytest.raises(ValueError, match="proportions: are they of the same"):
        FeatureSimilarity(19).update(maps, classes)
    options = {"num_classes": 19, "protocol": "official", "boundary_width": 2, "mode": mode}
    for grid in (None, (16, 40)):
        stretched, expected = FeatureSimilarity(size=grid, **options), FeatureSimilarity(**options)
        stretched.update(maps, classes)
        resized = torch.nn.functional.interpolate(maps, grid or labels, mode=mode)
        rows, columns = (
            [i * side // cells for i in range(cells)]
            for side, cells in zip(labels, grid or labels, strict=True)
        )
        expected.update(resized, classes[:, rows][:, :, columns])
        assert stretched.compute() == expected.compute()


def test_official_figures_of_stretched_features_by_hand() -> None:
    """Labels of 2 x 4 over features of 2 x 2, nearest: the columns 0, 0, 1, 1."""
    maps = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]]).repeat(2, 1, 1, 1)
    classes = torch.tensor([[[0, 0, 0, 1], [0, 0, 0, 1]]]).repeat(2, 1, 1)
    similarity = FeatureSimilarity(2, protocol="official", mode="nearest")
    similarity.update(maps, classes)
    scores = similarity.compute().per_class["all"]
    # class 0: centre (2, 1) / 3, cosines 2 / sqrt(5) twice and 1 / sqrt(5); class 1: its own centre (0, 1)
    assert scores[0].intra == pytest.approx(5 / 3 / 5**0.5, abs=1e-6)
    assert scores[0].inter == pytest.approx(1 / 5**0.5, abs=1e-6)
    assert (scores[0].accuracy, scores[1].accuracy) == (pytest.approx(2 / 3), 1.0)
    assert scores[1].intra == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 300, "protocol": "official"}, "from 1 to 255"),
        ({"protocol": "official", "centres": "dataset"}, "centres of each image only"),
        ({"protocol": "mine"}, "protocol must be one of"),
        ({"centres": "batch"}, "centres must be one of"),
        ({"mode": "cubic"}, "mode must be one of"),
        ({"boundary_width": 0}, "boundary_width"),
        ({"max_distance": 0}, "max_distance"),
        ({"size": (0, 4)}, "size"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureSimilarity(**{"num_classes": 3} | options)


def test_centres_of_the_data_set_come_first() -> None:
    features, labels = torch.rand(1, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.int64)
    similarity = FeatureSimilarity(3, centres="dataset")
    with pytest.raises(ValueError, match="call fit_centres"):
        similarity.update(features, labels)
    similarity.fit_centres(features, labels)
    with pytest.raises(ValueError, match=r"classes \[1\] have no centre"):
        similarity.update(features, labels + 1)
    with pytest.raises(ValueError, match="4 channels"):
        similarity.update(torch.rand(1, 4, 4, 4), labels)
    with pytest.raises(ValueError, match="4 channels"):
        similarity.fit_centres(torch.rand(1, 4, 4, 4), labels)
    similarity.update(features, labels)
    with pytest.raises(ValueError, match="after update"):
        similarity.fit_centres(features, labels)
    with pytest.raises(ValueError, match='for centres="dataset"'):
        FeatureSimilarity(3).fit_centres(features, labels)


def test_strides_that_round_either_way_are_taken() -> None:
    labels = torch.zeros(1, 250, 333, dtype=torch.int64)
    for size in ((62, 83), (63, 84), (32, 42), (7, 10), (8, 11), (1, 1), (250, 333), (500, 666)):
        similarity = FeatureSimilarity(1, size=(20, 20))
        similarity.update(torch.ones(1, 2, *size), labels)
        score = similarity.compute().per_class["all"][0]
        assert score.pixels == 400, size
        assert score.intra == pytest.approx(1.0), size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_the_cpu() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(2, 16, 32, 32), torch.randint(0, 5, (2, 64, 64))
    results = []
    for device in ("cpu", "cuda"):
        similarity = FeatureSimilarity(5)
        similarity.update(features.to(device), labels)
        results.append(similarity.compute().rows())
    for row, other in zip(*results, strict=True):
        assert row == pytest.approx(other, abs=1e-4)


def test_boundary_and_resizing_are_those_of_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    generator = np.random.default_rng(0)
    for _ in range(60):
        height, width, rows, columns = (int(side) for side in generator.integers(1, 60, 4))
        labels = blocks(generator, height, width, 6).astype(np.uint8)
        labels[generator.random(labels.shape) < 0.01] = 255
        small = cv2.resize(labels, (columns, rows), interpolation=cv2.INTER_NEAREST)
        assert np.array_equal(module.resize_labels(torch.from_numpy(labels)[None], (rows, columns))[0], small)
        edge_k = int(generator.choice([1, 3, 5]))
        square = np.ones((edge_k, edge_k), np.uint8)
        edges = cv2.dilate((cv2.Laplacian(labels, cv2.CV_64F) != 0).astype(np.uint8), square)
        edges[cv2.dilate((labels == 255).astype(np.uint8), square) == 1] = 0
        actual = module._official_edges(torch.from_numpy(labels).long(), edge_k, 255)
        assert np.array_equal(actual, edges == 1)
