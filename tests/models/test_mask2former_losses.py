"""Mask2Former's targets, loss, inference and initial weights, against numbers of the original code."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

from freqfusion import upgrade_
from freqfusion.models import mask2former as tools
from freqfusion.models.mask2former import (
    LayerPrediction,
    QueryResult,
    object_targets,
    predict_layers,
    predict_queries,
    reset_parameters_,
    semantic_targets,
    set_losses,
)
from freqfusion.zoo.create import wrap
from support import assert_close, build_host, load_golden

SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4}
TINY = {
    "feature_size": 64,  # two channels for each group of the norms, which refuse a single number
    "mask_feature_size": 16,
    "hidden_dim": 64,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "num_attention_heads": 2,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "num_queries": 7,
    "train_num_points": 64,
}


def mask2former(num_classes: int = 4, upgraded: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    host = build_host("mask2former_swin_t", num_classes, **{**TINY, "backbone_config": dict(SWIN), **options})
    return upgrade_(host, init="paper", verify=False) if upgraded else host


def seeded(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# targets


def test_semantic_targets_are_one_mask_a_class() -> None:
    mask = torch.tensor([[[3, 255, 0], [3, 3, 1]], [[255, 255, 255], [255, 255, 255]]], dtype=torch.uint8)
    masks, labels = semantic_targets(mask)
    assert labels[0].tolist() == [0, 1, 3]
    assert masks[0].tolist() == [
        [[0, 0, 1], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 1]],
        [[1, 0, 0], [1, 1, 0]],
    ]
    assert labels[1].shape == (0,)
    assert masks[1].shape == (0, 2, 3)
    assert {x.dtype for x in masks} == {torch.float32}
    assert {x.dtype for x in labels} == {torch.int64}
    assert semantic_targets(torch.tensor([[[7]]]), ignore_index=7).class_labels[0].shape == (0,)


def test_object_targets_leave_out_crowds_and_keep_what_a_crop_has_emptied() -> None:
    panoptic = {
        "segments": torch.tensor([[0, 1, 1], [2, 4, 4]]),
        "labels": torch.tensor([5, 3, 2, 3]),
        "iscrowd": torch.tensor([False, True, False, False]),
    }
    boxes = {
        "masks": torch.tensor([[[1, 0]], [[1, 1]]], dtype=torch.uint8),
        "labels": torch.tensor([1, 0]),
        "iscrowd": torch.tensor([True, False]),
    }
    nothing = {
        "segments": torch.zeros(1, 1, dtype=torch.int64),
        "labels": torch.zeros(0, dtype=torch.int64),
        "iscrowd": torch.zeros(0, dtype=torch.bool),
    }
    masks, labels = object_targets([panoptic, boxes, nothing])
    assert [x.tolist() for x in labels] == [[5, 2, 3], [0], []]
    assert masks[0].tolist() == [[[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 1]]]
    assert masks[1].tolist() == [[[1, 1]]]
    assert masks[2].shape == (0, 1, 1)
    assert {x.dtype for x in masks} == {torch.float32}
    with pytest.raises(ValueError, match="labels, iscrowd, but neither segments nor masks"):
        object_targets([{"labels": torch.tensor([1]), "iscrowd": torch.tensor([False])}])


# loss


@pytest.fixture
def the_same_points(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes torch.rand give the stream of numbers that the golden losses were made with."""

    def start(seed: int) -> None:
        stream = np.random.RandomState(seed)

        def rand(*shape: int, device: Any = None) -> Tensor:
            return torch.from_numpy(stream.random_sample(shape).astype(np.float32))

        monkeypatch.setattr(torch, "rand", rand)

    return start


@pytest.mark.parametrize(("case", "images"), [("all", [0, 1, 2, 3]), ("empty", [1])])
def test_losses_and_gradients_equal_the_originals(
    case: str, images: list[int], the_same_points: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three layers, four images, one of them (and in the second case the only one) without any mask."""
    meta, arrays = load_golden("mask2former_criterion")
    host = mask2former(meta["classes"], train_num_points=meta["points"])
    class_logits = arrays["class_logits"].float().requires_grad_()
    mask_logits = arrays["mask_logits"].float().requires_grad_()
    layers = [LayerPrediction(c[images], m[images]) for c, m in zip(class_logits, mask_logits, strict=True)]
    monkeypatch.setattr(tools, "predict_layers", lambda host, images: layers)
    masks = [arrays[f"masks/{i}"].float() for i in images]
    labels = [arrays[f"labels/{i}"] for i in images]
    the_same_points(meta["seed"])
    losses = set_losses(host, torch.zeros(len(images), 3, 64, 96), masks, labels)
    assert {len(label) for label in labels} == ({0, 1, 2, 3} if case == "all" else {0})
    for name, official in (("class", "ce"), ("mask", "mask"), ("dice", "dice")):
        assert losses[name].dtype == torch.float32
        assert_close(name, losses[name], arrays[f"{case}/{official}"], 1e-6)
    torch.stack(list(losses.values())).sum().backward()
    for name, logits in (("class", class_logits), ("mask", mask_logits)):
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, arrays[f"{case}/grad_{name}"].float(), rtol=1e-5, atol=1e-8)


def test_without_deep_supervision_the_last_layer_counts_alone() -> None:
    host = mask2former()
    images, (masks, labels) = seeded(1, 3, 32, 32), semantic_targets(torch.ones(1, 32, 32))
    every = set_losses(host, images, masks, labels)["class"]
    host.config.use_auxiliary_loss = False
    last = set_losses(host, images, masks, labels)["class"]
    assert 0 < last.item() < every.item()


@pytest.mark.parametrize("upgraded", [False, True])
@pytest.mark.parametrize("empty", [[1], [0, 1]])
def test_images_without_any_truth_train_too(empty: list[int], upgraded: bool) -> None:
    segmenter = wrap(mask2former(upgraded=upgraded))
    mask = torch.randint(0, 4, (2, 33, 50), generator=torch.Generator().manual_seed(2))
    mask[empty] = 255
    loss = segmenter.loss(seeded(2, 3, 33, 50), mask, F.cross_entropy)
    loss.backward()
    assert loss.isfinite()
    trained = {name: p for name, p in segmenter.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert all(bool(p.grad.isfinite().all()) for p in trained.values() if p.grad is not None)
    head = segmenter.host.class_predictor.weight.grad
    assert float(head.abs().sum()) > 0


def test_images_of_different_sizes_are_padded_with_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    host = mask2former()
    seen: list[Any] = []
    matcher = host.criterion.matcher.forward
    monkeypatch.setattr(
        host.criterion.matcher, "forward", lambda *args: seen.append(args[2]) or matcher(*args)
    )
    images = [seeded(3, 20, 40), seeded(3, 33, 7)]
    targets = [semantic_targets(torch.zeros(1, *image.shape[-2:])) for image in images]
    masks, labels = ([target[i][0] for target in targets] for i in range(2))
    set_losses(host, images, masks, labels)
    assert len(seen) == 3
    for padded, image in zip(seen[0], images, strict=True):
        height, width = image.shape[-2:]
        assert padded.shape == (1, 64, 64)
        assert int(padded.sum()) == int(padded[:, :height, :width].sum()) == height * width


@pytest.mark.parametrize(
    ("masks", "labels", "message"),
    [
        ([torch.zeros(1, 8, 8)], [torch.tensor([4])], r"labels from 4 to 4, but the network has 4 classes"),
        ([torch.zeros(1, 8, 8)], [torch.tensor([-1])], r"labels from -1 to -1"),
        (
            [torch.zeros(2, 8, 8)],
            [torch.tensor([0])],
            r"image 0: the masks have the shape \(2, 8, 8\), expected \(1, 8, 8\)",
        ),
        ([torch.zeros(1, 8, 9)], [torch.tensor([0])], r"expected \(1, 8, 8\)"),
        ([], [], r"got 0 sets of masks and 0 of labels for 1 images"),
    ],
)
def test_targets_that_do_not_fit(masks: list[Tensor], labels: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_losses(mask2former(), torch.zeros(1, 3, 8, 8), masks, labels)


TWO_PROCESSES = """
import json, sys
import torch
from test_mask2former_losses import mask2former, seeded, set_losses

def run(counts, rank):
    host, count = mask2former().eval(), counts[rank]
    masks = [torch.ones(count, 32, 32)]
    torch.manual_seed(3)
    losses = set_losses(host, seeded(1, 3, 32, 32), masks, [torch.arange(count)])
    return {name: float(loss) for name, loss in losses.items()}

def work(rank, store, out):
    import torch.distributed as dist
    cases = [[3, 1], [1, 0]]
    alone = [run(counts, rank) for counts in cases]
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    together = [run(counts, rank) for counts in cases]
    with open(f"{out}{rank}.json", "w") as file:
        json.dump([alone, together], file)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, args=(sys.argv[1], sys.argv[2]), nprocs=2, start_method="fork")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, so that they start fast")
def test_two_processes_divide_by_the_average_number_of_masks(tmp_path: Path) -> None:
    """Of 3 and 1 masks by 2, of 1 and 0 by 1, the least; the class loss is a mean over the queries of a process."""
    script = tmp_path / "two_processes.py"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script.write_text(f"import sys\nsys.path[:0] = {folders!r}\n{TWO_PROCESSES}")
    command = [sys.executable, str(script), str(tmp_path / "store"), str(tmp_path / "losses")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    factors = [[3 / 2, 1], [1 / 2, 1]]  # by process, then case
    for rank in range(2):
        alone, together = json.loads((tmp_path / f"losses{rank}.json").read_text())
        for before, after, factor in zip(alone, together, factors[rank], strict=True):
            assert after["class"] == pytest.approx(before["class"], rel=1e-6)
            for name in ("mask", "dice"):
                assert after[name] == pytest.approx(factor * before[name], rel=1e-5)
        assert (together[1]["mask"] > 0) == (rank == 0)


# network


@torch.no_grad()
@pytest.mark.parametrize("upgraded", [False, True])
def test_layers_are_those_of_the_host(upgraded: bool) -> None:
    host, images = mask2former(upgraded=upgraded).eval(), seeded(2, 3, 64, 96)
    expected = host(images, output_auxiliary_logits=True)
    layers = predict_layers(host, images)
    assert len(layers) == 3
    assert torch.equal(layers[-1].class_logits, expected.class_queries_logits)
    assert torch.equal(layers[-1].mask_logits, expected.masks_queries_logits)
    for layer, auxiliary in zip(layers, expected.auxiliary_logits, strict=False):
        assert torch.equal(layer.mask_logits, auxiliary["masks_queries_logits"])


@pytest.mark.parametrize("upgraded", [False, True])
def test_bfloat16_autocast_trains_and_judges(upgraded: bool) -> None:
    """The pixel decoder keeps out of it; the rest rounds, which moves a few points of the discrete choices."""
    host = mask2former(upgraded=upgraded, train_num_points=512)
    reset_parameters_(host)
    segmenter = wrap(host)
    dtypes: list[torch.dtype] = []
    decoder = host.model.pixel_level_module.decoder
    watched = [decoder.encoder.layers[0].self_attn.sampling_offsets, decoder.mask_projection]
    if upgraded:
        watched.append(decoder.fusions["in_8"].fusion.hr_channel_compressor)
    for module in watched:
        module.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    half: list[torch.dtype] = []
    host.class_predictor.register_forward_hook(lambda module, inputs, output: half.append(output.dtype))
    images = seeded(2, 3, 90, 70)
    mask = torch.randint(0, 4, (2, 90, 70), generator=torch.Generator().manual_seed(2))
    losses, gradients = [], []
    for enabled in (False, True):
        torch.manual_seed(1)
        segmenter.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = segmenter.loss(images, mask, F.cross_entropy)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in segmenter.parameters() if p.grad is not None]))
    assert set(dtypes) == {torch.float32}
    assert set(half) == {torch.float32, torch.bfloat16}
    assert losses[1].dtype == torch.float32
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-2)
    assert gradients[1].isfinite().all()
    assert float(F.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.9
    segmenter.eval()
    with torch.no_grad():
        expected = segmenter(images)
        with torch.autocast("cpu", torch.bfloat16):
            scores = segmenter(images)
    assert scores.dtype == torch.float32
    assert float((scores - expected).abs().max()) < 0.5  # of logarithms
    assert float((scores.argmax(1) == expected.argmax(1)).float().mean()) > 0.9


def test_initial_weights_are_drawn_as_in_the_original() -> None:
    """Bounds of uniform distributions; each is reached within a few per cent by enough numbers."""
    host = mask2former(encoder_feedforward_dim=128, dim_feedforward=256)
    before = {name: x.clone() for name, x in host.model.pixel_level_module.encoder.state_dict().items()}
    reset_parameters_(host)
    after = host.model.pixel_level_module.encoder.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    decoder, transformer = host.model.pixel_level_module.decoder, host.model.transformer_module
    layer, encoder = transformer.decoder.layers[0], decoder.encoder.layers[0]
    bounds = {
        decoder.input_projections[0][0].weight: math.sqrt(6 / (64 + 64)),
        decoder.adapter_1[0].weight: math.sqrt(3 / 8),
        decoder.layer_1[0].weight: math.sqrt(3 / (9 * 64)),
        decoder.mask_projection.weight: math.sqrt(3 / 64),
        encoder.fc1.weight: math.sqrt(6 / (64 + 128)),
        encoder.fc1.bias: 1 / math.sqrt(64),
        encoder.fc2.bias: 1 / math.sqrt(128),
        encoder.self_attn.value_proj.weight: math.sqrt(6 / 128),
        layer.self_attn.q_proj.weight: math.sqrt(6 / (64 + 3 * 64)),
        layer.self_attn.out_proj.weight: math.sqrt(6 / 128),
        layer.cross_attn.in_proj_weight: math.sqrt(6 / (64 + 3 * 64)),
        layer.fc2.weight: math.sqrt(6 / (256 + 64)),
        transformer.decoder.mask_predictor.mask_embedder.get_submodule("1.0").weight: 1 / math.sqrt(64),
        host.class_predictor.weight: 1 / math.sqrt(64),
        host.class_predictor.bias: 1 / math.sqrt(64),
    }
    for parameter, bound in bounds.items():
        largest = parameter.detach().abs().max().item()
        assert (0.5 if parameter.numel() < 10 else 0.94) * bound < largest <= bound * (1 + 1e-6)
    for normal in (decoder.level_embed, transformer.queries_features.weight, transformer.level_embed.weight):
        assert normal.std().item() == pytest.approx(1, rel=0.2)
    for zero in (
        encoder.self_attn.sampling_offsets.weight,
        layer.self_attn.q_proj.bias,
        decoder.mask_projection.bias,
    ):
        assert not zero.any()
    offsets = encoder.self_attn.sampling_offsets.bias.view(2, 3, 4, 2)
    for head, direction in enumerate((1.0, -1.0)):  # along x, there and back
        for point in range(4):
            expected = torch.tensor([direction * (point + 1), 0.0]).expand(3, 2)
            torch.testing.assert_close(offsets[head, :, point], expected, rtol=0, atol=1e-5)


# inference


def golden_results() -> Iterator[tuple[dict[str, Any], dict[str, Tensor], int, QueryResult]]:
    meta, arrays = load_golden("mask2former_inference")
    for index, (size, output) in enumerate(zip(meta["sizes"], meta["output_sizes"], strict=True)):
        logits = (arrays[name][index].float() for name in ("class_logits", "mask_logits"))
        yield meta, arrays, index, QueryResult(*logits, (32, 64), tuple(size), tuple(output))


def test_semantic_inference_equals_the_originals() -> None:
    """Odd sizes; the second image is judged at another size than it was seen at."""
    for _, arrays, index, result in golden_results():
        assert result.semantic().shape == (4, *result.output_size)
        for name, scores in (
            ("semantic", result.semantic()),
            ("semantic_after", result.semantic(resize_first=True)),
        ):
            assert_close(name, scores[:, ::3, ::3], arrays[f"{name}/{index}"], 1e-6)
    assert not torch.equal(arrays["semantic/1"], arrays["semantic_after/1"])


def test_panoptic_inference_equals_the_originals() -> None:
    for meta, arrays, index, result in golden_results():
        found = result.panoptic([label in meta["things"] for label in range(4)])
        assert found["segments"].dtype == torch.int64
        assert torch.equal(found["segments"], arrays[f"panoptic/{index}"].long())
        assert torch.equal(found["segment_labels"], arrays[f"panoptic_labels/{index}"])
        assert found["segment_scores"].shape == found["segment_labels"].shape
        assert bool((found["segment_scores"] > 0.8).all())


def test_instance_inference_equals_the_originals() -> None:
    for meta, arrays, index, result in golden_results():
        of_things = [label in meta["things"] for label in range(4)]
        for name, things in (("things", of_things), ("all", None)):
            found = result.instances(top_k=meta["top_k"], things=things)
            assert_close("scores", found["scores"], arrays[f"{name}_scores/{index}"], 1e-6)
            assert torch.equal(found["labels"], arrays[f"{name}_labels/{index}"])
            assert found["masks"].shape == (len(found["labels"]), 1, *result.output_size)
            assert (np.packbits(found["masks"].numpy()) == arrays[f"{name}_masks/{index}"].numpy()).all()
            assert int(found["masks"].any(dim=(1, 2, 3)).sum()) > 5
            for box, mask in zip(found["boxes"].long().tolist(), found["masks"][:, 0], strict=True):
                pixels = mask.nonzero().flip(1)
                corners = [pixels.amin(dim=0), pixels.amax(dim=0) + 1] if len(pixels) else [torch.zeros(4)]
                assert box == torch.cat(corners).int().tolist()


def result_of(classes: list[int], masks: list[Tensor], num_classes: int = 3) -> QueryResult:
    """Queries that are sure of their class (``num_classes``: of none) and of their mask, at full size."""
    class_logits = 20 * F.one_hot(torch.tensor(classes), num_classes + 1).float()
    mask_logits = 10 * (2 * torch.stack(masks).float() - 1)
    size = (masks[0].shape[-2], masks[0].shape[-1])
    return QueryResult(class_logits, mask_logits, size, size, size)


def test_segments_of_stuff_are_one_and_hidden_queries_none() -> None:
    rows = torch.arange(10)[:, None].expand(10, 4)
    top, middle, bottom, most = rows < 3, (rows >= 3) & (rows < 6), rows >= 6, rows < 9
    result = result_of([1, 0, 1, 0, 3], [top, middle, bottom, most, top])
    result.class_logits[3, 0] = 5  # less sure than the queries that it lies below
    result.class_logits[2, 1] = 8
    found = result.panoptic(things=[True, False, False])
    assert found["segment_labels"].tolist() == [1, 0]
    assert found["segments"][:, 0].tolist() == [1, 1, 1, 2, 2, 2, 1, 1, 1, 1]
    assert float(found["segment_scores"][0]) == pytest.approx(1, abs=1e-6)
    apart = result.panoptic(things=[True, True, False])
    assert apart["segment_labels"].tolist() == [1, 0, 1]
    assert float(apart["segment_scores"][2]) == pytest.approx(
        float(torch.tensor([0.0, 8, 0, 0]).softmax(0)[1])
    )
    assert (
        result.panoptic(things=[True, False, False], overlap_threshold=0.0)["segments"][:, 0].tolist()
        == [1] * 3 + [2] * 3 + [1] * 4
    )


def test_nothing_found() -> None:
    nothing = torch.zeros(1, 1)
    unsure = result_of([3, 3], [nothing, nothing])
    found = unsure.panoptic(things=[True, False, False])
    assert found["segments"].tolist() == [[0]]
    assert found["segment_labels"].shape == found["segment_scores"].shape == (0,)
    sure_of_no_pixel = result_of([0, 1], [nothing, nothing])
    assert sure_of_no_pixel.panoptic(things=[True, False, False])["segments"].tolist() == [[0]]
    objects = sure_of_no_pixel.instances(top_k=1000, things=[False, False, False])
    assert objects["boxes"].shape == (0, 4)
    assert objects["masks"].shape == (0, 1, 1, 1)
    objects = sure_of_no_pixel.instances(top_k=1000)
    assert len(objects["labels"]) == 6  # two queries, three classes
    assert not objects["boxes"].any()
    assert not objects["scores"].any()


@torch.no_grad()
@pytest.mark.parametrize("upgraded", [False, True])
def test_images_of_any_size_are_judged_as_if_padded_together(upgraded: bool) -> None:
    host = mask2former(upgraded=upgraded).eval()
    images = [seeded(3, 37, 61), seeded(3, 1, 1), seeded(3, 64, 5)]
    outputs = [(37, 61), (9, 8), (1, 1)]
    batch = torch.stack([F.pad(x, (0, 64 - x.shape[2], 0, 64 - x.shape[1])) for x in images])
    expected = host(batch)
    masks = F.interpolate(expected.masks_queries_logits, (64, 64), mode="bilinear", align_corners=False)
    results = predict_queries(host, images, outputs)
    for i, (result, image, output) in enumerate(zip(results, images, outputs, strict=True)):
        assert result.padded_size == (64, 64)
        cropped = masks[i : i + 1, :, : image.shape[1], : image.shape[2]]
        fitted = F.interpolate(cropped, output, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(result.masks(), fitted)
        assert result.panoptic(things=[True] * 9)["segments"].shape == output
        assert result.instances()["masks"].shape[-2:] == output
    with pytest.raises(ValueError, match="got 1 output sizes for 3 images"):
        predict_queries(host, images, [(1, 1)])


@pytest.mark.parametrize(
    "images", [[], torch.zeros(0, 3, 8, 8), [torch.zeros(1, 8, 8)], torch.zeros(1, 3, 0, 8)]
)
def test_what_are_no_images(images: Any) -> None:
    with pytest.raises(ValueError, match=r"expected images \(3, H, W\), at least one"):
        predict_queries(mask2former(), images)
