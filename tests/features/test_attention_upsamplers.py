"""NAF, AnyUp and JAFAR at awkward sizes and dtypes, and what they refuse."""

from collections.abc import Callable

import pytest
import torch

from freqfusion.features import JAFAR, NAF, AnyUp, FeatureUpsampler

Build = Callable[[], FeatureUpsampler]
BUILDS: dict[str, Build] = {
    "naf": lambda: NAF(dim=32, kernel_size=3).eval(),
    "anyup": lambda: AnyUp(qk_dim=16, window_ratio=0.3).eval(),
    "natten": lambda: AnyUp(qk_dim=16, window_ratio=0.2, natten=True).eval(),
    "jafar": lambda: JAFAR(8, qk_dim=16).eval(),
}
each = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())


def _inputs(batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 8, 4, 3), torch.rand(batch, 3, 28, 21)


@each
@pytest.mark.parametrize("size", [(28, 21), (4, 3), (64, 48), (17, 31), (9, 3)])
def test_any_size_stays_within_the_features(build: Build, size: tuple[int, int]) -> None:
    upsampler = build()
    features, image = _inputs(2)
    with torch.no_grad():
        out = upsampler(features, image, size)
        rows = upsampler(features, image, size, chunk=3)
    assert out.shape == (2, 8, *size)
    least, most = features.amin((2, 3))[..., None, None], features.amax((2, 3))[..., None, None]
    assert bool(((out >= least - 1e-5) & (out <= most + 1e-5)).all())
    torch.testing.assert_close(rows, out, rtol=1e-4, atol=1e-5)


@each
def test_images_of_a_batch_are_independent(build: Build) -> None:
    upsampler = build()
    features, image = _inputs(2)
    with torch.no_grad():
        both = upsampler(features, image)
        torch.testing.assert_close(both[1:], upsampler(features[1:], image[1:]), rtol=1e-4, atol=1e-5)
        assert upsampler(features[:0], image[:0]).shape == (0, 8, 28, 21)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(build: Build, dtype: torch.dtype) -> None:
    upsampler = build()
    features, image = _inputs()
    with torch.no_grad():
        expected = upsampler(features, image)
        mixed = upsampler(features.to(dtype), image)
        pure = upsampler.to(dtype)(features.to(dtype), image.to(dtype))
        rows = upsampler(features.to(dtype), image.to(dtype), chunk=8)
    for out in (mixed, pure, rows):
        assert out.dtype == dtype
        assert float((out.float() - expected).abs().max()) < 0.1


@each
def test_autocast(build: Build) -> None:
    upsampler = build()
    features, image = _inputs()
    expected = upsampler(features, image)
    with torch.autocast("cpu", torch.bfloat16):
        out = upsampler(features, image)
    assert out.dtype == torch.float32
    assert float((out - expected).detach().abs().max()) < 0.1


@each
def test_channels_last_and_frozen_features_train(build: Build) -> None:
    upsampler = build().train()
    features, image = (x.contiguous(memory_format=torch.channels_last) for x in _inputs())
    upsampler(features, image).square().sum().backward()
    gradient = upsampler.image_encoder.get_parameter(
        "encoder.0.weight" if isinstance(upsampler, NAF) else "0.weight"
    ).grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("name", ["naf", "anyup"])
def test_compiled(name: str) -> None:
    upsampler = BUILDS[name]()
    features, image = _inputs()
    torch._dynamo.reset()
    compiled = torch.compile(upsampler, backend="eager")
    torch.testing.assert_close(compiled(features, image), upsampler(features, image), rtol=1e-4, atol=1e-5)


def test_places_are_scaled_in_training_alone() -> None:
    upsampler = NAF(dim=32, kernel_size=3)
    for parameter in upsampler.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    features, image = _inputs()
    with torch.no_grad():
        plain = upsampler.eval()(features, image)
        upsampler.train()
        first, again = upsampler(features, image), upsampler(features, image)
        assert not torch.allclose(first, again, atol=1e-4)  # another factor in each pass
        assert not torch.allclose(first, plain, atol=1e-4)
        assert torch.equal(upsampler.eval()(features, image), plain)


def test_what_is_refused() -> None:
    features, image = _inputs()
    with pytest.raises(ValueError, match="window of 9 coarse rows does not fit"):
        NAF(dim=32)(features, image)
    with pytest.raises(ValueError, match="at least 3 columns"):
        NAF(dim=32, kernel_size=3)(features[..., :2], image)
    with pytest.raises(ValueError, match="groups must divide the channels of features"):
        NAF(dim=32, kernel_size=3)(features[:, :6], image)
    with pytest.raises(ValueError, match="at least 2 rows and columns"):
        AnyUp(qk_dim=16)(features[..., :1], image)
    with pytest.raises(ValueError, match="image must have more than 1 rows"):
        JAFAR(8, qk_dim=16, kernel_size=3)(features, image[:, :, :1], (28, 21))
    with pytest.raises(ValueError, match="qk_dim must be divisible by 8"):
        JAFAR(8, qk_dim=20)
    with pytest.raises(ValueError, match="dim must be divisible"):
        NAF(dim=24)
    state = NAF(dim=64, rope_base=10.0).state_dict()
    with pytest.raises(ValueError, match="rope_base"):
        NAF(dim=64).load_state_dict(state)


def test_jafar_takes_the_encoders_normalisation() -> None:
    features, image = _inputs()
    upsampler = JAFAR(8, qk_dim=16, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    expected = upsampler.upsample(features, image * 2 - 1, (28, 21), None)
    torch.testing.assert_close(upsampler(features, image), expected, rtol=1e-4, atol=1e-6)
