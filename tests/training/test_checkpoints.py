import os
import pickle

import pytest
import torch

from freqfusion.tasks import SegmentationModule
from freqfusion.training import load_checkpoint
from freqfusion.training.checkpoints import AtomicCheckpointIO, Checkpoints
from tiny_training import tiny_fit

pytestmark = pytest.mark.usefixtures("tiny_networks")


@pytest.fixture
def run(tmp_path):
    weights, _ = tiny_fit(tmp_path, "noisy", data={"resize": (24, 28)}, max_epochs=1)
    return tmp_path, weights


def test_a_checkpoint_rebuilds_the_network(run):
    folder, weights = run
    module, classes, palette = load_checkpoint(folder / "last.ckpt")
    assert not module.training
    assert len(classes) == len(palette) == module.network.num_classes
    assert all(isinstance(name, str) for name in classes)
    assert all(len(colour) == 3 for colour in palette)
    assert tuple(module.data_options["resize"]) == (24, 28)
    for key, value in module.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_it_holds_plain_values_and_no_path_of_starting_weights(tmp_path):
    module = SegmentationModule("plain", num_classes=2)
    content = {"hyper_parameters": {**module.hparams, "backbone_weights": "w.pth"}}

    class Trainer:
        world_size = 1

    module._trainer = Trainer()
    module.on_save_checkpoint(content)
    options = {"num_classes": 2, "fusion": "freqfusion"}
    spec = {"name": "plain", "options": options, "upgrade": None, "classes": None}
    assert content["hyper_parameters"]["network"] == {"spec": spec}
    assert content["hyper_parameters"]["backbone_weights"] is None
    assert content["asked"] == {"network": "plain", "network_options": None}
    assert content["classes"] == ["class 0", "class 1"]
    assert content["palette"] == [[0, 0, 0], [255, 255, 255]]


def test_a_broken_write_leaves_the_old_file(run, monkeypatch):
    folder, _ = run
    before = (folder / "last.ckpt").read_bytes()

    def fail(content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({}, folder / "last.ckpt")
    assert (folder / "last.ckpt").read_bytes() == before
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_missing_truncated_and_foreign_files(run, tmp_path):
    folder, _ = run
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.ckpt"):
        load_checkpoint(tmp_path / "none.ckpt")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((folder / "last.ckpt").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.ckpt is not a complete checkpoint .* copy it again"):
        load_checkpoint(cut)
    foreign = tmp_path / "foreign.pth"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(ValueError, match=r"foreign\.pth .* lacks classes, hyper_parameters, palette"):
        load_checkpoint(foreign)
    torch.save([1, 2], foreign)
    with pytest.raises(ValueError, match="is not a checkpoint of freqfusion"):
        load_checkpoint(foreign)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_malicious_files_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt .* was not loaded"):
        load_checkpoint("evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"plain\.ckpt"):
        load_checkpoint("plain.ckpt")
    assert not (tmp_path / "evil-was-here").exists()


def test_weights_of_another_network(run, tmp_path):
    folder, _ = run
    content = torch.load(folder / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["num_classes"] += 1
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt contradicts itself"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_wrong_interval(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Checkpoints(tmp_path, every_steps=0)


def test_a_byte_that_flipped_is_found(run):
    folder, _ = run
    data = bytearray((folder / "last.ckpt").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    (folder / "flipped.ckpt").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"flipped\.ckpt cannot be read.*damaged: .* does not fit its checksum"
    ):
        load_checkpoint(folder / "flipped.ckpt")


@pytest.mark.parametrize("name", ["optimizer_states", "lr_schedulers", "loops", "callbacks"])
@pytest.mark.parametrize("value", [None, "x"])
def test_a_run_goes_on_from_whole_states_alone(run, name, value):
    folder, _ = run
    content = torch.load(folder / "last.ckpt", weights_only=True)
    if value is None:
        del content[name]
    else:
        content[name] = value
    torch.save(content, folder / "changed.ckpt")
    with pytest.raises(ValueError, match=rf"changed\.ckpt is damaged: it (lacks|has 'str' for) {name}"):
        AtomicCheckpointIO().load_checkpoint(folder / "changed.ckpt")
    load_checkpoint(folder / "changed.ckpt")  # the network is whole


@pytest.mark.parametrize(
    "change",
    [
        {"palette": [["a", "b", "c"]]},
        {"palette": [[0, 0, 256]]},
        {"datamodule_hyper_parameters": "x"},
        {"category_ids": "x"},
        {"category_ids": [None]},
    ],
)
def test_odd_entries_are_named(run, change):
    folder, _ = run
    content = torch.load(folder / "last.ckpt", weights_only=True)
    if "palette" in change:
        change = {"palette": change["palette"] * len(content["palette"])}
    torch.save({**content, **change}, folder / "changed.ckpt")
    with pytest.raises(
        ValueError, match=r"changed\.ckpt is damaged: its (classes and palette|settings of the data)"
    ):
        load_checkpoint(folder / "changed.ckpt")
