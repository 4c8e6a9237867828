"""Encoders by name with the weights of files, every tensor accounted for."""

import json

import pytest
import torch

from freqfusion.features.extract import encoder_normalisation, extract_features
from freqfusion.zoo.encoders import load_encoder

timm = pytest.importorskip("timm")

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
OPTIONS = "?embed_dim=24&depth=2&num_heads=2"


def save_timm(path, name, **options):
    torch.manual_seed(1)
    model = timm.create_model(name, **options)
    torch.save(model.state_dict(), path)
    return model.eval()


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224", "deit_small_distilled_patch16_224", "beit_base_patch16_224"]
)
def test_a_classifier_of_timm_without_its_classifier(name, tmp_path):
    whole = save_timm(tmp_path / "w.pth", name, **SMALL)
    model = load_encoder(name + OPTIONS, tmp_path / "w.pth")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    image = torch.rand(1, 3, 224, 224)
    expected = extract_features(timm.create_model(name, num_classes=0, **SMALL).eval(), image)
    features = extract_features(model, image)
    assert not torch.allclose(features, expected)  # fresh weights give something else
    own = model.state_dict()
    for key, value in whole.state_dict().items():
        assert key not in own or torch.equal(own[key], value), key
    assert {key.partition(".")[0] for key in whole.state_dict().keys() - own.keys()} <= {
        "fc_norm",
        "head",
        "head_dist",
    }


def test_any_size_where_the_network_can():
    features = extract_features(load_encoder("vit_small_patch16_224" + OPTIONS), torch.rand(1, 3, 33, 50))
    assert features.shape == (1, 24, 3, 4)
    assert extract_features(load_encoder("resnet18"), torch.rand(1, 3, 33, 50)).shape == (1, 512, 2, 2)


def test_dinov2_as_its_authors_save_it(tmp_path):
    """A token for masked patches, registers under another name and a position of the class token."""
    name = "vit_small_patch14_reg4_dinov2"
    state = timm.create_model(name, **SMALL).state_dict()
    position = torch.randn(1, 1, 24)
    theirs = {
        key: value for key, value in state.items() if key not in ("reg_token", "pos_embed", "cls_token")
    }
    theirs |= {
        "register_tokens": state["reg_token"],
        "pos_embed": torch.cat([position, state["pos_embed"]], 1),
        "cls_token": state["cls_token"] - position,
        "mask_token": torch.zeros(1, 24),
    }
    torch.save(theirs, tmp_path / "w.pth")
    own = load_encoder(name + OPTIONS, tmp_path / "w.pth").state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(own[key], value)


def test_positions_of_another_grid_are_resampled(tmp_path):
    save_timm(tmp_path / "w.pth", "vit_small_patch16_224", **SMALL)
    model = load_encoder("vit_small_patch16_224" + OPTIONS + "&img_size=(48,80)", tmp_path / "w.pth")
    assert model.pos_embed.shape == (1, 1 + 3 * 5, 24)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_file_that_does_not_fit(change, tmp_path):
    state = save_timm(tmp_path / "w.pth", "vit_small_patch16_224", **SMALL).state_dict()
    if change == "missing":
        del state["blocks.1.attn.qkv.bias"]
    elif change == "extra":
        state["blocks.1.ls1.gamma"] = torch.ones(24)
    else:
        state["norm.weight"] = torch.ones(25)
    torch.save(state, tmp_path / "w.pth")
    place = {"missing": "1 missing: blocks.1.attn.qkv.bias", "extra": "1 without a place: blocks.1.ls1.gamma"}
    reason = place.get(change, r"norm.weight \(25,\) instead of \(24,\)")
    with pytest.raises(ValueError, match=rf"w.pth cannot be loaded; is it of another encoder\? .*{reason}"):
        load_encoder("vit_small_patch16_224" + OPTIONS, tmp_path / "w.pth")


def test_a_file_that_timm_cannot_convert(tmp_path):
    torch.save({"mask_token": torch.ones(1), "pos_embed": torch.ones(1, 3, 5)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="cannot be loaded; is it of another encoder"):
        load_encoder("vit_small_patch14_dinov2" + OPTIONS, tmp_path / "w.pth")


def test_a_folder_of_transformers_with_its_normalisation(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32
    )
    saved = transformers.ViTForImageClassification(config).eval()  # without the pooler of a ViTModel
    saved.save_pretrained(tmp_path / "vit")
    image = torch.rand(1, 3, 32, 48)
    with pytest.warns(UserWarning, match="left out were 2 tensors: classifier"):
        model = load_encoder("transformers:ViTModel", tmp_path / "vit")
    assert torch.equal(extract_features(model, image), extract_features(saved, image))
    content = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "vit/preprocessor_config.json").write_text(json.dumps(content))
    model = load_encoder("transformers:ViTForImageClassification", tmp_path / "vit")
    assert encoder_normalisation(model) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    expected = extract_features(saved, image, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    assert torch.equal(extract_features(model, image), expected)


@pytest.mark.parametrize(
    "name, weights, reason",
    [
        ("vit_nothing", None, "timm has no network 'vit_nothing'"),
        ("smp:Unet", None, "'smp:Unet' is no encoder that can be read"),
        (
            "vit_tiny_patch16_224",
            "timm:nothing",
            "timm has no weights 'timm:nothing' of vit_tiny_patch16_224",
        ),
        ("vit_tiny_patch16_224", "nothing.pth", "no weights file at nothing.pth"),
    ],
)
def test_names_and_weights_that_are_not_there(name, weights, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        load_encoder(name, weights)


def test_a_file_for_transformers(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file; .* give the folder"):
        load_encoder("transformers:Dinov2Model?hidden_size=24&num_attention_heads=2", tmp_path / "w.pth")
