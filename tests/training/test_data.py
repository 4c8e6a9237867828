import gc

import pytest
import torch
from torchvision import tv_tensors

from freqfusion.training.data import EvalOrder, SegmentationData, TrainOrder, _Samples, collate
from tiny_training import tiny_data


def batches(order: TrainOrder, epoch: int = 0, first: int = 0) -> list[list[int]]:
    order.epoch, order.first = epoch, first
    return [[index for _, index in batch] for batch in order]


def test_processes_share_the_batches_of_a_single_one():
    whole = batches(TrainOrder(11, 4, seed=3))
    shares = [batches(TrainOrder(11, 4, seed=3, rank=rank, world_size=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole
    assert len({index for batch in whole for index in batch}) == 8


def test_order_depends_on_seed_and_epoch():
    order = TrainOrder(50, 5, seed=3)
    assert batches(order) == batches(TrainOrder(50, 5, seed=3))
    assert batches(order) != batches(order, epoch=1)
    assert batches(order) != batches(TrainOrder(50, 5, seed=4))


def test_an_epoch_can_start_in_the_middle():
    order = TrainOrder(11, 2, seed=0)
    assert batches(order, epoch=2, first=3) == batches(order, epoch=2)[3:]
    assert len(order) == 5


def test_batches_that_do_not_fit():
    with pytest.raises(ValueError, match="5 cannot be shared by 2 processes: use a multiple of 2"):
        TrainOrder(11, 5, seed=0, world_size=2)
    with pytest.raises(ValueError, match="3 images, fewer than one batch of 4: set batch_size to 3"):
        TrainOrder(3, 4, seed=0)


@pytest.mark.parametrize("length, batch_size, world_size", [(7, 1, 2), (8, 3, 2), (1, 1, 3), (5, 2, 1)])
def test_evaluation_meets_each_image_once_in_equally_many_batches(length, batch_size, world_size):
    shares = [list(EvalOrder(length, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(share) == len(EvalOrder(length, batch_size, 0, world_size)) for share in shares)
    indices = sorted(index for share in shares for batch in share for _, index in batch)
    assert indices == list(range(length))


def test_collate():
    def sample(height: int) -> dict:
        return {
            "image": torch.zeros(3, height, 5),
            "mask": torch.zeros(height, 5, dtype=torch.int64),
            "name": str(height),
        }

    assert collate([sample(4), sample(4)])["image"].shape == (2, 3, 4, 5)
    assert collate([]) == {"name": []}
    with pytest.raises(ValueError, match="several sizes \\(4x5, 6x5\\): set eval_batch_size to 1"):
        collate([sample(4), sample(6)])


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    def transform(sample: dict) -> dict:
        return {**sample, "image": sample["image"] + torch.rand(1)}

    samples = _Samples([{"image": torch.zeros(3, 4, 4)}] * 3, transform, seed=5)

    def draw(epoch: int, index: int) -> float:
        return float(samples[epoch, index]["image"][0, 0, 0])

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert draw(0, 1) == first
    assert len({first, draw(1, 1), draw(0, 2), draw(1, 2)}) == 4
    samples.seed = 6
    assert draw(0, 1) != first


def test_resize_keeps_labels_whole(monkeypatch):
    mask = torch.tensor([[0, 7], [255, 3]], dtype=torch.uint8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    sample = {"image": tv_tensors.Image(torch.zeros(3, 8, 8)), "mask": tv_tensors.Mask(mask), "name": "a"}
    data = SegmentationData(resize=(5, 3))
    monkeypatch.setattr(data, "open", lambda split: [sample])
    assert data.sample("val", 0)["mask"].shape == (5, 3)
    sample = data.transform("eval")(data.dataset("val")[0])
    assert sample["image"].shape == (3, 5, 3)
    assert sample["mask"].shape == (5, 3)
    assert sample["mask"].dtype == torch.int64
    assert set(sample["mask"].unique().tolist()) == {0, 3, 7, 255}
    assert type(sample["image"]) is torch.Tensor


def test_workers_do_not_change_what_comes():
    def first_batches(workers: int) -> list[torch.Tensor]:
        data = tiny_data(length=8, workers=workers)
        loader = data._loader("train", "train", TrainOrder(8, 4, seed=0))
        images = [batch["image"] for batch in loader]
        del loader
        gc.collect()  # ends the workers here; if that happens during an import, they wait for its lock
        return images

    for alone, helped in zip(first_batches(0), first_batches(2), strict=True):
        assert torch.equal(alone, helped)


def test_wrong_settings_and_folders(tmp_path):
    with pytest.raises(ValueError, match="batch_size is 0, expected a whole number of at least 1"):
        SegmentationData(batch_size=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SegmentationData("camvid", str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(RuntimeError, match="pass it to fit"):
        tiny_data().train_dataloader()
