"""Backbone weights from files and addresses."""

import functools
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from freqfusion import create_model
from freqfusion.models import MSCAN, SegNeXt
from freqfusion.weights.backbones import load_backbone_


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {key: value + 1 for key, value in MSCAN("t").state_dict().items()}


@pytest.fixture
def backbone() -> MSCAN:
    return MSCAN("t")


def assert_loaded(module: nn.Module, state: dict[str, Tensor]) -> None:
    own = module.state_dict()
    assert own.keys() == state.keys()
    for key, value in own.items():
        assert torch.equal(value, state[key]), key


def test_authors_layout_without_its_classifier(
    tmp_path: Path, backbone: MSCAN, state: dict[str, Tensor]
) -> None:
    classifier = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    torch.save({"state_dict": {**state, **classifier}, "epoch": 300}, tmp_path / "mscan_t.pth")
    load_backbone_(backbone, tmp_path / "mscan_t.pth")
    assert_loaded(backbone, state)


def test_plain_state_dict(tmp_path: Path, backbone: MSCAN, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "plain.pt")
    load_backbone_(backbone, str(tmp_path / "plain.pt"))
    assert_loaded(backbone, state)


def test_whole_model(tmp_path: Path, backbone: MSCAN) -> None:
    model = SegNeXt("t", 3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    load_backbone_(backbone, tmp_path / "model.pt")
    assert_loaded(backbone, model.backbone.state_dict())


def test_safetensors(tmp_path: Path, backbone: MSCAN, state: dict[str, Tensor]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "plain.safetensors")
    load_backbone_(backbone, tmp_path / "plain.safetensors")
    assert_loaded(backbone, state)
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors cannot be read as weights"):
        load_backbone_(backbone, tmp_path / "bad.safetensors")


def test_safetensors_without_the_package(
    tmp_path: Path, backbone: MSCAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "plain.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install .freqfusion\[hub\]"):
        load_backbone_(backbone, tmp_path / "plain.safetensors")


def test_model_takes_weights_when_asked(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"state_dict": state}, tmp_path / "mscan_t.pth")
    model = create_model("segnext_t", 3, "bilinear", backbone_weights=tmp_path / "mscan_t.pth")
    assert_loaded(model.backbone, state)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a local web server for ``tmp_path / "site"``; downloads go to ``tmp_path / "home"``."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "site").mkdir()
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


def test_address(tmp_path: Path, backbone: MSCAN, state: dict[str, Tensor], server: str) -> None:
    file = tmp_path / "site" / "mscan_t.pth"
    torch.save({"state_dict": state}, file)
    load_backbone_(backbone, f"{server}/mscan_t.pth")
    assert_loaded(backbone, state)
    file.unlink()  # the second time the local copy serves
    again = MSCAN("t")
    load_backbone_(again, f"{server}/mscan_t.pth")
    assert_loaded(again, state)
    # an equal file name at another address is another file
    with pytest.raises(OSError, match="could not download"):
        load_backbone_(again, f"{server}/other/mscan_t.pth")


def test_failed_download_names_the_address(backbone: MSCAN, server: str) -> None:
    with pytest.raises(OSError, match=r"could not download http://127.0.0.1.*absent.pth: .*404"):
        load_backbone_(backbone, f"{server}/absent.pth")


def test_missing_file(tmp_path: Path, backbone: MSCAN) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*absent\.pth"):
        load_backbone_(backbone, tmp_path / "absent.pth")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04broken", b"\x80\x02garbage"])
def test_foreign_file(tmp_path: Path, backbone: MSCAN, content: bytes) -> None:
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"page\.pth cannot be read as weights"):
        load_backbone_(backbone, tmp_path / "page.pth")


def test_truncated_file(tmp_path: Path, backbone: MSCAN, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "part.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"part\.pth cannot be read as weights.*downloaded completely"):
        load_backbone_(backbone, tmp_path / "part.pth")


class Payload:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_code_in_a_file_does_not_run(
    tmp_path: Path, backbone: MSCAN, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}, "extra": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_backbone_(backbone, tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content, message",
    [
        (torch.zeros(3), "holds 'Tensor', expected a state dict"),
        ({}, "expected a state dict"),
        ({"epoch": 3}, "entry 'epoch' is a int, expected a tensor"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, backbone: MSCAN, content: object, message: str) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=message):
        load_backbone_(backbone, tmp_path / "odd.pt")


def test_keys_that_do_not_match_are_listed(tmp_path: Path, backbone: MSCAN, state: dict[str, Tensor]) -> None:
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    wrong = dict(state)
    del wrong["norm1.weight"]
    wrong["norm9.weight"] = torch.zeros(3)
    wrong["norm2.bias"] = torch.zeros(5)
    torch.save(wrong, tmp_path / "wrong.pt")
    with pytest.raises(ValueError) as caught:
        load_backbone_(backbone, tmp_path / "wrong.pt")
    message = str(caught.value)
    assert "1 missing: norm1.weight" in message
    assert "1 without a place: norm9.weight" in message
    assert "1 of another shape: norm2.bias (5,) instead of (64,)" in message
    assert_loaded(backbone, before)


def test_another_variant_gets_a_short_list(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(
        ValueError, match=r"cannot be loaded into this MSCAN; is it another variant\?.* more"
    ) as caught:
        load_backbone_(MSCAN("s"), tmp_path / "t.pt")
    assert len(str(caught.value)) < 2500
