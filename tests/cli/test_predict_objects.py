"""predict with detectors and panoptic networks, through the whole command line."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from freqfusion import save_pretrained
from freqfusion.cli.main import main
from freqfusion.data import create_dataset
from freqfusion.prediction.writers import ObjectWriter
from freqfusion.tasks import DetectionModule, ObjectData
from freqfusion.training import create_trainer, load_checkpoint
from tiny_objects import SMALL_DETECTOR, tiny_detection, write_coco


def keep_checkpoint(module: Any, data: Any, folder: Path) -> Path:
    """The file that a run of one step writes."""
    trainer = create_trainer(
        folder, accelerator="cpu", max_steps=1, limit_val_batches=0, enable_progress_bar=False
    )
    trainer.fit(module, data)
    return folder / "last.ckpt"


class Trained(NamedTuple):
    """Where its pictures and its checkpoint are, and what it found at its last validation."""

    data: Path
    checkpoint: Path
    results: dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A Mask R-CNN over FreqFusion that has learnt to see some pictures."""
    folder = tmp_path_factory.mktemp("objects")
    torch.manual_seed(0)
    module, data = tiny_detection(write_coco(folder / "data"), warmup_steps=10, milestones=[0.8])
    trainer = create_trainer(
        folder / "run",
        accelerator="cpu",
        max_epochs=100,
        check_val_every_n_epoch=100,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    return Trained(folder / "data", folder / "run" / "last.ckpt", module.results)


def test_a_detector_learns(trained: Trained) -> None:
    """Boxes and masks of what it was trained on come out, with every class."""
    results = trained.results
    assert results["mask_ap"] > 0.9
    assert results["box_ap"] > 0.9
    assert results["box_ap50"] == pytest.approx(1.0)
    assert min(results["mask_ap_per_class"]) > 0.85


def test_what_was_found_before_a_stop_is_kept(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, checkpoint, _ = trained
    add, seen = ObjectWriter.add, []

    def stop(self: Any, picture: Any, image: Any) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(picture.file)
        add(self, picture, image)

    monkeypatch.setattr(ObjectWriter, "add", stop)
    words = [str(data / "train" / "*.png"), "--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    assert main(["predict", *words]) == 130
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == seen == ["train_0.png", "train_1.png"]
    assert {each["image_id"] for each in content["annotations"]} == {1, 2}


def test_boxes_and_masks(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, checkpoint, _ = trained
    out = tmp_path / "out"
    pattern = str(data / "train" / "*.png")
    assert (
        main(["predict", pattern, "--checkpoint", str(checkpoint), "--out", str(out), "--score", "0.6"]) == 0
    )
    printed = capsys.readouterr().out
    assert "objects with a score of at least 0.6" in printed
    assert "4 of 4 images predicted" in printed
    content = json.loads((out / "predictions.json").read_text())
    assert [category["id"] for category in content["categories"]] == [3, 7]
    assert [image["file_name"] for image in content["images"]] == [f"train_{i}.png" for i in range(4)]
    assert content["annotations"]
    assert min(annotation["score"] for annotation in content["annotations"]) >= 0.6
    for image in content["images"]:
        drawn = Image.open(out / "overlays" / f"{Path(image['file_name']).stem}.png")
        assert drawn.size == (image["width"], image["height"])

    # the file is a data set in COCO's form: what was predicted comes back as truth
    again = create_dataset("coco", data, "train", annotations=str(out / "predictions.json"), images="train")
    assert len(again) == 4
    assert again.has_masks
    truth = create_dataset("coco", data, "train")
    found = sum(len(sample["labels"]) for sample in again)
    assert found == len(content["annotations"])
    assert abs(found - sum(len(sample["labels"]) for sample in truth)) <= 2

    rows = list(csv.DictReader((out / "object_counts.csv").read_text().splitlines()))
    assert len(rows) == 4 * 2
    assert sum(int(row["objects"]) for row in rows) == found


def test_a_folder_of_save_pretrained(trained: Trained, tmp_path: Path) -> None:
    """The same results as from the checkpoint, and the classes by the names that were saved."""
    data, checkpoint, _ = trained
    module, classes, _ = load_checkpoint(checkpoint)
    save_pretrained(module.network, tmp_path / "model", classes=classes)
    results = []
    for name, source in (("file", checkpoint), ("folder", tmp_path / "model")):
        words = [
            str(data / "train" / "train_1.png"),
            "--checkpoint",
            str(source),
            "--out",
            str(tmp_path / name),
        ]
        assert main(["predict", *words]) == 0
        results.append(json.loads((tmp_path / name / "predictions.json").read_text()))
    assert [x["name"] for x in results[1]["categories"]] == ["disc", "block"]
    boxes = [torch.tensor([x["bbox"] for x in result["annotations"]]) for result in results]
    assert len(boxes[0])
    assert torch.equal(*boxes)


def test_panoptic_segments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ObjectData(
        "synthetic_panoptic",
        dataset_options={"length": 4, "size": (48, 64)},
        short_sides=[48],
        batch_size=2,
        workers=0,
    )
    network_options = {**SMALL_DETECTOR, "semantic_channels": 32, "panoptic_stuff_area": 20, "min_size": 48}
    module = DetectionModule(
        "panoptic_fpn_r18",
        num_classes=data.num_classes,
        things=data.things,
        network_options=network_options,
        optimizer="adamw",
        lr=1e-3,
        warmup_steps=1,
    )
    checkpoint = keep_checkpoint(module, data, tmp_path / "run")
    picture = tmp_path / "photos" / "deep" / "a.png"
    picture.parent.mkdir(parents=True)
    Image.fromarray(data.dataset("val")[0]["image"].permute(1, 2, 0).numpy()).save(picture)
    out = tmp_path / "out"
    assert (
        main(["predict", str(tmp_path / "photos"), "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    )
    content = json.loads((out / "panoptic.json").read_text())
    (annotation,) = content["annotations"]
    assert annotation["file_name"] == "deep/a.png"
    ids = np.asarray(Image.open(out / "panoptic" / "deep" / "a.png")).astype(int)
    ids = ids[..., 0] + 256 * ids[..., 1] + 65536 * ids[..., 2]
    for info in annotation["segments_info"]:
        assert int((ids == info["id"]).sum()) == info["area"]
    assert [category["isthing"] for category in content["categories"]] == [int(x) for x in data.things]
    assert (out / "overlays" / "deep" / "a.png").is_file()
    assert "share of the pixels" in capsys.readouterr().out


def test_options_of_another_task(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, checkpoint, _ = trained
    words = ["predict", str(data), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    for option, message in (
        (["--window", "64"], "--window does not apply to this network's task, objects and segments"),
        (["--sizes", "64", "0"], "--sizes is [64, 0], expected one or more whole numbers of at least 1"),
        (["--score", "7"], "--score is 7.0, expected a number of at least 0 and at most 1"),
    ):
        assert main([*words, *option]) == 2
        assert message in capsys.readouterr().err
