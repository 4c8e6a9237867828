"""The feature pyramid."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.decoders.fpn import FPN
from support import assert_close


def make_maps(sizes: list[tuple[int, int]], channels: tuple[int, ...] = (6, 10, 14)) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]


@pytest.mark.parametrize("fusion", ["nearest", "bilinear"])
def test_top_down_addition(fusion: str) -> None:
    maps = make_maps([(9, 7), (5, 4), (3, 2)])
    fpn = FPN([6, 10, 14], 8, fusion)
    align = None if fusion == "nearest" else False
    p3 = fpn.laterals[2](maps[2])
    p2 = fpn.laterals[1](maps[1]) + F.interpolate(p3, size=(5, 4), mode=fusion, align_corners=align)
    p1 = fpn.laterals[0](maps[0]) + F.interpolate(p2, size=(9, 7), mode=fusion, align_corners=align)
    outputs = fpn(maps)
    assert len(outputs) == 3
    for i, merged in enumerate((p1, p2, p3)):
        assert_close(f"level {i}", outputs[i], fpn.outputs[i](merged), 1e-6)


@pytest.mark.parametrize(
    "sizes", [[(12, 8), (6, 4), (3, 2)], [(9, 7), (5, 4), (3, 2)], [(1, 1), (1, 1), (1, 1)]]
)
def test_freqfusion_at_any_size(sizes: list[tuple[int, int]]) -> None:
    fpn = FPN([6, 10, 14], 16, "freqfusion", {"compressed_channels": 8})
    outputs = fpn(make_maps(sizes))
    assert [tuple(x.shape) for x in outputs] == [(2, 16, *size) for size in sizes]
    sum(x.square().sum() for x in outputs).backward()
    for name, parameter in fpn.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


def test_fusions_refine_both_maps() -> None:
    """What the fusion returns is what is added: both maps, in the order coarse to fine."""
    fpn = FPN([6, 10, 14], 16, "freqfusion", {"compressed_channels": 8})
    maps = make_maps([(8, 8), (4, 4), (2, 2)])
    x = fpn.laterals[2](maps[2])
    for fusion, level in zip(fpn.fusions, (1, 0), strict=True):
        fused = fusion(hr_feat=fpn.laterals[level](maps[level]), lr_feat=x)
        x = fused.hr_feat + fused.lr_feat
    assert_close("finest", fpn(maps)[0], fpn.outputs[0](x), 1e-6)


def test_fewer_outputs_leave_no_parameter_unused() -> None:
    fpn = FPN([6, 10, 14], 8, num_outputs=1)
    outputs = fpn(make_maps([(8, 8), (4, 4), (2, 2)]))
    assert len(outputs) == 1
    outputs[0].sum().backward()
    assert all(p.grad is not None for p in fpn.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_channels": [8]}, "at least two maps"),
        ({"num_outputs": 0}, "between 1 and 3, got 0"),
        ({"num_outputs": 4}, "between 1 and 3, got 4"),
        ({"fusion": "no such"}, "no such"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FPN(**{"in_channels": [6, 10, 14], "channels": 8, **arguments})  # type: ignore[arg-type]


def test_wrong_number_of_maps() -> None:
    with pytest.raises(ValueError, match="got 2 maps, this decoder was built for 3"):
        FPN([6, 10, 14], 8)(make_maps([(8, 8), (4, 4), (2, 2)])[:2])
