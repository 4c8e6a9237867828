"""``freqfusion convert``."""

from pathlib import Path

import pytest
import torch
from torch import nn

from freqfusion import create_model
from freqfusion.cli.main import main
from official_files import key_list, official_state

pytest.importorskip("safetensors")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "segnext_t.pth"
    torch.save({"meta": {}, "state_dict": official_state(key_list("segnext_t"))}, path)
    return path


def test_what_is_printed_and_the_lines_to_load_it(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "segnext_t"
    assert main(["convert", str(file), "--to", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == f"converting {file}\n"
    size = (folder / "model.safetensors").stat().st_size / 1e6
    assert out.splitlines() == [
        "recognised  SegNeXt-T, FreqFusion head, 150 classes",
        "parameters  4,520,794",
        "tensors     594, each with the shape that the model needs",
        "left out    2: sub-pixel positions, which follow from the sizes",
        f"written     {folder}/model.safetensors ({size:.1f} MB)",
        f"written     {folder}/freqfusion.json (0.0 MB)",
        "",
        "import freqfusion",
        f'model = freqfusion.from_pretrained("{folder}")',
    ]
    assert 18 < size < 19
    names: dict[str, nn.Module] = {}
    exec("\n".join(out.splitlines()[-2:]), names)
    official = torch.load(file, weights_only=True)["state_dict"]
    for key, value in names["model"].state_dict().items():
        assert torch.equal(value, official[key]), key


def test_a_second_time_changes_nothing(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["convert", str(file), "--to", str(folder)]) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    capsys.readouterr()
    assert main(["convert", str(file), "--to", str(folder)]) == 2
    assert f"freqfusion convert: error: {folder} holds a model already" in capsys.readouterr().err
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_other_files_in_the_folder_stay(file: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["convert", str(file), "--to", str(tmp_path)]) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert {"model.safetensors", "freqfusion.json", "segnext_t.pth"} <= {x.name for x in tmp_path.iterdir()}


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "out")
    assert main(["convert", str(tmp_path / "absent.pth"), "--to", folder]) == 2
    assert "freqfusion convert: error: no weights file at " in capsys.readouterr().err
    torch.save(create_model("fpn_small", 2, "bilinear").state_dict(), tmp_path / "ours.pth")
    assert main(["convert", str(tmp_path / "ours.pth"), "--to", folder]) == 2
    assert "ours.pth holds no known model" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "ours.pth")]) == 2
    assert "the following arguments are required: --to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    out = capsys.readouterr().out
    assert "freqfusion convert segnext_t_freqfusion.pth --to segnext_t" in out
    assert "A DIR that holds a model already is left as it" in out
