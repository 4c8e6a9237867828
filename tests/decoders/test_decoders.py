"""What the three decoders promise alike, and what the two that concatenate compute."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.decoders import FPN, ProgressiveConcat, UNet
from freqfusion.decoders.progressive import cascade_channels, fuse_cascade
from freqfusion.fusion import create_fusion, list_fusions
from freqfusion.fusion.catalog import GROUPS, create_fitting_fusion
from support import assert_close

DECODERS: dict[str, Callable[..., nn.Module]] = {
    "fpn": partial(FPN, num_outputs=1),
    "unet": UNet,
    "progressive": ProgressiveConcat,
}
IN_CHANNELS = (5, 7, 11)
ODD = ((13, 11), (7, 5), (3, 2))  # the last two sizes rounded up and down


def make_maps(sizes: Sequence[tuple[int, int]] = ODD, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, *size, generator=generator) for c, size in zip(IN_CHANNELS, sizes, strict=True)
    ]


def finest(decoder: nn.Module, maps: list[Tensor]) -> Tensor:
    out = decoder(maps)
    return out[0] if isinstance(out, list) else out


def check_learning(decoder: nn.Module, maps: list[Tensor], shape: tuple[int, ...]) -> None:
    for x in maps:
        x.requires_grad_()
    out = finest(decoder, maps)
    assert out.shape == shape
    out.square().sum().backward()
    for name, value in {**dict(decoder.named_parameters()), **dict(enumerate(maps))}.items():
        assert value.grad is not None, name
        assert bool(torch.isfinite(value.grad).all()), name
    assert all(float(x.grad.abs().max()) > 0 for x in maps if x.grad is not None)


@pytest.mark.parametrize("fusion", list_fusions())
@pytest.mark.parametrize("name", DECODERS)
def test_every_fusion_at_odd_sizes_and_odd_map_channels(name: str, fusion: str) -> None:
    torch.manual_seed(0)
    decoder = DECODERS[name](IN_CHANNELS, 8, fusion)
    channels = 24 if name == "progressive" else 8
    check_learning(decoder, make_maps(), (2, channels, 13, 11))


@pytest.mark.parametrize("fusion", [name for name in list_fusions() if not name.startswith("dysample-s")])
@pytest.mark.parametrize("name", DECODERS)
def test_odd_channels_of_the_decoder(name: str, fusion: str) -> None:
    torch.manual_seed(0)
    decoder = DECODERS[name](IN_CHANNELS, 9, fusion)
    channels = 27 if name == "progressive" else 9
    check_learning(decoder, make_maps(), (2, channels, 13, 11))


@pytest.mark.parametrize("name", DECODERS)
def test_channels_that_a_method_cannot_have(name: str) -> None:
    """DySample-S shuffles channels into a 2 x 2 square: no number of groups helps."""
    with pytest.raises(ValueError, match="needs channels divisible by"):
        DECODERS[name](IN_CHANNELS, 9, "dysample-s")


def test_fewer_groups_only_where_the_default_does_not_divide() -> None:
    groups = [
        create_fitting_fusion("freqfusion", 4, channels, {}).dysampler.groups for channels in (4, 6, 9, 64)
    ]
    assert groups == [4, 2, 1, 4]
    assert create_fitting_fusion("freqfusion", 4, 6, {"feature_resample_group": 3}).dysampler.groups == 3
    with pytest.raises(ValueError, match="4 groups for 6 channels"):
        create_fitting_fusion("freqfusion", 4, 6, {"feature_resample_group": 4})


@pytest.mark.parametrize("fusion", list_fusions())
def test_the_groups_of_every_method_are_known(fusion: str) -> None:
    """A method with groups by default is in the table, with its own default."""
    built = create_fusion(fusion, 64, 64)
    sampler = getattr(built, "dysampler", built)
    groups = getattr(sampler, "n_groups" if fusion == "lda_aqu" else "groups", None)
    assert (fusion in GROUPS) == (groups is not None)
    if groups is not None:
        option, default = GROUPS[fusion]
        assert default == groups
        assert option in inspect.signature(type(built)).parameters


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "sizes", [((12, 8), (6, 4), (3, 2)), ((1, 1), (1, 1), (1, 1)), ((16, 12), (4, 3), (4, 3))]
)
def test_other_sizes(name: str, sizes: tuple[tuple[int, int], ...]) -> None:
    """Ratios of 2, 4 and 1, down to a single pixel."""
    decoder = DECODERS[name](IN_CHANNELS, 8, "freqfusion").eval()
    out = finest(decoder, make_maps(sizes))
    assert out.shape[-2:] == sizes[0]
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("name", DECODERS)
def test_layouts_and_empty_batch(name: str) -> None:
    torch.manual_seed(0)
    decoder = DECODERS[name](IN_CHANNELS, 8, "freqfusion").eval()
    maps = make_maps()
    expected = finest(decoder, maps)
    last = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    assert_close("channels_last", finest(decoder, last), expected, 1e-5)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in maps]
    assert_close("not contiguous", finest(decoder, strided), expected, 1e-5)
    assert finest(decoder, [x[:0] for x in maps]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("name", ["unet", "progressive"])
@pytest.mark.parametrize(
    "arguments, message",
    [({"in_channels": [8]}, "at least two maps"), ({"fusion": "no such"}, "no such")],
)
def test_wrong_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DECODERS[name](**{"in_channels": IN_CHANNELS, "channels": 8, **arguments})


@pytest.mark.parametrize("name", ["unet", "progressive"])
def test_wrong_number_of_maps(name: str) -> None:
    with pytest.raises(ValueError, match="got 2 maps, this decoder was built for 3"):
        DECODERS[name](IN_CHANNELS, 8)(make_maps()[:2])


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def test_progressive_concatenates_the_finest_map_first() -> None:
    decoder = ProgressiveConcat(IN_CHANNELS, 6)
    maps = make_maps()
    c1, c2, c3 = (lateral(x) for lateral, x in zip(decoder.laterals, maps, strict=True))
    inner = torch.cat([c2, upsample(c3, (7, 5))], dim=1)
    expected = torch.cat([c1, upsample(inner, (13, 11))], dim=1)
    assert decoder.out_channels == 18
    assert_close("cascade", decoder(maps), expected, 1e-6)
    assert cascade_channels([6, 6, 6]) == [(6, 6), (6, 12)]


def test_unet_convolves_skip_and_deeper_result() -> None:
    decoder = UNet(IN_CHANNELS, 6).eval()
    maps = make_maps()
    c1, c2, c3 = (lateral(x) for lateral, x in zip(decoder.laterals, maps, strict=True))
    y2 = decoder.blocks[0](torch.cat([c2, upsample(c3, (7, 5))], dim=1))
    y1 = decoder.blocks[1](torch.cat([c1, upsample(y2, (13, 11))], dim=1))
    assert decoder.out_channels == 6
    assert_close("finest", decoder(maps), y1, 1e-6)
    kinds = [type(layer) for part in decoder.blocks[0] for layer in part]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2


@pytest.mark.parametrize("name", ["unet", "progressive"])
def test_both_refined_maps_are_used(name: str) -> None:
    """With FreqFusion the fine map that is joined is the one that the fusion returned."""
    torch.manual_seed(0)
    decoder = DECODERS[name](IN_CHANNELS, 8, "freqfusion").eval()
    joined: list[Tensor] = []
    fused: list[Tensor] = []
    decoder.fusions[-1].register_forward_hook(lambda module, args, out: fused.append(torch.cat(out[1:], 1)))
    if name == "unet":
        decoder.blocks[-1].register_forward_pre_hook(lambda module, args: joined.append(args[0]))
        decoder(make_maps())
    else:
        joined.append(decoder(make_maps()))
    assert torch.equal(joined[0], fused[0])


def test_cascade_by_groups_interleaves() -> None:
    fine, coarse = torch.randn(1, 4, 3, 3), torch.randn(1, 6, 3, 3)
    fusions = [create_fusion("nearest", 4, 6)]
    grouped = fuse_cascade(fusions, [fine, coarse], groups=2)
    expected = torch.cat([fine[:, :2], coarse[:, :3], fine[:, 2:], coarse[:, 3:]], dim=1)
    assert torch.equal(grouped, expected)
    assert torch.equal(fuse_cascade(fusions, [fine, coarse]), torch.cat([fine, coarse], dim=1))
