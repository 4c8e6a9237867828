"""The package's front: names, lazy imports, and errors before any file is touched."""

import subprocess
import sys

import pytest

import freqfusion.data
from freqfusion.data import create_dataset, list_datasets


def test_names() -> None:
    assert list_datasets() == [
        "ade20k",
        "camvid",
        "cityscapes",
        "cityscapes_panoptic",
        "coco",
        "coco_panoptic",
        "drive",
        "folder",
        "foreground",
        "pictures",
        "synthetic",
        "synthetic_panoptic",
        "voc",
        "voc_boxes",
    ]
    for name in freqfusion.data.__all__:
        assert getattr(freqfusion.data, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = freqfusion.data.nothing


def test_create_dataset_passes_options_on() -> None:
    dataset = create_dataset("synthetic", None, "val", length=3, size=(8, 10), seed=4)
    assert len(dataset) == 3
    assert dataset[2]["mask"].shape == (8, 10)
    with pytest.raises(ValueError, match="no option lenght"):
        create_dataset("synthetic", None, "val", lenght=3)


def test_create_dataset_refuses() -> None:
    with pytest.raises(ValueError, match="unknown dataset 'kitti'; known are ade20k, camvid"):
        create_dataset("kitti", None, "train")
    with pytest.raises(
        ValueError, match=r"'camvid' is read from files: give its folder as root\. CamVid expects"
    ):
        create_dataset("camvid", None, "train")


def test_package_imports_torch_alone() -> None:
    code = (
        "import sys, freqfusion.data\n"
        "late = {'torchvision', 'PIL', 'torchmetrics'} & set(sys.modules)\n"
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("package", ["PIL", "torchvision", "numpy"])
def test_absent_package_is_named_with_the_install_line(package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from freqfusion.data import create_dataset\n"
        "create_dataset('synthetic', None, 'train')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {package} is not installed")
    assert last.endswith('python -m pip install "freqfusion[train]"')
