"""The quickstart from end to end, in five steps."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from freqfusion.cli import _race
from freqfusion.cli import quickstart as command
from freqfusion.cli.main import main
from freqfusion.comparison import race
from freqfusion.tasks import SegmentationModule
from freqfusion.training import load_checkpoint
from tiny_training import RunHere


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folders of two runs of five steps with the same seed; the second trains in this process."""
    folders = [tmp_path_factory.mktemp("quickstart") / name for name in ("first", "second")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "VAL_SCENES", 8)
        patch.setattr(_race, "available_cores", lambda: 2)  # one thread for each run, as this process has
        patch.setenv("COLUMNS", "80")
        words = ["quickstart", "--minutes", "0.013", "--seed", "2", "--out"]
        assert main([*words, str(folders[0])]) == 0
        patch.setattr(race.subprocess, "Popen", RunHere)
        assert main([*words, str(folders[1])]) == 0
    return folders


def results(folder):
    content = json.loads((folder / "results.json").read_text())
    return {run["method"]: (run["seed"], run["metrics"], run["curves"]) for run in content["runs"]}


def test_same_seed_gives_the_same_metrics(outcome):
    first, second = (results(folder) for folder in outcome)
    assert first == second
    assert first.keys() == {"bilinear", "freqfusion"}
    for seed, metrics, curves in first.values():
        assert seed == 2
        assert 0 <= metrics["miou"] <= 100
        assert [step for step, _ in curves["miou"]] == [1, 2, 3, 4, 5]
    assert first["bilinear"][1] != first["freqfusion"][1]


def test_page_shows_both_methods(outcome):
    page = (outcome[0] / "report.html").read_text("utf-8")
    assert not re.search(r"https?://|url\(|<script|<link", page)
    assert page.count("data:image/png") == 3 * 2 * 6 + 2 * (2 + 2)
    for _, metrics, _ in results(outcome[0]).values():
        assert f"{metrics['miou']:.2f}" in page
        assert f"{metrics['boundary_iou']:.2f}" in page
    for text in (
        "--minutes 0.013 --seed 2",
        "What FreqFusion does",
        "281,240 to 353,006",
        "One seed: differences",
    ):
        assert text in page
    assert json.loads((outcome[0] / "results.json").read_text())["baseline"] == "bilinear"


def test_strips_and_checkpoints_are_there(outcome):
    with Image.open(outcome[0] / "strip_1.png") as strip:
        assert np.asarray(strip).std() > 10
    for fusion in ("bilinear", "freqfusion"):
        module, classes, palette = load_checkpoint(outcome[0] / fusion / "seed_2" / "last.ckpt")
        assert module.hparams["fusion"] == fusion
        assert len(classes) == len(palette) == module.network.num_classes


def test_both_networks_start_from_the_same_weights_and_see_the_same_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "VAL_SCENES", 8)
    first, seen, rates = {}, {}, {}
    original = SegmentationModule.training_step

    def spy(self, batch, batch_idx):
        fusion = self.hparams["fusion"]
        first.setdefault(fusion, {key: value.clone() for key, value in self.network.state_dict().items()})
        seen.setdefault(fusion, []).append((batch["name"], batch["image"].clone(), batch["mask"].clone()))
        rates.setdefault(fusion, []).append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationModule, "training_step", spy)
    for fusion in command.METHODS:
        words = ["--model.fusion", fusion, "--seed", "5", "--out", str(tmp_path / fusion)]
        recipe = str(command.PRESETS / "tiny.yaml")
        assert main(["fit", "--config", recipe, *command.fit_words(0.013), *words]) == 0
    bilinear, ours = first.values()
    assert bilinear.keys() < ours.keys()
    assert all(
        torch.equal(value, ours[name]) for name, value in bilinear.items() if "num_batches" not in name
    )
    for (names, images, masks), (other_names, other_images, other_masks) in zip(*seen.values(), strict=True):
        assert names == other_names
        assert torch.equal(images, other_images)
        assert torch.equal(masks, other_masks)
    assert len({name for names, _, _ in seen["bilinear"] for name in names}) == 5 * 8  # none seen twice
    assert rates["bilinear"] == rates["freqfusion"]
    assert len(set(rates["bilinear"])) == 5


def test_steps_follow_from_minutes_alone():
    for minutes, steps in ((4, 900), (2, 450), (1.5, 340), (1e-9, 5)):
        words = command.fit_words(minutes)
        settings = dict(zip(words[::2], words[1::2], strict=True))
        assert settings["--trainer.max_steps"] == str(steps)
        assert steps % int(settings["--trainer.val_check_interval"]) == 0
        # every scene is new
        assert int(settings["--data.dataset_options.length"]) >= steps * command.BATCH


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--minutes", "nan"], ["--seed", "-1"]])
def test_wrong_options_are_refused(tmp_path, capsys, options):
    assert main(["quickstart", *options, "--out", str(tmp_path / "out")]) == 2
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
