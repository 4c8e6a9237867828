"""Encoders by strips of rows equal those on the whole map."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from freqfusion.features._rows import Rows
from support import assert_close


def _encoder() -> nn.Sequential:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 5, padding=2, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 1),
        nn.GroupNorm(2, 4, affine=False),
    )
    encoder[5].running_mean.normal_()
    return encoder.double().eval()


@pytest.mark.parametrize("height", [3, 5, 20])
@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 50])
@torch.no_grad()
def test_strips_equal_the_whole(height: int, chunk: int | None) -> None:
    encoder = _encoder()
    x = torch.randn(2, 3, height, 7, dtype=torch.float64)
    rows = Rows.of(x, chunk).through(encoder)
    expected = encoder(x)
    assert_close("rows", rows(1, 3), expected[:, :, 1:3], 1e-12)
    for size in ((height, 7), (4, 5), (2 * height + 1, 9), (1, 1)):
        assert_close(
            f"pooled to {size}", rows.pooled(size).whole(), F.adaptive_avg_pool2d(expected, size), 1e-12
        )
    kept = Rows.of(x, chunk).kept()
    doubled = (
        kept.through(nn.Conv2d(3, 3, 3, padding=1).double()).each(torch.zeros_like).joined(kept, torch.add)
    )
    assert_close("a sum with a map that is read twice", doubled.whole(), x, 0)


def test_no_read_is_longer_than_a_chunk_and_its_border() -> None:
    reads = []

    def read(lo: int, hi: int) -> torch.Tensor:
        reads.append(hi - lo)
        return torch.randn(1, 3, hi - lo, 7, dtype=torch.float64)

    with torch.no_grad():
        Rows(40, read, chunk=4).through(_encoder()).whole()
    assert max(reads) == 4 + 2 * (1 + 2 + 2)


def test_other_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="stride"):
        Rows.of(torch.zeros(1, 3, 4, 4), 1).through(nn.Conv2d(3, 3, 3, stride=2, padding=1))
