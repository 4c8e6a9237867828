"""Fusions by name, and the contract that every one of them keeps."""

import inspect
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion import Fusion, create_fusion, describe_fusions, list_fusions, register_fusion
from freqfusion.fusion import DySample, catalog
from freqfusion.testing import check_fusion
from support import relative_error

HR_CHANNELS, LR_CHANNELS = 32, 64
METHODS = list_fusions()


def build(name: str) -> Fusion:
    """With weights large enough that every branch matters."""
    fusion = create_fusion(name, HR_CHANNELS, LR_CHANNELS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return fusion


def random_maps(hr_size: tuple[int, int], lr_size: tuple[int, int], batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hr = torch.randn(batch, HR_CHANNELS, *hr_size, generator=generator)
    return hr, torch.randn(batch, LR_CHANNELS, *lr_size, generator=generator)


@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str) -> None:
    check_fusion(partial(create_fusion, name), HR_CHANNELS, LR_CHANNELS)


@pytest.mark.parametrize(
    ("spatial_dims", "name"), [(dims, name) for dims in (2, 3) for name in list_fusions(dims)]
)
def test_gradients_of_an_empty_batch(spatial_dims: int, name: str) -> None:
    fine, coarse = (torch.zeros(0, 8, *[side] * spatial_dims, requires_grad=True) for side in (4, 2))
    out = create_fusion(name, 8, 8, spatial_dims=spatial_dims)(hr_feat=fine, lr_feat=coarse)
    (out.hr_feat.sum() + out.lr_feat.sum()).backward()
    assert coarse.grad is not None
    assert coarse.grad.shape == coarse.shape


@pytest.mark.parametrize("name", METHODS)
def test_one_pixel_in_norms_of_one_channel(name: str) -> None:
    pixel = torch.rand(1, 8, 1, 1)
    out = create_fusion(name, 8, 8).eval()(hr_feat=pixel, lr_feat=pixel).lr_feat
    assert out.shape == pixel.shape
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["dysample", "dysample+", "dysample-s", "dysample-s+"])
@pytest.mark.parametrize(("hr_size", "lr_size"), [((8, 10), (4, 5)), ((27, 33), (14, 17))])
def test_dysample_without_offsets_is_bilinear(
    name: str, hr_size: tuple[int, int], lr_size: tuple[int, int]
) -> None:
    fusion = create_fusion(name, HR_CHANNELS, LR_CHANNELS)
    torch.nn.init.zeros_(fusion.get_parameter("offset.weight"))
    hr, lr = random_maps(hr_size, lr_size)
    bilinear = create_fusion("bilinear", HR_CHANNELS, LR_CHANNELS)(hr, lr).lr_feat
    assert relative_error(fusion(hr, lr).lr_feat, bilinear) < 1e-5


@pytest.mark.parametrize("name", ["nearest", "bilinear"])
def test_interpolations_leave_the_fine_map_alone(name: str) -> None:
    hr, lr = torch.randn(1, 3, 9, 7), torch.randn(1, 5, 4, 3)
    kernel, fused_hr, fused_lr = create_fusion(name, 3, 5)(hr, lr)
    assert kernel is None
    assert fused_hr is hr
    assert torch.equal(fused_lr, F.interpolate(lr, size=(9, 7), mode=name))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # the panoptic table's column: three sites of a 256-channel FPN
        ("deconv", 1_770_240),
        ("pixel_shuffle", 7_080_960),
        ("carafe", 222_444),
        ("indexnet", 6_300_672),
        ("a2u", 32_370),
        ("fade", 141_771),
        ("sapa", 52_416),
        ("dysample", 24_672),
        ("dysample+", 49_248),
        ("dysample-s", 3_120),
        ("dysample-s+", 6_192),
        # and of those published since: per site as their papers count
        ("sapa_d", 3 * 139_808),
        ("fade_lite", 3 * 13_332),
        ("lda_aqu", 3 * 39_410),
        ("resfu", 3 * 47_570),
    ],
)
def test_parameters_of_three_sites(name: str, parameters: int) -> None:
    assert (
        3 * sum(parameter.numel() for parameter in create_fusion(name, 256, 256).parameters()) == parameters
    )


def test_a2u_counts_29k_weights() -> None:
    """The published +29.2K leaves out biases and norm affines."""
    weights = [
        parameter.numel() for parameter in create_fusion("a2u", 256, 256).parameters() if parameter.ndim > 1
    ]
    assert 3 * sum(weights) == 29_184


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("carrafe", {}, "unknown fusion 'carrafe'; choose one of: nearest, bilinear"),
        ("deconv", {"kernel_size": 5}, "kernel_size must be 2, 3 or 4"),
        ("pixel_shuffle", {"upsample_kernel": 2}, "upsample_kernel must be odd"),
        ("carafe", {"up_group": 5}, "groups must divide the channels of lr_feat"),
        ("indexnet", {"kind": "o2o"}, "kind must be one of"),
        ("indexnet", {"kind": "depthwise_o2o"}, "hr_channels == lr_channels, got 32 and 64"),
        ("a2u", {"encode_kernel": 5}, "encode_kernel must be even"),
        ("fade", {"gating": True}, "hr_channels == lr_channels, got 32 and 64; use gating=False"),
        ("sapa", {"norm": "batch"}, "norm must be one of"),
        ("dysample", {"style": "x"}, 'style must be "lp" or "pl"'),
        ("dysample", {"groups": 5}, "groups must divide the channels of lr_feat"),
        ("sapa_d", {"groups": 5}, "groups must divide the channels of lr_feat"),
        ("lda_aqu", {"n_groups": 3}, "groups must divide the channels of lr_feat"),
        ("lda_aqu", {"nh": 3}, "nh must divide the 16 channels of queries and lr_channels = 64, got 3"),
        ("lda_aqu", {"k_u": 2}, "k_u must be odd"),
        ("fade_lite", {"up_kernel_size": 4}, "up_kernel_size must be odd"),
        ("resfu", {"kernel_size": 2}, "kernel_size must be odd"),
        ("resfu", {"groups": 3}, "groups must divide the channels of queries and scores"),
        ("resfu", {"gn_dim": 64}, "groups must divide the channels of queries and scores"),
        ("resfu", {"eps": 0.0}, "eps must be positive"),
    ],
)
def test_wrong_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_fusion(name, HR_CHANNELS, LR_CHANNELS, **options)


OPTIONS = [
    (name, option.name, option.annotation)
    for name in METHODS
    for option in inspect.signature(type(create_fusion(name, HR_CHANNELS, LR_CHANNELS))).parameters.values()
    if option.annotation in (int, bool)
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option[0]} {option[1]}")
def test_types_of_options(option: tuple[str, str, type]) -> None:
    method, name, kind = option
    build = type(create_fusion(method, HR_CHANNELS, LR_CHANNELS))
    valid = {"hr_channels": HR_CHANNELS, "lr_channels": LR_CHANNELS}
    wrong = [2.0, "2", None, [2], torch.tensor(2)]
    expected = "a whole number" if kind is int else "True or False"
    for value in [*wrong, True if kind is int else 1]:
        message = (
            f"^{name} must be {expected}, got .* of type {type(value).__name__}; pass an? {kind.__name__}$"
        )
        with pytest.raises(TypeError, match=message):
            build(**{**valid, name: value})
    if kind is int:
        for value, message in ((0, "must be at least 1, got 0"), (2**62, f"must be at most .*, got {2**62}")):
            with pytest.raises(ValueError, match=f"^{name} {message}"):
                build(**{**valid, name: value})


def test_options_of_numpy_are_python_numbers() -> None:
    fusion = create_fusion("freqfusion", np.int64(8), np.int32(8), lowpass_kernel=np.int64(3))
    assert type(fusion.hr_channels) is type(fusion.lowpass_kernel) is int


@pytest.mark.parametrize("name", [None, 3, ["carafe"]], ids=repr)
def test_names_that_are_no_text(name: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown fusion .*; choose one of: nearest"):
        create_fusion(name, 8, 8)


def test_option_of_another_method() -> None:
    with pytest.raises(TypeError, match="groups"):
        create_fusion("bilinear", 8, 8, groups=2)


def test_descriptions() -> None:
    lines = {line.name: line for line in describe_fusions()}
    assert list(lines) == METHODS
    assert {name for name, line in lines.items() if line.guided} == {
        "indexnet",
        "a2u",
        "fade",
        "sapa",
        "sapa-g",
        "sapa_d",
        "fade_lite",
        "resfu",
        "freqfusion",
    }
    assert lines["freqfusion"].parameters == 104_690
    for name, line in lines.items():
        hr, lr = random_maps((8, 10), (4, 5))
        fusion = build(name).eval()
        changed = fusion(hr.flip(0), lr).lr_feat
        assert torch.equal(changed, fusion(hr, lr).lr_feat) != line.guided, name


@pytest.mark.parametrize("name", METHODS)
def test_what_is_built_next_has_the_same_weights_with_every_method(name: str) -> None:
    torch.manual_seed(3)
    create_fusion("nearest", 8, 8)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second = (create_fusion(name, HR_CHANNELS, LR_CHANNELS) for _ in range(2))
    torch.manual_seed(3)
    again = create_fusion(name, HR_CHANNELS, LR_CHANNELS)
    assert torch.equal(torch.rand(4), expected)
    weights = [
        torch.cat([x.flatten() for x in (*fusion.parameters(), torch.zeros(1))])
        for fusion in (first, second, again)
    ]
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[0], weights[1]) == (name in ("nearest", "bilinear"))


def test_a_taken_name() -> None:
    with pytest.raises(ValueError, match="the fusion 'carafe' exists already"):
        register_fusion("carafe", Fusion)


def test_a_registered_method_takes_the_type_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_METHODS", dict(catalog._METHODS))
    register_fusion("mine", DySample)
    register_fusion("a function", lambda hr_channels, lr_channels: DySample(hr_channels, lr_channels))
    assert catalog.class_name("mine") == "mine"
    assert len({catalog.class_name(name) for name in list_fusions()}) == len(METHODS) + 2


@pytest.mark.parametrize("name", METHODS)
def test_under_vmap(name: str) -> None:
    """Of a batch of inputs as of one after the other."""
    fusion = create_fusion(name, 16, 16).eval()
    hr, lr = torch.randn(2, 1, 16, 8, 8), torch.randn(2, 1, 16, 4, 4)
    mapped = torch.func.vmap(lambda hr, lr: fusion(hr, lr).lr_feat)(hr, lr)
    for index in range(2):
        torch.testing.assert_close(mapped[index], fusion(hr[index], lr[index]).lr_feat)
