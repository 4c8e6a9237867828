import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from freqfusion.cli import quickstart as command
from freqfusion.comparison import quickstart
from freqfusion.comparison.quickstart_page import SHOWN_SCENES
from freqfusion.training import load_checkpoint


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Two runs of three steps with the same seed: their folders and what was printed."""
    folders = [tmp_path_factory.mktemp("quickstart") / name for name in ("first", "second")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "VAL_SCENES", 8)
        patch.setattr(quickstart, "TEST_SCENES", 8)
        patch.setenv("COLUMNS", "80")
        codes = [
            command.run(["--minutes", "0.013", "--seed", "2", "--out", str(folder)]) for folder in folders
        ]
    assert codes == [0, 0]
    return folders


def results(folder):
    content = json.loads((folder / "results.json").read_text())
    for run in content["runs"].values():
        run.pop("train_seconds")
    return content


def test_same_seed_gives_the_same_figures(outcome):
    first, second = (results(folder) for folder in outcome)
    assert first == second
    assert first["settings"]["steps"] == 3
    for fusion in ("bilinear", "freqfusion"):
        run = first["runs"][fusion]
        assert 0 <= run["test"]["miou"] <= 1
        assert [step for step, _ in run["losses"]] == [1, 2, 3]
        assert [step for step, _ in run["val_miou"]] == [1, 2, 3]
        assert run["losses"][0][1] > 0
    assert first["runs"]["freqfusion"]["parameters"] > first["runs"]["bilinear"]["parameters"]
    assert first["runs"]["freqfusion"]["losses"] != first["runs"]["bilinear"]["losses"]


def test_page_is_self_contained_and_says_what_came_out(outcome):
    page = (outcome[0] / "report.html").read_text("utf-8")
    assert not re.search(r"https?://|url\(|<script|<link", page)
    addresses = re.findall(r'(?:src|srcset|href)\s*=\s*"([^"]*)"', page)
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    pictures = [Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) for address in addresses]
    for picture in pictures:
        picture.load()
    assert len(pictures) == 3 * 2 + SHOWN_SCENES * 2 * 6
    assert sum(picture.size == (192, 192) for picture in pictures) == SHOWN_SCENES * 2 * 6
    scores = results(outcome[0])["runs"]
    for run in scores.values():
        assert f"{100 * run['test']['miou']:.1f}" in page
        assert f"{100 * run['test']['boundary_iou']:.1f}" in page
        assert f"{run['parameters']:,}" in page
    assert "--minutes 0.013 --seed 2" in page


def test_strips_and_checkpoints_are_there(outcome):
    with Image.open(outcome[0] / "strips.png") as strips:
        assert np.asarray(strips).std() > 10
    for fusion in ("bilinear", "freqfusion"):
        module, classes, palette = load_checkpoint(outcome[0] / f"{fusion}.ckpt")
        assert module.hparams["fusion"] == fusion
        assert len(classes) == len(palette) == module.network.num_classes
    assert not list(outcome[0].glob(".*"))


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--minutes", "nan"], ["--seed", "-1"]])
def test_wrong_options_are_refused(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as stop:
        command.run([*options, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
