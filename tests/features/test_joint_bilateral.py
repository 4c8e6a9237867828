"""Joint bilateral upsampling: constants, edges, limits, strips."""

import pytest
import torch
from torch import Tensor

from freqfusion.features import JointBilateralFeatures


def _by_definition(
    features: Tensor, image: Tensor, size: tuple[int, int], module: JointBilateralFeatures
) -> Tensor:
    """Sums over all coarse pixels of the window, one by one; the image has the size of the result."""
    (h, w), (height, width) = features.shape[-2:], size
    mean = torch.nn.functional.adaptive_avg_pool2d(image, (h, w))
    out = torch.zeros(*features.shape[:2], *size, dtype=features.dtype)
    for y in range(height):
        for x in range(width):
            total = torch.zeros(len(features), 1, dtype=features.dtype)
            for i in range(
                max(0, y * h // height - module.radius), min(h, y * h // height + module.radius + 1)
            ):
                for j in range(
                    max(0, x * w // width - module.radius), min(w, x * w // width + module.radius + 1)
                ):
                    near = ((y + 0.5) * h / height - 0.5 - i) ** 2 + ((x + 0.5) * w / width - 0.5 - j) ** 2
                    alike = (image[:, :, y, x] - mean[:, :, i, j]).square().sum(1, keepdim=True)
                    weight = (
                        -near / (2 * module.sigma_spatial**2) - alike / (2 * module.sigma_range**2)
                    ).exp()
                    out[:, :, y, x] += weight * features[:, :, i, j]
                    total += weight
            out[:, :, y, x] /= total
    return out


@pytest.mark.parametrize("size", [(8, 12), (7, 11), (4, 4)])
def test_equals_its_definition(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    features, image = torch.randn(2, 3, 4, 3).double(), torch.rand(2, 3, *size).double()
    module = JointBilateralFeatures(sigma_range=0.3, sigma_spatial=0.8, radius=1)
    out = module(features, image)
    torch.testing.assert_close(out, _by_definition(features, image, size, module))
    for chunk in (1, 3, 100):
        torch.testing.assert_close(module(features, image, chunk=chunk), out)


@pytest.mark.parametrize("size", [(32, 48), (29, 31), (2, 3)])
def test_constant_features_stay_and_others_stay_in_their_range(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, *size).double()
    out = JointBilateralFeatures()(torch.full((1, 2, 2, 3), -1.5).double(), image)
    torch.testing.assert_close(out, torch.full_like(out, -1.5))
    features = torch.randn(1, 2, 2, 3).double()
    out = JointBilateralFeatures()(features, image)
    assert features.min() - 1e-12 <= out.min() <= out.max() <= features.max() + 1e-12


@pytest.mark.parametrize("edge", [16, 19, 30])
def test_the_edge_is_the_images(edge: int) -> None:
    """The image's step, inside a coarse pixel too, is where the features step."""
    image = (torch.arange(48) >= edge).double().expand(1, 3, 32, 48)
    features = (torch.arange(6) >= (edge + 4) // 8).double().expand(1, 1, 4, 6)
    out = JointBilateralFeatures()(features, image)[0, 0]
    assert (out[:, :edge] < 0.01).all()
    assert (out[:, edge:] > 0.99).all()


def test_no_edges_at_a_large_range_deviation() -> None:
    torch.manual_seed(0)
    features, image = torch.randn(1, 2, 5, 6).double(), torch.rand(1, 3, 40, 48).double()
    smooth = JointBilateralFeatures(sigma_range=1e6, sigma_spatial=0.7, radius=2)
    weights = []
    for few, many in ((5, 40), (6, 48)):
        centres = ((torch.arange(many).double() + 0.5) * few / many - 0.5)[:, None]
        taps = torch.arange(few).double()
        weight = (-((centres - taps) ** 2) / (2 * 0.7**2)).exp()
        parents = (torch.arange(many) * few // many)[:, None]
        weight = weight * ((taps - parents).abs() <= 2)
        weights.append(weight / weight.sum(1, keepdim=True))
    gaussian = weights[0] @ features @ weights[1].T
    torch.testing.assert_close(smooth(features, image), gaussian, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_empty_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features, image = torch.randn(2, 4, 3, 5).to(dtype), torch.rand(2, 3, 24, 37).to(dtype)
    module = JointBilateralFeatures()
    out, exact = module(features, image), module(features.double(), image.double())
    assert out.dtype == dtype
    assert float((out.double() - exact).abs().max()) < 0.05
    assert module(features[:0], image[:0]).shape == (0, 4, 24, 37)


def test_gradients_reach_features() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    image = torch.rand(1, 3, 6, 7).double()
    assert torch.autograd.gradcheck(lambda x: JointBilateralFeatures()(x, image), (features,))


@pytest.mark.parametrize(
    "options", [{"sigma_range": 0.0}, {"sigma_spatial": -1.0}, {"sigma_range": float("nan")}]
)
def test_wrong_deviations(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be a positive number"):
        JointBilateralFeatures(**options)
