import gc
import json

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from torchvision import tv_tensors

from freqfusion.data import BadSampleError, ImageFolder
from freqfusion.tasks import ObjectData
from freqfusion.tasks.image_data import EvalOrder, SegmentationData, TrainOrder, _Samples, collate
from tiny_objects import write_coco, write_panoptic
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
        SegmentationData("camvid", root=str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(RuntimeError, match="pass it to fit"):
        tiny_data().train_dataloader()


# classes that never occur


def mask_set(root, values, names=("ground", "lesion", "vessel"), splits=("train", "val"), count=3):
    """Masks with these values in halves, one pair of them after the other."""
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    for split in splits:
        for number in range(count):
            for folder in ("images", "masks"):
                (root / split / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6)).save(root / split / "images" / f"{number}.png")
            first, second = values[number % len(values)]
            mask = np.full((6, 8), first, np.uint8)
            mask[:, 4:] = second
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")
    return root


def set_up(root, stage="fit", dataset="folder", **options):
    SegmentationData(dataset, root=str(root), batch_size=2, **options).setup(stage)


@pytest.mark.parametrize("module", [SegmentationData, ObjectData])
def test_every_option_is_kept_and_has_a_help(module):
    """The shared ones too: in the hyperparameters, and on the command line."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(module, "data")
    helps = {action.dest: action.help for action in parser._actions}
    hparams = module(flip=0.25, max_size=77).hparams
    assert {"root", "train_split", "flip", "batch_size", "seed", "crop_size", "max_size"} < set(hparams)
    assert (hparams["flip"], hparams["max_size"]) == (0.25, 77)
    assert all(len(helps[f"data.{name}"]) > 10 for name in hparams)
    assert {name for name in helps if name.startswith("data.")} == {f"data.{name}" for name in hparams}
    assert set(type(module())(**hparams).hparams) == set(hparams)
    with pytest.raises(TypeError, match="batchsize"):
        module(batchsize=2)


@pytest.mark.parametrize(
    ("module", "dataset", "words"),
    [
        (SegmentationData, "coco", r"'coco' has boxes.* tasks detection and masks .*; .*use ade20k.*, voc$"),
        (ObjectData, "voc", r"'voc' has a class for every pixel.* task semantic .*; .*, coco.*, voc_boxes$"),
        (ObjectData, "vac", r"unknown dataset 'vac'; for this task use cityscapes_panoptic, coco"),
    ],
)
def test_data_of_another_kind_is_refused_with_what_to_use(module, dataset, words):
    with pytest.raises(ValueError, match=words):
        module(dataset=dataset, root="nowhere").dataset("train")


def test_classes_that_never_occur_are_named(tmp_path, caplog):
    set_up(mask_set(tmp_path, [(0, 1)]))
    assert [text.partition(": ")[2] for text in caplog.messages] == [
        "1 of 3 classes never occur in the truth (all 3 samples looked at): 'vessel'."
    ] * 2
    assert f"{tmp_path}, split 'train'" in caplog.messages[0]
    assert f"{tmp_path}, split 'val'" in caplog.messages[1]


def test_nothing_is_said_where_all_occur(tmp_path, caplog):
    set_up(mask_set(tmp_path, [(0, 1), (2, 255)]))
    assert not caplog.messages


@pytest.mark.parametrize("values", [[(0, 255)], [(1, 255)], [(255, 255)]])
def test_objects_stored_as_255_are_recognised(tmp_path, values, caplog):
    root = mask_set(tmp_path, values, ("ground", "lesion"))
    with pytest.raises(
        ValueError, match=r"never occur in the truth .*The value 255 does occur.*nothing to learn"
    ):
        set_up(root)
    set_up(root, "validate")
    assert "The value 255 does occur" in caplog.text
    caplog.clear()
    set_up(root, "test", test_split="train")
    assert "The value 255 does occur" in caplog.text


def test_255_beside_other_classes_is_a_warning(tmp_path, caplog):
    set_up(mask_set(tmp_path, [(0, 1), (0, 255)]))
    assert "'vessel'. The value 255 does occur" in caplog.messages[0]


def test_other_values_of_black_and_white_are_refused_before_training(tmp_path):
    with pytest.raises(
        BadSampleError, match=r"\.png: holds the label values 128, but ImageFolder has only 0\.\.1"
    ):
        set_up(mask_set(tmp_path, [(128, 255)], ("ground", "lesion")))


def test_bad_masks_are_left_out_of_the_search_where_they_are_left_out(tmp_path, caplog):
    root = mask_set(tmp_path, [(0, 1), (0, 9), (0, 2)], ("a", "b", "c", "d"))
    with pytest.raises(BadSampleError, match="holds the label values 9"):
        set_up(root)
    set_up(root, skip_bad=True)
    assert caplog.messages[-1].endswith("'d'.")


def test_a_class_alone_without_255_is_a_warning(tmp_path, caplog):
    set_up(mask_set(tmp_path, [(0, 0)]))
    assert (
        "2 of 3 classes never occur in the truth (all 3 samples looked at): 'lesion', 'vessel'."
        in caplog.text
    )


def test_the_search_ends_in_time(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("freqfusion.tasks.image_data._LOOKING_SECONDS", -1)
    set_up(mask_set(tmp_path, [(0, 255)], ("ground", "lesion"), count=4))
    assert "(1 of 4 samples looked at): 'lesion'" in caplog.messages[0]


def test_the_search_ends_with_the_last_class(tmp_path, monkeypatch):
    looked = []
    labels = ImageFolder.labels
    monkeypatch.setattr(
        ImageFolder, "labels", lambda self, entry: looked.append(entry) or labels(self, entry)
    )
    set_up(mask_set(tmp_path, [(0, 1)], ("a", "b"), splits=("val",), count=200), "validate")
    assert 1 <= len(looked) < 100


def test_long_lists_of_names_are_cut(tmp_path, caplog):
    set_up(mask_set(tmp_path, [(0, 1)], [f"{number} {'x' * 1000}" for number in range(30)]))
    assert "28 of 30 classes never occur" in caplog.messages[0]
    assert caplog.messages[0].endswith(" and 18 more.")
    assert len(caplog.messages[0]) < 1200


@pytest.mark.parametrize("kind", ["coco", "coco_panoptic"])
def test_kinds_of_objects_that_never_occur_are_named(tmp_path, kind, caplog):
    for split in ("train", "val"):
        (write_coco if kind == "coco" else write_panoptic)(tmp_path, split)
    data = ObjectData(kind, root=str(tmp_path))
    data.setup("fit")
    assert not caplog.messages
    part = "instances" if kind == "coco" else "panoptic"
    for split in ("train", "val"):
        path = tmp_path / f"{part}_{split}.json"
        content = json.loads(path.read_text())
        content["categories"].append({"id": 50, "name": "rare", "isthing": 1})
        for entry in content["annotations"]:  # crowds do not count
            for found in [entry] if kind == "coco" else entry["segments_info"]:
                found["iscrowd"] = int(found["category_id"] == 7)
        path.write_text(json.dumps(content))
    ObjectData(kind, root=str(tmp_path)).setup("fit")
    assert [text.partition("): ")[2] for text in caplog.messages] == ["'block', 'rare'."] * 2


@pytest.mark.parametrize("crowd", [0, 1])
def test_data_without_an_object_is_refused(tmp_path, crowd):
    for split in ("train", "val"):
        write_coco(tmp_path, split)
    path = tmp_path / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"] = [{**entry, "iscrowd": 1} for entry in content["annotations"]] * crowd
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"2 of 2 classes never occur in the truth .*nothing to learn"):
        ObjectData("coco", root=str(tmp_path)).setup("fit")
    ObjectData("coco", root=str(tmp_path)).setup("validate")  # the other part has objects


def test_label_maps_are_searched_where_nothing_else_tells_their_segments(tmp_path, caplog):
    for split in ("train", "val"):
        for folder, name in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_instanceIds")):
            path = tmp_path / folder / split / "ulm" / f"ulm_0_0_{name}.png"
            path.parent.mkdir(parents=True)
            ids = np.array([[7, 26001, 24, 33000]], np.uint16)  # road, car, a crowd of persons, bicycle
            Image.fromarray(ids if folder == "gtFine" else np.zeros((1, 4, 3), np.uint8)).save(path)
    ObjectData("cityscapes_panoptic", root=str(tmp_path)).setup("fit")
    assert "16 of 19 classes never occur" in caplog.messages[0]
    assert "'sidewalk'" in caplog.messages[0]
    assert "'road'" not in caplog.messages[0]
