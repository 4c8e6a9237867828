"""Features of encoders as maps: the right token at the right place, from every kind of encoder."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from freqfusion.features.extract import encoder_normalisation, encoder_patch, extract_features

timm = pytest.importorskip("timm")

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2}
TIMM = {
    "vit_small_patch16_224": 16,
    "vit_small_patch14_dinov2": 14,
    "vit_small_patch14_reg4_dinov2": 14,
    "vit_base_patch16_siglip_224": 16,
    "deit_small_distilled_patch16_224": 16,
    "eva02_small_patch14_224": 14,
    "vit_small_patch16_dinov3": 16,
}
HUGGING = {
    "ViTModel": 16,
    "Dinov2Model": 14,
    "Dinov2WithRegistersModel": 14,
    "DINOv3ViTModel": 16,
    "BeitModel": 16,
    "DeiTModel": 16,
    "SiglipVisionModel": 16,
    "ViTForImageClassification": 16,
    "Dinov2Backbone": 14,
}


def make_timm(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **{"dynamic_img_size": True, **SMALL, **options}).eval()


def make_hugging(name: str, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    settings = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    if "patch_size" not in options:
        options["patch_size"] = HUGGING.get(name, 16)
    return cls(cls.config_class(image_size=4 * options["patch_size"], **settings, **options)).eval()


@torch.no_grad()
def let_tokens_pass(model: nn.Module) -> None:
    """Make every layer the identity and every position the same, so that a token is its patch's embedding."""
    blocks = max(
        (part for part in model.modules() if isinstance(part, (nn.ModuleList, nn.Sequential))), key=len
    )
    assert len(blocks) == 3
    for parameter in blocks.parameters():
        parameter.zero_()
    for name, parameter in model.named_parameters():
        if "pos" in name:
            parameter.zero_()


def embedded(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The embeddings of the patches after the final norm, made by hand."""
    mean, std = (torch.tensor(values)[:, None, None] for values in encoder_normalisation(model))
    conv = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    x = F.conv2d((image - mean) / std, conv.weight, conv.bias, stride=conv.stride)
    host = getattr(model, "vit", getattr(model, "vision_model", model))
    norm = next(
        getattr(host, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(host, name)
    )
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", TIMM)
def test_each_token_of_timm_is_at_its_patch(name):
    model = make_timm(name)
    let_tokens_pass(model)
    image = torch.rand(2, 3, 3 * TIMM[name], 5 * TIMM[name])
    features = extract_features(model, image)
    assert features.shape == (2, 24, 3, 5)
    assert encoder_patch(model) == (image.shape[2] // 3,) * 2
    assert_close(features, embedded(model, image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HUGGING)
def test_each_token_of_transformers_is_at_its_patch(name):
    model = make_hugging(name)
    let_tokens_pass(model)
    patch = HUGGING[name]
    image = torch.rand(2, 3, 3 * patch, 5 * patch)
    features = extract_features(model, image)
    assert features.shape == (2, 24, 3, 5)
    assert encoder_patch(model) == (image.shape[2] // 3,) * 2
    assert_close(features, embedded(model, image), rtol=1e-4, atol=1e-5)


def test_beit_of_timm_is_of_one_size():
    model = timm.create_model("beit_base_patch16_224", num_classes=0, img_size=(48, 80), **SMALL).eval()
    let_tokens_pass(model)
    image = torch.rand(1, 3, 48, 80)
    assert_close(extract_features(model, image), embedded(model, image), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"made for images of \(48, 80\), got \(64, 80\)"):
        extract_features(model, torch.rand(1, 3, 49, 80))


@pytest.mark.parametrize(
    "name", [name for name in HUGGING if "Classification" not in name and "Backbone" not in name]
)
def test_last_layer_is_the_last_hidden_state(name):
    model, patch = make_hugging(name), HUGGING[name]
    image = torch.rand(2, 3, 4 * patch, 4 * patch)
    mean, std = (torch.tensor(values)[:, None, None] for values in encoder_normalisation(model))
    with torch.no_grad():
        tokens = model((image - mean) / std).last_hidden_state[:, -16:]
    assert_close(extract_features(model, image), tokens.mT.unflatten(2, (4, 4)), rtol=1e-5, atol=1e-6)


def test_clip_is_normed_too():
    """Its last hidden state is not, and the norm has parameters that would be missed."""
    model = make_hugging("CLIPVisionModel")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        getattr(model, "vision_model", model).post_layernorm.bias.fill_(5)
    assert extract_features(model, image).mean() == pytest.approx(5, abs=1e-3)


def test_vision_part_of_a_model_of_images_and_texts():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.SiglipConfig(
        vision_config={**small, "image_size": 32, "patch_size": 16},
        text_config={**small, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    model = transformers.SiglipModel(config).eval()
    image = torch.rand(1, 3, 32, 48)
    assert torch.equal(extract_features(model, image), extract_features(model.vision_model, image))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "Dinov2Model"])
def test_an_image_of_any_size_is_brought_to_whole_patches(name):
    model = make_timm(name) if name in TIMM else make_hugging(name)
    image = torch.rand(1, 3, 29, 57)
    features = extract_features(model, image)
    assert features.shape == (1, 24, 3, 5)
    resized = F.interpolate(image, (42, 70), mode="bilinear")
    assert_close(features, extract_features(model, resized), rtol=1e-4, atol=1e-5)
    assert extract_features(model, torch.rand(1, 3, 1, 3)).shape == (1, 24, 1, 1)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "DINOv3ViTModel"])
def test_layers_are_normed_and_joined_in_their_order(name):
    model = make_timm(name) if name in TIMM else make_hugging(name)
    image = torch.rand(1, 3, 32, 48)
    first, last = (extract_features(model, image, [index]) for index in (0, 2))
    assert not torch.allclose(first, last)
    assert torch.equal(last, extract_features(model, image))
    assert torch.equal(extract_features(model, image, [-1, 0]), torch.cat([last, first], 1))
    assert_close(first.mean(1), torch.zeros_like(first[:, 0]), rtol=0, atol=1e-5)  # a layer norm's


def test_networks_of_stages():
    model = timm.create_model("resnet18", num_classes=0).eval()
    image = torch.rand(2, 3, 50, 70)
    features = extract_features(model, image)
    assert features.shape == (2, 512, 2, 3)
    mean, std = (torch.tensor(values)[:, None, None] for values in encoder_normalisation(model))
    with torch.no_grad():
        expected = model.forward_features(F.interpolate((image - mean) / std, (64, 96), mode="bilinear"))
    assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert extract_features(model, image, [1]).shape == (2, 64, 16, 24)
    assert encoder_patch(model) == (32, 32)
    with pytest.raises(ValueError, match=r"different sizes, \[\(2, 3\), \(4, 6\)\]"):
        extract_features(model, image, [3, 4])


def test_maps_of_swin_have_channels_first():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=0,
        img_size=64,
        embed_dim=12,
        window_size=2,
        depths=(1, 1, 1, 1),
    ).eval()
    assert extract_features(model, torch.rand(1, 3, 60, 33)).shape == (1, 96, 2, 2)


def test_normalisation():
    model = make_timm("vit_small_patch16_224")
    assert encoder_normalisation(model) == ((0.5,) * 3, (0.5,) * 3)
    image = torch.rand(1, 3, 32, 32)
    own = extract_features(model, image)
    assert torch.equal(own, extract_features(model, image, mean=(0.5,) * 3, std=(0.5,) * 3))
    other = extract_features(model, image, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    del model.pretrained_cfg
    assert torch.equal(other, extract_features(model, image))
    assert not torch.allclose(own, other)


def test_dtype_of_the_model_and_no_gradients():
    model = make_timm("vit_small_patch16_224").bfloat16()
    image = torch.rand(1, 3, 32, 48, requires_grad=True)
    features = extract_features(model, image)
    assert features.shape == (1, 24, 2, 3)
    assert features.dtype == torch.bfloat16
    assert not features.requires_grad


def test_hooks_are_removed():
    model = make_hugging("Dinov2Model")
    extract_features(model, torch.rand(1, 3, 28, 28))
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize("layers", [[3], [-4], []])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match="which has 3: 0 to 2"):
        extract_features(make_timm("vit_small_patch16_224"), torch.rand(1, 3, 32, 32), layers)


def test_wrong_images_and_models():
    model = make_timm("vit_small_patch16_224")
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="3 channels"):
        extract_features(model, image[:, :1])
    with pytest.raises(TypeError, match="floating point"):
        extract_features(model, image.byte())
    with pytest.raises(ValueError, match="4 dimensions"):
        extract_features(model, image[0])
    with pytest.raises(ValueError, match=r"training mode, .* \.eval\(\)"):
        extract_features(model.train(), image)
    with pytest.raises(ValueError, match="cannot read the features of this Conv2d"):
        extract_features(nn.Conv2d(3, 8, 3).eval(), image)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("ViTMAEModel", "it has mask_ratio"),  # drops most of them and shuffles the others
        ("PixtralVisionModel", r"got \(1, 12, 24\)"),  # joins the images of a batch
        ("VitDetModel", r"got \(2, 24, 2, 3\)"),
        ("Siglip2VisionModel", "expected a plain vision transformer"),
        ("Aimv2VisionModel", r"fails on an image of \(32, 48\)"),
    ],
)
def test_transformers_that_cannot_be_read(name, reason):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"this release has no {name}")
    model = make_hugging(name)
    with pytest.raises(ValueError, match=f"cannot read the features of this {name}: .*{reason}"):
        extract_features(model, torch.rand(2, 3, 32, 48))
