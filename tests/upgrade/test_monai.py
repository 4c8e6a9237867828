from typing import Any

import pytest
import torch
from torch import nn

from freqfusion import find_sites, upgrade_

pytest.importorskip("monai")

from monai.data import MetaTensor
from monai.networks.nets import BasicUNet, BasicUNetPlusPlus, FlexibleUNet

from host_cases.monai import basic, dynunet, segresnet, unet


def check(model: nn.Module, sites: int, size: tuple[int, ...]) -> list[str]:
    """Hold identity on a size; returns the modes of the sites."""
    model, image = model.eval(), torch.rand(1, 1, *size)
    with torch.no_grad():
        expected = model(image)
        outputs = upgrade_(model)(image)
    torch.testing.assert_close(outputs, expected)
    used = [site for site in find_sites(model) if not site.skipped]
    assert len(used) == sites
    return [site.mode for site in used]


@pytest.mark.parametrize(
    "upsample, mode",
    [
        ("deconv", "learned"),
        ("deconvgroup", "learned"),
        ("pixelshuffle", "learned"),
        ("nontrainable", "bilinear"),
    ],
)
def test_every_way_to_enlarge_at_odd_sizes(upsample: str, mode: str) -> None:
    if upsample != "deconvgroup":  # not an option of this network
        assert set(check(basic(upsample=upsample), 4, (61, 87))) == {mode}
    assert set(check(segresnet(upsample_mode=upsample), 2, (32, 48))) == {mode}


@pytest.mark.parametrize("upsample", ["deconv", "nontrainable"])
def test_nested_connections(upsample: str) -> None:
    check(basic(BasicUNetPlusPlus, upsample=upsample), 10, (61, 87))


def test_unknown_channels_are_skipped() -> None:
    model = FlexibleUNet(1, 2, "resnet18", decoder_channels=(64, 32, 32, 16, 16), spatial_dims=2)
    modes = check(model, 4, (64, 96))
    assert set(modes) == {"nearest"}
    model = FlexibleUNet(
        1, 2, "resnet18", decoder_channels=(64, 32, 32, 16, 16), spatial_dims=2, pre_conv=None
    )
    sites = find_sites(model)
    assert sites
    assert all("cannot tell how many" in site.skipped for site in sites)


@pytest.mark.parametrize("build", [basic, dynunet, segresnet])
@pytest.mark.parametrize("init", ["identity", "paper"])
def test_learned_weights_stay_in_use(build: Any, init: Any) -> None:
    model = upgrade_(build(), init=init).train()
    model(torch.rand(2, 1, 64, 64)).square().mean().backward()
    convs = [module for module in model.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert bool(convs) == (build is not segresnet)
    for conv in convs:
        assert conv.weight.grad is not None
        assert conv.weight.grad.abs().max() > 0


def test_models_in_1d_are_refused() -> None:
    model = BasicUNet(spatial_dims=1, in_channels=1, out_channels=2, features=(16,) * 6)
    assert all("2D" in site.skipped for site in find_sites(model))
    with pytest.raises(
        ValueError,
        match="fusions are for 2D and 3D, this is a Conv1d; build the model with spatial_dims=2 or 3",
    ):
        upgrade_(model)


@pytest.mark.parametrize("upsample, mode", [("deconv", "learned"), ("nontrainable", "trilinear")])
def test_volumes(upsample: str, mode: str) -> None:
    network = {"spatial_dims": 3, "upsample": upsample, "features": (8,) * 6}
    assert set(check(basic(**network), 4, (17, 16, 35))) == {mode}
    network = {"spatial_dims": 3, "upsample_mode": upsample}
    assert set(check(segresnet(**network), 2, (4, 8, 12))) == {mode}


def test_methods_without_a_form_for_volumes_are_refused() -> None:
    model = segresnet(spatial_dims=3)
    with pytest.raises(ValueError, match="'sapa' has no form for volumes"):
        upgrade_(model, "sapa")
    assert not hasattr(model, "fusions")


@pytest.mark.parametrize("options", [{"num_res_units": 0}, {"num_res_units": 2}, {"up_kernel_size": 5}])
def test_every_way_up_of_unet(options: dict[str, int]) -> None:
    assert check(unet(**options), 2, (32, 48)) == ["learned", "learned"]


def test_a_level_of_unet_without_a_stride_is_skipped() -> None:
    sites = find_sites(unet(strides=(2, 1, 2)))
    assert [site.path for site in sites] == ["model.1.fusions.up", "model.1.submodule.1.fusions.up"]
    assert [site.skipped for site in sites] == ["both maps have the same size", ""]
    check(unet(strides=(2, 1, 2)), 1, (32, 48))


def test_a_level_of_the_same_size_is_skipped() -> None:
    sites = find_sites(dynunet(upsample_kernel_size=[2, 1], strides=[1, 2, 1]))
    assert sorted(site.skipped for site in sites) == ["", "both maps have the same size"]


@torch.no_grad()
def test_images_with_metadata() -> None:
    model = upgrade_(basic(), init="paper").eval()
    image = torch.rand(1, 1, 37, 50)
    torch.testing.assert_close(torch.as_tensor(model(MetaTensor(image))), model(image))
