"""Decoders on plain vision transformers: the map of their tokens, the stem, weights, and frozen backbones."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion import create_model, from_pretrained, save_pretrained, upgrade_
from freqfusion.models import EncoderDecoder, PixelModel, TimmEncoder
from freqfusion.zoo.start import freeze_backbone_
from support import assert_close

timm = pytest.importorskip("timm")

TINY: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}
NAMES = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3")
"""A class token; registers and patches of 14; rotary positions."""


@pytest.fixture(autouse=True)
def _start() -> None:
    torch.manual_seed(0)


def make(name: str, decoder: str = "fpn", **options: Any) -> EncoderDecoder:
    options = {"num_classes": 3, "channels": 16, "backbone_options": TINY, **options}
    model: EncoderDecoder = create_model(f"{decoder}_{name}", **options)
    return model


@torch.no_grad()
def test_one_map_of_the_chosen_layers() -> None:
    encoder = TimmEncoder(NAMES[0], options={**TINY, "depth": 5, "out_indices": (1, 3)}).eval()
    assert (encoder.is_plain, encoder.strides, encoder.out_channels) == (True, (16,), (64,))
    image = torch.randn(2, 3, 48, 80)
    (tokens,) = encoder(image)
    assert tokens.shape == (2, 64, 3, 5)
    for one, raw in zip(tokens.chunk(2, dim=1), encoder.network(image), strict=True):
        deviation = raw.var(dim=1, correction=0, keepdim=True).add(1e-5).sqrt()
        assert_close("normalised", one, (raw - raw.mean(dim=1, keepdim=True)) / deviation, 1e-5)


@torch.no_grad()
def test_the_default_layers() -> None:
    assert TimmEncoder(NAMES[0], options={**TINY, "depth": 4}).out_channels == (96,)
    assert TimmEncoder(NAMES[0], options={**TINY, "depth": 1}).out_channels == (32,)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (20, 45), (70, 97)])
@pytest.mark.parametrize("decoder", ["fpn", "unet", "progressive"])
def test_any_image_size(name: str, size: tuple[int, int], decoder: str) -> None:
    model = make(name, decoder).eval()
    scores = model(torch.randn(2, 3, *size))
    assert scores.shape == (2, 3, *size)
    assert bool(scores.isfinite().all())
    assert model.decode(torch.randn(1, 3, *size)).shape[-2:] == tuple(-(-side // 4) for side in size)


@torch.no_grad()
@pytest.mark.parametrize("patch, name", [(16, NAMES[0]), (14, NAMES[1])])
def test_the_tokens_cover_the_image_and_nothing_else(patch: int, name: str) -> None:
    """A part of a patch at the border is looked at larger, not filled up with what is not there."""
    encoder = TimmEncoder(name, options=TINY).eval()
    image = torch.randn(1, 3, 3 * patch - 5, 4 * patch - 1)
    resized = F.interpolate(image, (3 * patch, 4 * patch), mode="bilinear")
    assert_close("tokens", encoder(image)[0], encoder(resized)[0], 1e-6)
    assert encoder(image)[0].shape[-2:] == (3, 4)


@pytest.mark.parametrize(
    "name, finest_stride, channels",
    [
        ("vit_tiny_patch16_224", 4, (48, 64)),
        ("vit_tiny_patch16_224", 2, (32, 48, 64)),
        ("vit_small_patch14_dinov2", 8, (64,)),
        ("vit_small_patch32_224", 4, (48, 64, 96)),
        ("vit_base_patch8_224", 4, (48,)),
    ],
)
def test_levels_of_the_stem(name: str, finest_stride: int, channels: tuple[int, ...]) -> None:
    model = make(name, finest_stride=finest_stride)
    assert isinstance(model.stem, nn.Module)
    assert model.stem.out_channels == channels
    maps = model.stem(torch.randn(1, 3, 37, 70))
    expected = [(-(-37 // s), -(-70 // s)) for s in (finest_stride * 2**i for i in range(len(channels)))]
    assert [tuple(x.shape[-2:]) for x in maps] == expected


def test_networks_with_stages_have_no_stem() -> None:
    model = create_model("fpn_resnet18", 3)
    assert model.stem is None
    assert not any(key.startswith("stem") for key in model.state_dict())


def test_a_stem_with_nothing_to_add() -> None:
    with pytest.raises(ValueError, match=r"the strides \[2, 4, 8\], of which finest_stride=16 leaves none"):
        make(NAMES[0], finest_stride=16)


def test_a_network_of_one_image_size() -> None:
    name = "beit_base_patch16_224"
    options = {**TINY, "img_size": (48, 64)}
    model = make(name, backbone_options=options).eval()
    assert model(torch.randn(1, 3, 48, 64)).shape == (1, 3, 48, 64)
    with pytest.raises(ValueError, match=r"made for images of \(48, 64\) and fails on \(48, 80\)"):
        model(torch.randn(1, 3, 48, 80))


@pytest.mark.parametrize("fusion", ["freqfusion", "bilinear"])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str, fusion: str) -> None:
    model = make(name, fusion=fusion)
    F.cross_entropy(model(torch.randn(2, 3, 70, 65)), torch.randint(0, 3, (2, 70, 65))).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
    stem = [p.grad for key, p in model.named_parameters() if key.startswith("stem.")]
    assert stem
    assert all(bool(grad.abs().sum() > 0) for grad in stem if grad is not None)
    assert not any(model.is_backbone(key) for key, _ in model.named_parameters() if key.startswith("stem."))


def test_save_and_load(tmp_path: Path) -> None:
    model = make(NAMES[1], finest_stride=2).eval()
    save_pretrained(model, tmp_path / "saved")
    image = torch.randn(1, 3, 30, 41)
    assert torch.equal(from_pretrained(tmp_path / "saved").eval()(image), model(image))


@pytest.mark.parametrize("img_size", [224, (96, 128)])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_weights_of_another_grid(tmp_path: Path, name: str, img_size: Any) -> None:
    """timm's classifier for 224, into a backbone for another size: its positions are resampled."""
    classifier = timm.create_model(name, num_classes=5, **TINY).eval()
    torch.save(classifier.state_dict(), tmp_path / "timm.pth")
    options = {**TINY, "img_size": img_size}
    model = make(name, backbone_options=options, backbone_weights=tmp_path / "timm.pth").eval()
    image = torch.randn(1, 3, 96, 128)
    whole = timm.create_model(name, dynamic_img_size=True, **TINY).eval()
    whole.load_state_dict({k: v for k, v in classifier.state_dict().items() if "head" not in k}, strict=False)
    with torch.no_grad():
        expected = whole.forward_intermediates(image, indices=2, intermediates_only=True)[-1]
        network: Any = model.backbone.network
        assert_close("tokens", network(image)[-1], expected, 1e-5)


def test_positions_that_cannot_be_resampled(tmp_path: Path) -> None:
    state = timm.create_model(NAMES[0], **TINY).state_dict()
    state["pos_embed"] = state["pos_embed"][:, :-3]
    torch.save(state, tmp_path / "timm.pth")
    message = r"of another shape: pos_embed \(1, 194, 32\) instead of \(1, 197, 32\)"
    with pytest.raises(ValueError, match=message):
        make(NAMES[0], backbone_weights=tmp_path / "timm.pth")


@pytest.mark.parametrize("name", [NAMES[0], "resnet18", "segnext_t"])
def test_frozen_backbones(name: str) -> None:
    options: dict[str, Any] = {"num_classes": 3, "freeze_backbone": True}
    if name == "segnext_t":
        model = create_model(name, **options)
    else:
        small = {**TINY, "pos_drop_rate": 0.5} if name == NAMES[0] else {"layers": (1, 1, 1, 1)}
        model = create_model(f"fpn_{name}", channels=16, backbone_options=small, **options)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    assert model.training
    assert model.decode_head.training
    assert not any(module.training for module in model.backbone.modules())
    model.eval().train()
    assert not any(module.training for module in model.backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    maps: list[Tensor] = []
    model.backbone.register_forward_hook(lambda module, inputs, output: maps.extend(output))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.randint(0, 3, (2, 64, 64))).backward()
    optimizer.step()
    assert maps
    assert not any(x.requires_grad for x in maps), "nothing is kept for a backward pass"
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    rest = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not rest


def test_frozen_backbones_of_detectors_and_libraries() -> None:
    detector = create_model("faster_rcnn_r18", 2, channels=32, min_size=64, freeze_backbone=True)
    assert not any(parameter.requires_grad for parameter in detector.backbone.body.parameters())
    assert all(parameter.requires_grad for parameter in detector.backbone.fpn.parameters())
    assert not detector.train().backbone.body.training
    pytest.importorskip("segmentation_models_pytorch")
    unet = create_model("smp:Unet?encoder_name=resnet18", 2, freeze_backbone=True)
    assert not any(module.training for module in unet.train().host.encoder.modules())
    assert not any(parameter.requires_grad for parameter in unet.host.encoder.parameters())
    assert all(parameter.requires_grad for parameter in unet.host.decoder.parameters())


def test_what_cannot_be_frozen() -> None:
    torchvision = pytest.importorskip("torchvision")

    class Own(PixelModel):
        def forward(self, images: Tensor) -> Tensor:
            return images

    with pytest.raises(ValueError, match="cannot tell which part of this Own is the backbone"):
        freeze_backbone_(Own())
    own = Own()
    own.backbone = upgrade_(torchvision.ops.FeaturePyramidNetwork([8, 8], 32))
    with pytest.raises(ValueError, match=r"the backbone of this Own cannot be frozen: .* holds fusions too"):
        freeze_backbone_(own)


def test_compile() -> None:
    torch._dynamo.reset()
    model = make(NAMES[0], fusion="bilinear").eval()
    image = torch.randn(1, 3, 45, 70)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close("compiled", compiled(image), model(image), 1e-4)
