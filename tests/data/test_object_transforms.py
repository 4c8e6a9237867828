"""Augmentation of objects: sizes, agreement of image, boxes, masks and segments, batches."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from freqfusion.data import SyntheticPanoptic, segments_to_objects
from freqfusion.data.object_transforms import (
    collate_objects,
    eval_object_transform,
    group_by_aspect,
    train_object_transform,
)

Sample = dict[str, Any]


def object_sample(height: int, width: int, boxes: list[list[float]], masks: bool = True) -> Sample:
    """Grey objects (40, 80, 120, ...) on black; boxes have whole numbers if there are masks of them."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    filled = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes):
        place = slice(int(top), int(bottom)), slice(int(left), int(right))
        image[:, place[0], place[1]] = 40 * (number + 1)
        filled[number, place[0], place[1]] = 1
    sample: Sample = {
        "image": tv_tensors.Image(image),
        "name": "a",
        "image_id": 7,
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            format="XYXY",
            canvas_size=(height, width),
        ),
        "labels": torch.arange(len(boxes)),
        "iscrowd": torch.arange(len(boxes)) % 2 == 1,
    }
    return {**sample, "masks": tv_tensors.Mask(filled)} if masks else sample


def panoptic_sample(segments: Tensor, labels: list[int]) -> Sample:
    return {
        "image": tv_tensors.Image((segments * 40).to(torch.uint8).expand(3, -1, -1).contiguous()),
        "name": "a",
        "image_id": 7,
        "segments": tv_tensors.Mask(segments.to(torch.int32)),
        "labels": torch.tensor(labels),
        "iscrowd": torch.zeros(len(labels), dtype=torch.bool),
    }


def multi_scale(*short_sides: int, max_size: int = 1000, flip: float = 0.0, **options: Any) -> Any:
    return train_object_transform(short_sides=short_sides, max_size=max_size, flip=flip, **options)


def large_jitter(jitter: tuple[float, float], crop_size: tuple[int, int], **options: Any) -> Any:
    return multi_scale(1, jitter=jitter, crop_size=crop_size, **options)


def check_plain(sample: Sample, names: set[str]) -> None:
    assert set(sample) == {"image", "name", "image_id", "labels", "iscrowd"} | names
    assert {type(value) for value in sample.values() if isinstance(value, Tensor)} == {Tensor}
    assert (sample["name"], sample["image_id"]) == ("a", 7)
    height, width = sample["image"].shape[1:]
    assert sample["image"].dtype == torch.float32
    assert sample["image"].min() >= 0
    assert sample["image"].max() <= 1
    assert sample["labels"].dtype == torch.int64
    assert sample["iscrowd"].dtype == torch.bool
    if "segments" in names:
        assert sample["segments"].dtype == torch.int64
        assert sample["segments"].shape == (height, width)
        return
    boxes = sample["boxes"]
    assert boxes.dtype == torch.float32
    assert boxes.shape == (len(sample["labels"]), 4)
    assert len(sample["iscrowd"]) == len(boxes)
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    if "masks" in names:
        assert sample["masks"].dtype == torch.uint8
        assert sample["masks"].shape == (len(boxes), height, width)


BOXES = [[3.0, 2.0, 9.0, 12.0], [10.0, 4.0, 20.0, 8.0], [0.0, 13.0, 5.0, 15.0]]


def test_eval_transform_changes_the_form_alone() -> None:
    sample = object_sample(15, 20, BOXES)
    result = eval_object_transform()(sample)
    check_plain(result, {"boxes", "masks"})
    torch.testing.assert_close(result["image"], sample["image"].as_subclass(Tensor) / 255)
    for key in ("boxes", "labels", "iscrowd", "masks"):
        assert torch.equal(result[key], sample[key].as_subclass(Tensor))
    segments = torch.tensor([[0, 1], [2, 2]])
    result = eval_object_transform()(panoptic_sample(segments, [4, 5]))
    check_plain(result, {"segments"})
    assert torch.equal(result["segments"], segments)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("size", [(15, 20), (1, 1), (33, 9), (480, 7)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_form_of_output(masks: bool, size: tuple[int, int], count: int) -> None:
    boxes = [[0.0, 0.0, float(size[1]), float(size[0])]] * count
    names = {"boxes", "masks"} if masks else {"boxes"}
    for transform in (
        multi_scale(11, 40, max_size=60, flip=0.5, photometric=True),
        large_jitter((0.3, 3.0), (24, 17), flip=0.5, photometric=True),
    ):
        for seed in range(4):
            torch.manual_seed(seed)
            check_plain(transform(object_sample(*size, boxes, masks)), names)


@pytest.mark.parametrize(
    "size, short_side, max_size, expected",
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((200, 600), 800, 1333, (444, 1333)),
        ((375, 500), 300, 10000, (300, 400)),
        ((2, 5), 1, 1000, (1, 3)),  # 2.5 goes up
        ((2, 7), 1, 1000, (1, 4)),  # 3.5 too
        ((3, 600), 800, 60, (1, 60)),  # never without a row
    ],
)
def test_short_side_and_greatest_size(
    size: tuple[int, int], short_side: int, max_size: int, expected: tuple[int, int]
) -> None:
    result = multi_scale(short_side, max_size=max_size)(object_sample(*size, [], masks=False))
    assert result["image"].shape[1:] == expected


def test_short_sides_are_drawn_evenly() -> None:
    transform = multi_scale(10, 20, 30)
    torch.manual_seed(0)
    heights = [transform(object_sample(40, 60, []))["image"].shape[1] for _ in range(150)]
    assert set(heights) == {10, 20, 30}
    assert min(heights.count(height) for height in (10, 20, 30)) > 30


def test_images_are_interpolated_as_at_test_time() -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 61, 83), dtype=torch.uint8)
    sample = {**object_sample(61, 83, []), "image": tv_tensors.Image(image)}
    for short_side in (25, 97):
        result = multi_scale(short_side)(sample)["image"]
        expected = torch.nn.functional.interpolate(
            image[None] / 255, result.shape[1:], mode="bilinear", align_corners=False, antialias=False
        )[0]
        assert (result - expected).abs().max() <= 1.01 / 255  # whole steps of 8 bits


@pytest.mark.parametrize("factor", [0.5, 2, 3])
def test_boxes_masks_and_image_move_together(factor: float) -> None:
    boxes = [[6.0, 4.0, 18.0, 24.0], [20.0, 8.0, 40.0, 16.0]]
    sample = object_sample(30, 40, boxes)
    for flip in (0.0, 1.0):
        result = multi_scale(int(30 * factor), flip=flip)(sample)
        height, width = result["image"].shape[1:]
        assert (height, width) == (30 * factor, 40 * factor)
        expected = torch.tensor(boxes) * factor
        if flip:
            expected = torch.stack(
                [width - expected[:, 2], expected[:, 1], width - expected[:, 0], expected[:, 3]], dim=1
            )
        assert torch.equal(result["boxes"], expected)
        for number, (left, top, right, bottom) in enumerate(expected.long().tolist()):
            filled = torch.zeros(height, width, dtype=torch.uint8)
            filled[top:bottom, left:right] = 1
            assert torch.equal(result["masks"][number], filled)
            inner = result["image"][0, top + 2 : bottom - 2, left + 2 : right - 2]
            torch.testing.assert_close(inner, torch.full_like(inner, 40 * (number + 1) / 255))


def test_masks_are_on_the_grid_of_the_image() -> None:
    """Over many sizes, a mask's centre lies where its box says, not half a pixel beside."""
    shifts = []
    for short_side in range(20, 160):
        result = multi_scale(short_side)(object_sample(61, 67, [[13.0, 24.0, 48.0, 41.0]]))
        rows, columns = result["masks"][0].nonzero().float().add(0.5).mean(0).tolist()
        left, top, right, bottom = result["boxes"][0].tolist()
        shifts.append([rows - (top + bottom) / 2, columns - (left + right) / 2])
    assert torch.tensor(shifts).mean(0).abs().max() < 0.02
    assert torch.tensor(shifts).abs().max() <= 0.5


def test_no_box_at_the_rim_is_lost_to_rounding() -> None:
    for width in range(30, 90):
        result = multi_scale(53)(object_sample(31, width, [[0.0, 0.0, float(width), 31.0]], masks=False))
        assert len(result["boxes"]) == 1
        height, wide = result["image"].shape[1:]
        torch.testing.assert_close(result["boxes"], torch.tensor([[0.0, 0.0, wide, height]]))


def test_boxes_under_a_pixel_are_dropped_with_all_they_have() -> None:
    boxes = [[2.0, 2.0, 4.0, 30.0], [10.0, 10.0, 20.0, 20.0], [5.0, 8.0, 35.0, 11.0], [30.0, 1.0, 34.0, 5.0]]
    result = multi_scale(10)(object_sample(40, 40, boxes))  # to a quarter
    check_plain(result, {"boxes", "masks"})
    assert result["boxes"].tolist() == [[2.5, 2.5, 5, 5], [7.5, 0.25, 8.5, 1.25]]
    assert result["labels"].tolist() == [1, 3]
    assert result["iscrowd"].tolist() == [True, True]
    kept = [mask.nonzero().float().mean(0).tolist() for mask in result["masks"]]
    assert kept[0][0] > 2 > kept[1][0]  # rows of the second object, then of the fourth


# large scale jitter


def test_objects_whose_box_alone_is_left_are_dropped() -> None:
    """A crop may hold a corner of a box and no pixel of the object."""
    sample = object_sample(30, 40, [[0.0, 0.0, 30.0, 30.0], [15.0, 8.0, 25.0, 22.0]])
    sample["masks"][0, :, 8:] = 0
    transform = large_jitter((2.0, 2.0), (20, 20))  # fits at 0.5: the size stays, then 20 x 20 are cut out
    left = set()
    for seed in range(20):
        torch.manual_seed(seed)
        result = transform(dict(sample))
        assert result["masks"].flatten(1).any(1).all()
        assert len(result["masks"]) == len(result["boxes"]) == len(result["iscrowd"]) == len(result["labels"])
        left.add(tuple(result["labels"].tolist()))
    assert left == {(0, 1), (1,)}


def test_jitter_is_relative_to_the_scale_that_fits() -> None:
    for size, crop, expected in (
        ((100, 200), (50, 50), (25, 50)),
        ((200, 100), (50, 50), (50, 25)),
        ((100, 200), (80, 400), (80, 160)),
    ):
        result = large_jitter((1.0, 1.0), crop)(object_sample(*size, []))
        assert result["image"].shape[1:] == expected


def test_jitter_range_and_crop() -> None:
    transform = large_jitter((0.5, 2.0), (40, 40))
    torch.manual_seed(0)
    heights = [transform(object_sample(60, 60, []))["image"].shape[1] for _ in range(200)]
    assert min(heights) == pytest.approx(20, abs=2)
    assert max(heights) == 40  # cropped
    assert heights.count(40) / 200 == pytest.approx(
        2 / 3, abs=0.1
    )  # the factor is drawn evenly from 0.5 to 2


def test_crops_cut_boxes_and_masks_alike() -> None:
    boxes = [[6.0, 4.0, 18.0, 24.0], [20.0, 8.0, 40.0, 16.0], [0.0, 26.0, 5.0, 30.0]]
    transform = large_jitter((2.0, 2.0), (20, 20), flip=0.5)
    places = set()
    lost = 0
    for seed in range(60):
        torch.manual_seed(seed)
        result = transform(
            object_sample(30, 40, boxes)
        )  # fits at 0.5: the size stays, then 20 x 20 are cut out
        check_plain(result, {"boxes", "masks"})
        assert result["image"].shape == (3, 20, 20)
        lost += 3 - len(result["labels"])
        for label, box, mask in zip(
            result["labels"].tolist(), result["boxes"].tolist(), result["masks"], strict=True
        ):
            rows, columns = mask.nonzero(as_tuple=True)
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box
            assert torch.equal((result["image"][0] * 255).round() == 40 * (label + 1), mask.bool())
            places.add((label, *box))
    assert lost > 10
    assert len(places) > 60


def test_panoptic_segments_keep_their_place() -> None:
    segments = torch.zeros(30, 40, dtype=torch.int64)
    segments[:10] = 1
    segments[12:20, 5:15] = 3  # the second segment lies in a corner
    segments[24:, 25:] = 2
    transform = large_jitter((2.0, 2.0), (20, 20), flip=0.5)
    vanished = 0
    for seed in range(30):
        torch.manual_seed(seed)
        result = transform(panoptic_sample(segments, [4, 5, 6]))
        check_plain(result, {"segments"})
        assert result["labels"].tolist() == [4, 5, 6]
        assert len(result["iscrowd"]) == 3
        assert torch.equal((result["image"][0] * 255).round().long(), result["segments"] * 40)
        vanished += 2 not in result["segments"].unique().tolist()
    assert 0 < vanished < 30


def test_large_segment_numbers_survive_resizing() -> None:
    segments = torch.arange(1, 40 * 50 + 1).reshape(40, 50)
    sample = {
        **panoptic_sample(segments % 6, [0] * 2000),
        "segments": tv_tensors.Mask(segments.to(torch.int32)),
    }
    result = multi_scale(80)(sample)["segments"]
    assert torch.equal(result, segments.repeat_interleave(2, 0).repeat_interleave(2, 1))


# randomness and settings


def test_same_seed_same_result_and_input_is_kept() -> None:
    scene = SyntheticPanoptic("train", length=1)[0]
    before = {key: value.clone() for key, value in scene.items() if isinstance(value, Tensor)}
    transform = pickle.loads(pickle.dumps(large_jitter((0.5, 2.0), (64, 80), flip=0.5, photometric=True)))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(transform(scene))
    assert torch.equal(results[0]["image"], results[1]["image"])
    assert torch.equal(results[0]["segments"], results[1]["segments"])
    assert not torch.equal(results[0]["segments"], results[2]["segments"])
    for key, value in before.items():
        assert torch.equal(scene[key], value)


def test_photometric_distortion_leaves_the_objects() -> None:
    sample = object_sample(15, 20, BOXES)
    torch.manual_seed(1)
    result = multi_scale(15, photometric=True)(sample)
    assert not torch.equal(result["image"], eval_object_transform()(sample)["image"])
    assert torch.equal(result["masks"], sample["masks"].as_subclass(Tensor))


def test_flip_probability() -> None:
    torch.manual_seed(0)
    transform = multi_scale(20, flip=0.3)
    flipped = sum(
        transform(object_sample(20, 20, [[0.0, 0.0, 5.0, 5.0]]))["boxes"][0, 0].item() > 0 for _ in range(300)
    )
    assert 60 < flipped < 120


def test_objects_of_augmented_segments() -> None:
    dataset = SyntheticPanoptic("train", length=5)
    transform = large_jitter((1.0, 3.0), (48, 48))
    torch.manual_seed(0)
    for scene in dataset:
        sample = transform(scene)
        objects = segments_to_objects(sample["segments"], sample["labels"], sample["iscrowd"], dataset.things)
        assert (objects["masks"].flatten(1).sum(1) > 0).all()
        assert (objects["boxes"][:, 2:] <= 48).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"flip": 1.5}, "flip is a probability in"),
        ({"short_sides": ()}, "short_sides must be one or more numbers of pixels"),
        ({"short_sides": (800, 0)}, "short_sides must be"),
        ({"max_size": 0}, "max_size one, got .* and 0"),
        ({"jitter": (0.1, 2.0)}, r"jitter and crop_size go together, got \(0\.1, 2\.0\) and None"),
        ({"crop_size": (64, 64)}, "jitter and crop_size go together"),
        (
            {"jitter": (2.0, 0.1), "crop_size": (64, 64)},
            "jitter must be two positive factors in rising order",
        ),
        ({"jitter": (0.0, 0.1), "crop_size": (64, 64)}, "jitter must be"),
        ({"jitter": (0.1, 2.0), "crop_size": (0, 64)}, "crop_size must be at least 1x1"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], words: str) -> None:
    settings: dict[str, Any] = {"short_sides": (800,), "max_size": 1333, "flip": 0.5}
    with pytest.raises(ValueError, match=words):
        train_object_transform(**{**settings, **change})


# batches


def test_batches_are_lists() -> None:
    samples = [eval_object_transform()(object_sample(5, width, BOXES[:1])) for width in (10, 13)]
    batch = collate_objects(samples)
    assert set(batch) == set(samples[0])
    assert [image.shape[2] for image in batch["image"]] == [10, 13]
    assert batch["name"] == ["a", "a"]
    assert batch["boxes"][1] is samples[1]["boxes"]
    assert collate_objects([]) == {"name": [], "image_id": []}
    del samples[1]["masks"]
    with pytest.raises(ValueError, match=r"must have the same entries, got \['boxes', .*\] and \["):
        collate_objects(samples)


def test_groups_by_aspect() -> None:
    sizes = [(2, 3), (3, 2), (2, 2), (3, 2), (9, 10), (8, 1), (1, 8)]  # 1, 3 and 5 are portrait
    assert group_by_aspect(sizes, range(7), 2) == [[0, 2], [1, 3], [4, 6]]
    assert group_by_aspect(sizes, [5, 6, 4, 3, 2, 1, 0], 2) == [[6, 4], [5, 3], [2, 0]]
    assert group_by_aspect(sizes, range(7), 3) == [[0, 2, 4], [1, 3, 5]]
    assert group_by_aspect(sizes, range(7), 4) == [[0, 2, 4, 6]]
    assert group_by_aspect(sizes, range(6), 4) == [[0, 2, 4, 1]]  # a mixed batch of what is left
    assert group_by_aspect(sizes, range(7), 1) == [[index] for index in range(7)]
    assert group_by_aspect(sizes, range(7), 8) == group_by_aspect(sizes, [], 2) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        group_by_aspect(sizes, range(7), 0)


def test_groups_show_no_picture_twice_and_drop_less_than_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    for batch_size in (2, 3, 5, 16):
        for count in (0, 1, 7, 50, 101):
            sizes = [(int(h), int(w)) for h, w in torch.randint(1, 9, (count, 2), generator=generator)]
            order = torch.randperm(count, generator=generator).tolist()
            batches = group_by_aspect(sizes, order, batch_size)
            assert batches == group_by_aspect(sizes, order, batch_size)
            assert {len(batch) for batch in batches} <= {batch_size}
            assert len(batches) == count // batch_size
            shown = [index for batch in batches for index in batch]
            assert len(shown) == len(set(shown))
            mixed = [len({sizes[index][1] >= sizes[index][0] for index in batch}) for batch in batches].count(
                2
            )
            assert mixed <= 1
