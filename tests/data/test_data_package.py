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
        "drive",
        "folder",
        "foreground",
        "synthetic",
        "voc",
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
def test_absent_package_is_named_with_the_install_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package} is not installed.*pip install "freqfusion\[train\]"'):
        create_dataset("synthetic", None, "train")
