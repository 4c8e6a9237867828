"""Released weights: layouts of their files, where they come from, what is said about their licence."""

import functools
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from freqfusion.features import FeatUpJBU, LoftUp, create_upsampler, weights
from freqfusion.features.weights import RELEASED, Released


def _state(name: str, channels: int = 384, **options: object) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return create_upsampler(name, channels, **options).state_dict()


def _assert_filled(module: nn.Module, state: dict[str, Tensor]) -> None:
    own = module.state_dict()
    assert own.keys() == state.keys()
    for key, value in own.items():
        assert torch.equal(value, state[key]), key


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a web server on this machine that serves the test's folder; downloads go to another."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def _lightning(state: dict[str, Tensor], norm: bool) -> dict[str, object]:
    """As FeatUp's authors save it: the encoder and the downsampler are there too."""
    entries = {f"upsampler.{key}": value for key, value in state.items() if not key.startswith("norm.")}
    if norm:
        entries |= {f"model.1.{key}": value for key, value in state.items() if key.startswith("norm.")}
    entries |= {"model.0.blocks.0.weight": torch.zeros(2), "downsampler.kernel": torch.zeros(3)}
    return {"state_dict": entries, "epoch": 3, "hyper_parameters": {"lr": 0.1}}


@pytest.mark.parametrize("norm", [False, True])
def test_featup_as_its_authors_save_it(
    norm: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = _state("featup_jbu", norm=norm)
    torch.save(_lightning(state, norm), tmp_path / "jbu.ckpt")
    upsampler = create_upsampler("featup_jbu", 384, weights=tmp_path / "jbu.ckpt")
    assert isinstance(upsampler, FeatUpJBU)
    assert (upsampler.norm is not None) == norm
    _assert_filled(upsampler, state)
    assert upsampler.licence == "MIT"
    assert capsys.readouterr().err == "weights of featup_jbu: MIT\n"


def test_a_norm_that_the_file_lacks_is_missing(tmp_path: Path) -> None:
    torch.save(_lightning(_state("featup_jbu"), False), tmp_path / "jbu.ckpt")
    with pytest.raises(ValueError, match=r"2 missing: norm.weight, norm.bias"):
        create_upsampler("featup_jbu", 384, weights=tmp_path / "jbu.ckpt", norm=True)


@pytest.mark.parametrize("name", ["loftup", "uplift", "jafar", "naf", "anyup"])
def test_plain_and_wrapped_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = _state(name)
    torch.save({"jafar": state, "epoch": 2} if name == "jafar" else state, tmp_path / "released.pth")
    upsampler = create_upsampler(name, 384, weights=tmp_path / "released.pth")
    _assert_filled(upsampler, state)
    licence = {"jafar": "Apache-2.0", "naf": "Apache-2.0", "anyup": "CC-BY-4.0"}.get(name, "MIT")
    assert upsampler.licence.startswith(licence)
    assert f"weights of {name}: {licence}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["featup_jbu", "loftup", "naf"])
@pytest.mark.parametrize("prefix", ["upsampler.", "network."])
def test_files_of_fit_are_the_users_own(
    name: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = _state(name)
    content = {
        "state_dict": {prefix + key: value for key, value in state.items()}
        | {"encoder.weight": torch.zeros(1)},
        "task": "features",
        "hyper_parameters": {},
    }
    torch.save(content, tmp_path / "last.ckpt")
    upsampler = create_upsampler(name, 384, weights=tmp_path / "last.ckpt")
    _assert_filled(upsampler, state)
    assert upsampler.licence == ""
    assert capsys.readouterr().err == ""


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = _state("uplift")
    safetensors.save_file(state, tmp_path / "uplift.safetensors")
    upsampler = create_upsampler("uplift", 384, weights=tmp_path / "uplift.safetensors")
    _assert_filled(upsampler, state)
    assert upsampler.licence == "MIT"


def test_released_by_address(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = _state("featup_jbu", norm=True)
    torch.save(_lightning(state, True), tmp_path / "jbu.ckpt")
    released = RELEASED["featup_jbu"]["dinov2_s"]._replace(address=f"{server}/jbu.ckpt", licence="for tests")
    monkeypatch.setitem(RELEASED["featup_jbu"], "dinov2_s", released)
    upsampler = create_upsampler("featup_jbu", 384, weights="released:dinov2_s")
    _assert_filled(upsampler, state)
    assert upsampler.licence == "for tests"
    assert "weights of featup_jbu: for tests" in capsys.readouterr().err
    assert len(list((tmp_path / "torch").rglob("*jbu.ckpt"))) == 1

    absent = released._replace(address=f"{server}/absent.ckpt")
    monkeypatch.setitem(RELEASED["featup_jbu"], "dinov2_s", absent)
    with pytest.raises(OSError, match=r"could not download http.*absent.ckpt.*give its path"):
        create_upsampler("featup_jbu", 384, weights="released:dinov2_s")


def test_released_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = _state("loftup")
    torch.save(state, tmp_path / "pytorch_model.bin")
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository != "haiwen/loftup-dinov2s":
            raise ConnectionError("no network")
        return str(tmp_path / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    upsampler = create_upsampler("loftup", 384, weights="released:dinov2_s")
    assert isinstance(upsampler, LoftUp)
    _assert_filled(upsampler, state)
    assert upsampler.licence == "MIT"
    with pytest.raises(OSError, match=r"uplift_dinov3-splus16.safetensors of https://huggingface.co/UPLiFT"):
        create_upsampler("uplift", 384, weights="released:dinov3_splus")
    assert [repository for repository, _ in asked] == [
        "haiwen/loftup-dinov2s",
        "UPLiFT-upsampler/uplift_dinov3-splus16",
    ]


def test_options_that_released_weights_were_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(_state("uplift"), tmp_path / "uplift.pth")
    monkeypatch.setattr(weights, "_download", lambda address: tmp_path / "uplift.pth")
    patch_sizes = [
        create_upsampler("uplift", 384, weights=f"released:{name}", **options).patch_size
        for name, options in (("dinov2_s", {}), ("dinov3_splus", {}), ("dinov3_splus", {"patch_size": 14}))
    ]
    assert patch_sizes == [14, 16, 14]


def test_nothing_is_downloaded_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(weights, "_download", refuse)
    for name in RELEASED:
        assert create_upsampler(name, 384).licence == ""


def test_every_released_entry_is_whole() -> None:
    for name, entries in RELEASED.items():
        for title, released in entries.items():
            assert isinstance(released, Released)
            assert title
            assert released.licence
            on_hub = not released.address.startswith("https://")
            assert not on_hub or released.address.count("/") == 2
            with torch.device("meta"):
                create_upsampler(name, 384, **released.options)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    torch.save(_state("loftup", 512), tmp_path / "loftup.pth")
    with pytest.raises(ValueError, match=r"loftup.pth: .*The file fits loftup for 512 channels$"):
        create_upsampler("featup_jbu", 384, weights=tmp_path / "loftup.pth")
    with pytest.raises(ValueError, match=r"LoftUp\) for 384 channels: .*of another shape.*for 512 channels$"):
        create_upsampler("loftup", 384, weights=tmp_path / "loftup.pth")
    state = _state("uplift")
    del state["attender.conv1.bias"]
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"1 missing: attender.conv1.bias; 1 without a place: extra$"):
        create_upsampler("uplift", 384, weights=tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"bilinear has no weights to load"):
        create_upsampler("bilinear", weights=tmp_path / "cut.pth")
    with pytest.raises(
        ValueError, match=r"loftup has no released weights 'dinov9'; choose one of: dinov2_s, "
    ):
        create_upsampler("loftup", 384, weights="released:dinov9")
    with pytest.raises(
        ValueError, match=r"joint_bilateral has no released weights 'x'; no weights of it are"
    ):
        create_upsampler("joint_bilateral", weights="released:x")
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*absent.pth"):
        create_upsampler("loftup", 384, weights=tmp_path / "absent.pth")
