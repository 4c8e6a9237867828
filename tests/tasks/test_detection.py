"""Training and judging detectors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from pycocotools.coco import COCO
from torch import Tensor

import tiny_objects
from freqfusion import FreqFusion
from freqfusion.data import create_dataset
from freqfusion.data.objects import Category
from freqfusion.models.detection.contract import training_target
from freqfusion.tasks import DetectionModule, ObjectData
from freqfusion.tasks.evaluators import DetectionEvaluator, PanopticEvaluator
from freqfusion.training import create_trainer, load_checkpoint
from freqfusion.training.checkpoints import AtomicCheckpointIO
from tiny_objects import tiny_detection, write_coco
from tiny_training import read_history


def run_fit(out: Path, module: Any, data: Any, resume: Path | None = None, **options: Any) -> Any:
    trainer = create_trainer(
        out, **{"accelerator": "cpu", "enable_progress_bar": False, "log_steps": 1, **options}
    )
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    return trainer


def test_target_of_boxes() -> None:
    sample = {
        "boxes": torch.tensor([[0.0, 1.0, 4.0, 5.0], [2.0, 2.0, 8.0, 9.0]]),
        "labels": torch.tensor([0, 2]),
        "iscrowd": torch.tensor([True, False]),
        "masks": torch.arange(2 * 3 * 4).view(2, 3, 4).to(torch.uint8),
    }
    target = training_target(sample, things=[True] * 3)
    assert target["labels"].tolist() == [3]
    assert target["boxes"].tolist() == [[2.0, 2.0, 8.0, 9.0]]
    assert torch.equal(target["masks"], sample["masks"][1:])


def test_target_of_segments() -> None:
    segments = torch.tensor([[0, 1, 1, 2], [3, 3, 4, 4]])
    sample = {
        "segments": segments,
        "labels": torch.tensor([5, 1, 5, 0]),
        "iscrowd": torch.tensor([False, False, True, False]),
    }
    target = training_target(sample, things=[True, False, False, False, False, True])
    assert target["labels"].tolist() == [6, 1]
    assert target["boxes"].tolist() == [[1.0, 0.0, 3.0, 1.0], [2.0, 1.0, 4.0, 2.0]]
    assert target["masks"].tolist() == [[[0, 1, 1, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 1, 1]]]
    assert target["semantic"].tolist() == [[255, 5, 5, 1], [5, 5, 0, 0]]


def learning_rates(tmp_path: Path, batch_size: int, accumulate: int = 1, **options: Any) -> list[float]:
    """Of every optimiser step of a run over 8 images."""
    module, data = tiny_detection(
        write_coco(tmp_path, count=8),
        "faster_rcnn_r18",
        {"batch_size": batch_size},
        **{"optimizer": "sgd", "lr": 0.02, "lr_batch_size": 16, "warmup_ratio": 0.0, **options},
    )
    run_fit(
        tmp_path / "run",
        module,
        data,
        max_epochs=4,
        limit_val_batches=0,
        enable_checkpointing=False,
        accumulate_grad_batches=accumulate,
    )
    return [float(row["lr"]) for row in read_history(tmp_path / "run")]


def test_schedule(tmp_path: Path) -> None:
    """Warm-up over four steps, drops after the second and third epoch; linear in the images of a step."""
    rates = learning_rates(tmp_path, 2, accumulate=2, warmup_steps=4, milestones=[0.5, 0.75])
    peak = 0.02 * 4 / 16
    # written after a step, when the rate is that of the next one; two steps per epoch
    factors = [1 / 4, 1 / 2, 3 / 4, 1 / 10, 1 / 10, 1 / 100, 1 / 100, 1 / 100]
    assert rates == pytest.approx([peak * factor for factor in factors])


def test_a_frozen_backbone_goes_on_without_its_file(tmp_path: Path) -> None:
    """The weights to start from are needed once; a checkpoint has them."""
    root = write_coco(tmp_path)
    weights = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    options = {**tiny_objects.SMALL_DETECTOR, "backbone_options": {"frozen_stages": 1, "norm_eval": True}}

    def build(**more: Any) -> tuple[DetectionModule, ObjectData]:
        _, data = tiny_detection(root, "faster_rcnn_r18")
        return DetectionModule("faster_rcnn_r18", num_classes=2, network_options=options, **more), data

    run_fit(tmp_path / "run", *build(backbone_weights=str(tmp_path / "resnet18.pth")), max_epochs=1)
    (tmp_path / "resnet18.pth").unlink()
    module, data = build()
    run_fit(tmp_path / "run", module, data, tmp_path / "run" / "last.ckpt", max_epochs=2)
    body: Any = module.network.backbone
    assert torch.equal(body.body.conv1.weight, weights["conv1.weight"])
    assert not torch.equal(body.body.layer2[0].conv1.weight, weights["layer2.0.conv1.weight"])
    with pytest.raises(ValueError, match="frozen_stages is 1, but no weights are given"):
        run_fit(tmp_path / "other", *build(), max_epochs=1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fusions_have_a_learning_rate_of_their_own(tmp_path: Path, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "lr": 0.01, "lr_batch_size": None, "warmup_steps": 0}
    module, data = tiny_detection(write_coco(tmp_path), fusion_lr_factor=0.1, **settings)
    trainer = run_fit(
        tmp_path / "run", module, data, max_epochs=1, limit_val_batches=0, enable_checkpointing=False
    )
    fusions = [part for part in module.modules() if isinstance(part, FreqFusion)]
    expected = {id(parameter) for fusion in fusions for parameter in fusion.parameters()}
    others, of_fusions = trainer.optimizers[0].param_groups
    assert {id(parameter) for parameter in of_fusions["params"]} == expected != set()
    assert of_fusions["initial_lr"] == pytest.approx(0.1 * others["initial_lr"]) == pytest.approx(1e-3)


def test_optimizer_leaves_frozen_weights_alone(tmp_path: Path) -> None:
    module, data = tiny_detection(write_coco(tmp_path), optimizer="sgd", momentum=0.8, weight_decay=0.01)
    module.network.backbone.body.layer1.requires_grad_(False)
    trainer = run_fit(
        tmp_path / "run", module, data, max_epochs=1, limit_val_batches=0, enable_checkpointing=False
    )
    groups = trainer.optimizers[0].param_groups
    assert {(group["momentum"], group["weight_decay"]) for group in groups} == {(0.8, 0.01)}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in module.parameters())


def test_an_interrupted_run_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint in the middle of an epoch: same weights and history; sampling of anchors included."""
    root = write_coco(tmp_path, count=8)
    save = AtomicCheckpointIO.save_checkpoint
    moments: list[Path] = []

    def save_and_keep(self: Any, checkpoint: Any, path: Path, storage_options: Any = None) -> None:
        save(self, checkpoint, path)
        if path.name == "last.ckpt":
            moments.append(shutil.copytree(path.parent, tmp_path / f"moment{len(moments)}"))

    def fit(out: Path, resume: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0 if resume is None else 99)
        module, data = tiny_detection(root, data={"batch_size": 2, "flip": 0.5}, milestones=[0.5])
        run_fit(out, module, data, resume, max_epochs=2, checkpoint_steps=1)
        return module.state_dict()

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_keep)
        whole = fit(tmp_path / "whole")
    moment = moments[2]
    assert torch.load(moment / "last.ckpt", weights_only=True)["global_step"] == 3
    resumed = fit(moment, moment / "last.ckpt")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert read_history(moment) == read_history(tmp_path / "whole")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes_judge_like_one(tmp_path: Path) -> None:
    """Five images to judge leave one over; each process trains on its own half of the batches."""
    root = write_coco(write_coco(tmp_path, "train", 4), "val", 5)
    done = subprocess.run(
        [sys.executable, tiny_objects.__file__, str(root), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(Path(tiny_objects.__file__).parent)},
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    module, _, _ = load_checkpoint(tmp_path / "two" / "last.ckpt")
    data = ObjectData(**module.data_options)
    trainer = create_trainer(
        tmp_path / "one", accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.validate(module, data, verbose=False)
    one, two = (json.loads((tmp_path / name / "val_metrics.json").read_text()) for name in ("one", "two"))
    assert one == two
    first, second = (
        sorted(
            json.loads((tmp_path / name / "val_box_results.json").read_bytes()),
            key=lambda x: (x["image_id"], -x["score"]),
        )
        for name in ("one", "two")
    )
    assert [x["image_id"] for x in first] == [x["image_id"] for x in second]
    assert len({x["image_id"] for x in first}) == 5
    torch.testing.assert_close(
        torch.tensor([x["bbox"] for x in first]),
        torch.tensor([x["bbox"] for x in second]),
        rtol=1e-4,
        atol=1e-3,
    )


def test_results_of_a_test(tmp_path: Path) -> None:
    """The files that the official servers take, curves, and a table that names every class."""
    module, data = tiny_detection(write_coco(tmp_path))
    trainer = create_trainer(tmp_path / "out", accelerator="cpu", enable_progress_bar=False)
    trainer.test(module, data, verbose=False)
    results = json.loads((tmp_path / "out" / "test_mask_results.json").read_bytes())
    assert {entry["category_id"] for entry in results} <= {3, 7}
    assert {entry["image_id"] for entry in results} <= {10, 11, 12, 13}
    assert (tmp_path / "out" / "test_precision_recall.png").stat().st_size > 5000
    table = (tmp_path / "out" / "test_classes.csv").read_text()
    assert table.splitlines()[0] == "class,mask_ap,mask_ap50,box_ap,box_ap50"
    metrics = json.loads((tmp_path / "out" / "test_metrics.json").read_text())
    assert list(metrics["classes"]) == ["disc", "block"]
    assert metrics["mask_ap_medium"] is None  # the pictures have small objects only


def test_a_detector_of_torchvision(tmp_path: Path) -> None:
    """Upgraded, trained a step, saved, and rebuilt from the checkpoint alone."""
    root = write_coco(tmp_path)
    data = ObjectData("coco", root=str(root), val_split="train", short_sides=[64], batch_size=4, workers=0)
    module = DetectionModule(
        "torchvision:retinanet_resnet50_fpn",
        "dysample",
        num_classes=2,
        network_options={"min_size": 64, "max_size": 96, "init": "identity"},
    )
    run_fit(tmp_path / "run", module, data, max_epochs=1)
    assert set(module.metric_labels) == {
        "box_ap",
        "box_ap50",
        "box_ap75",
        "box_ap_small",
        "box_ap_medium",
        "box_ap_large",
    }
    again, classes, _ = load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert classes == ("disc", "block")
    assert isinstance(again.network.host, torchvision.models.detection.RetinaNet)
    first, second = module.state_dict(), again.state_dict()
    assert all(torch.equal(first[key], value) for key, value in second.items())
    assert any("fusions" in key for key in second)


def test_sizes_and_mirrored_passes_are_merged(tmp_path: Path) -> None:
    module, data = tiny_detection(write_coco(tmp_path), test_size=[48, 64], flip_test=True)
    module.eval()
    image = data.transform("eval")(data.dataset("train")[0])["image"]
    merged = module([image])[0]
    plain = DetectionModule(**{**module.hparams, "test_size": None, "flip_test": False}).eval()
    plain.load_state_dict(module.state_dict())
    single = plain([image])[0]
    assert len(merged["boxes"]) <= 100
    assert merged["masks"].shape[1:] == single["masks"].shape[1:]
    assert float(merged["scores"][0]) >= float(single["scores"][0])
    assert bool((merged["scores"].diff() <= 0).all())
    mirrored = module([image.flip(-1)])[0]
    best = merged["boxes"][0]
    expected = torch.stack((80 - best[2], best[1], 80 - best[0], best[3]))
    torch.testing.assert_close(mirrored["boxes"][0], expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": 0}, "num_classes is 0, expected at least 1"),
        ({"network_options": {"colour": 1}}, "network_options {'colour': 1} do not fit 'faster_rcnn_r50'"),
        ({"network": "segnext_t", "things": None}, "segnext_t gives a class for every pixel"),
        ({"network": "torchvision:resnet9"}, "torchvision has no model 'resnet9'"),
        (
            {"network_options": {"init": "paper"}},
            "init and upgrade_options are for models of other libraries",
        ),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionModule(**{"num_classes": 2, **options})


def test_data_that_does_not_fit(tmp_path: Path) -> None:
    root = write_coco(tmp_path)

    def fit(module: DetectionModule, data: ObjectData) -> None:
        run_fit(tmp_path / "run", module, data, max_epochs=1, enable_checkpointing=False)

    module, _ = tiny_detection(root)
    _, unmasked = tiny_detection(root, data={"dataset_options": {"with_masks": False}})
    with pytest.raises(ValueError, match="the network predicts masks, but the annotations have none"):
        fit(module, unmasked)
    panoptic = DetectionModule("panoptic_fpn_r18", num_classes=2, things=[True, False])
    with pytest.raises(ValueError, match="made for other things and stuff than the data has"):
        fit(panoptic, unmasked)
    with pytest.raises(ValueError, match="the network predicts 5 classes, the data has 2"):
        fit(DetectionModule("faster_rcnn_r18", num_classes=5), unmasked)


def test_panoptic_files_of_pictures_of_one_name(tmp_path: Path) -> None:
    """COCO wants bare names, which pictures in several folders may share."""
    names = ["s/a", "t/a", "t/b"]

    class Pictures:
        categories = (Category(7, "ground", False, (0, 0, 0)),)

        def __len__(self) -> int:
            return len(names)

        def name(self, index: int) -> str:
            return names[index]

    judge = PanopticEvaluator([False])
    judge.start(Pictures(), tmp_path / "test")
    segments = torch.ones(2, 3, dtype=torch.long)
    for number, name in enumerate(names):
        sample = {"name": name, "image_id": number, "segments": segments}
        sample |= {"labels": torch.tensor([0]), "iscrowd": torch.tensor([False])}
        judge.update(sample, {"segments": segments, "segment_labels": torch.tensor([0])})
    assert judge.compute()["pq"] == 1
    files = [
        entry["file_name"]
        for entry in json.loads((tmp_path / "test_panoptic.json").read_text())["annotations"]
    ]
    assert files == ["s_a_0.png", "t_a_1.png", "b.png"]
    assert sorted(path.name for path in (tmp_path / "test_panoptic").iterdir()) == sorted(files)


@pytest.mark.parametrize("masks", [False, True])
def test_results_name_the_images_as_the_annotations_do(tmp_path: Path, masks: bool) -> None:
    """Also those in text, which the evaluator cannot take, and numbers and texts in one file."""
    root = write_coco(tmp_path, "val", 3)
    path = root / "instances_val.json"
    content = json.loads(path.read_text())
    names = {10: "img_b", 11: "1", 12: 1}
    for entry in content["images"]:
        entry["id"] = names[entry["id"]]
    for entry in content["annotations"]:
        entry["image_id"] = names[entry["image_id"]]
    path.write_text(json.dumps(content))
    dataset = create_dataset("coco", root, "val")
    judge = DetectionEvaluator(masks)
    judge.start(dataset, tmp_path / "out" / "test")
    for sample in dataset:
        found = {key: torch.as_tensor(sample[key]) for key in ("boxes", "labels", "masks")}
        found["scores"] = torch.ones(len(found["labels"]))
        judge.update(sample, {**found, "masks": found["masks"][:, None].float()})
    assert judge.compute()["box_ap"] == pytest.approx(1)
    for kind in ("box", "mask")[: 1 + masks]:
        results = json.loads((tmp_path / "out" / f"test_{kind}_results.json").read_bytes())
        assert [entry["image_id"] for entry in results] == [
            entry["image_id"] for entry in content["annotations"]
        ]
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        assert len(truth.loadRes(results).anns) == len(content["annotations"])


def test_a_frozen_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, data = tiny_detection(write_coco(tmp_path), network="faster_rcnn_r18", freeze_backbone=True)
    body = module.network.backbone.body
    before = {key: value.clone() for key, value in body.state_dict().items()}
    head = module.network.backbone.fpn.laterals[0].weight.clone()
    with pytest.warns(UserWarning, match="freeze_backbone is set, but no weights are given"):
        trainer = run_fit(tmp_path / "run", module, data, max_epochs=1, enable_checkpointing=False)
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())
    assert not torch.equal(module.network.backbone.fpn.laterals[0].weight, head)
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in body.parameters()}
