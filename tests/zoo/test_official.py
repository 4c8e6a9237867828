"""Official checkpoints: files of every layout, files that are none, and the checks that every model goes through."""

import pickle
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from freqfusion.weights.files import read_state_dict
from freqfusion.weights.fill import Renaming, fill_
from freqfusion.zoo.official import convert_official, read_official
from freqfusion.zoo.official.base import Plan, Shapes

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([0.5, -0.5])}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2, 3)}}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]}
MMCV = {
    "meta": {"epoch": 3, "CLASSES": ("a", "b"), "hook_msgs": {"best_score": np.float64(0.437)}},
    "state_dict": STATE,
    "optimizer": OPTIMIZER,
}
DETECTRON2 = {
    "model": STATE,
    "optimizer": OPTIMIZER,
    "scheduler": {"base_lrs": [1e-4], "last_epoch": 9},
    "iteration": 9,
}
PARALLEL = {"state_dict": {f"module.{key}": value for key, value in STATE.items()}}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    "content", [STATE, MMCV, DETECTRON2, PARALLEL], ids=["plain", "mmcv", "d2", "parallel"]
)
def test_every_layout_is_read(tmp_path: Path, content: dict[str, Any], zipped: bool) -> None:
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(tmp_path / "file.pth"), STATE)


def test_safetensors_are_read(tmp_path: Path) -> None:
    pytest.importorskip("safetensors.torch").save_file(STATE, tmp_path / "file.safetensors")
    assert_same(read_state_dict(tmp_path / "file.safetensors"), STATE)


def test_notes_that_numpy_1_wrote_are_read(tmp_path: Path) -> None:
    torch.save(MMCV, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            data = new.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
                assert data.count(b"numpy.core.multiarray\n") == 1
            old.writestr(name, data)
    assert_same(read_state_dict(tmp_path / "old.pth"), STATE)


class Payload:
    """Whoever unpickles this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("way", ["zip", "before torch 1.6", "pickle", "pkl"])
def test_code_in_a_file_is_not_run(tmp_path: Path, way: str) -> None:
    content = {"state_dict": STATE, "meta": Payload(tmp_path / "ran")}
    path = tmp_path / ("evil.pkl" if way == "pkl" else "evil.pth")
    if way in ("pickle", "pkl"):
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(
        ValueError, match=r"evil\.p\w+ cannot be read as weights.* (could|can) run code"
    ) as caught:
        read_official(path)
    assert not (tmp_path / "ran").exists()
    assert "add_safe_globals" not in str(caught.value)  # torch's advice, which would run it

    pickle.loads(pickle.dumps(content))["meta"].close()  # as any other reader would
    assert (tmp_path / "ran").exists()


def test_notes_of_mmengine_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training history is an object of its own with NumPy arrays; it need not be installed."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(3.0)

    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    with monkeypatch.context() as installed:
        for name in ("mmengine", "mmengine.logging", HistoryBuffer.__module__):
            installed.setitem(sys.modules, name, ModuleType(name))
        sys.modules[HistoryBuffer.__module__].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
        content = {"message_hub": {"log_scalars": {"loss": HistoryBuffer()}}, **MMCV}
        torch.save(content, tmp_path / "epoch.pth")
    assert_same(read_state_dict(tmp_path / "epoch.pth"), STATE)


def test_what_holds_foreign_objects_is_refused_with_the_line_that_keeps_the_weights(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "where": Path("x")}, tmp_path / "run.pth")
    with pytest.raises(ValueError, match="which could run code, so it was not loaded") as caught:
        read_state_dict(tmp_path / "run.pth")
    command = str(caught.value).splitlines()[1]
    code = command.removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    assert_same(read_state_dict(tmp_path / "run.state_dict.pth"), STATE)


def test_a_compressed_file_is_not_opened(tmp_path: Path) -> None:
    """Some megabytes could stand for terabytes."""
    torch.save(STATE, tmp_path / "plain.pth")
    bomb = zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pth") as old, bomb as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"bomb\.pth cannot be read as weights \(it is compressed"):
        read_state_dict(tmp_path / "bomb.pth")


def test_a_pickle_of_arrays_is_refused_with_the_way_to_tensors(tmp_path: Path) -> None:
    arrays = {key: value.numpy() for key, value in STATE.items()}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    with pytest.raises(ValueError, match="a plain pickle of NumPy arrays, which can run code") as caught:
        read_official(tmp_path / "model.pkl")
    command = str(caught.value).splitlines()[-1]
    code = command.removeprefix('python -c "').removesuffix('"')
    assert command == f'python -c "{code}"'
    subprocess.run([sys.executable, "-c", code], check=True)
    assert_same(read_state_dict(tmp_path / "model.pth"), STATE)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04broken", b"\x80\x02garbage"])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"page\.pth cannot be read as weights"):
        read_official(tmp_path / "page.pth")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.98])
def test_a_file_that_is_cut_off(tmp_path: Path, kept: float) -> None:
    torch.save(DETECTRON2, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "part.pth").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"part\.pth cannot be read as weights.*downloaded completely"):
        read_official(tmp_path / "part.pth")


@pytest.mark.parametrize("name", ["absent.pth", "."])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        read_official(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds 'list', expected a state dict"),
        ({}, "holds 'dict', expected a state dict"),
        ({"model": {}}, "holds 'dict', expected a state dict"),
        ({"epoch": 3}, "entry 'epoch' is a int, expected a tensor and its name"),
        ({"state_dict": {"a": [1.0]}}, "entry 'a' is a list, expected a tensor and its name"),
        ({3: torch.zeros(1)}, "entry 3 is a Tensor, expected a tensor and its name"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=message):
        read_official(tmp_path / "odd.pth")


def test_an_unknown_model_is_named_by_its_keys(tmp_path: Path) -> None:
    state = {f"features.{i}.weight": torch.zeros(i + 1) for i in range(9)}
    torch.save({"state_dict": state}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError) as caught:
        convert_official(tmp_path / "vgg.pth", tmp_path / "vgg")
    message = str(caught.value)
    assert "vgg.pth holds no known model; its 9 tensors begin with features.0.weight, " in message
    assert "features.4" not in message
    assert "\n  SegNeXt T, S, B, L" in message
    assert "\n  Mask2Former with ResNet-50, ResNet-101 or Swin-T" in message
    assert not (tmp_path / "vgg").exists()


def test_names_in_both_directions() -> None:
    names = Renaming(
        {
            "block{}.attn.": "blocks.{}.attention.",
            "block{}.qkv.{}": ("blocks.{}.q.{}", "blocks.{}.k.{}", "blocks.{}.v.{}"),
            "scale": "gain",
        }
    )
    official = {
        "block1.attn.proj.weight": torch.randn(2, 2),
        "block1.qkv.weight": torch.randn(6, 2),
        "block12.qkv.bias": torch.randn(3),
        "scale": torch.tensor(2.0),
    }
    own = {}
    for key, value in official.items():
        keys = names.own_keys(key)
        own.update(zip(keys, [value] if len(keys) == 1 else value.chunk(len(keys)), strict=True))
    assert list(own)[:4] == [
        "blocks.1.attention.proj.weight",
        "blocks.1.q.weight",
        "blocks.1.k.weight",
        "blocks.1.v.weight",
    ]
    assert_same(names.official_state(dict(reversed(own.items()))), official)
    for unknown in ("block1.attn", "block.1.attn.x", "scale.x", "xscale", "scales"):
        assert not names.own_keys(unknown)
    with pytest.raises(ValueError, match="no official names are known for 2 keys: gains, blocks"):
        names.official_state({"gains": torch.zeros(1), "blocks": torch.zeros(1)})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(2, 3) for _ in range(3))
        self.norm = nn.BatchNorm1d(3)


def net_plan() -> Plan:
    names = Renaming({"qkv.{}": ("q.{}", "k.{}", "v.{}"), "bn.": "norm.", "old_bn.": "norm."})
    return Plan(
        "a net",
        Net(),
        names.own_keys,
        unneeded={r"index": "it follows from the size", r"mean_\d": "elsewhere"},
        kept={r"norm\.num_batches_tracked": "frozen"},
    )


def fill(plan: Plan, state: dict[str, Tensor]) -> Counter[str]:
    return fill_(plan.model, state, plan.title, plan.own_keys, plan.unneeded, plan.kept)


def net_state() -> dict[str, Tensor]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {
        "qkv.weight": torch.randn(9, 2),
        "qkv.bias": torch.randn(9),
        "index": torch.arange(4),
        "mean_0": torch.zeros(1),
        "mean_1": torch.zeros(1),
        **{f"bn.{part}": torch.randn(3) for part in parts},
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_filling_takes_every_tensor_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    plan, ours = net_plan(), torch.float32
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in net_state().items()}
    assert fill(plan, state) == {"it follows from the size": 1, "elsewhere": 2}
    net = plan.model
    assert isinstance(net, Net)
    assert torch.equal(torch.cat([net.q.weight, net.k.weight, net.v.weight]), state["qkv.weight"].to(ours))
    assert torch.equal(torch.cat([net.q.bias, net.k.bias, net.v.bias]), state["qkv.bias"].to(ours))
    assert torch.equal(net.norm.running_var, state["bn.running_var"].to(ours))
    assert net.norm.num_batches_tracked == 0
    assert {x.dtype for x in net.parameters()} == {ours}
    assert all(x.requires_grad for x in net.parameters())


def test_mixed_dtypes_lose_nothing() -> None:
    state = net_state()
    state["bn.weight"] = state["bn.weight"].half()
    plan = net_plan()
    fill(plan, state)
    assert torch.equal(plan.model.state_dict()["norm.weight"], state["bn.weight"].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bn.weight": torch.zeros(4)},
            r"do not fit a net: 1 of another shape: bn\.weight \(4,\) instead of \(3,\) of norm\.weight$",
        ),
        (
            {"qkv.weight": torch.zeros(10, 2)},
            r"qkv\.weight \(10, 2\) instead of \(9, 2\) of q\.weight, k\.weight, v\.weight$",
        ),
        ({"qkv.bias": torch.zeros(9, 1)}, r"qkv\.bias \(9, 1\) instead of \(9,\)"),
        ({"qkv.bias": torch.tensor(0.0)}, r"qkv\.bias \(\) instead of \(9,\)"),
        ({"bn.bias": None}, r"do not fit a net: 1 missing: norm\.bias$"),
        ({"qkv.bias": None}, r"3 missing: q\.bias, k\.bias, v\.bias$"),
        ({"head.weight": torch.zeros(1)}, r"do not fit a net: 1 without a place: head\.weight$"),
        ({"bn.gamma": torch.zeros(3)}, r"1 without a place: bn\.gamma$"),
        ({"index2": torch.zeros(1)}, r"1 without a place: index2$"),
        (
            {"bn.bias": torch.zeros(3, dtype=torch.int8)},
            r"1 of another kind than the numbers expected: bn\.bias \(torch\.int8, torch\.strided, cpu\)$",
        ),
        ({"bn.bias": torch.zeros(3, dtype=torch.complex64)}, r"another kind .*: bn\.bias \(torch\.complex64"),
        ({"bn.bias": torch.zeros(3).to_sparse()}, r"another kind .*: bn\.bias \(.*torch\.sparse_coo"),
        ({"bn.bias": torch.zeros(3, device="meta")}, r"another kind .*: bn\.bias \(.* meta\)$"),
        ({"old_bn.bias": torch.zeros(3)}, r"1 without a place: old_bn\.bias$"),  # it would be the second
    ],
)
def test_what_does_not_fit_is_listed_and_changes_nothing(
    change: dict[str, Tensor | None], message: str
) -> None:
    plan = net_plan()
    before = {key: value.clone() for key, value in plan.model.state_dict().items()}
    state = {key: value for key, value in {**net_state(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        fill(plan, state)
    assert_same(plan.model.state_dict(), before)


def test_all_problems_come_in_one_message() -> None:
    state = net_state()
    del state["bn.weight"]
    state["bn.bias"] = torch.zeros(5)
    state.update({f"extra.{i}": torch.zeros(1) for i in range(11)})
    with pytest.raises(
        ValueError, match=r"1 missing: .*; 11 without a place: extra\.0,.* and 3 more; 1 of another"
    ):
        fill(net_plan(), state)


def test_shapes_count_the_modules_of_a_list() -> None:
    shapes = Shapes({"a.0.w": (1,), "a.0.b": (1,), "a.10.w": (1,), "ab.1.w": (1,)})
    assert shapes.count("a.") == 2
    assert shapes.count("c.") == 0
    with pytest.raises(ValueError, match=r"it has no c\.w"):
        shapes["c.w"]


def test_a_folder_with_a_model_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("model.safetensors", "freqfusion.json"):
        (folder / name).write_text("precious")
        with pytest.raises(FileExistsError, match=rf"mine holds a model already \({name}\); name another"):
            convert_official(tmp_path / "absent.pth", folder)
        assert [path.read_text() for path in folder.iterdir()] == ["precious"]
        (folder / name).unlink()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match=r"file is a file; name a folder"):
        convert_official(tmp_path / "absent.pth", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install .freqfusion\[hub\]"):
        convert_official(tmp_path / "absent.pth", tmp_path / "out")


def test_importing_needs_torch_alone() -> None:
    code = (
        "import sys, freqfusion.zoo.official; "
        "print([name for name in ('transformers', 'safetensors', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
