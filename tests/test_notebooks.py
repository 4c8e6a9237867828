"""The notebooks: stripped, with a badge, and, slowly, run on small settings."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
REPOSITORY = "OWNER/freqfusion"
"""Where the project is: a placeholder, as in hubconf.py, to be replaced in both and in the notebooks."""
WORDS = {"RBC": (5, 5, 40, 40), "WBC": (50, 20, 90, 60), "Platelets": (60, 5, 70, 15)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_as_a_reader_finds_it(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    badge = f"colab.research.google.com/github/{REPOSITORY}/blob/main/examples/notebooks/{path.name})"
    assert notebook.cells[0].source.startswith("[![Open in Colab](")
    assert badge in notebook.cells[0].source
    assert set(re.findall(r"github\.com/(\w+/freqfusion)", path.read_text(encoding="utf-8"))) == {REPOSITORY}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert all(
        line.startswith(("%", " ", "#")) or "pip" not in line
        for cell in code
        for line in cell.source.split("\n")
    )
    assert "FREQFUSION_NOTEBOOK_FAST" in "".join(cell.source for cell in code)


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["compare_methods", "detector_bccd", "vit_features"]


def write_bccd(root: Path) -> None:
    """Two pictures of BCCD's form in each split."""
    from PIL import Image

    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, box in WORDS.items()
    )
    size = "<size><width>96</width><height>72</height><depth>3</depth></size>"
    for split in ("train", "val"):
        names = [f"{split}_{number}" for number in range(2)]
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))
        for name in names:
            (root / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
            values = random.integers(0, 256, (72, 96, 3), dtype=np.uint8)
            Image.fromarray(values).save(root / f"JPEGImages/{name}.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on small settings; ``BCCD``, ``MY_FOLDER``, ``VIT_WEIGHTS`` and ``PHOTO`` are used where they are set."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for package in ("torchvision", "lightning", "matplotlib", "timm"):
        pytest.importorskip(package)
    if "BCCD" not in os.environ:
        write_bccd(tmp_path / "bccd")
        monkeypatch.setenv("BCCD", str(tmp_path / "bccd"))
    monkeypatch.setenv("FREQFUSION_NOTEBOOK_FAST", "1")
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "language": "python",
    }
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(
        json.dumps(kernel | {"display_name": "this Python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
