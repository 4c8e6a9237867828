"""Decoded samples in memory are what the data set gives, each read once."""

import pickle
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from freqfusion.data import create_dataset
from freqfusion.data.cache import SampleCache, decode_all
from tiny_objects import write_coco, write_panoptic


class Counted:
    """A data set that counts how often each sample is read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.read = dataset, Counter[int]()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.read[index] += 1
        return self.dataset[index]


def decoded(dataset: Any) -> SampleCache:
    return decode_all(dataset, lambda sample: sample, "some data", threads=2)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for key, value in one.items():
        assert type(value) is type(other[key]), key
        if isinstance(value, Tensor):
            assert (value.dtype, value.shape) == (other[key].dtype, other[key].shape)
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key]
        if isinstance(value, tv_tensors.BoundingBoxes):
            assert (value.format, value.canvas_size) == (other[key].format, other[key].canvas_size)


@pytest.fixture(params=["synthetic", "coco", "coco_panoptic", "synthetic_panoptic"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param.startswith("synthetic"):
        return create_dataset(request.param, None, "train", length=21, size=(23, 31))
    root = write_coco(tmp_path) if request.param == "coco" else write_panoptic(tmp_path)
    return create_dataset(request.param, root, "train")


def test_every_kind_of_sample_comes_back(dataset: Any, tmp_path: Path) -> None:
    counted = Counted(dataset)
    cache = decoded(counted)
    assert counted.read == dict.fromkeys(range(len(dataset)), 1)
    cache.save(tmp_path / "cache")
    mapped = SampleCache.load(tmp_path / "cache")
    assert len(cache) == len(mapped) == len(dataset)
    for index in range(len(dataset)):
        for kept in (cache, mapped, cache.to(torch.device("cpu"))):
            assert_same(kept[index], dataset[index])


@pytest.mark.parametrize("mapped", [False, True])
def test_processes_that_are_not_forked_get_it(tmp_path: Path, mapped: bool) -> None:
    """In the form in which they get it, here read by the same process."""
    dataset = create_dataset("synthetic", None, "train", length=3, size=(23, 31))
    cache = decoded(dataset)
    if mapped:
        cache.save(tmp_path / "cache")
        cache = SampleCache.load(tmp_path / "cache")
    again = pickle.loads(ForkingPickler.dumps(cache))
    for index in range(3):
        assert_same(again[index], dataset[index])


def test_a_sample_may_be_changed(dataset: Any) -> None:
    cache = decoded(dataset)
    cache[0]["image"].zero_()
    assert_same(cache[0], dataset[0])


def test_all_tensors_are_on_the_device(dataset: Any) -> None:
    sample = decoded(dataset).to(torch.device("meta"))[0]
    assert {value.device.type for value in sample.values() if isinstance(value, Tensor)} == {"meta"}


def test_more_than_thefree_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dataset = create_dataset("synthetic", None, "train", length=40, size=(23, 31))
    needed = 40 * 4 * 23 * 31
    message = (
        r"some data: its 40 decoded samples take {} 0\.00 GiB, and 0\.00 GiB of memory are free: leave out"
    )
    counted = Counted(dataset)
    monkeypatch.setattr("freqfusion.data.cache.free_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=message.format("about")):
        decoded(counted)
    assert counted.read.total() == 16  # refused before all are read
    monkeypatch.setattr("freqfusion.data.cache.free_memory", lambda: needed)
    with pytest.raises(ValueError, match=message.format("more than")):  # the last samples are larger
        decoded(_Growing(dataset))
    monkeypatch.setattr("freqfusion.data.cache.free_memory", lambda: 2 * needed)
    cache = decoded(dataset)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed // 2))
    with pytest.raises(OSError, match="GiB free, and the decoded data set takes"):
        cache.save(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


class _Growing(Counted):
    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        return {**sample, "more": torch.zeros(9999 if index == 39 else 0)}


@pytest.mark.parametrize("value", [None, [1], tv_tensors.Video(torch.zeros(1, 3, 2, 2))])
def test_what_cannot_be_kept_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"a sample's odd is a .*, which the cache cannot keep"):
        decoded([{"odd": value}])
