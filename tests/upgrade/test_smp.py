from typing import Any

import pytest
import torch
from torch import nn

from freqfusion import downgrade_, find_sites, upgrade_

smp = pytest.importorskip("segmentation_models_pytorch")

from host_cases.smp import build  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {
    "Unet": {},
    "UnetPlusPlus": {},
    "MAnet": {"decoder_pab_channels": 8},
    "Linknet": {},
    "FPN": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "PAN": {},
    "UPerNet": {"decoder_channels": 32},
    "Segformer": {"decoder_segmentation_channels": 32},
    "DeepLabV3Plus": {"decoder_channels": 32},
}


def make(name: str, encoder: str = "tiny-wide", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(getattr(smp, name), encoder, **{**MODELS[name], **options})().eval()


def floor_sizes(model: nn.Module) -> nn.Module:
    """Odd sides lose their last pixel on the way down, as in encoders that cut patches or pool."""
    for stage in model.encoder.stages:
        kernel = stage.stride[0]
        stage.weight = nn.Parameter(stage.weight[..., :kernel, :kernel].detach().clone())
        stage.kernel_size, stage.padding = stage.stride, (0, 0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_without_channels_at_stride_2(name: str) -> None:
    model, image = make(name, "tiny-no-stride-2"), torch.rand(1, 3, 160, 128)
    try:
        expected = model(image)
    except RuntimeError as error:
        pytest.skip(f"this release of the host cannot: {error}")
    torch.testing.assert_close(upgrade_(model)(image), expected)
    image = torch.rand(1, 3, 151, 131)
    assert upgrade_(downgrade_(model), init="paper")(image).shape == (1, 3, 151, 131)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_that_rounds_down(name: str) -> None:
    model, image = floor_sizes(make(name)), torch.rand(1, 3, 160, 128)
    expected = model(image)
    torch.testing.assert_close(upgrade_(model)(image), expected)
    image = torch.rand(1, 3, 157, 131)
    assert upgrade_(downgrade_(model), init="paper")(image).shape == (1, 3, 157, 131)


def test_the_fusions_are_parameters_of_the_decoder() -> None:
    for name in MODELS:
        model = upgrade_(make(name))
        assert all(site.path.startswith("decoder.fusions.") for site in find_sites(model))
        assert any("fusions" in key for key, _ in model.decoder.named_parameters())
        assert {key.partition(".")[0] for key in model.state_dict() if "fusions" in key} == {"decoder"}


def test_a_decoder_alone_is_left_alone() -> None:
    model = make("Unet")
    assert find_sites(model.decoder) == []
    with pytest.raises(ValueError, match="found no place"):
        upgrade_(model.decoder)
    assert len(find_sites(nn.Sequential(model))) == 4


def test_levels_that_dilation_makes_equal_are_skipped() -> None:
    skipped = {site.path: site.skipped for site in find_sites(make("PAN"))}
    assert "stride 16" in skipped["decoder.fusions.gau3"]
    assert not skipped["decoder.fusions.gau2"]
    assert not any(site.skipped for site in find_sites(make("PAN", encoder_output_stride=32)))


@torch.no_grad()
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_fpn_of_any_depth(depth: int) -> None:
    model = make("FPN", encoder_depth=depth, upsampling=2 ** (depth - 3))
    image = torch.rand(1, 3, 64, 96)
    expected = model(image)
    assert expected.shape[-2:] == image.shape[-2:]
    torch.testing.assert_close(upgrade_(model)(image), expected)
    assert model(image[..., :59, :85]).shape[-2:] == (59, 85)


@torch.no_grad()
def test_masks_that_are_smaller_on_purpose_stay_so() -> None:
    model = upgrade_(make("FPN", upsampling=1))
    assert model(torch.rand(1, 3, 64, 96)).shape[-2:] == (16, 24)
    assert model(torch.rand(1, 3, 61, 87)).shape[-2:] == (16, 22)


class Several(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(channels, 2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"masks": self.pointwise(x), "mean": x.mean((2, 3))}


HEADS = {
    "a convolution": lambda channels: nn.Conv2d(channels, 5, 1),
    "none": lambda channels: nn.Identity(),
    "several outputs": Several,
    "one vector": lambda channels: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "a half of x4": lambda channels: nn.Sequential(
        nn.Conv2d(channels, 2, 3, 2, 1), nn.Upsample(scale_factor=4)
    ),
    "x4 last": lambda channels: nn.Sequential(
        nn.Conv2d(channels, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=4)
    ),
    "x8": lambda channels: nn.Sequential(nn.Conv2d(channels, 2, 1), nn.Upsample(scale_factor=8)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_any_head_gives_what_it_gives_the_plain_model(name: str) -> None:
    image = torch.rand(1, 3, 128, 160)
    for what, head in HEADS.items():
        for aux in (None, {"classes": 3, "dropout": 0.0}):
            model = make(name, aux_params=aux)
            model.segmentation_head = head(model.segmentation_head[0].in_channels)
            expected = model(image)
            torch.testing.assert_close(
                upgrade_(model)(image), expected, msg=lambda text, what=what: f"{what}: {text}"
            )


@torch.no_grad()
def test_a_head_of_ones_own_fits_any_image_where_it_enlarges_to_the_images_size() -> None:
    model = upgrade_(make("FPN"))
    model.segmentation_head = HEADS["x4 last"](model.segmentation_head[0].in_channels)
    assert model(torch.rand(1, 3, 61, 87)).shape[-2:] == (61, 87)
    model.segmentation_head = nn.Identity()
    assert model(torch.rand(1, 3, 61, 87)).shape[-2:] == (16, 22)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_other_norms(name: str) -> None:
    model, image = make(name), torch.rand(1, 3, 128, 160)
    for path, module in list(model.decoder.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, last = path.rpartition(".")
            norm = nn.GroupNorm(1, module.num_features) if module.num_features > 1 else nn.Identity()
            setattr(model.decoder.get_submodule(parent), last, norm)
    expected = model(image)
    torch.testing.assert_close(upgrade_(model)(image), expected)


@torch.no_grad()
def test_a_classification_head_still_answers() -> None:
    model = upgrade_(make("FPN", aux_params={"classes": 5}))
    masks, labels = model(torch.rand(2, 3, 61, 87))
    assert (masks.shape, labels.shape) == ((2, 3, 61, 87), (2, 5))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "area", "bilinear", "bicubic"])
def test_interpolation_modes_and_attention(mode: str) -> None:
    for name in ("Unet", "UnetPlusPlus"):
        model = make(name, decoder_interpolation=mode, decoder_attention_type="scse")
        image = torch.rand(1, 3, 64, 96)
        expected = model(image)
        torch.testing.assert_close(upgrade_(model)(image), expected)
        assert find_sites(model)[0].mode == mode


def test_linknet_keeps_its_transposed_convolutions_in_use() -> None:
    for init in ("identity", "paper"):
        model = upgrade_(make("Linknet"), init=init).train()
        model(torch.rand(2, 3, 64, 64)).square().mean().backward()
        for block in model.decoder.blocks:
            gradient = block.block[1][0].weight.grad
            assert gradient is not None
            assert gradient.abs().max() > 0


def test_filtered_sites_still_take_any_size() -> None:
    for name in MODELS:
        model = make(name)
        last = find_sites(model)[-1].path
        upgrade_(model, filter_fn=lambda site, last=last: site.path == last)
        assert model(torch.rand(1, 3, 131, 157)).shape[-2:] == (131, 157)
