"""Models in files: the same outputs after another process made them again, and clear words about bad files."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from freqfusion import create_model, from_pretrained, push_to_hub, save_pretrained, upgrade_
from support import load_model

pytest.importorskip("safetensors")
pytest.importorskip("torchvision")

HOST = """
import torch
from torchvision.ops import FeaturePyramidNetwork

class Net(torch.nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.down = torch.nn.Conv2d(8, 8, 3, 2, 1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.pool = torch.nn.MaxPool2d(1)
        self.fpn = FeaturePyramidNetwork([8, 8], 8)
        self.head = torch.nn.Conv2d(8, 2, 1)
        self.copy = self.head if tied else None

    def forward(self, x):
        fine = self.pool(self.norm(self.stem(x)))
        return self.head(self.fpn({"0": fine, "1": self.down(fine)})["0"])

def make(tied=False):
    return Net(tied)
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(HOST)
    return f"{tmp_path / 'net.py'}:make"


def trained(spec: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = upgrade_(load_model(spec), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.norm.running_mean.uniform_()
    return model.eval()


@pytest.fixture
def saved(spec: str, tmp_path: Path) -> Path:
    return save_pretrained(trained(spec), tmp_path / "saved")


IMAGE = torch.linspace(-1, 1, 3 * 30 * 42).reshape(1, 3, 30, 42)


def test_same_outputs_in_another_process(spec: str, tmp_path: Path) -> None:
    model = trained(spec, fusion="dysample", groups=2)
    folder = save_pretrained(model, tmp_path / "saved")
    assert sorted(path.name for path in folder.iterdir()) == ["freqfusion.json", "model.safetensors"]
    code = f"""
import torch, freqfusion
image = torch.linspace(-1, 1, 3 * 30 * 42).reshape(1, 3, 30, 42)
model = freqfusion.from_pretrained({str(folder)!r}, host={spec!r})
torch.save(model(image).detach(), {str(tmp_path / "out.pt")!r})
print(model.freqfusion_upgrade)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), model(IMAGE))
    assert result.stdout.strip() == str(model.freqfusion_upgrade)


def test_what_the_json_says(saved: Path, spec: str) -> None:
    config = json.loads((saved / "freqfusion.json").read_text())
    upgrade = {"fusion": "freqfusion", "init": "identity", "options": {}, "sites": ["fpn.fusions.0"]}
    assert config["spec"] == {"name": spec, "options": {}, "upgrade": upgrade, "classes": None}
    assert {"torch", "freqfusion"} <= set(config["versions"])


def test_tied_weights_and_other_dtypes(spec: str, tmp_path: Path) -> None:
    model = trained(f"{spec}?tied=True").half()
    save_pretrained(model, tmp_path / "saved")
    other = from_pretrained(tmp_path / "saved", host=f"{spec}?tied=True")
    assert other.copy is other.head
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
        assert other.state_dict()[name].dtype == value.dtype, name


def test_models_that_were_not_upgraded(spec: str, tmp_path: Path) -> None:
    model = load_model(spec).eval()
    other = from_pretrained(save_pretrained(model, tmp_path / "saved"), host=spec)
    assert torch.equal(other(IMAGE), model(IMAGE))


def test_own_models_and_channels_last(tmp_path: Path) -> None:
    model = load_model("fpn_small?num_classes=3&fusion=carafe").eval()
    expected = model(IMAGE)
    save_pretrained(model.to(memory_format=torch.channels_last), tmp_path)
    torch.testing.assert_close(from_pretrained(tmp_path)(IMAGE), expected)


def test_own_networks_know_how_they_were_made(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = create_model("unet_mobilenetv3_small_050", 3, "carafe", channels=16).eval()
    other = from_pretrained(save_pretrained(model, tmp_path / "built"))
    assert torch.equal(other(IMAGE), model(IMAGE))
    small = create_model("fpn_small", 2, "dysample", channels=16).eval()
    other = from_pretrained(save_pretrained(small, tmp_path / "small"))
    assert torch.equal(other(IMAGE), small(IMAGE))


def test_saving_needs_to_know_the_host(tmp_path: Path, spec: str) -> None:
    model = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="cannot tell how this Conv2d is made; pass host="):
        save_pretrained(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved model does not fit .*net\.py:make .* missing: stem\.weight"):
        save_pretrained(model, tmp_path / "saved", host=spec)
    with pytest.raises(
        ValueError, match=r"not fit torch\.nn:Conv2d with these options: 1 of another shape: weight"
    ):
        save_pretrained(
            model, tmp_path / "saved", host="torch.nn:Conv2d?in_channels=2&out_channels=1&kernel_size=1"
        )
    assert not (tmp_path / "saved").exists()


def test_code_named_by_a_file_is_not_run(saved: Path) -> None:
    with pytest.raises(ValueError, match="code that is not run because a file names it"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has the format 2, this freqfusion reads 1; update it"),
        ({"sha256": "0"}, "is cut off, changed or of another model"),
        ({"spec": {"options": {}}}, r"was changed: spec\.name is None"),
        ({"spec": "smp:Unet"}, r"was changed: spec\.name is None"),
        ({"spec": {"name": "x", "options": 3}}, r"was changed: spec\.options is 3"),
        ({"versions": None}, "was changed: versions is None"),
        ({"upgrade": {"fusion": "carafe"}}, r"was changed: spec\.upgrade\.init is None"),
        ({"upgrade": None}, r"does not fit the model: \d+ without a place: fpn\.fusions.* more$"),
    ],
)
def test_tampered_json(saved: Path, spec: str, change: dict[str, Any], message: str) -> None:
    path = saved / "freqfusion.json"
    content = json.loads(path.read_text())
    (content["spec"] if "upgrade" in change else content).update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        from_pretrained(saved, host=spec)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}"])
def test_other_json(saved: Path, spec: str, content: str) -> None:
    (saved / "freqfusion.json").write_text(content)
    with pytest.raises(ValueError, match=r"not valid JSON|not written by freqfusion\.save_pretrained"):
        from_pretrained(saved, host=spec)


def test_damaged_weights(saved: Path, spec: str) -> None:
    weights = saved / "model.safetensors"
    data = weights.read_bytes()
    for damaged in (data[:-100], data[:50], b"", data[:-1] + bytes([data[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="is cut off, changed or of another model"):
            from_pretrained(saved, host=spec)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        from_pretrained(saved, host=spec)


def test_another_host_does_not_fit(saved: Path) -> None:
    with pytest.raises(ValueError, match="found no place in this Conv2d"):
        from_pretrained(saved, host=lambda: nn.Conv2d(1, 1, 1))


def test_another_version_is_told(saved: Path, spec: str) -> None:
    path = saved / "freqfusion.json"
    config = json.loads(path.read_text())
    config["versions"]["freqfusion"] = "0.0.1"
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"was written by freqfusion 0\.0\.1 \(here .*\); check its results"):
        from_pretrained(saved, host=spec)


def test_a_failed_write_leaves_the_old_files(saved: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("freqfusion._files.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(trained(spec, fusion="carafe"), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_saving_does_not_disturb_randomness(spec: str, tmp_path: Path) -> None:
    model = trained(spec)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(torch.rand(2), expected)


class FakeHub:
    """Stands in for the hub, which no test may reach: keeps what was uploaded in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.created: dict[str, Any] = {}

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.created[repo_id] = options

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> SimpleNamespace:
        target = self.folder / repo_id
        target.mkdir(parents=True)
        for path in Path(folder_path).iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_the_hub(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", lambda token=None: fake)
    model = trained(spec)
    assert push_to_hub(model, "someone/net", private=True) == "https://hub/someone/net/commit/1"
    assert fake.created == {"someone/net": {"private": True, "exist_ok": True}}
    folder = tmp_path / "hub/someone/net"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "freqfusion.json",
        "model.safetensors",
    ]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: freqfusion\n")
    assert 'freqfusion.from_pretrained("someone/net")' in card
    asked = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path / "hub" / repo_id)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    other = from_pretrained("someone/net", host=spec, revision="main")
    assert asked == {"revision": "main", "allow_patterns": ["freqfusion.json", "model.safetensors"]}
    assert torch.equal(other(IMAGE), model(IMAGE))


def test_no_such_place(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(
        FileNotFoundError, match=r"no folder 'someone/net', and no such repository .* no conn"
    ):
        from_pretrained("someone/net")


def detector(name: str, **arguments: Any) -> Any:
    return load_model(f"torchvision:{name}?" + "&".join(f"{key}={value}" for key, value in arguments.items()))


@pytest.mark.parametrize(
    "name, attributes",
    [
        (
            "fasterrcnn_resnet50_fpn",
            {
                "roi_heads.score_thresh": 0.3,
                "roi_heads.nms_thresh": 0.35,
                "roi_heads.detections_per_img": 7,
                "rpn.nms_thresh": 0.6,
                "rpn._pre_nms_top_n": {"training": 50, "testing": 40},
                "transform.min_size": (96, 128),
                "transform.max_size": 160,
                "transform.image_mean": [0.1, 0.2, 0.3],
                "transform.size_divisible": 64,
                "roi_heads.box_coder.weights": (1.0, 1.0, 2.0, 2.0),
            },
        ),
        (
            "retinanet_resnet50_fpn",
            {"score_thresh": 0.2, "topk_candidates": 9, "transform.image_std": [1.0, 1.0, 1.0]},
        ),
        ("fcos_resnet50_fpn", {"nms_thresh": 0.4, "detections_per_img": 3}),
        (
            "maskrcnn_resnet50_fpn",
            {"backbone.body.bn1.eps": 0.25, "roi_heads.box_roi_pool.sampling_ratio": 1},
        ),
    ],
)
def test_what_is_set_by_attribute_is_kept(name: str, attributes: dict[str, Any], tmp_path: Path) -> None:
    model = detector(name, num_classes=3)
    for path, value in attributes.items():
        parent, _, attribute = path.rpartition(".")
        holder = model
        for part in filter(None, parent.split(".")):
            holder = getattr(holder, part)
        setattr(holder, attribute, value)
    upgrade_(model)
    again: Any = from_pretrained(save_pretrained(model, tmp_path))
    for path, value in attributes.items():
        holder = again
        for part in path.split("."):
            holder = getattr(holder, part)
        assert holder == value, path
        assert type(holder) is type(value), path


def test_arrays_set_where_numbers_were_are_kept(tmp_path: Path) -> None:
    """Thresholds searched for with numpy, means measured with torch."""
    np = pytest.importorskip("numpy")
    model = detector("fasterrcnn_resnet50_fpn", num_classes=3)
    model.roi_heads.score_thresh = np.linspace(0, 1, 5)[1]
    model.roi_heads.detections_per_img = np.int64(7)
    model.transform.image_mean = torch.tensor([0.25, 0.5, 0.75])
    model.transform.image_std = [np.float64(0.5)] * 3
    again: Any = from_pretrained(save_pretrained(model, tmp_path))
    assert (again.roi_heads.score_thresh, again.roi_heads.detections_per_img) == (0.25, 7)
    assert (again.transform.image_mean, again.transform.image_std) == ([0.25, 0.5, 0.75], [0.5] * 3)


def test_start_weights_are_not_written_and_their_norms_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COCO's weights come with frozen norms whose epsilon is 0; the line names the weights."""
    import torchvision
    from torchvision.models._api import WeightsEnum

    plain = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    state = {key: x for key, x in plain.state_dict().items() if "num_batches_tracked" not in key}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: state)
    model: Any = load_model("torchvision:fasterrcnn_resnet50_fpn?weights=DEFAULT").eval()
    upgrade_(model)
    save_pretrained(model, tmp_path)
    monkeypatch.undo()
    assert "DEFAULT" not in (tmp_path / "freqfusion.json").read_text()
    again: Any = from_pretrained(tmp_path)
    norm = again.backbone.body.layer1[0].bn1
    assert (type(norm), norm.eps) == (torchvision.ops.FrozenBatchNorm2d, 0.0)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for key, value in model.backbone(image).items():
            assert torch.equal(again.backbone(image)[key], value)


def test_what_cannot_be_written_down_is_named(tmp_path: Path) -> None:
    model = detector("fasterrcnn_resnet50_fpn", num_classes=3)
    anchors = model.rpn.anchor_generator
    anchors.cell_anchors = [2 * x for x in anchors.cell_anchors]
    with pytest.raises(
        ValueError, match=r"rpn\.anchor_generator\.cell_anchors is not what torchvision:fasterrcnn"
    ):
        save_pretrained(model, tmp_path)

    class Head(type(model.roi_heads.box_predictor)):  # type: ignore[misc]
        pass

    model = detector("fasterrcnn_resnet50_fpn", num_classes=3)
    model.roi_heads.box_predictor = Head(1024, 3)
    with pytest.raises(
        ValueError, match=r"roi_heads\.box_predictor is a Head, but torchvision:.* FastRCNNPredictor"
    ):
        save_pretrained(model, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spec, attribute",
    [
        ("smp:Unet?encoder_name=resnet18&classes=2", "encoder.bn1.eps"),
        ("monai:BasicUNet?spatial_dims=2&in_channels=3&out_channels=2", "conv_0.conv_0.adn.A.negative_slope"),
        ("transformers:SegformerForSemanticSegmentation?num_labels=2", "decode_head.batch_norm.eps"),
    ],
)
def test_other_hosts_keep_it_too(spec: str, attribute: str, tmp_path: Path) -> None:
    pytest.importorskip(
        {"smp": "segmentation_models_pytorch"}.get(spec.partition(":")[0], spec.partition(":")[0])
    )
    model = load_model(spec)
    parent, _, name = attribute.rpartition(".")
    setattr(model.get_submodule(parent), name, 0.75)
    again = from_pretrained(save_pretrained(model, tmp_path))
    assert getattr(again.get_submodule(parent), name) == 0.75


@pytest.mark.parametrize(
    "name, value",
    [
        ("stem", {"stride": [0, 0]}),
        ("stem", {"stride": [1, 1, 1]}),
        ("stem", {"stride": "x"}),
        ("stem", {"dilation": [0, 0]}),
        ("stem", {"groups": 7}),
        ("stem", {"padding": [100000, 100000]}),
        ("stem", {"padding_mode": "foo"}),
        ("pool", {"kernel_size": 0}),
        ("pool", {"stride": -1}),
        ("pool", {"padding": 2**20}),
        ("norm", {"eps": None}),
        ("norm", {"eps": "small"}),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    saved: Path, spec: str, name: str, value: dict[str, Any]
) -> None:
    file = saved / "freqfusion.json"
    config = json.loads(file.read_text()) | {"settings": {"attributes": {name: value}}}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"freqfusion\.json: its settings do not fit the model"):
        from_pretrained(saved, host=spec)


def test_convolutions_that_were_dilated_are_kept(spec: str, tmp_path: Path) -> None:
    model = load_model(spec).eval()
    model.down.stride, model.down.dilation, model.down.padding = (1, 1), (2, 2), (2, 2)
    again = from_pretrained(save_pretrained(model, tmp_path / "saved"), host=spec)
    assert torch.equal(again(IMAGE), model(IMAGE))


@pytest.mark.parametrize("classes", [[1, {}, None], ["a"] * (2**14 + 1)])
def test_names_of_classes_are_texts(saved: Path, spec: str, classes: list[Any]) -> None:
    file = saved / "freqfusion.json"
    content = json.loads(file.read_text())
    content["spec"]["classes"] = classes
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="classes must be at most 16384 texts"):
        from_pretrained(saved, host=spec)


@pytest.mark.parametrize(
    "hook",
    [
        lambda part: part.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda part: part.register_forward_pre_hook(lambda module, inputs: inputs),
        lambda part: vars(part).update(forward=lambda x: x),
    ],
)
def test_hooks_cannot_be_written_down(spec: str, tmp_path: Path, hook: Any) -> None:
    model = load_model(spec)
    hook(model.stem)
    with pytest.raises(ValueError, match="stem has a hook or a forward set on the instance"):
        save_pretrained(model, tmp_path / "saved", host=spec)
    assert not (tmp_path / "saved").exists()
