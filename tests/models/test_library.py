"""Models of other libraries as segmentation networks: built, filled, upgraded, run and trained."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("segmentation_models_pytorch")

import transformers

from freqfusion import FreqFusion, create_model, downgrade_, list_models, save_pretrained
from freqfusion.models import predict_logits
from freqfusion.zoo.create import wrap
from freqfusion.zoo.start import load_backbone_of_
from host_cases.transformers import sizes_of_beit
from support import build_host, load_golden, value_by_rule

SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
MIT = {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 1, 1, 2]}
CONVNEXT = {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 2, 1]}
MASK2FORMER = {
    "feature_size": 64,
    "mask_feature_size": 16,
    "hidden_dim": 64,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "num_attention_heads": 2,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "num_queries": 7,
    "train_num_points": 64,
}
UPERNET = {"hidden_size": 16, "auxiliary_channels": 8}
SMP = "smp:Unet?encoder_name=resnet18"
BEIT = (
    "transformers:BeitForSemanticSegmentation?hidden_size=32&num_attention_heads=2&num_hidden_layers=4"
    "&intermediate_size=32&out_indices=[1,2,3,4]&image_size=64&use_relative_position_bias=True"
)
ONE_SIZE = pytest.mark.skipif(bool(sizes_of_beit()), reason="BEiT of this release takes one size alone")
TINY: dict[str, dict[str, Any]] = {
    "segformer_b0": {**MIT, "decoder_hidden_size": 16},
    "upernet_swin_t": {**UPERNET, "auxiliary_in_channels": 32, "backbone_config": SWIN},
    "upernet_convnext_t": {**UPERNET, "auxiliary_in_channels": 8, "backbone_config": CONVNEXT},
    "mask2former_r50": {**MASK2FORMER, "backbone_config": RESNET},
    "mask2former_swin_t": {**MASK2FORMER, "backbone_config": SWIN},
    SMP: {},
}
K = 4


def tiny(name: str, num_classes: int = K, fusion: str = "freqfusion", **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {**copy.deepcopy(TINY.get(name, {})), **options}
    return create_model(name, num_classes, fusion, **settings).host


def seeded(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def truth(*shape: int) -> Tensor:
    mask = torch.randint(0, K, shape, generator=torch.Generator().manual_seed(2))
    mask[:, :3] = 255
    return mask


def cross_entropy(scores: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(scores, mask, ignore_index=255)


def class_logits(host: nn.Module, images: Tensor) -> Tensor:
    output: Any = host(images)
    return output if isinstance(output, Tensor) else output.logits


# building

PUBLISHED_MILLIONS = {
    "segformer_b0": 3.8,
    "segformer_b1": 13.7,
    "segformer_b2": 27.5,
    "segformer_b3": 47.3,
    "segformer_b4": 64.1,
    "segformer_b5": 84.7,
    "upernet_swin_t": 60,
    "upernet_swin_s": 81,
    "upernet_swin_b": 121,
    "upernet_convnext_t": 60,
    "mask2former_r50": 44,
    "mask2former_r101": 63,
    "mask2former_swin_t": 47,
    "mask2former_swin_s": 69,
    "mask2former_swin_b": 107,
    "mask2former_swin_l": 215,
}
"""On ADE20K, from the papers and model zoos."""


def test_the_published_networks_have_the_published_sizes() -> None:
    systems = ("segformer_*", "upernet_*", "mask2former_*")
    assert [name for system in systems for name in list_models(system)] == list(PUBLISHED_MILLIONS)
    for name, published in PUBLISHED_MILLIONS.items():
        with torch.device("meta"):
            host = build_host(name, 150)
        millions = sum(parameter.numel() for parameter in host.parameters()) / 1e6
        assert millions == pytest.approx(published, abs=0.05 if published < 50 and published % 1 else 0.6), (
            name
        )


def test_settings_of_the_published_runs() -> None:
    with torch.device("meta"):
        config: Any = build_host("mask2former_swin_l", 133).config
        upernet: Any = build_host("upernet_swin_b", 19).config
    assert (config.num_queries, config.num_labels, config.train_num_points) == (100, 133, 12544)
    assert (config.class_weight, config.mask_weight, config.dice_weight, config.no_object_weight) == (
        2,
        5,
        5,
        0.1,
    )
    assert (config.backbone_config.window_size, config.backbone_config.drop_path_rate) == (12, 0.3)
    assert (upernet.auxiliary_loss_weight, upernet.backbone_config.window_size) == (0.4, 12)


def test_settings_can_be_changed() -> None:
    host: Any = build_host("mask2former_swin_t", 5, **{**TINY["mask2former_swin_t"], "num_queries": 9})
    assert host.config.num_queries == 9
    assert host.config.backbone_config.embed_dim == 8
    assert host.config.backbone_config.drop_path_rate == 0.3  # untouched by the rest
    assert host.config.num_labels == len(host.config.id2label) == 5


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("segformer_b6", {}, ValueError, "unknown model 'segformer_b6', did you mean segformer_b"),
        ("segformer_b0", {"widths": [1]}, TypeError, "segformer_b0: a SegformerConfig has no widths"),
        ("segformer_b0", {"num_labels": 3}, TypeError, "has no num_labels"),
        ("segformer_b0", {"backbone_config": {}}, TypeError, "has no backbone_config"),
        (
            "upernet_swin_t",
            {"backbone_config": {"windows": 7}},
            TypeError,
            "backbone_config: a SwinConfig has no windows",
        ),
        ("smp:Unet?classes=3", {}, ValueError, "says another number of classes than 4; leave classes out"),
        ("smp:Nothing", {}, ValueError, "smp has no model 'Nothing'"),
    ],
)
def test_what_cannot_be_built(name: str, options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build_host(name, K, **options)


def test_a_class_is_needed() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        create_model("segformer_b0", 0)


def test_listing_needs_no_library() -> None:
    code = (
        "import sys\n"
        "from freqfusion import list_models\n"
        "assert {'segformer_b0', 'mask_rcnn_r50'} <= set(list_models())\n"
        "late = {'transformers', 'torchvision', 'segmentation_models_pytorch'} & set(sys.modules)\n"
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "fusion", "upgraded"),
    [
        ("segformer_b0", "bilinear", False),
        ("mask2former_swin_t", "bilinear", False),
        ("mask2former_swin_t", "carafe", True),
        (SMP, "nearest", False),
        (SMP, "bilinear", True),
        ("torchvision:lraspp_mobilenet_v3_large", "bilinear", False),
    ],
)
def test_the_hosts_own_way_leaves_it_as_it_is(name: str, fusion: str, upgraded: bool) -> None:
    host = tiny(name, fusion=fusion)
    upgrade = getattr(host, "freqfusion_upgrade", None)
    assert (upgrade is not None) == upgraded
    if upgraded:
        assert (upgrade.fusion, upgrade.init) == (fusion, "paper")
    assert host.training


def test_options_of_the_upgrade() -> None:
    host = tiny("segformer_b0", upgrade_options={"compressed_channels": 8}, init="identity")
    assert host.freqfusion_upgrade.init == "identity"
    assert host.freqfusion_upgrade.options == {"compressed_channels": 8}
    with pytest.raises(TypeError, match="nothing"):
        tiny("segformer_b0", upgrade_options={"nothing": 8})
    with pytest.raises(ValueError, match="found no place"):
        tiny("torchvision:lraspp_mobilenet_v3_large")


# running


@pytest.mark.parametrize("fusion", ["freqfusion", "plain"])
@pytest.mark.parametrize("name", [*TINY, pytest.param(BEIT, marks=ONE_SIZE), "smp:PAN?encoder_name=resnet18"])
@torch.no_grad()
def test_scores_at_any_size(name: str, fusion: str) -> None:
    fusion = {SMP: "nearest"}.get(name, "bilinear") if fusion == "plain" else fusion
    segmenter = wrap(tiny(name, fusion=fusion)).eval()
    assert segmenter.num_classes == K
    for size in ((1, 1), (33, 50), (64, 32)):
        scores = segmenter(seeded(2, 3, *size))
        assert scores.shape == (2, K, *size)
        assert scores.isfinite().all()
    averaged = predict_logits(segmenter, seeded(1, 3, 33, 50), scales=(1.0, 1.5), flip=True)
    torch.testing.assert_close(averaged.sum(1), torch.ones(1, 33, 50))


@pytest.mark.parametrize("name", ["segformer_b0", "upernet_swin_t", SMP, pytest.param(BEIT, marks=ONE_SIZE)])
@torch.no_grad()
def test_scores_are_the_hosts(name: str) -> None:
    """At the size of the image; where the host needs another, at that of the padded image, cropped."""
    host = tiny(name)
    segmenter = wrap(host).eval()
    images = seeded(2, 3, 64, 96)
    logits = class_logits(host, images)
    expected = F.interpolate(logits, (64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(segmenter(images), expected, rtol=0, atol=0)
    odd = seeded(2, 3, 61, 83)
    side = {SMP: 32, BEIT: 16}.get(name, 1)
    assert segmenter.multiple == side
    padded = F.pad(odd, (0, -83 % side, 0, -61 % side))
    expected = F.interpolate(
        class_logits(host, padded), padded.shape[-2:], mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(segmenter(odd), expected[..., :61, :83], rtol=0, atol=0)


@torch.no_grad()
def test_scores_of_mask2former_are_logarithms_of_its_votes() -> None:
    host = tiny("mask2former_swin_t")
    segmenter = wrap(host).eval()
    images = seeded(1, 3, 37, 61)
    output = host(F.pad(images, (0, 3, 0, 27)))
    masks = F.interpolate(output.masks_queries_logits, (64, 64), mode="bilinear", align_corners=False)
    classes = output.class_queries_logits.softmax(-1)[..., :-1]
    votes = torch.einsum("bqk,bqhw->bkhw", classes, masks.sigmoid())[..., :37, :61]
    torch.testing.assert_close(segmenter(images), votes.log())
    torch.testing.assert_close(segmenter(images).softmax(1), votes / votes.sum(1, keepdim=True))


class Dictionary(nn.Module):
    """A host with scores in a dict, at half the size of the image."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.layer = nn.Conv2d(3, 2, 2, stride=2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"aux": images, self.key: self.layer(images)}


@pytest.mark.parametrize("key", ["out", "logits"])
def test_scores_in_a_dict(key: str) -> None:
    host = Dictionary(key)
    segmenter = wrap(host, 2, multiple=2)
    images = seeded(1, 3, 5, 8)
    expected = F.interpolate(host.layer(F.pad(images, (0, 0, 0, 1))), (6, 8), mode="bilinear")[..., :5, :]
    torch.testing.assert_close(segmenter(images), expected)
    assert not any(map(segmenter.is_backbone, dict(segmenter.named_parameters())))


@pytest.mark.parametrize(
    ("host", "images", "kind", "message"),
    [
        (Dictionary("out"), torch.zeros(3, 8, 8), ValueError, r"images must have shape \(B, 3, H, W\)"),
        (Dictionary("out"), torch.zeros(1, 3, 0, 8), ValueError, r"images must have shape"),
        (Dictionary("out"), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "got torch.uint8"),
        (
            Dictionary("boxes"),
            torch.zeros(1, 3, 8, 8),
            TypeError,
            r"a dict; expected class scores \(B, 2, h, w\)",
        ),
        (nn.Conv2d(3, 5, 1), torch.zeros(1, 3, 8, 8), TypeError, r"shape \(1, 5, 8, 8\); expected"),
        (nn.Flatten(), torch.zeros(1, 3, 8, 8), TypeError, r"shape \(1, 192\); expected"),
    ],
)
def test_what_is_no_host_or_no_image(
    host: nn.Module, images: Tensor, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        wrap(host, 2)(images)


def test_a_host_of_unknown_classes() -> None:
    with pytest.raises(ValueError, match="cannot infer the number of classes of Conv2d; pass num_classes="):
        wrap(nn.Conv2d(3, 5, 1))
    assert wrap(build_host("torchvision:lraspp_mobilenet_v3_large", 7)).num_classes == 7


# training


@pytest.mark.parametrize("fusion", ["freqfusion", "bilinear"])
@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_trained(name: str, fusion: str) -> None:
    """Else distributed training would wait for its gradient."""
    segmenter = wrap(tiny(name, fusion=fusion))
    loss = segmenter.loss(seeded(2, 3, 61, 50), truth(2, 61, 50), cross_entropy)
    assert loss.shape == ()
    loss.backward()
    parameters = dict(segmenter.named_parameters())
    assert [key for key, x in parameters.items() if x.requires_grad and x.grad is None] == []
    frozen = [key for key, x in parameters.items() if not x.requires_grad]
    assert all(".swin.layernorm." in key for key in frozen)
    assert len(frozen) == (2 if "swin" in name and any(".swin." in key for key in parameters) else 0)


@pytest.mark.parametrize("name", ["segformer_b0", SMP])
def test_the_loss_is_the_criterions(name: str) -> None:
    segmenter = wrap(tiny(name)).eval()
    images, mask = seeded(2, 3, 61, 50), truth(2, 61, 50)
    expected = cross_entropy(segmenter(images), mask)
    torch.testing.assert_close(segmenter.loss(images, mask, cross_entropy), expected)


@pytest.mark.parametrize("name", ["upernet_swin_t", "upernet_convnext_t", pytest.param(BEIT, marks=ONE_SIZE)])
def test_the_auxiliary_head_counts_as_published(name: str) -> None:
    """The library's own loss for the same truth."""
    host = tiny(name).eval()
    segmenter = wrap(host)
    images, mask = seeded(2, 3, 64, 96), truth(2, 64, 96)
    loss = segmenter.loss(images, mask, cross_entropy)
    torch.testing.assert_close(loss, host(images, labels=mask).loss)
    host.config.auxiliary_loss_weight = 0.0
    main = segmenter.loss(images, mask, cross_entropy)
    torch.testing.assert_close(main, cross_entropy(segmenter(images), mask))
    assert loss.item() > main.item() + 0.3
    assert not host.auxiliary_head._forward_hooks


def test_mask2former_takes_no_criterion() -> None:
    def never(scores: Tensor, mask: Tensor) -> Tensor:
        raise AssertionError

    segmenter = wrap(tiny("mask2former_swin_t"))
    torch.manual_seed(1)
    loss = segmenter.loss(seeded(1, 3, 33, 40), truth(1, 33, 40), never)
    assert 5 < loss.item() < 100


BACKBONES = {
    "segformer_b0": "segformer",
    "upernet_swin_t": "backbone",
    "mask2former_swin_t": "model.pixel_level_module.encoder",
    SMP: "encoder",
}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_backbone_is_known(name: str) -> None:
    host = tiny(name)
    segmenter = wrap(host)
    found = {path for path, _ in segmenter.named_parameters() if segmenter.is_backbone(path)}
    backbone = host.get_submodule(BACKBONES[name])
    assert found == {f"host.{BACKBONES[name]}.{path}" for path, _ in backbone.named_parameters()}
    assert not any("fusions" in path for path in found)


def test_no_weight_decay_follows_the_published_rules() -> None:
    def found(name: str) -> list[str]:
        segmenter = wrap(tiny(name))
        paths = [path for path, _ in segmenter.named_parameters() if segmenter.no_weight_decay(path)]
        return [path for path in paths if not path.endswith("relative_position_bias_table")]

    transformer = "host.model.transformer_module."
    queries = [
        transformer + name + ".weight" for name in ("queries_embedder", "queries_features", "level_embed")
    ]
    assert found("mask2former_swin_t") == found("mask2former_r50") == queries
    assert found("segformer_b0") == found("upernet_swin_t") == found(SMP) == []
    segmenter = wrap(tiny("upernet_swin_t"))
    tables = [path for path, _ in segmenter.named_parameters() if segmenter.no_weight_decay(path)]
    assert len(tables) == 4


def test_frozen_norms_stay_as_they_are() -> None:
    segmenter = wrap(tiny("mask2former_r50"), frozen_norm=True)
    norms = {path: m for path, m in segmenter.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms
    assert all(map(segmenter.is_backbone, norms))
    before = copy.deepcopy({path: norm.state_dict() for path, norm in norms.items()})
    for mode in (True, False, True):
        segmenter.train(mode)
        assert segmenter.host.training == mode
        assert not any(norm.training for norm in norms.values())
    loss = segmenter.loss(seeded(2, 3, 33, 40), truth(2, 33, 40), cross_entropy)
    loss.backward()
    for path, norm in norms.items():
        assert all(x.grad is None for x in norm.parameters())
        assert all(torch.equal(x, before[path][key]) for key, x in norm.state_dict().items())
    assert all(m.training for m in wrap(tiny("mask2former_r50")).modules())


@pytest.mark.parametrize("name", ["mask2former_swin_t", "segformer_b0", "upernet_swin_t"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    images, mask = seeded(2, 3, 40, 50), truth(2, 40, 50)
    gradients = []
    for checkpointing in (False, True):
        segmenter = wrap(tiny(name, checkpointing=checkpointing))
        fusions = [module for module in segmenter.modules() if isinstance(module, FreqFusion)]
        assert {fusion.use_checkpoint for fusion in fusions} == {checkpointing}
        flags = [getattr(module, "gradient_checkpointing", False) for module in segmenter.modules()]
        supported = any(getattr(m, "supports_gradient_checkpointing", False) for m in segmenter.modules())
        assert any(flags) == (checkpointing and supported)  # SegFormer: not in every release
        torch.manual_seed(1)  # of drop path and random points
        segmenter.loss(images, mask, cross_entropy).backward()
        gradients.append({key: x.grad for key, x in segmenter.named_parameters() if x.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


def test_nothing_to_checkpoint() -> None:
    with pytest.raises(ValueError, match="nothing to checkpoint in this Unet"):
        tiny(SMP, fusion="nearest", checkpointing=True)


# weights of whole models


@pytest.fixture
def plain_mask2former() -> Any:
    torch.manual_seed(5)
    return build_host("mask2former_swin_t", K, **copy.deepcopy(TINY["mask2former_swin_t"])).eval()


@torch.no_grad()
def assert_same_outputs(one: Any, other: Any) -> None:
    images = seeded(1, 3, 64, 96)
    for before, after in zip(one(images)[:2], other(images)[:2], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def save_with_transformers(host: Any, folder: Path) -> str:
    host.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("save", [save_with_transformers, save_pretrained])
@pytest.mark.parametrize("fusion", ["freqfusion", "bilinear"])
def test_plain_weights_start_as_what_they_were(
    plain_mask2former: Any, tmp_path: Path, save: Callable[[Any, Path], Any], fusion: str
) -> None:
    save(plain_mask2former, tmp_path)
    host = tiny("mask2former_swin_t", fusion=fusion, weights=tmp_path)
    assert host.training
    upgrade = getattr(host, "freqfusion_upgrade", None)
    assert (upgrade and upgrade.init) == ("identity" if fusion == "freqfusion" else None)
    assert_same_outputs(plain_mask2former, host.eval())
    assert tiny("mask2former_swin_t", weights=tmp_path, init="paper").freqfusion_upgrade.init == "paper"


@pytest.mark.parametrize("save", [save_with_transformers, save_pretrained])
def test_another_number_of_classes_starts_the_classifier_anew(
    plain_mask2former: Any, tmp_path: Path, save: Callable[[Any, Path], Any]
) -> None:
    save(plain_mask2former, tmp_path)
    fresh = r"fresh weights: class_predictor\.bias, class_predictor\.weight, criterion\.empty_weight$"
    with pytest.warns(UserWarning, match=fresh):
        host = tiny("mask2former_swin_t", num_classes=6, weights=tmp_path)
    assert host.class_predictor.weight.shape == (7, 64)
    assert host.criterion.empty_weight.tolist() == pytest.approx([1] * 6 + [0.1])
    own, before = host.state_dict(), plain_mask2former.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(own[key], value)}
    assert changed == {"class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"}
    assert wrap(host).num_classes == 6


def test_the_configuration_of_a_checkpoint_counts_for_a_class_of_transformers(
    plain_mask2former: Any, tmp_path: Path
) -> None:
    plain_mask2former.save_pretrained(tmp_path)
    host: Any = create_model("transformers:Mask2Former", K, weights=tmp_path).host
    assert host.config.num_queries == 7
    assert_same_outputs(plain_mask2former, host.eval())
    with pytest.warns(UserWarning, match=r"class_predictor\.bias"):
        other: Any = create_model("transformers:Mask2Former", 2, weights=tmp_path).host
    assert other.config.num_labels == 2


def test_an_upgraded_model_comes_back_as_it_was(tmp_path: Path) -> None:
    trained = tiny("segformer_b0", upgrade_options={"compressed_channels": 8}).eval()
    save_pretrained(trained, tmp_path)
    torch.manual_seed(9)
    host = tiny("segformer_b0", weights=tmp_path)
    assert host.freqfusion_upgrade == trained.freqfusion_upgrade
    images = seeded(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(host.eval()(images).logits, trained(images).logits, rtol=0, atol=0)
    with pytest.warns(UserWarning, match=r"decode_head\.classifier\.bias, decode_head\.classifier\.weight$"):
        tiny("segformer_b0", num_classes=2, weights=tmp_path)
    for options in ({"fusion": "carafe"}, {"fusion": "bilinear"}, {"init": "identity"}):
        with pytest.raises(ValueError, match=r"holds a model upgraded with .*asked for .*downgrade_"):
            tiny("segformer_b0", weights=tmp_path, **options)
    with pytest.raises(ValueError, match="you asked for"):
        tiny("segformer_b0", weights=tmp_path, upgrade_options={"compressed_channels": 16})
    save_pretrained(downgrade_(trained), tmp_path)
    assert tiny("segformer_b0", weights=tmp_path).freqfusion_upgrade.init == "identity"


def test_weights_of_a_host_of_another_library(tmp_path: Path) -> None:
    trained = tiny(SMP, fusion="nearest")
    save_pretrained(trained, tmp_path)
    with pytest.warns(UserWarning, match=r"segmentation_head\.0\.bias, segmentation_head\.0\.weight$"):
        host = tiny(SMP, num_classes=3, weights=tmp_path)
    assert torch.equal(host.encoder.conv1.weight, trained.encoder.conv1.weight)
    assert host.freqfusion_upgrade.init == "identity"


def test_weights_that_do_not_fit(plain_mask2former: Any, tmp_path: Path) -> None:
    plain_mask2former.save_pretrained(tmp_path / "theirs")
    save_pretrained(plain_mask2former, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        queries = (
            r"2 of another shape: .*queries_embedder\.weight \(7, 64\) instead of \(9, 64\).*pass every setting"
        )
        with pytest.raises(ValueError, match=queries):
            tiny("mask2former_swin_t", weights=tmp_path / folder, num_queries=9)
        with pytest.raises(ValueError, match=r"does not fit|do not fit"):
            tiny("segformer_b0", weights=tmp_path / folder)
    with pytest.raises(
        ValueError, match=r"has no freqfusion\.json, .* the only kind of folder that a Unet takes"
    ):
        tiny(SMP, weights=tmp_path / "theirs")
    with pytest.raises(FileNotFoundError, match="is neither a folder of freqfusion"):
        tiny("segformer_b0", weights=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not both"):
        tiny("segformer_b0", weights=tmp_path / "ours", backbone_weights=tmp_path / "x.pth")


# weights of backbones

GOLDEN_HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "upernet_swin_t",
        {
            **UPERNET,
            "auxiliary_in_channels": 16,
            "backbone_config": {
                "embed_dim": 4,
                "depths": [2, 2, 2, 2],
                "num_heads": [1, 1, 1, 2],
                "window_size": 4,
            },
        },
    ),
    "segformer": ("segformer_b0", {**MIT, "decoder_hidden_size": 16}),
    "convnext": ("upernet_convnext_t", TINY["upernet_convnext_t"]),
}


def golden_file(kind: str) -> dict[str, Tensor]:
    """A state dict as the original code has it, filled by the golden files' rule."""
    meta, _ = load_golden("backbone_files")
    state = {}
    for key, shape in meta[kind]["keys"].items():
        if key.endswith(("relative_position_index", "attn_mask")):
            state[key] = torch.zeros(shape)  # they follow from the window's size
        else:
            value = value_by_rule(key, shape)
            assert value is not None
            state[key] = value
    return state


def last_map(host: Any, kind: str, images: Tensor) -> Tensor:
    """Of the last stage; before its norm, which the original's classifier does not have, but for SegFormer."""
    if kind == "segformer":
        return host.segformer(images).last_hidden_state
    norm = host.backbone.hidden_states_norms["stage4"]
    seen: list[Tensor] = []
    watch = norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    shape = host.backbone(images).feature_maps[-1].shape
    watch.remove()
    before = seen[0]
    return before if before.shape == shape else before.transpose(1, 2).reshape(shape)


@pytest.mark.parametrize("kind", GOLDEN_HOSTS)
@pytest.mark.parametrize("wrapped", [False, True])
@torch.no_grad()
def test_backbones_equal_the_original_code(kind: str, wrapped: bool, tmp_path: Path) -> None:
    name, options = GOLDEN_HOSTS[kind]
    meta, arrays = load_golden("backbone_files")
    state = golden_file(kind)
    torch.save({"model": state, "epoch": 3} if wrapped else state, tmp_path / "weights.pth")
    host: Any = build_host(name, K, **copy.deepcopy(options)).double().eval()
    load_backbone_of_(host, tmp_path / "weights.pth")
    noise = np.random.RandomState(3).standard_normal((1, 3, *meta[kind]["size"])).astype(np.float32)
    found = last_map(host, kind, torch.from_numpy(noise).double())
    # transformers takes the softmax in float32, and SegFormer's norms with another epsilon than the original
    tolerance = 1e-3 if kind == "segformer" else 1e-4
    torch.testing.assert_close(found, arrays[f"{kind}/last"], rtol=tolerance, atol=tolerance)


def test_torchvisions_resnet(tmp_path: Path) -> None:
    resnet = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(3)
    original = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10).eval()
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    torch.save(original.state_dict(), tmp_path / "resnet.pth")
    backbone = {"depths": [1, 1, 1, 1]}
    host = tiny("mask2former_r50", backbone_config=backbone, backbone_weights=tmp_path / "resnet.pth").eval()
    images = seeded(1, 3, 61, 50)
    with torch.no_grad():
        found = host.model.pixel_level_module.encoder(images).feature_maps
        x = original.maxpool(original.relu(original.bn1(original.conv1(images))))
        for layer, feature in zip(
            (original.layer1, original.layer2, original.layer3, original.layer4), found, strict=True
        ):
            x = layer(x)
            torch.testing.assert_close(feature, x)


TRANSFORMERS = {
    "swin": ("upernet_swin_t", "Swin", SWIN),
    "segformer": ("segformer_b0", "Segformer", MIT),
    "convnext": ("upernet_convnext_t", "ConvNext", CONVNEXT),
    "resnet": ("mask2former_r50", "ResNet", RESNET),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_names_of_transformers(kind: str, tmp_path: Path) -> None:
    """A classifier's state dict, its saved file (which has the names of earlier versions), the backbone's own."""
    name, library, config = TRANSFORMERS[kind]
    torch.manual_seed(3)
    make = getattr(transformers, f"{library}ForImageClassification")
    classifier = make(getattr(transformers, f"{library}Config")(**copy.deepcopy(config)))
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    classifier.save_pretrained(tmp_path)
    hosts = [tiny(name, backbone_weights=tmp_path / file) for file in ("classifier.pth", "model.safetensors")]
    backbone = hosts[0].get_submodule(
        BACKBONES.get(name, "backbone" if "upernet" in name else BACKBONES["mask2former_swin_t"])
    )
    trained = {key.removeprefix(f"{kind}."): value for key, value in classifier.state_dict().items()}
    loaded = {key.removeprefix(f"{kind}."): value for key, value in backbone.state_dict().items()}
    shared = {key for key in loaded.keys() & trained.keys() if not key.startswith("layernorm")}
    assert len(shared) > 0.8 * len(trained)
    assert all(torch.equal(loaded[key], trained[key]) for key in shared)
    for key, value in hosts[0].state_dict().items():
        assert torch.equal(hosts[1].state_dict()[key], value)
    nn.init.normal_(next(p for key, p in backbone.named_parameters() if "norm" in key))
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    again = tiny(name, backbone_weights=tmp_path / "backbone.pth")
    state = hosts[0].state_dict()
    assert all(
        torch.equal(value, state[key]) for key, value in again.state_dict().items() if "layernorm." not in key
    )


def test_names_of_the_backbone_itself(tmp_path: Path) -> None:
    encoder = tiny(SMP).encoder
    nn.init.normal_(encoder.conv1.weight)
    state = encoder.state_dict() | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "resnet18.pth")
    host = tiny(SMP, backbone_weights=tmp_path / "resnet18.pth")
    assert torch.equal(host.encoder.conv1.weight, encoder.conv1.weight)
    assert torch.equal(host.encoder.layer4[1].bn2.weight, encoder.layer4[1].bn2.weight)


def test_half_precision_weights_fill_a_float32_network(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in golden_file("convnext").items()}
    torch.save(state, tmp_path / "half.pth")
    host = tiny("upernet_convnext_t", backbone_weights=tmp_path / "half.pth")
    assert {x.dtype for x in host.parameters()} == {torch.float32}


def test_another_window_is_said_plainly(tmp_path: Path) -> None:
    torch.save(golden_file("swin"), tmp_path / "swin.pth")
    name, options = GOLDEN_HOSTS["swin"]
    options = {**options, "backbone_config": {**options["backbone_config"], "window_size": 7}}
    message = r'windows of 4, the backbone of 7; .*backbone_config=\{"window_size": 4\}'
    with pytest.raises(ValueError, match=message):
        create_model(name, K, backbone_weights=tmp_path / "swin.pth", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages.0.0.gamma": None}, r"1 missing: encoder\.stages\.0\.layers\.0\.layer_scale_parameter"),
        ({"stages.0.0.beta": torch.zeros(4)}, r"1 without a place: stages\.0\.0\.beta"),
        (
            {"stages.0.0.gamma": torch.zeros(5)},
            r"1 of another shape: stages\.0\.0\.gamma \(5,\) instead of \(4,\)",
        ),
        ({"stages.4.0.gamma": torch.zeros(4)}, r"1 without a place: stages\.4\.0\.gamma"),
    ],
)
def test_each_tensor_of_a_backbone_is_checked(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = {key: value for key, value in (golden_file("convnext") | change).items() if value is not None}
    torch.save(state, tmp_path / "weights.pth")
    host = build_host("upernet_convnext_t", K, **copy.deepcopy(TINY["upernet_convnext_t"]))
    before = copy.deepcopy(host.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone_of_(host, tmp_path / "weights.pth")
    assert f"{tmp_path / 'weights.pth'} cannot be loaded into the convnext backbone" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())


def test_files_that_are_no_backbone(tmp_path: Path) -> None:
    torch.save(golden_file("convnext"), tmp_path / "convnext.pth")
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    with pytest.raises(
        ValueError, match=r"no official names are known for \d+ keys: downsample_layers\.0\.0\.weight"
    ):
        tiny("mask2former_r50", backbone_weights=tmp_path / "convnext.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        tiny("mask2former_r50", backbone_weights=tmp_path / "broken.pth")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        tiny("mask2former_r50", backbone_weights=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="cannot tell which part of this Dictionary is the backbone"):
        load_backbone_of_(Dictionary("out"), tmp_path / "convnext.pth")
