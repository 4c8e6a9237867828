"""The image as a guide of plain vision transformers' features in UPerNet and DPT of transformers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor, nn

from freqfusion import create_model, downgrade_, find_sites, from_pretrained, save_pretrained, upgrade_
from freqfusion.models import LibrarySegmenter
from freqfusion.upgrade.base import ImageStem
from host_cases import HostCase
from host_cases import transformers as cases
from support import assert_close

HOSTS: dict[str, Any] = {
    "upernet": lambda: cases.upernet(cases.dinov2()),
    "dpt_depth": cases.dpt_depth,
    "dpt_semantic": cases.dpt_semantic,
}
IMAGE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
OF_IMAGE = {
    "upernet": ["decode_head.fusions.image_4"],  # patches of 8
    "dpt_depth": ["neck.fusion_stage.fusions.image_2"],
    "dpt_semantic": ["neck.fusion_stage.fusions.image_2"],
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    host: nn.Module = HOSTS[name]()
    return host.eval()


def out(model: nn.Module, *images: Tensor, **inputs: Tensor) -> Tensor:
    found = model(*(images or (() if inputs else (IMAGE,))), **inputs)
    result: Tensor = found.logits if hasattr(found, "logits") else found.predicted_depth
    return result


def opened(model: nn.Module) -> nn.Module:
    """With the gates half open."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.fill_(0.5)
    return model


@pytest.mark.parametrize("name", HOSTS)
def test_it_starts_as_the_host_and_learns(name: str) -> None:
    plain = make(name)
    expected = out(plain).detach()
    model = upgrade_(make(name), image_guide=True)
    assert [site.path for site in find_sites(model) if "image" in site.path] == OF_IMAGE[name]
    assert_close("identity", out(model), expected, 1e-6)
    assert_close("by its name", out(model, pixel_values=IMAGE), expected, 1e-6)
    out(opened(model)).square().sum().backward()
    own = {key: p.grad for key, p in model.named_parameters() if ".stem." in key or ".image_" in key}
    assert own
    for key, grad in own.items():
        assert grad is not None, key
        assert bool(grad.abs().sum() > 0), key
    downgrade_(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert_close("plain again", out(model), expected, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", HOSTS)
def test_the_result_depends_on_the_stem(name: str) -> None:
    model = opened(upgrade_(make(name), image_guide=True))
    before = out(model)
    stem = next(module for module in model.modules() if isinstance(module, ImageStem))
    for parameter in stem.parameters():
        parameter.mul_(3.0)
    assert float((out(model) - before).abs().max()) > 1e-3
    assert stem.image is None, "given back after the pass"


@torch.no_grad()
def test_the_image_is_given_back_where_the_pass_fails() -> None:
    model = upgrade_(make("upernet"), image_guide=True)
    stem = next(module for module in model.modules() if isinstance(module, ImageStem))
    with pytest.raises(ValueError, match="channel"):
        model(torch.rand(1, 5, 64, 64))
    assert stem.image is None


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["freqfusion", "bilinear", "carafe", "dysample"])
@pytest.mark.parametrize("size", [(61, 87), (24, 16)])
def test_upernet_at_any_size(fusion: str, size: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *size)
    expected = out(make("upernet"), image)
    model = upgrade_(make("upernet"), fusion, image_guide=True)
    assert_close("identity", out(model, image), expected, 1e-6)
    found = out(opened(model), image)
    assert found.shape == expected.shape
    assert bool(found.isfinite().all())
    segmenter = LibrarySegmenter(model, 4)
    assert segmenter(torch.rand(1, 3, 13, 37)).shape == (1, 4, 13, 37)


@torch.no_grad()
def test_larger_patches_are_brought_up_in_two_steps() -> None:
    torch.manual_seed(0)
    backbone = cases.dinov2()
    backbone.patch_size, backbone.image_size = 14, 56
    model = upgrade_(cases.upernet(backbone).eval(), image_guide=True)
    sizes: dict[str, Any] = {}
    for stride in (8, 4):
        slot = model.get_submodule(f"decode_head.fusions.image_{stride}")
        slot.register_forward_hook(
            lambda _, args, output, at=stride: sizes.update({at: (args[1].shape[-2:], output[1].shape[-2:])})
        )
    out(model, torch.rand(1, 3, 70, 57))
    assert sizes == {8: ((5, 4), (9, 8)), 4: ((9, 8), (18, 15))}


@torch.no_grad()
@pytest.mark.parametrize("name", HOSTS)
def test_copies(name: str, tmp_path: Path) -> None:
    model = opened(upgrade_(make(name), image_guide=True))
    expected = out(model)
    copied = copy.deepcopy(model)
    loaded = upgrade_(make(name), image_guide=True)
    loaded.load_state_dict(model.state_dict())
    save_pretrained(model, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved").eval()
    for parameter in model.parameters():
        parameter.zero_()
    for kind, other in {"copied": copied, "loaded": loaded, "saved": again}.items():
        assert_close(kind, out(other), expected, 1e-6)
    upgrade: Any = again.freqfusion_upgrade
    assert upgrade.options == {"image_guide": True}


@torch.no_grad()
def test_by_the_one_entrance() -> None:
    host = create_model(
        "transformers:DPTForSemanticSegmentation",
        4,
        upgrade_options={"image_guide": True},
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        fusion_hidden_size=16,
        neck_hidden_sizes=[8, 8, 16, 16],
        backbone_out_indices=[0, 1, 2, 3],
        is_hybrid=False,
        use_auxiliary_head=False,
    )
    assert host.spec.to_json()["upgrade"]["options"] == {"image_guide": True}
    assert any(isinstance(module, ImageStem) for module in host.modules())
    assert host.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 4, 32, 32)


def test_a_chosen_site_alone() -> None:
    model = upgrade_(make("upernet"), image_guide=True, filter_fn=lambda site: site.path.endswith("image_4"))
    upgrade: Any = model.freqfusion_upgrade
    assert upgrade.sites == ("decode_head.fusions.image_4",)
    without = upgrade_(make("upernet"), image_guide=True, filter_fn=lambda site: site.path.endswith(".0"))
    assert not any(isinstance(module, ImageStem) for module in without.modules())
    assert not without._forward_pre_hooks


@pytest.mark.parametrize("backbone", ["convnext", "none"])
def test_hosts_without_such_a_place(backbone: str) -> None:
    convnext = backbone == "convnext"
    host = cases.upernet(cases.convnext()) if convnext else cases.upernet(cases.dinov2()).decode_head
    before = set(host.state_dict())
    with pytest.raises(ValueError, match=r"takes the image as a guide: .* leave out image_guide"):
        upgrade_(host, image_guide=True)
    assert set(host.state_dict()) == before
    assert not [site for site in find_sites(host, image_guide=True) if "image" in site.path]


@pytest.mark.slow
def test_compile() -> None:
    torch._dynamo.reset()
    model = opened(upgrade_(make("upernet"), "bilinear", image_guide=True))
    with torch.no_grad():
        assert_close("compiled", out(torch.compile(model, backend="aot_eager")), out(model), 1e-4)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize(
    "case",
    [c for c in cases.CASES if "DepthAnything" in c.name or "ZoeDepth" in c.name],
    ids=lambda c: c.name,
)
def test_other_hosts_with_such_a_stage(case: HostCase) -> None:
    torch.manual_seed(0)
    model = case.build().eval()
    image = torch.rand(1, 3, *case.size)
    expected = case.call(model, image).predicted_depth
    upgrade_(model, image_guide=True)
    assert_close("identity", case.call(model, image).predicted_depth, expected, 1e-5)
    assert float((case.call(opened(model), image).predicted_depth - expected).abs().max()) > 0
