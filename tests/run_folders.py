"""Run folders as `freqfusion fit` leaves them, made without training."""

import json
from pathlib import Path
from typing import Any

import yaml


def write_run(
    folder: Path,
    fusion: str = "freqfusion",
    seed: int = 0,
    miou: float | None = 0.5,
    *,
    steps: int = 40,
    judged: int | None = 40,
    task: str = "semantic",
    metrics: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A run of ``steps`` steps, validated at 20 and 40; ``settings`` have two underscores for a dot."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "task": task,
        "seed_everything": seed,
        "out": str(folder),
        "model": {"network": "fpn_small", "fusion": fusion, "lr": 0.1, "boundary_width": 2},
        "data": {"dataset": "synthetic", "root": None, "dataset_options": {"length": 8}, "val_split": "val"},
        "trainer": {"max_epochs": 2, "limit_val_batches": 3, "accelerator": "auto"},
    }
    for name, value in settings.items():
        group, _, key = name.partition("__")
        config[group][key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"steps": steps, "parameters": 7}))
    values = metrics or {"miou": miou, "boundary_iou": 0.25}
    columns = [{"miou": "iou"}.get(name, name) for name in values]
    classes = {"sky": dict.fromkeys(columns, 0.5), "sea": dict.fromkeys(columns)}
    results = {**({} if judged is None else {"step": judged}), **values, "classes": classes}
    (folder / "val_metrics.json").write_text(json.dumps(results))
    names = ",".join(f"val_{name}" for name in values)
    last = ",".join("" if value is None else str(value) for value in values.values())
    first, empty = ",".join("0.125" for _ in values), "," * (len(values) - 1)
    (folder / "metrics.csv").write_text(
        f"step,epoch,seconds,{names}\n10,0,1.0,{empty}\n20,0,1.5,{first}\n{judged or steps},1,3.5,{last}\n"
    )
    return folder
