"""A tiny Mask2Former and its runs for the tests; as a script, a run in two processes."""

import sys
from pathlib import Path
from typing import Any

import torch

import freqfusion.tasks.sharding
from freqfusion.tasks import FSDP, MaskClassificationModule, ObjectData
from freqfusion.training import create_trainer

TINY: dict[str, Any] = {
    "backbone_config": {
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [2, 2, 4, 4],
        "drop_path_rate": 0.0,
    },
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_layers": 2,
    "encoder_feedforward_dim": 64,
    "decoder_layers": 3,
    "dim_feedforward": 64,
    "num_attention_heads": 4,
    "num_queries": 8,
    "train_num_points": 1024,
}
"""Options of the network."""


def object_data(root: Path, dataset: str = "coco_panoptic", **options: Any) -> ObjectData:
    settings = {
        "val_split": "train",
        "test_split": "train",
        "short_sides": [64],
        "batch_size": 4,
        "flip": 0.0,
    }
    return ObjectData(dataset, root=str(root), **{**settings, "workers": 0, **options})


def mask_module(data: ObjectData, **options: Any) -> MaskClassificationModule:
    settings = {
        "network": "mask2former_swin_t",
        "network_options": TINY,
        "lr": 1e-3,
        "backbone_lr_factor": 1.0,
        "test_size": None,
    }
    return MaskClassificationModule(
        num_classes=data.num_classes,
        things=data.things,
        **{**settings, **options},
    )


def run_fit(out: Path, module: Any, data: Any, resume: Path | None = None, **options: Any) -> Any:
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "gradient_clip_val": 1.0, "log_steps": 1}
    trainer = create_trainer(out, **{**settings, **options})
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    return trainer


if __name__ == "__main__":
    freqfusion.tasks.sharding.LEAST_SHARD = 2000  # so that the tiny network has several
    kind, root, folder = sys.argv[1:]
    torch.manual_seed(0)
    data = object_data(Path(root), batch_size=2)
    run_fit(
        Path(folder),
        mask_module(data),
        data,
        max_epochs=3,
        check_val_every_n_epoch=3,
        strategy=FSDP(process_group_backend="gloo") if kind == "sharded" else "ddp",
        devices=2,
    )
