"""FeatUp, LoftUp and UPLiFT at any size, by strips, in half precision; what they promise beside their numbers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.features import FeatUpJBU, FeatureUpsampler, LoftUp, UPLiFT, create_upsampler
from freqfusion.features._strips import Resized, Stream

SMALL: dict[str, tuple[type[FeatureUpsampler], dict[str, Any]]] = {
    "featup_jbu": (FeatUpJBU, {}),
    "featup_jbu with a norm": (FeatUpJBU, {"norm": True}),
    "loftup": (LoftUp, {"n_freqs": 3, "num_heads": 2, "num_layers": 1}),
    "loftup with a table": (
        LoftUp,
        {"n_freqs": 3, "num_heads": 2, "num_layers": 1, "lr_pe_type": "learnable"},
    ),
    "uplift of patches of 14": (UPLiFT, {"encoder_channels": (4, 6, 8), "decoder_channels": (8, 20)}),
    "uplift of patches of 16": (
        UPLiFT,
        {"patch_size": 16, "encoder_channels": (4, 6), "decoder_channels": (20, 8), "attender": 25},
    ),
}


def _small(name: str, channels: int = 4) -> FeatureUpsampler:
    torch.manual_seed(0)
    build, options = SMALL[name]
    upsampler = build(channels, **options).double().eval()
    with torch.no_grad():  # a network with fresh weights hardly sees the image
        for parameter in upsampler.parameters():
            if parameter.ndim > 1:
                parameter *= 2
    return upsampler


def _inputs(h: int, w: int, height: int, width: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 4, h, w).double(), torch.rand(batch, 3, height, width).double()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("coarse", "image", "size"),
    [
        ((3, 4), (48, 64), None),
        ((3, 4), (42, 56), None),
        ((5, 3), (71, 40), (33, 19)),
        ((2, 3), (30, 44), (37, 49)),
        ((2, 2), (28, 30), (2, 2)),
    ],
)
@torch.no_grad()
def test_strips_equal_the_whole(name: str, coarse: Any, image: Any, size: Any) -> None:
    upsampler = _small(name)
    features, picture = _inputs(*coarse, *image, batch=2)
    whole = upsampler(features, picture, size)
    assert whole.shape == (2, 4, *(size or image))
    for chunk in (1 if size is None else 7, 1000):
        torch.testing.assert_close(
            upsampler(features, picture, size, chunk=chunk), whole, rtol=0, atol=1e-10, msg=f"chunk={chunk}"
        )


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    upsampler = _small(name)
    features, picture = _inputs(3, 2, 40, 30)
    features, picture = features.to(dtype), picture.to(torch.float32 if "loftup" in name else dtype)
    exact = upsampler(features.double(), picture.double())
    for weights in (torch.float32, dtype):
        out = upsampler.to(weights)(features, picture)
        assert out.dtype == dtype
        error = (out.double() - exact).abs().max() / exact.abs().max()
        assert error < (0.1 if dtype == torch.bfloat16 else 0.02)
    strips = upsampler(features, picture, chunk=9)
    assert strips.dtype == dtype
    assert float((strips - out).abs().max()) <= float(0.05 * out.abs().max())


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_awkward_shapes(name: str) -> None:
    upsampler = _small(name)
    features, picture = _inputs(1, 1, 16, 17, batch=2)
    one = upsampler(features, picture)
    assert torch.isfinite(one).all()
    assert one.shape == (2, 4, 16, 17)
    assert upsampler(features[:0], picture[:0]).shape == (0, 4, 16, 17)
    features, picture = _inputs(2, 3, 21, 40, batch=2)
    plain = upsampler(features, picture)
    layout = torch.channels_last
    last = upsampler(features.contiguous(memory_format=layout), picture.contiguous(memory_format=layout))
    torch.testing.assert_close(last, plain)
    if "loftup" not in name:  # whose colours are scaled over the batch
        torch.testing.assert_close(upsampler(features[1:], picture[1:]), plain[1:])


@pytest.mark.parametrize("name", SMALL)
def test_trains(name: str) -> None:
    upsampler = _small(name).train()
    features, picture = _inputs(3, 4, 42, 56, batch=2)
    upsampler(features, picture).square().mean().backward()
    without = [
        key for key, value in upsampler.named_parameters() if value.grad is None or not value.grad.any()
    ]
    assert without == []


def test_loftup_scales_colours_over_the_whole_batch() -> None:
    upsampler = _small("loftup")
    features, picture = _inputs(2, 3, 12, 14, batch=2)
    picture[1] *= 0.5
    with torch.no_grad():
        together, alone = upsampler(features, picture), upsampler(features[1:], picture[1:])
        assert float((together[1:] - alone).abs().max()) > 1e-3
        picture[:, :, 0, 0], picture[:, :, 0, 1] = 0, 1  # with one range for both images nothing is coupled
        together, alone = upsampler(features, picture), upsampler(features[1:], picture[1:])
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize("attender", [5, 9, 13, 17, 25])
@torch.no_grad()
def test_uplift_stays_in_the_hull(attender: int) -> None:
    torch.manual_seed(0)
    upsampler = UPLiFT(4, attender=attender, encoder_channels=(4, 6), decoder_channels=(6, 7)).double().eval()
    features, picture = _inputs(3, 4, 42, 56)
    constant = upsampler(torch.full_like(features, 2.5), picture)
    torch.testing.assert_close(constant, torch.full_like(constant, 2.5))
    out = upsampler(features, picture)
    assert (out.amax((2, 3)) <= features.amax((2, 3)) + 1e-12).all()
    assert (out.amin((2, 3)) >= features.amin((2, 3)) - 1e-12).all()


@torch.no_grad()
def test_uplift_doubles_as_few_times_as_reach_the_size() -> None:
    upsampler = _small("uplift of patches of 16")
    features, picture = _inputs(3, 4, 48, 64)
    upsampler.iters = 2
    twice = upsampler(features, picture, (12, 16))
    upsampler.iters = None
    torch.testing.assert_close(upsampler(features, picture, (12, 16)), twice)
    torch.testing.assert_close(
        upsampler(features, picture, (9, 13)), F.interpolate(twice, (9, 13), mode="bilinear", antialias=True)
    )
    upsampler.iters = 2  # and then interpolates
    torch.testing.assert_close(
        upsampler(features, picture, (30, 41)), F.interpolate(twice, (30, 41), mode="bilinear")
    )


@torch.no_grad()
def test_featup_is_reduced_with_antialiasing() -> None:
    upsampler = _small("featup_jbu")
    features, picture = _inputs(3, 4, 42, 56)
    full = upsampler(features, picture, (48, 64))
    expected = F.interpolate(full, (42, 56), mode="bilinear", antialias=True)
    torch.testing.assert_close(upsampler(features, picture), expected)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="lr_pe_type must be one of"):
        LoftUp(8, lr_pe_type="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"attender must be one of .* got 7"):
        UPLiFT(8, attender=7)
    with pytest.raises(ValueError, match="decoder_channels two"):
        UPLiFT(8, decoder_channels=(8,))
    with pytest.raises(ValueError, match="made for one number of channels"):
        create_upsampler("uplift")
    features, picture = _inputs(2, 2, 32, 32)
    with pytest.raises(ValueError, match=r"4 channels.* built for 8"):
        UPLiFT(8)(features.float(), picture.float())


def test_a_stream_computes_each_row_once_and_forgets_what_all_have_read() -> None:
    asked: list[tuple[int, int]] = []
    x = torch.arange(20.0).reshape(1, 1, 20, 1)

    def compute(first: int, last: int) -> Tensor:
        asked.append((first, last))
        return x[:, :, first:last]

    stream = Stream(compute, readers=2)
    assert stream.take(range(2, 6)).flatten().tolist() == [2, 3, 4, 5]
    assert stream.take([0, 3, 9], reader=1).flatten().tolist() == [0, 3, 9]
    assert stream.take(range(5, 12)).flatten().tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert asked == [(0, 6), (6, 10), (10, 12)]
    assert stream.take([11], reader=1).flatten().tolist() == [11]
    stream.take([11])
    assert [block.shape[2] for block in stream._blocks] == [2]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "bicubic"},
        {"mode": "bilinear", "antialias": True},
        {"mode": "bilinear", "align_corners": True},
    ],
)
@pytest.mark.parametrize("size", [(22, 8), (7, 9), (11, 3), (40, 5)])
def test_resized_rows(options: dict[str, Any], size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 11, 5, dtype=torch.float64)
    whole = F.interpolate(x, size, **options)
    rows = Resized(lambda first, last: x[:, :, first:last], x, 11, size, **options)
    torch.testing.assert_close(rows(0, size[0]), whole)
    torch.testing.assert_close(torch.cat([rows(0, 2), rows(2, 6), rows(6, size[0])], 2), whole)


@pytest.mark.parametrize("name", ["loftup", "uplift of patches of 14"])
@torch.no_grad()
def test_no_strips_while_training(name: str) -> None:
    upsampler = _small(name).train()
    with pytest.raises(ValueError, match=r"chunk is for evaluation: call .eval\(\) of the (LoftUp|UPLiFT)"):
        upsampler(*_inputs(3, 4, 42, 56), chunk=5)


@pytest.mark.parametrize("name", SMALL)
def test_autocast(name: str) -> None:
    upsampler = _small(name).float()
    features, picture = (x.float() for x in _inputs(3, 4, 42, 56))
    with torch.no_grad():
        exact = upsampler(features, picture)
    with torch.autocast("cpu", torch.bfloat16):
        out = upsampler(features, picture)
        with torch.no_grad():
            strips = upsampler(features, picture, chunk=9)
    out.square().mean().backward()
    for actual in (out, strips):
        assert actual.dtype == torch.float32
        assert float((actual.detach() - exact).norm() / exact.norm()) < 0.05
