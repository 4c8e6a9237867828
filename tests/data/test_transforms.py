"""Augmentation: sizes, ranges, agreement of image and mask, and reproducibility from torch's seed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from freqfusion.data import SyntheticScenes
from freqfusion.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from freqfusion.data.transforms import (
    BalancedRandomCrop,
    PhotometricDistortion,
    RandomRescale,
    eval_transform,
    train_transform,
)


def sample_of(image: Tensor, mask: Tensor) -> dict[str, Any]:
    return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask), "name": "a"}


def paired_sample(height: int, width: int) -> dict[str, Any]:
    """A sample whose image tells its own mask: pixels of class k have the grey value 20 k, in wide regions."""
    mask = (torch.arange(height)[:, None] // 8 + torch.arange(width) // 8).remainder(6).to(torch.uint8)
    return sample_of((mask * 20).expand(3, -1, -1).contiguous(), mask)


def denormalised(image: Tensor) -> Tensor:
    return image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]


def test_eval_transform_normalises_and_nothing_else() -> None:
    sample = paired_sample(9, 13)
    result = eval_transform()(sample)
    assert type(result["image"]) is type(result["mask"]) is Tensor
    assert result["image"].dtype == torch.float32
    assert result["mask"].dtype == torch.int64
    assert result["name"] == "a"
    torch.testing.assert_close(
        denormalised(result["image"]), sample["image"].float().as_subclass(Tensor) / 255
    )
    assert torch.equal(result["mask"], sample["mask"].long().as_subclass(Tensor))
    assert set(eval_transform()({"image": sample["image"]})) == {"image"}


@pytest.mark.parametrize("crop", [(32, 32), (7, 50), (100, 30), (1, 1)])
@pytest.mark.parametrize("size", [(40, 60), (1, 1), (33, 9)])
def test_train_transform_gives_the_crop_size(crop: tuple[int, int], size: tuple[int, int]) -> None:
    transform = train_transform(crop, (0.5, 2.0), None, flip=0.5, photometric=True)
    for seed in range(3):
        torch.manual_seed(seed)
        result = transform(paired_sample(*size))
        assert result["image"].shape == (3, *crop)
        assert result["mask"].shape == crop
        assert result["image"].dtype == torch.float32
        assert result["mask"].dtype == torch.int64
        assert set(result["mask"].unique().tolist()) <= {0, 1, 2, 3, 4, 5, 255}
        values = denormalised(result["image"])
        assert values.min() >= -1e-5
        assert values.max() <= 1 + 1e-5


def test_same_seed_same_result() -> None:
    transform = train_transform((32, 32), (0.5, 2.0), (60, 40), flip=0.5, photometric=True)
    sample = SyntheticScenes("train", length=1)[0]
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(transform(sample))
    assert torch.equal(results[0]["image"], results[1]["image"])
    assert torch.equal(results[0]["mask"], results[1]["mask"])
    assert not torch.equal(results[0]["image"], results[2]["image"])


def test_input_is_kept() -> None:
    sample = paired_sample(20, 20)
    before = sample["image"].clone(), sample["mask"].clone()
    train_transform((8, 8), (0.5, 2.0), None, flip=1.0, photometric=True)(sample)
    assert torch.equal(sample["image"], before[0])
    assert torch.equal(sample["mask"], before[1])


def test_image_and_mask_move_together() -> None:
    transform = train_transform((24, 40), (1.0, 1.0), None, flip=0.5, photometric=False, cat_max_ratio=1.0)
    for seed in range(10):
        torch.manual_seed(seed)
        result = transform(paired_sample(50, 45))
        grey = (denormalised(result["image"])[0] * 255).round().long()
        assert torch.equal(grey, result["mask"] * 20)


def test_padding_is_mean_colour_and_ignored_on_the_right_and_below() -> None:
    transform = train_transform((12, 15), (1.0, 1.0), None, flip=0.0, photometric=False)
    result = transform(paired_sample(8, 10))
    for part in ((slice(8, None), slice(None)), (slice(None), slice(10, None))):
        assert (result["mask"][part] == 255).all()
        assert (result["image"][:, part[0], part[1]] == 0).all()
    assert (result["mask"][:8, :10] < 6).all()


def test_flip() -> None:
    sample = paired_sample(10, 12)
    result = train_transform((10, 12), (1.0, 1.0), None, flip=1.0, photometric=False)(sample)
    assert torch.equal(result["mask"], sample["mask"].long().flip(1).as_subclass(Tensor))


@pytest.mark.parametrize(
    "size, base, ratio, expected",
    [
        ((512, 683), (2048, 512), 1.0, (512, 683)),
        ((300, 400), (2048, 512), 1.0, (512, 683)),
        ((100, 900), (512, 2048), 1.0, (228, 2048)),
        ((100, 50), (2048, 512), 0.5, (512, 256)),
        ((10, 20), None, 1.5, (15, 30)),
        ((1, 40), None, 0.25, (1, 10)),
    ],
)
def test_rescale_is_relative_to_the_base_size(
    size: tuple[int, int], base: tuple[int, int] | None, ratio: float, expected: tuple[int, int]
) -> None:
    result = RandomRescale((ratio, ratio), base)(paired_sample(*size))
    assert result["image"].shape[1:] == expected
    assert result["mask"].shape == expected
    assert result["mask"].max() < 6


def test_rescale_stays_in_its_range() -> None:
    sizes = {RandomRescale((0.5, 2.0), None)(paired_sample(20, 20))["mask"].shape[0] for _ in range(60)}
    assert min(sizes) >= 10
    assert max(sizes) <= 40
    assert len(sizes) > 10


def test_crop_avoids_a_single_class() -> None:
    mask = torch.zeros(40, 400, dtype=torch.uint8)
    mask[:, 360:] = 1
    sample = sample_of(torch.zeros(3, 40, 400, dtype=torch.uint8), mask)

    def mixed(cat_max_ratio: float) -> int:
        crop = BalancedRandomCrop((40, 40), cat_max_ratio)
        torch.manual_seed(0)
        return sum(crop(sample)["mask"].unique().numel() == 2 for _ in range(200))

    assert mixed(1.0) < 40
    assert mixed(0.95) > 80


def test_crop_of_ignored_pixels_alone_is_allowed() -> None:
    sample = sample_of(torch.zeros(3, 9, 9, dtype=torch.uint8), torch.full((9, 9), 255, dtype=torch.uint8))
    assert BalancedRandomCrop((4, 4), 0.75)(sample)["mask"].shape == (4, 4)


def test_photometric_distortion_changes_colours_only() -> None:
    torch.manual_seed(0)
    sample = SyntheticScenes("train", length=1)[0]
    distort = PhotometricDistortion()
    means, changed = [], 0
    for _ in range(40):
        result = distort(sample)
        assert result["image"].dtype == torch.uint8
        assert torch.equal(result["mask"], sample["mask"])
        means.append(result["image"].float().mean().item())
        changed += not torch.equal(result["image"], sample["image"])
    original = sample["image"].float().mean().item()
    assert 25 < changed < 40  # all four are left out in one of sixteen
    assert min(means) < 0.8 * original < 1.2 * original < max(means)


def test_photometric_strengths_are_in_range() -> None:
    torch.manual_seed(0)
    drawn = [PhotometricDistortion().make_params([]) for _ in range(300)]
    for name, low, high in (
        ("brightness", -32 / 255, 32 / 255),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -0.1, 0.1),
    ):
        values = [entry[name] for entry in drawn if entry[name] is not None]
        assert 110 < len(values) < 190, name
        assert low <= min(values) < low + 0.1 * (high - low), name
        assert high - 0.1 * (high - low) < max(values) <= high, name


@pytest.mark.parametrize(
    "change, words",
    [
        ({"crop_size": (0, 4)}, "crop_size must be at least 1x1"),
        ({"ratio_range": (2.0, 0.5)}, "ratio_range must be two positive factors in rising order"),
        ({"ratio_range": (0.0, 0.5)}, "ratio_range"),
        ({"base_size": (0, 5)}, "base_size"),
        ({"flip": 1.5}, "flip is a probability"),
        ({"cat_max_ratio": 0.0}, "cat_max_ratio must be in"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], words: str) -> None:
    settings: dict[str, Any] = {
        "crop_size": (4, 4),
        "ratio_range": (0.5, 2.0),
        "base_size": None,
        "flip": 0.5,
        "photometric": True,
    }
    with pytest.raises(ValueError, match=words):
        train_transform(**{**settings, **change})
