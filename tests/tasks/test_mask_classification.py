"""Training and judging Mask2Former: panoptic, instance and semantic segmentation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import tiny_masks
from freqfusion import create_model, save_pretrained
from freqfusion.data.class_names import COCO_PANOPTIC, COCO_THINGS
from freqfusion.tasks import MaskClassificationModule, SegmentationData, SegmentationModule
from freqfusion.training import create_trainer, load_checkpoint
from freqfusion.training.checkpoints import AtomicCheckpointIO
from tiny_masks import TINY, mask_module, object_data, run_fit
from tiny_objects import write_coco, write_panoptic
from tiny_training import read_history


def test_overfits_a_handful_of_images(tmp_path: Path) -> None:
    """Panoptic segments of what it was trained on, things and stuff, with FreqFusion in the pixel decoder."""
    torch.manual_seed(0)
    data = object_data(write_panoptic(tmp_path, count=3), batch_size=3, short_sides=[96])
    module = mask_module(data, lr=2e-3, weight_decay=0.0, test_size=96)
    run_fit(
        tmp_path / "run",
        module,
        data,
        max_epochs=300,
        check_val_every_n_epoch=300,
        enable_checkpointing=False,
        log_steps=50,
    )
    assert module.results["pq"] > 0.9
    assert min(module.results["pq_per_class"]) > 0.8


def test_instances(tmp_path: Path) -> None:
    """Of data with masks, and of the things of panoptic data; results as the official server takes them."""
    for name, data in (
        ("coco", object_data(write_coco(tmp_path / "coco"), "coco")),
        ("panoptic", object_data(write_panoptic(tmp_path / "panoptic"))),
    ):
        module = mask_module(data, output="instance", max_detections=7)
        trainer = run_fit(tmp_path / name / "run", module, data, max_epochs=1)
        assert set(module.results) >= {"mask_ap", "box_ap"}
        trainer.test(module, data, verbose=False)
        results = json.loads((tmp_path / name / "run" / "test_mask_results.json").read_text())
        assert {entry["category_id"] for entry in results} <= {3, 7}
        assert 0 < len(results) <= 4 * 7


def test_an_interrupted_run_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint in the middle of an epoch: same weights and history; random points of the loss included."""
    root = write_panoptic(tmp_path, count=8)
    save = AtomicCheckpointIO.save_checkpoint
    moments: list[Path] = []

    def save_and_keep(self: Any, checkpoint: Any, path: Path, storage_options: Any = None) -> None:
        save(self, checkpoint, path)
        if path.name == "last.ckpt":
            moments.append(shutil.copytree(path.parent, tmp_path / f"moment{len(moments)}"))

    def fit(out: Path, resume: Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0 if resume is None else 99)
        data = object_data(root, flip=0.5, batch_size=2)
        module = mask_module(data)
        run_fit(out, module, data, resume, max_epochs=2, checkpoint_steps=1)
        return {key: value.clone() for key, value in module.state_dict().items()}

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_keep)
        whole = fit(tmp_path / "whole")
    moment = moments[2]
    assert torch.load(moment / "last.ckpt", weights_only=True)["global_step"] == 3
    resumed = fit(moment, moment / "last.ckpt")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert read_history(moment) == read_history(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes(tmp_path: Path) -> None:
    """Parameters in shards train as copies do; the results are those of a single process."""
    root = write_panoptic(tmp_path, count=8)
    tests = Path(tiny_masks.__file__).parent
    for kind in ("copies", "sharded"):
        done = subprocess.run(
            [sys.executable, tiny_masks.__file__, kind, str(root), str(tmp_path / kind)],
            env={**os.environ, "PYTHONPATH": str(tests)},
            capture_output=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
    copies, sharded = (
        torch.load(tmp_path / kind / "last.ckpt", weights_only=True)["state_dict"]
        for kind in ("copies", "sharded")
    )
    assert sharded.keys() == copies.keys()
    torch.manual_seed(0)
    start = mask_module(object_data(root)).state_dict()
    learned = sum(float((value - start[key]).square().sum()) for key, value in copies.items())
    apart = sum(float((value - sharded[key]).square().sum()) for key, value in copies.items())
    assert learned > 0
    assert apart < 1e-4 * learned  # AdamW makes much of rounding where a gradient should be zero
    history, of_sharded = read_history(tmp_path / "copies"), read_history(tmp_path / "sharded")
    losses = [float(row["train_loss"]) for row in history if row["train_loss"]]
    assert losses[-1] < losses[0]
    assert [float(row["train_loss"]) for row in of_sharded if row["train_loss"]] == pytest.approx(
        losses, rel=1e-3
    )

    module, _, _ = load_checkpoint(tmp_path / "sharded" / "last.ckpt")
    trainer = create_trainer(tmp_path / "one", accelerator="cpu", enable_progress_bar=False)
    trainer.test(module, object_data(root), verbose=False)
    assert module.results["pq"] == pytest.approx(float(of_sharded[-1]["val_pq"]), abs=1e-6)


def test_semantic(tmp_path: Path) -> None:
    """The same network with a class for every pixel, by the task semantic; rebuilt from its checkpoint alone."""
    data = SegmentationData(
        dataset_options={"length": 4, "size": (48, 64)}, crop_size=(48, 64), batch_size=2, workers=0
    )
    module = SegmentationModule(
        "mask2former_swin_t",
        num_classes=data.num_classes,
        network_options=TINY,
        lr=1e-3,
        warmup_steps=0,
        test_size=40,
    )
    run_fit(tmp_path, module, data, max_epochs=1)
    assert 0 <= module.results["miou"] <= 1
    again, _, _ = load_checkpoint(tmp_path / "last.ckpt")
    image = torch.randn(1, 3, 37, 61)
    module.eval()
    scores: Any = again
    assert torch.equal(scores.predict(image), module.predict(image))
    assert scores.predict(image).shape == (1, data.num_classes, 37, 61)


def test_learning_rates(tmp_path: Path) -> None:
    """Of backbone and fusions; norms, embeddings and tables of positions are not decayed; poly decay."""
    data = object_data(write_panoptic(tmp_path))
    module = mask_module(data, lr=1e-4, backbone_lr_factor=0.1, fusion_lr_factor=0.3)
    trainer = run_fit(tmp_path / "run", module, data, max_epochs=2, limit_val_batches=0)
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    found = {name: (group["initial_lr"], group["weight_decay"]) for name, group in groups.items()}
    assert found == {
        "backbone": (pytest.approx(1e-5), 0.05),
        "backbone_norm": (pytest.approx(1e-5), 0.0),
        "fusion": (pytest.approx(3e-5), 0.05),
        "head": (pytest.approx(1e-4), 0.05),
        "head_norm": (pytest.approx(1e-4), 0.0),
    }
    assert sum(len(group["params"]) for group in groups.values()) == sum(
        parameter.requires_grad for parameter in module.parameters()
    )
    assert groups["head"]["lr"] == 0  # at the end of the decay


def test_steps_in_place_of_the_decay(tmp_path: Path) -> None:
    data = object_data(write_panoptic(tmp_path), batch_size=1)
    module = mask_module(data, lr=1e-4, milestones=[0.5, 0.75])
    trainer = run_fit(tmp_path / "run", module, data, max_epochs=1, limit_val_batches=0, log_steps=1)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-6)


def test_wrong_settings_and_data(tmp_path: Path) -> None:
    root = write_panoptic(tmp_path)
    panoptic, boxes = object_data(root), object_data(root, "coco")
    with pytest.raises(ValueError, match="SegformerForSemanticSegmentation gives a class for every pixel"):
        MaskClassificationModule("segformer_b0", num_classes=3)
    with pytest.raises(ValueError, match="do not fit 'mask2former_swin_t'"):
        mask_module(panoptic, network_options={"colours": 3})
    module = MaskClassificationModule(
        "mask2former_swin_t", num_classes=2, things=[True, True], network_options=TINY, test_size=None
    )
    with pytest.raises(ValueError, match="panoptic segments need panoptic data"):
        run_fit(tmp_path / "run", module, boxes, max_epochs=1)
    unmasked = object_data(root, "coco", dataset_options={"with_masks": False})
    with pytest.raises(ValueError, match="the annotations have no masks"):
        run_fit(tmp_path / "run", mask_module(unmasked, output="instance"), unmasked, max_epochs=1)


def test_starts_from_saved_models(tmp_path: Path) -> None:
    """By the task its classes speak for; what was trained from it needs its folder no more."""
    for classes, task in (
        (COCO_PANOPTIC, "masks"),
        (COCO_THINGS, "masks"),
        (("grass", "lake"), "semantic"),
        (None, "semantic"),
    ):
        network: Any = create_model("mask2former_swin_t", len(classes or range(3)), **TINY)
        save_pretrained(network, tmp_path / "saved", classes=classes)
        module, names, palette = load_checkpoint(tmp_path / "saved")
        assert module.task == task
        assert len(names) == len(palette) == network.num_classes
        if classes:
            assert names == classes
        if task == "masks":
            found = module([torch.rand(3, 50, 70)])[0]
            assert ("segments" if classes is COCO_PANOPTIC else "boxes") in found
            assert sum(module.hparams["things"]) == 80

    data = object_data(write_panoptic(tmp_path / "data"))
    save_pretrained(create_model("mask2former_swin_t", 3, "sapa", **TINY), tmp_path / "mine")
    trained = mask_module(data, network=str(tmp_path / "mine"), network_options=None)
    run_fit(tmp_path / "run", trained, data, max_epochs=1, limit_val_batches=0)
    shutil.rmtree(tmp_path / "mine")
    again, _, _ = load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in again.state_dict().items())


def test_starts_from_weights(tmp_path: Path) -> None:
    """Of a plain model: the upgrade starts as that one, which the checkpoint remembers without its folder."""
    data = object_data(write_panoptic(tmp_path / "data"))
    save_pretrained(create_model("mask2former_swin_t", 3, "bilinear", **TINY), tmp_path / "plain")
    trained = mask_module(data, weights=str(tmp_path / "plain"))
    run_fit(tmp_path / "run", trained, data, max_epochs=1, limit_val_batches=0)
    shutil.rmtree(tmp_path / "plain")
    again: Any
    again, _, _ = load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert again.network.host.freqfusion_upgrade.init == "identity"
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in again.state_dict().items())


def test_a_frozen_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = object_data(write_panoptic(tmp_path))
    module = mask_module(data, freeze_backbone=True)
    encoder = module.network.host.model.pixel_level_module.encoder
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    trainer = run_fit(tmp_path / "run", module, data, max_epochs=1)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert not any(
        part.training for part in module.train().network.host.model.pixel_level_module.encoder.modules()
    )
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized
    assert not optimized & {id(p) for p in encoder.parameters()}
