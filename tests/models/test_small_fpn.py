"""The small FPN network."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from freqfusion import create_model
from freqfusion.fusion import list_fusions
from freqfusion.models import EncoderDecoder
from freqfusion.models.encoders import SmallEncoder


def make_model(num_classes: int, fusion: str = "freqfusion", **options: Any) -> EncoderDecoder:
    model = create_model("fpn_small", num_classes, fusion, **options)
    assert isinstance(model, EncoderDecoder)
    return model


@pytest.mark.parametrize("fusion", list_fusions())
@pytest.mark.parametrize("size", [(1, 1), (33, 47), (97, 31), (32, 64)])
def test_any_image_size(fusion: str, size: tuple[int, int]) -> None:
    model = make_model(5, fusion).eval()
    out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 5, *size)
    assert bool(torch.isfinite(out).all())


def test_encoder_maps_halve() -> None:
    maps = SmallEncoder((4, 6, 8)).eval()(torch.zeros(1, 3, 33, 20))
    assert [tuple(x.shape[1:]) for x in maps] == [(4, 17, 10), (6, 9, 5), (8, 5, 3)]


@pytest.mark.parametrize("fusion", ["bilinear", "freqfusion"])
def test_every_parameter_learns(fusion: str) -> None:
    torch.manual_seed(0)
    model = make_model(3, fusion)
    F.cross_entropy(model(torch.randn(2, 3, 48, 32)), torch.randint(0, 3, (2, 48, 32))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


def test_overfits_one_picture() -> None:
    torch.manual_seed(0)
    model = make_model(2, "freqfusion")
    image = torch.randn(1, 3, 32, 32)
    target = torch.zeros(1, 32, 32, dtype=torch.long)
    target[:, 8:24, 12:28] = 1
    image[:, 0] += 2 * target
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(model(image), target).backward()
        optimiser.step()
    assert float((model(image).argmax(1) == target).float().mean()) > 0.98


def test_fusion_options_override_the_defaults() -> None:
    key = "decode_head.fpn.fusions.0.hr_channel_compressor.weight"
    assert make_model(2).state_dict()[key].shape[0] == 16
    assert make_model(2, fusion_options={"compressed_channels": 24}).state_dict()[key].shape[0] == 24


def test_shared_weights_do_not_depend_on_the_fusion() -> None:
    def weights(fusion: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        return make_model(4, fusion).state_dict()

    bilinear = weights("bilinear")
    for fusion in list_fusions():
        other = weights(fusion)
        assert all(torch.equal(value, other[name]) for name, value in bilinear.items()), fusion


def test_parameter_names_stay() -> None:
    """Checkpoints and results of earlier runs rest on them."""
    state = make_model(4).state_dict()
    parts = {".".join(key.split(".")[:3]) for key in state if key.startswith("decode_head")}
    assert parts == {
        "decode_head.conv_seg.weight",
        "decode_head.conv_seg.bias",
        "decode_head.fpn.fusions",
        "decode_head.fpn.laterals",
        "decode_head.fpn.outputs",
    }
    assert {key.split(".")[1] for key in state if key.startswith("backbone")} == {"stages"}
