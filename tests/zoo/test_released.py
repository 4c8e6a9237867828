"""The trained networks of freqfusion-weights: found, read, and as good as their cards say on their photographs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import freqfusion
from freqfusion.cli.main import main
from freqfusion.zoo.released import released_folder

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "weights" / "src"
FOLDERS = sorted(path.parent for path in SOURCES.glob("*/*/freqfusion.json"))

pytest.importorskip("timm")
pytest.importorskip("lightning")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOURCES))


def test_what_is_not_installed_names_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "path", [path for path in sys.path if not Path(path, "freqfusion_weights").exists()]
    )
    with pytest.raises(ImportError, match="pip install freqfusion-weights"):
        freqfusion.list_released()


@pytest.mark.usefixtures("installed")
def test_names() -> None:
    assert freqfusion.list_released() == [folder.name for folder in FOLDERS]
    assert released_folder("nuclei") == SOURCES / "freqfusion_weights" / "nuclei"
    with pytest.raises(ValueError, match="no released network 'nucleus'; choose one of blood_cells, nuclei"):
        freqfusion.load_released("nucleus")


def test_names_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--help"]) == 0
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert {folder.name for folder in FOLDERS} <= set(words)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.usefixtures("installed")
def test_files(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_size < 8_000_000
    model = freqfusion.load_released(folder.name)
    assert not model.training
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {
        torch.float32
    }
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(
        word in card for word in ("Licence", "Data", "Scores", "Limits", f'load_released("{folder.name}")')
    )


def predict(name: str, out: Path, *options: str) -> None:
    assert main(["predict", "--model", name, "--out", str(out), *options]) == 0
    assert Image.open(out / "overlays" / "example.png").size[0] > 200


def truth(name: str) -> np.ndarray:
    with Image.open(SOURCES / "freqfusion_weights" / name / "truth.png") as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["nuclei_unet", "nuclei_unet_bilinear"])
@pytest.mark.usefixtures("installed")
def test_nuclei_of_the_photograph(name: str, tmp_path: Path) -> None:
    predict(name, tmp_path)
    with Image.open(tmp_path / "masks" / "example.png") as image:
        found = np.asarray(image) == 1
    there = truth(name) > 0
    assert (found & there).sum() / (found | there).sum() > 0.75


@pytest.mark.usefixtures("installed")
def test_single_nuclei_of_the_photograph(tmp_path: Path) -> None:
    mask_api = pytest.importorskip("pycocotools.mask")
    predict("nuclei", tmp_path)
    content = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    masks = [mask_api.decode(each["segmentation"]).astype(bool) for each in content["annotations"]]
    instances = truth("nuclei")
    best = []
    for index in range(1, instances.max() + 1):
        there = instances == index
        best.append(max((mask & there).sum() / (mask | there).sum() for mask in masks))
    assert np.mean(np.array(best) > 0.5) > 0.7
    assert len(masks) < 1.5 * len(best)


@pytest.mark.usefixtures("installed")
def test_blood_cells_of_the_photograph(tmp_path: Path) -> None:
    predict("blood_cells", tmp_path)
    content = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert set(names.values()) == {"RBC", "WBC", "Platelets"}
    counts = [names[each["category_id"]] for each in content["annotations"]]
    assert counts.count("WBC") == 1
    assert 5 < counts.count("RBC") < 40


def test_torch_hub_needs_no_installation() -> None:
    """From a clone alone, as torch.hub leaves it."""
    code = f"""
import torch
model = torch.hub.load({str(ROOT)!r}, "load_released", "nuclei_unet", source="local")
print(tuple(model(torch.zeros(1, 3, 65, 97)).shape))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(1, 2, 65, 97)"
