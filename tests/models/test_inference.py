"""Prediction on whole images, windows, flips and scales."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from freqfusion import create_model
from freqfusion.models import predict_logits
from support import assert_close


class Pointwise(nn.Module):
    """Every pixel's logits depend on that pixel alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(4, 3, 1, 1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Counter(nn.Module):
    """Logits 1, 2, 3, ... in the order of the calls; remembers the shapes it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return torch.full_like(x[:, :2], float(len(self.shapes)))


def make_images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5))


def test_whole_image_is_the_models_own_output() -> None:
    model, images = Pointwise(), make_images(7, 9)
    assert torch.equal(predict_logits(model, images), model(images))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    window=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    data=st.data(),
)
def test_windows_of_a_pointwise_model_give_the_whole(
    size: tuple[int, int], window: tuple[int, int], data: st.DataObject
) -> None:
    stride = data.draw(st.none() | st.tuples(st.integers(1, window[0]), st.integers(1, window[1])))
    model, images = Pointwise(), make_images(*size)
    found = predict_logits(model, images, window=window, stride=stride)
    assert_close("logits", found, model(images), 1e-5)


def test_overlaps_are_averaged() -> None:
    model = Counter()
    out = predict_logits(model, make_images(2, 5, batch=1), window=(2, 3), stride=(2, 1))
    assert model.shapes == [(1, 3, 2, 3)] * 3
    assert torch.equal(out[0, 0, 0], torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0]))
    assert torch.equal(out, out[:1, :1, :1].expand_as(out))


def test_last_window_is_moved_to_the_border() -> None:
    model = Counter()
    out = predict_logits(model, make_images(5, 3, batch=1), window=3, stride=3)
    assert model.shapes == [(1, 3, 3, 3)] * 2
    assert torch.equal(out[0, 0, :, 0], torch.tensor([1.0, 1.0, 1.5, 2.0, 2.0]))


def test_default_stride_is_two_thirds_of_the_window() -> None:
    model = Counter()
    predict_logits(model, make_images(6, 14), window=6)  # steps of 4: columns 0, 4, 8
    assert model.shapes == [(2, 3, 6, 6)] * 3


def test_window_larger_than_the_image_shrinks() -> None:
    model = Counter()
    predict_logits(model, make_images(4, 20), window=(10, 8), stride=8)
    assert model.shapes == [(2, 3, 4, 8)] * 3
    model = Counter()
    out = predict_logits(model, make_images(4, 5), window=64)
    assert model.shapes == [(2, 3, 4, 5)]
    assert out.shape == (2, 2, 4, 5)


def test_flip_makes_the_prediction_symmetric() -> None:
    torch.manual_seed(0)
    model = create_model("fpn_small", 4, "bilinear").eval()
    images = make_images(21, 34)
    plain = predict_logits(model, images)
    out = predict_logits(model, images, flip=True)
    mirrored = predict_logits(model, images.flip(-1), flip=True)
    assert_close("mirror", mirrored.flip(-1), out, 1e-5)
    expected = (plain.softmax(1) + model(images.flip(-1)).flip(-1).softmax(1)) / 2
    assert_close("mean of both", out, expected.detach(), 1e-5)
    assert not torch.allclose(plain.softmax(1), out, atol=1e-4), "the model itself is not symmetric"


def test_scales_average_probabilities() -> None:
    model, images = Pointwise(), make_images(10, 15)
    out = predict_logits(model, images, scales=(0.5, 1.0, 1.5))
    expected = torch.zeros_like(out)
    for size in ((5, 8), (10, 15), (15, 22)):
        resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        logits = F.interpolate(model(resized), size=(10, 15), mode="bilinear", align_corners=False)
        expected += logits.softmax(1) / 3
    assert_close("probabilities", out, expected, 1e-5)
    assert_close("sum over classes", out.sum(1), torch.ones(2, 10, 15), 1e-5)


def test_one_other_scale_gives_logits_at_image_size() -> None:
    model, images = Counter(), make_images(9, 12)
    out = predict_logits(model, images, scales=[2.0])
    assert model.shapes == [(2, 3, 18, 24)]
    assert torch.equal(out, torch.ones(2, 2, 9, 12))


def test_tiny_scale_keeps_a_pixel() -> None:
    model = Counter()
    assert predict_logits(model, make_images(3, 50), scales=[0.1]).shape == (2, 2, 3, 50)
    assert model.shapes == [(2, 3, 1, 5)]


def test_everything_together_on_a_real_network() -> None:
    torch.manual_seed(0)
    model = create_model("segnext_t", 3).eval()
    out = predict_logits(model, make_images(45, 61), window=(32, 40), scales=(0.75, 1.0), flip=True)
    assert out.shape == (2, 3, 45, 61)
    assert_close("sum over classes", out.sum(1), torch.ones(2, 45, 61), 1e-5)


def test_mode_is_left_alone_and_no_gradient_is_recorded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    for training in (True, False):
        model.train(training)
        assert not predict_logits(model, make_images(4, 4), window=2, flip=True).requires_grad
        assert model.training is training


def test_half_precision_is_added_up_in_float32() -> None:
    model = Counter().bfloat16()
    out = predict_logits(model, make_images(1, 40, batch=1).bfloat16(), window=(1, 3), stride=1)
    assert out.dtype == torch.float32
    assert float(out[0, 0, 0, -2]) == 37.5  # bfloat16 sums would round


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"images": torch.zeros(3, 4, 4)}, ValueError, r"got \(3, 4, 4\)"),
        ({"images": torch.zeros(1, 3, 0, 4)}, ValueError, r"got \(1, 3, 0, 4\)"),
        ({"images": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, TypeError, "got torch.uint8"),
        ({"window": 0}, ValueError, "window must be at least 1 pixel, got 0"),
        ({"window": 4, "stride": 0}, ValueError, "stride must be at least 1 pixel"),
        ({"window": (4, 3), "stride": (4, 4)}, ValueError, "would leave gaps"),
        ({"stride": 3}, ValueError, "without a window"),
        ({"scales": ()}, ValueError, "at least one"),
        ({"scales": (1.0, 0.0)}, ValueError, "positive"),
        ({"model": nn.MaxPool2d(2)}, ValueError, "at the images' size"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict_logits(**{"model": Pointwise(), "images": make_images(4, 4), **arguments})
