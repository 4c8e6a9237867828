"""Decoders on backbones of timm: levels, layouts, sizes, and complete networks."""

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion import create_model
from freqfusion.models import EncoderDecoder, TimmEncoder
from freqfusion.models.encoders import SmallEncoder
from freqfusion.models.segmenter import build_segmenter
from support import assert_close

SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)},
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)},
    "swinv2_tiny_window8_256": {"embed_dim": 12, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)},
}
"""Backbones with the options that make them small enough for a test."""
DECODERS = ["fpn", "unet", "progressive"]
SIZES = [(1, 1), (20, 45), (97, 130)]


@pytest.fixture(autouse=True)
def _start() -> None:
    torch.manual_seed(0)


def make_encoder(name: str, *arguments: Any, **options: Any) -> TimmEncoder:
    pytest.importorskip("timm")
    return TimmEncoder(name, *arguments, options={**SMALL.get(name, {}), **options}).eval()


def make_model(name: str, decoder: str = "fpn", fusion: str = "freqfusion", **options: Any) -> EncoderDecoder:
    pytest.importorskip("timm")
    backbone_options = SMALL.get(name)
    return build_segmenter(
        name, decoder, fusion, num_classes=3, channels=16, backbone_options=backbone_options, **options
    )


def sizes_of(maps: list[Tensor]) -> list[tuple[int, int]]:
    return [(x.shape[-2], x.shape[-1]) for x in maps]


@torch.no_grad()
def test_levels_of_a_network_that_rounds_up() -> None:
    encoder = make_encoder("resnet18")
    assert encoder.strides == (4, 8, 16, 32)
    assert encoder.out_channels == (64, 128, 256, 512)
    maps = encoder(torch.randn(1, 3, 250, 333))
    assert sizes_of(maps) == [(63, 84), (32, 42), (16, 21), (8, 11)]
    assert [x.shape[1] for x in maps] == [64, 128, 256, 512]


@torch.no_grad()
def test_levels_of_a_network_that_rounds_down() -> None:
    encoder = make_encoder("convnext_atto")
    assert encoder.strides == (4, 8, 16, 32)
    assert sizes_of(encoder(torch.randn(1, 3, 250, 333))) == [(62, 83), (31, 41), (15, 20), (7, 10)]


@torch.no_grad()
def test_a_network_that_does_not_state_its_layout() -> None:
    encoder = make_encoder("mobilenetv3_small_050")
    assert not hasattr(encoder.network, "output_fmt")
    maps = encoder(torch.randn(1, 3, 250, 333))
    assert sizes_of(maps) == [(63, 84), (32, 42), (16, 21), (8, 11)]
    assert tuple(x.shape[1] for x in maps) == encoder.out_channels


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_channels_last_maps_of_any_size(name: str) -> None:
    encoder = make_encoder(name)
    image = torch.randn(1, 3, 100, 131)
    maps = encoder(image)
    assert encoder.out_channels == (12, 24, 48, 96)
    assert [tuple(x.shape[1:]) for x in maps] == [(12, 25, 33), (24, 13, 17), (48, 7, 9), (96, 4, 5)]
    inner = encoder.network(F.pad(image, (0, 1)))  # 132 is a whole number of patches
    for ours, theirs in zip(maps, inner, strict=True):
        assert torch.equal(ours, theirs.permute(0, 3, 1, 2))


@torch.no_grad()
def test_a_network_that_needs_whole_branches() -> None:
    """HRNet itself fails at sides that are no multiples of 32."""
    encoder = make_encoder("hrnet_w18_small")
    image = torch.randn(1, 3, 33, 50)
    with pytest.raises(RuntimeError):
        encoder.network(image)
    assert encoder.strides == (4, 8, 16, 32)
    assert sizes_of(encoder(image)) == [(9, 13), (5, 7), (3, 4), (2, 2)]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
@pytest.mark.parametrize(
    ("name", "alike", "multiple"),
    [
        ("resnet18", "resnet18", 1),
        ("dla34", "dla34", 32),
        ("swin_base_patch4_window7_224_in22k", "swin_tiny_patch4_window7_224", 4),
        ("swin_tiny_patch4_window7_224.ms_in1k", "swin_tiny_patch4_window7_224", 4),
    ],
    ids=["no", "DLA", "Swin, deprecated name", "Swin, tag"],
)
def test_what_a_network_needs_in_every_release_of_timm(
    monkeypatch: pytest.MonkeyPatch, name: str, alike: str, multiple: int
) -> None:
    """Most releases take no single name of a file."""
    timm = pytest.importorskip("timm")
    original = timm.models.is_model_in_modules

    def strict(name: str, files: tuple[str, ...]) -> bool:
        assert isinstance(files, (tuple, list, set))
        return bool(original(name, files))

    monkeypatch.setattr(timm.models, "is_model_in_modules", strict)
    encoder = make_encoder(name, **SMALL.get(alike, {}))
    assert encoder.multiple == multiple
    assert encoder.fixed_size is None
    assert sizes_of(encoder(torch.rand(1, 3, 70, 90)))[-1] == (3, 3)


@torch.no_grad()
def test_a_network_of_one_size() -> None:
    image = torch.randn(1, 3, 96, 64)
    options = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32)}
    own = make_encoder("maxvit_nano_rw_256", img_size=(96, 64), **options)
    assert sizes_of(own(image)) == [(24, 16), (12, 8), (6, 4), (3, 2)]
    with pytest.raises(ValueError, match=r"made for images of \(96, 64\) and fails on \(64, 96\)"):
        own(image.mT)
    with pytest.raises(ValueError, match=r"made for images of \(256, 256\) and fails on \(96, 64\)"):
        make_encoder("maxvit_nano_rw_256", **options)(image)
    with pytest.raises(RuntimeError, match="expected input"):  # what has another cause is not explained away
        own(image[:, :1])


@torch.no_grad()
def test_finer_and_fewer_levels() -> None:
    image = torch.randn(1, 3, 64, 64)
    fine = make_encoder("resnet18", 2)
    assert fine.strides == (2, 4, 8, 16, 32)
    assert sizes_of(fine(image)) == [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]
    assert make_encoder("convnext_atto", 2).strides == (4, 8, 16, 32), "it has no finer map"
    assert make_encoder("resnet18", 8).strides == (8, 16, 32)


@torch.no_grad()
def test_of_several_maps_of_one_stride_the_deepest_is_taken() -> None:
    encoder = make_encoder("resnet50", layers=(1, 1, 1, 1), output_stride=8)  # dilated, as in DeepLab
    assert list(encoder.network.feature_info.reduction()) == [2, 4, 8, 8, 8]
    assert encoder.strides == (4, 8)
    assert encoder.out_channels == (256, 2048)
    assert [tuple(x.shape[1:]) for x in encoder(torch.randn(1, 3, 64, 64))] == [(256, 16, 16), (2048, 8, 8)]


@pytest.mark.parametrize(
    "name, stride, message",
    [
        ("resnet18", 32, r"strides of 32 or more: with one size alone no coarse map meets a fine one"),
        ("resnet1800", 4, "timm has no network 'resnet1800'"),
    ],
)
def test_networks_that_do_not_fit(name: str, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encoder(name, stride)


def test_a_layout_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    network = nn.Identity()
    network.output_fmt = "NLC"  # type: ignore[assignment]
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: network)
    with pytest.raises(ValueError, match="gives maps in NLC, expected NCHW or NHWC"):
        TimmEncoder("resnet18")


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"freqfusion\[vision\]"):
        build_segmenter("resnet18", num_classes=2)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", SMALL)
def test_any_image_size(name: str, decoder: str, size: tuple[int, int]) -> None:
    out = make_model(name, decoder).eval()(torch.randn(2, 3, *size))
    assert out.shape == (2, 3, *size)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name: str, decoder: str) -> None:
    """A parameter without a gradient would also stop training on several GPUs."""
    model = make_model(name, decoder)
    F.cross_entropy(model(torch.randn(2, 3, 70, 65)), torch.randint(0, 3, (2, 70, 65))).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(torch.isfinite(parameter.grad).all()), key


@pytest.mark.parametrize("decoder", ["unet", "progressive"])
def test_overfits_one_picture(decoder: str) -> None:
    model = EncoderDecoder(SmallEncoder((8, 12, 16)), 2, decoder=decoder, channels=16)
    image = torch.randn(1, 3, 32, 32)
    target = torch.zeros(1, 32, 32, dtype=torch.long)
    target[:, 8:24, 12:28] = 1
    image[:, 0] += 2 * target
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(model(image), target).backward()
        optimiser.step()
    assert float((model(image).argmax(1) == target).float().mean()) > 0.98


@pytest.mark.parametrize("decoder", DECODERS)
def test_shared_weights_do_not_depend_on_the_fusion(decoder: str) -> None:
    def weights(fusion: str) -> dict[str, Tensor]:
        torch.manual_seed(7)
        return EncoderDecoder(SmallEncoder((4, 6)), 2, fusion, decoder=decoder, channels=8).state_dict()

    bilinear = weights("bilinear")
    for fusion in ("carafe", "freqfusion"):
        other = weights(fusion)
        assert all(torch.equal(value, other[name]) for name, value in bilinear.items()), fusion


def test_the_catalogs_network_is_built_from_the_same_parts() -> None:
    pytest.importorskip("timm")
    torch.manual_seed(3)
    named = create_model("fpn_resnet18", 3, "carafe").eval()
    torch.manual_seed(3)
    built = build_segmenter("resnet18", fusion="carafe", num_classes=3, channels=64).eval()
    state = named.state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in built.state_dict().items()
    }
    assert all(torch.equal(value, state[key]) for key, value in built.state_dict().items())
    assert named.decode(torch.randn(1, 3, 64, 32)).shape == (1, 3, 16, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decoder": "ham"}, "unknown decoder 'ham'; choose one of fpn, unet, progressive"),
        ({"fusion": "no such"}, "no such"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderDecoder(SmallEncoder((4, 6)), **{"num_classes": 2, "channels": 8, **options})


def test_a_wrong_image() -> None:
    model = EncoderDecoder(SmallEncoder((4, 6)), 2, channels=8)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 4, 8, 8\)"):
        model(torch.zeros(1, 4, 8, 8))


@pytest.fixture(scope="module")
def swin_unet() -> EncoderDecoder:
    torch.manual_seed(0)
    return make_model("swin_tiny_patch4_window7_224", "unet").eval()


IMAGE = torch.randn(1, 3, 45, 70, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state dict"])
def test_copies(swin_unet: EncoderDecoder, how: str) -> None:
    if how == "deepcopy":
        other = copy.deepcopy(swin_unet)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(swin_unet))
    else:
        other = make_model("swin_tiny_patch4_window7_224", "unet").eval()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.normal_()
        assert not torch.equal(other(IMAGE), swin_unet(IMAGE))
        other.load_state_dict(swin_unet.state_dict())
    assert torch.equal(other(IMAGE), swin_unet(IMAGE))


@torch.no_grad()
def test_autocast(swin_unet: EncoderDecoder) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        half = swin_unet(IMAGE)
    assert half.dtype == torch.bfloat16
    assert_close("bfloat16 autocast", half.float(), swin_unet(IMAGE), 5e-2)


@pytest.mark.parametrize(
    "decoder", [pytest.param(name, marks=() if name == "unet" else pytest.mark.slow) for name in DECODERS]
)
def test_compile(decoder: str) -> None:
    torch._dynamo.reset()
    model = make_model("convnext_atto", decoder).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close("compiled", compiled(IMAGE), model(IMAGE), 1e-4)
