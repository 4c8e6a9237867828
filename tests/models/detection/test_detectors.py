"""The detectors as a user meets them: training and evaluation contract, options, what can go wrong."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

import freqfusion
from freqfusion import create_model, list_models
from freqfusion.models.detection import RCNN, LibraryDetector, PanopticFPN
from freqfusion.models.detection.backbone import ResNetEncoder
from freqfusion.models.detection.rcnn import paste_masks
from freqfusion.models.inference import ObjectInference, fitting_size

SMALL: dict[str, Any] = {
    "channels": 32,
    "head_channels": 32,
    "min_size": 64,
    "max_size": 96,
    "rpn_post_nms_top_n": (50, 50),
}
THINGS = [True, False, True, False]


def create_small(kind: str, fusion: str = "freqfusion", **options: Any) -> RCNN:
    torch.manual_seed(0)
    panoptic = kind == "panoptic_fpn"
    classes = 4 if panoptic else 3
    settings = {**SMALL, "things": THINGS if panoptic else None, **options}
    if panoptic:
        settings.setdefault("semantic_channels", 32)
    return create_model(f"{kind}_r18", classes, fusion, **settings)


def make_target(height: int, width: int, boxes: list[list[float]]) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    semantic = torch.ones(height, width, dtype=torch.int64)
    semantic[:3] = 255
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor([1, 3])[: len(boxes)],
        "masks": masks,
        "semantic": semantic,
    }


IMAGES = [(61, 83), (70, 45)]
BOXES = [[[5.0, 6.0, 30.0, 40.0], [40.0, 10.0, 70.0, 55.0]], []]
LOSSES = {
    "faster_rcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"},
}
LOSSES["mask_rcnn"] = LOSSES["faster_rcnn"] | {"loss_mask"}
LOSSES["panoptic_fpn"] = LOSSES["mask_rcnn"] | {"loss_semantic"}


def make_batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator) for size in IMAGES]
    return images, [make_target(*size, boxes) for size, boxes in zip(IMAGES, BOXES, strict=True)]


def test_names() -> None:
    assert len(list_models("*_rcnn_*")) == 8
    assert list_models("panoptic_fpn_*")[-1] == "panoptic_fpn_r101"


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("fusion", ["nearest", "freqfusion", "dysample+"])
def test_training(kind: str, fusion: str) -> None:
    """Every loss is finite, an image without objects included, and every parameter gets a gradient."""
    model = create_small(kind, fusion)
    losses = model(*make_batch())
    assert set(losses) == LOSSES[kind]
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert torch.isfinite(loss), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_without_objects(kind: str) -> None:
    images, _ = make_batch()
    losses = create_small(kind)(images, [make_target(*size, []) for size in IMAGES])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_box_reg"].item() == 0
    sum(losses.values()).backward()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("top_level", ["pool", "fused"])
def test_evaluation(kind: str, top_level: str) -> None:
    model = create_small(kind, top_level=top_level, box_score_thresh=0.2).eval()
    images = [torch.rand(3, *size) for size in [*IMAGES, (1, 1), (3, 200)]]
    with torch.no_grad():
        results = model(images)
    assert len(results) == 4
    for image, result in zip(images, results, strict=True):
        height, width = image.shape[-2:]
        boxes, labels = result["boxes"], result["labels"]
        assert boxes.shape == (len(labels), 4)
        assert result["scores"].shape == labels.shape
        assert bool((boxes >= 0).all())
        assert bool((boxes <= torch.tensor([width, height, width, height]) + 1e-4).all())
        if kind != "faster_rcnn":
            assert result["masks"].shape == (len(labels), 1, height, width)
            assert result["masks"].dtype == torch.bool
        if kind == "panoptic_fpn":
            assert set(labels.tolist()) <= {1, 3}
            assert result["segments"].shape == (height, width)
            assert int(result["segments"].max()) == len(result["segment_labels"])


@pytest.mark.parametrize("kind", LOSSES)
def test_weights_that_are_nan_find_nothing(kind: str) -> None:
    model = create_small(kind).eval()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    with torch.no_grad():
        results = model([torch.rand(3, *size) for size in IMAGES])
    assert [tuple(result["boxes"].shape) for result in results] == [(0, 4)] * len(IMAGES)


def test_half_precision_keeps_boxes_exact() -> None:
    """Under autocast boxes are computed in single precision: bfloat16 has steps of 4 pixels at 1000."""
    model = create_small("mask_rcnn", box_score_thresh=0.0).eval()
    images, targets = make_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = model(images)[0]
    assert result["boxes"].dtype == result["scores"].dtype == torch.float32
    steps = result["boxes"].bfloat16().float() - result["boxes"]
    assert float(steps.abs().max()) > 1e-3  # not numbers of half precision
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_results_do_not_depend_on_the_batch() -> None:
    """Padding to a larger neighbour changes nothing but rounding where the network sees zeros either way."""
    model = create_small("faster_rcnn", "nearest", box_score_thresh=0.0, min_size=64, max_size=64).eval()
    small, large = torch.rand(3, 40, 64), torch.rand(3, 64, 64)
    with torch.no_grad():
        alone, together = model([small])[0], model([small, large])[0]
    best = alone["scores"][0]
    assert abs(float(best - together["scores"][0])) < 0.05


def test_fitting_size() -> None:
    assert fitting_size(427, 640, 800, 1333) == (800, 1199)
    assert fitting_size(200, 2000, 800, 1333) == (133, 1333)
    assert fitting_size(1, 5000, 800, 1333) == (1, 1333)


def test_training_sizes_are_drawn_and_can_be_skipped() -> None:
    model = create_small("mask_rcnn", min_size=[32, 48, 64], max_size=200)
    images, targets = make_batch()
    sides = set()
    for seed in range(12):
        torch.manual_seed(seed)
        batch, resized = model.transform(images, targets)
        sides.add(min(batch.image_sizes[0]))
        assert resized is not None
        assert resized[0]["masks"].shape[-2:] == batch.image_sizes[0]
        assert resized[0]["semantic"].shape == batch.image_sizes[0]
        scale = batch.image_sizes[0][1] / 83
        torch.testing.assert_close(resized[0]["boxes"][0, 0], torch.tensor(5 * scale))
    assert sides == {32, 48, 64}
    model.transform._skip_resize = True
    assert model.transform(images, targets)[0].image_sizes == IMAGES
    model.eval()
    assert min(model.transform(images)[0].image_sizes[0]) == 64


def test_pasted_mask_is_sampled_at_pixel_centres() -> None:
    """A mask that rises from left to right crosses one half at the middle of its box, wherever that lies."""
    ramp = torch.linspace(0, 1, 29)[:-1] + 1 / 56
    masks = ramp.expand(1, 1, 28, 28)
    boxes = torch.tensor([[10.25, 4.0, 30.25, 12.0]])
    pasted = paste_masks(masks, boxes, (16, 40))[0, 0]
    assert pasted.shape == (16, 40)
    assert not pasted[:, :20].any()
    assert pasted[4:12, 20:30].all()  # centre 20.5 is right of 20.25
    assert not pasted[:3].any()
    assert not pasted[13:].any()


def test_pasted_masks_outside_the_image() -> None:
    boxes = torch.tensor([[-50.0, -50.0, -40.0, -40.0], [2.0, 2.0, 2.0, 9.0], [-4.0, -4.0, 100.0, 100.0]])
    pasted = paste_masks(torch.ones(3, 1, 28, 28), boxes, (8, 9))
    assert not pasted[0].any()
    assert pasted[2].all()
    assert paste_masks(torch.ones(0, 1, 28, 28), boxes[:0], (8, 9)).shape == (0, 1, 8, 9)


def test_frozen_stages_and_statistics() -> None:
    encoder = ResNetEncoder("resnet18", frozen_stages=2, norm_eval=True).train()
    assert not any(p.requires_grad for p in encoder.get_submodule("layer2").parameters())
    assert not any(p.requires_grad for p in encoder.get_submodule("conv1").parameters())
    assert all(p.requires_grad for p in encoder.get_submodule("layer3").parameters())
    before = {name: x.clone() for name, x in encoder.named_buffers()}
    encoder(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(x, before[name]) for name, x in encoder.named_buffers())
    assert all(p.requires_grad for p in ResNetEncoder("resnet18").parameters())
    with pytest.raises(ValueError, match="frozen_stages must be from 0 to 4, got 5"):
        ResNetEncoder("resnet18", frozen_stages=5)


def test_backbone_weights(tmp_path: Any) -> None:
    """From torchvision's own files, whose classifier is left out."""
    torch.manual_seed(3)
    network = torchvision.models.resnet18(weights=None)
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    model = create_small("faster_rcnn", backbone_weights=str(tmp_path / "resnet18.pth"))
    assert torch.equal(model.backbone.body.layer4[1].conv2.weight, network.layer4[1].conv2.weight)
    with pytest.raises(ValueError, match="torchvision has no weights 'V9' of resnet18; it has IMAGENET1K_V1"):
        create_small("faster_rcnn", backbone_weights="torchvision:V9")


def test_a_network_of_timm() -> None:
    model = create_model("mask_rcnn_convnext_atto", 2, **SMALL)
    images, targets = make_batch()
    for target in targets:
        target["labels"] = target["labels"].clamp(max=2)
    sum(model(images, targets).values()).backward()
    with pytest.raises(ValueError, match=r"strides \(16, 32, 64\), the detectors need \(4, 8, 16, 32\)"):
        create_model("faster_rcnn_levit_conv_128s", 2, **SMALL)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("yolo_r50", {}, "unknown model 'yolo_r50'"),
        ("faster_rcnn_r50", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("panoptic_fpn_r18", {}, "things must say for each of the 3 classes whether it is one, got none"),
        ("panoptic_fpn_r18", {"things": [True] * 3}, "needs things and stuff, got 3 things among 3"),
        (
            "panoptic_fpn_r18",
            {"num_classes": 256, "things": [True, False] * 128},
            "got 256 classes, at most 255 fit",
        ),
        ("faster_rcnn_r18", {"top_level": "roof"}, "top_level must be one of none, pool, fused, got 'roof'"),
        ("faster_rcnn_r18", {"top_level": "none"}, "a detector has a top level: pool or fused"),
    ],
)
def test_what_cannot_be_built(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **{"num_classes": 3, **options})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.tensor([0, 1])}, r"labels of objects must be .* from 1 to 4, got \[0\]"),
        ({"labels": torch.tensor([2, 5])}, r"got \[2, 5\]; stuff is in the semantic map alone"),
        ({"boxes": torch.tensor([[5.0, 5, 9, 9], [5, 5, 5, 32]])}, r"x1 < x2 .* got \[5\.0, 5\.0, 5\.0, 32"),
    ],
)
def test_wrong_panoptic_targets(change: dict[str, Tensor], message: str) -> None:
    images, targets = make_batch()
    with pytest.raises(ValueError, match=message):
        create_small("panoptic_fpn").train()(images, [targets[0] | change, targets[1]])


def test_one_fixed_size_has_no_scales() -> None:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    with pytest.raises(ValueError, match=r"SSD resizes every image to \(320, 320\) .*leave sizes out"):
        LibraryDetector(model.eval()).find([torch.rand(3, 40, 50)], ObjectInference(sizes=[320, 400]))


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = create_small("panoptic_fpn", top_level="fused").eval()
    freqfusion.save_pretrained(model, tmp_path)
    again = freqfusion.from_pretrained(tmp_path)
    assert isinstance(again, PanopticFPN)
    image = torch.rand(3, 60, 70)
    with torch.no_grad():
        first, second = model([image])[0], again([image])[0]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_upgraded_torchvision_detector_keeps_its_contract() -> None:
    """torchvision's own Mask R-CNN, upgraded, gives what it gave before."""
    torch.manual_seed(0)
    host = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96, box_score_thresh=0.2
    ).eval()
    image = torch.rand(3, 60, 70)
    with torch.no_grad():
        before = host([image])[0]
        after = freqfusion.upgrade_(host)([image])[0]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_numbers_of_classes_come_back_where_values_were_lost() -> None:
    """No state dict has them."""
    things = [True, False, True, False]
    expected = create_model("panoptic_fpn_r18", 4, things=things)
    with torch.device("meta"):
        model = create_model("panoptic_fpn_r18", 4, things=things)
    model.to_empty(device="cpu")
    for name in ("thing_labels", "stuff_labels", "thing_numbers", "semantic_numbers"):
        assert torch.equal(getattr(model, name), getattr(expected, name)), name
