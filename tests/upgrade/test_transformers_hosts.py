"""What is particular to the hosts of transformers, beyond the contract."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from torch import Tensor, nn
from transformers import ResNetConfig, SegformerConfig, SwinConfig
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

from freqfusion import find_sites, list_fusions, upgrade_
from host_cases import HostCase
from host_cases import transformers as cases

CASES = {case.name: case for case in cases.CASES}
BACKBONES: dict[str, Any] = {
    "convnext": cases.convnext,
    "dinov2": cases.dinov2,  # all levels of one stride
    "resnet": lambda: ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=cases.STAGES,
    ),
    "swin": lambda: SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], out_features=cases.STAGES
    ),
}


def fusion_inputs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Filled, while the model runs, with what each fusion is given: the fine and the coarse map."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for site in find_sites(model):
        slot = model.get_submodule(site.path)
        slot.register_forward_pre_hook(lambda _, args, path=site.path: seen.update({path: args}))
    return seen


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_upernet_takes_every_backbone_and_method(backbone: str) -> None:
    torch.manual_seed(0)
    model = cases.upernet(BACKBONES[backbone]()).eval()
    image = torch.rand(1, 3, 61, 87)
    expected = model(image).logits
    for method in list_fusions() if backbone == "dinov2" else ["freqfusion"]:
        upgraded = upgrade_(cases.upernet(BACKBONES[backbone]()).eval(), method)
        upgraded.load_state_dict(model.state_dict())
        torch.testing.assert_close(upgraded(image).logits, expected, rtol=1e-5, atol=1e-5)
        for name, gate in upgraded.named_parameters():
            if name.endswith("gate.weight"):
                gate.fill_(1.0)
        logits = upgraded(image).logits
        assert torch.isfinite(logits).all()
        if method == "freqfusion":
            assert not torch.allclose(logits, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("UperNetForSemanticSegmentation", "bilinear", {}),
        ("BeitForSemanticSegmentation", "bilinear", {}),
        ("DPTForDepthEstimation", "bilinear", {"align_corners": True}),
        ("DPTForSemanticSegmentation", "bilinear", {"align_corners": True}),
        ("ZoeDepthForDepthEstimation", "bilinear", {"align_corners": True}),
        ("DepthAnythingForDepthEstimation", "bilinear", {"align_corners": True}),
        ("PromptDepthAnythingForDepthEstimation", "bilinear", {"align_corners": True}),
        ("RTDetrForObjectDetection", "nearest", {}),
        ("DFineForObjectDetection", "nearest", {}),
    ],
)
@torch.no_grad()
def test_without_gates_the_hosts_own_interpolation_gives_the_hosts_outputs(
    name: str, method: str, options: dict[str, Any]
) -> None:
    case: HostCase = CASES[name]
    model, image = case.model(), case.image(case.odd_size or case.size)
    expected = case.run(model, image)
    upgrade_(model, method, init="paper", **options)
    for one, other in zip(case.run(model, image), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@torch.no_grad()
def test_segformer_is_a_cascade_with_the_channels_in_the_order_of_the_host() -> None:
    model = CASES["SegformerForSemanticSegmentation"].model()
    upgrade_(model, "bilinear", init="paper")
    head: Any = model.decode_head
    sites = {site.path: (site.hr_channels, site.lr_channels) for site in find_sites(head)}
    assert sites == {"fusions.2": (16, 16), "fusions.1": (16, 32), "fusions.0": (16, 48)}

    levels = [torch.randn(2, c, n, n + 2) for c, n in zip((8, 16, 24, 32), (16, 8, 5, 3), strict=True)]
    projections = head.linear_projections if hasattr(head, "linear_projections") else head.linear_c
    c1, c2, c3, c4 = (
        F.conv2d(level, mlp.proj.weight[..., None, None], mlp.proj.bias)
        for level, mlp in zip(levels, projections, strict=True)
    )

    def enlarge(x: Tensor, *finer: Tensor) -> Tensor:
        for y in finer:
            x = F.interpolate(x, y.shape[-2:], mode="bilinear")
        return x

    joined = torch.cat((enlarge(c4, c3, c2, c1), enlarge(c3, c2, c1), enlarge(c2, c1), c1), dim=1)
    expected = head.classifier(head.activation(head.batch_norm(head.linear_fuse(joined))))
    torch.testing.assert_close(head(levels), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_segformer_takes_a_last_level_of_tokens() -> None:
    config = SegformerConfig(
        hidden_sizes=[8, 16],
        decoder_hidden_size=8,
        num_encoder_blocks=2,
        reshape_last_stage=False,
        num_labels=3,
    )
    head = SegformerDecodeHead(config).eval()
    levels = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 16)  # the host takes as many tokens as channels
    expected = head(levels)
    torch.testing.assert_close(upgrade_(head)(levels), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("DPTForDepthEstimation", {"0": (8, 10), "1": (16, 20)}),  # twice the coarse size
        ("DepthAnythingForDepthEstimation", {"0": (7, 10), "1": (14, 20)}),  # of the finer map
    ],
)
@torch.no_grad()
def test_dpt_is_guided_by_what_the_next_layer_adds(name: str, sizes: dict[str, tuple[int, int]]) -> None:
    case = CASES[name]
    model = upgrade_(case.model())
    stage: Any = model.neck.fusion_stage
    added = {}
    for i, layer in enumerate(stage.layers):
        layer.residual_layer1.register_forward_hook(lambda _, args, out, i=i: added.update({str(i - 1): out}))
    seen = fusion_inputs(stage)
    case.run(model, case.image((61, 87)))  # 7 x 10 patches, which give maps of 14 x 20, 7 x 10 and 4 x 5
    assert seen.keys() == {"fusions.0", "fusions.1"}
    for i, size in sizes.items():
        fine, _ = seen[f"fusions.{i}"]
        assert fine is added[i]
        assert fine.shape[-2:] == size


@pytest.mark.parametrize(
    "name", ["RTDetrForObjectDetection", "RTDetrV2ForObjectDetection", "DFineForObjectDetection"]
)
@torch.no_grad()
def test_rt_detr_fuses_its_top_down_path_alone(name: str) -> None:
    case = CASES[name]
    model = upgrade_(case.model())
    encoder: Any = model.model.encoder
    assert all(hasattr(block, "fusions") for block in encoder.fpn_blocks)
    assert not any(hasattr(block, "fusions") for block in encoder.pan_blocks)
    coarse = []
    for conv in encoder.lateral_convs:
        conv.register_forward_hook(lambda *call: coarse.append(call[-1]))
    seen = fusion_inputs(encoder)
    case.run(model, case.image())
    assert [tuple(fine.shape[-2:]) for fine, _ in seen.values()] == [(4, 6), (8, 12)]
    for (_, lr_feat), expected in zip(seen.values(), coarse, strict=True):
        torch.testing.assert_close(lr_feat, expected, rtol=0, atol=0)


@torch.no_grad()
def test_rt_detr_still_records_hidden_states() -> None:
    case = CASES["RTDetrForObjectDetection"]
    model, image = case.model(), case.image()
    expected = model(image, output_hidden_states=True)
    actual = upgrade_(case.model())(image, output_hidden_states=True)
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        assert len(actual[name]) == len(expected[name]) > 0
        for one, other in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_block_outside_its_encoder_is_no_site() -> None:
    encoder: Any = CASES["RTDetrForObjectDetection"].model().model.encoder
    assert find_sites(encoder.fpn_blocks[0]) == []
    assert [site.path for site in find_sites(encoder)] == [
        "fpn_blocks.0.fusions.up",
        "fpn_blocks.1.fusions.up",
    ]
