"""Training from memory: the same numbers as from files, each image decoded once whoever reads it."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from freqfusion.cli.main import main
from freqfusion.comparison import race
from freqfusion.data.cache import SampleCache
from freqfusion.data.synthetic import SyntheticScenes
from freqfusion.tasks import SegmentationData
from freqfusion.tasks.image_data import CACHE_VARIABLE
from tiny_training import RunHere, read_history, tiny_fit


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with a line for each scene that this process, or one that it forks, draws."""
    path, draw = tmp_path / "reads.txt", SyntheticScenes.__getitem__

    def counted(self: SyntheticScenes, index: int) -> Any:
        with path.open("a") as file:
            file.write(f"{self.split} {index}\n")
        return draw(self, index)

    monkeypatch.setattr(SyntheticScenes, "__getitem__", counted)
    return path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["ram", "device"])
def test_the_same_training_and_each_image_decoded_once(
    tmp_path: Path, reads: Path, monkeypatch: pytest.MonkeyPatch, cache: str, workers: int
) -> None:
    data = {"length": 10, "resize": (20, 28), "crop_size": (16, 24), "batch_size": 4}
    plain, _ = tiny_fit(tmp_path / "plain", "noisy", max_epochs=3, data=data)
    asked = reads.read_text().split("\n")[:-1]
    assert max(Counter(asked).values()) >= 3
    reads.unlink()
    moved, to = [], SampleCache.to

    def watched(self: SampleCache, device: torch.device) -> SampleCache:
        moved.append(device.type)
        return to(self, device)

    monkeypatch.setattr(SampleCache, "to", watched)
    kept, trainer = tiny_fit(
        tmp_path / "kept", "noisy", max_epochs=3, data={**data, "cache": cache, "workers": workers}
    )
    for key, value in plain.items():
        assert torch.equal(kept[key], value), key
    assert read_history(tmp_path / "kept") == read_history(tmp_path / "plain")
    assert sorted(Counter(reads.read_text().split("\n")[:-1]).items()) == sorted(
        (f"{split} {index}", 1) for split in ("train", "val") for index in range(10)
    )
    assert moved == (["cpu", "cpu"] if cache == "device" else [])  # the stand-in of an accelerator
    loaders = [trainer.train_dataloader.loader, trainer.val_dataloaders.loader]
    assert [loader.num_workers for loader in loaders] == [0 if cache == "device" else workers] * 2


def test_judging_reads_the_images_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"length": 4, "cache": "ram"}
    tiny_fit(tmp_path, "plain", max_epochs=1, data=data)
    monkeypatch.setattr(SegmentationData, "cached", lambda *args: pytest.fail("decoded all first"))
    assert (
        main(["validate", "--checkpoint", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "val")]) == 0
    )


def write_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("a\nb\n")
    for name in "abcd":
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(rng.integers(0, 2, (20, 30), np.uint8)).save(root / "masks" / f"{name}.png")
    return root


def test_other_processes_find_what_was_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that was decoded with other settings."""
    root, folder = write_folder(tmp_path / "data"), tmp_path / "cache"
    folder.mkdir()
    options: dict[str, Any] = {"dataset": "folder", "root": str(root), "resize": (10, 15)}
    first = SegmentationData(**options, cache="ram")
    first.share(folder)
    expected = [first.sample("train", index) for index in range(4)]
    for path in (root / "images").iterdir():
        Image.new("RGB", (30, 20)).save(path)
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    for split in ("train", "val"):
        found = SegmentationData(**options, cache="device").cached(split)
        for index, sample in enumerate(expected):
            assert torch.equal(found[index]["image"], sample["image"])
            assert torch.equal(found[index]["mask"], sample["mask"])
    others: list[dict[str, Any]] = [{"resize": (20, 30)}, {"resize": None}, {"skip_bad": True}]
    for change in others:
        assert not SegmentationData(**{**options, **change}).cached("train")[0]["image"].any()


def test_a_race_decodes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs need no pictures: these are taken away when the first one starts."""
    out, root = tmp_path / "race", write_folder(tmp_path / "data")
    start, seen = race._start, []

    def watched(*args: Any) -> None:
        folder = Path(os.environ[CACHE_VARIABLE])
        seen.append(sorted(path.suffix for path in folder.iterdir()))
        for path in (root / "images").iterdir():
            path.write_bytes(b"no picture")
        start(*args)

    def popen(command: list[str], **options: Any) -> RunHere:
        assert options["env"][CACHE_VARIABLE] == os.environ[CACHE_VARIABLE]
        return RunHere(command)

    monkeypatch.setattr(race, "_start", watched)
    monkeypatch.setattr(race.subprocess, "Popen", popen)
    monkeypatch.setattr("freqfusion.comparison.page.write_comparison", lambda *args, **options: [])
    line = ["compare", "--preset", "tiny", "--methods", "bilinear", "nearest", "--seeds", "1", "--jobs", "1"]
    line += ["--data.dataset", "folder", "--data.root", str(root), "--data.dataset_options", "null"]
    line += ["--data.crop_size", "16x16", "--data.batch_size", "4", "--trainer.max_steps", "2"]
    line += ["--trainer.val_check_interval", "1", "--model.warmup_steps", "0", "--data.cache", "ram"]
    assert main([*line, "--out", str(out)]) == 0
    assert seen == [["", "", ".json", ".json"]] * 2
    assert not (out / ".cache").exists()
    assert CACHE_VARIABLE not in os.environ
    for method in ("bilinear", "nearest"):
        assert (out / method / "seed_0" / "val_metrics.json").exists()
