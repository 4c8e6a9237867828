"""The pixel decoders of transformers' Mask2Former and its relatives, beyond the contract."""

import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

from freqfusion import FreqFusion, downgrade_, find_sites, upgrade_
from freqfusion.analysis.record import record_features
from freqfusion.zoo.official.mask2former import DECODER, _names
from host_cases import HostCase, tensors
from host_cases import transformers_masks as cases
from support import GOLDEN, assert_close, fill_by_rule, load_golden

CASES = {case.name: case for case in cases.CASES}
PREFIX = "sem_seg_head.pixel_decoder."
POINTS_OF_FUSION = ["in_16", "in_8", "out_4"]
BEFORE_THE_ENCODER = ("freqfusion_call0", "freqfusion_call1")
TINY = {
    "backbone_channels": [8, 8, 16, 24],
    "conv_dim": 32,
    "mask_dim": 16,
    "transformer_enc_layers": 1,
    "transformer_dim_feedforward": 16,
    "transformer_nheads": 2,
    "common_stride": 4,
}


def pixel_decoder(options: dict[str, Any]) -> nn.Module:
    """A plain pixel decoder, for the official one's arguments."""
    config = Mask2FormerConfig(
        backbone_config=cases.swin(),
        feature_size=options["conv_dim"],
        mask_feature_size=options["mask_dim"],
        encoder_layers=options["transformer_enc_layers"],
        encoder_feedforward_dim=options["transformer_dim_feedforward"],
        num_attention_heads=options["transformer_nheads"],
        common_stride=options["common_stride"],
    )
    decoder = Mask2FormerPixelDecoder(config, options["backbone_channels"])
    nn.init.zeros_(decoder.level_embed)  # transformers leaves it uninitialised
    return decoder.eval()


def pixel_decoder_key(official_key: str) -> str:
    """The name in our pixel decoder of one of the official one's."""
    (own,) = _names(old_swin=False).own_keys(PREFIX + official_key)
    return own.removeprefix(DECODER)


class OfficialNames(nn.Module):
    """An upgraded pixel decoder with the names of the official one in its state dict."""

    def __init__(self, decoder: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.decoder = decoder
        self.names = names

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state = self.decoder.state_dict()
        return {name: state[pixel_decoder_key(name)] for name in self.names}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        ours = {pixel_decoder_key(name): value for name, value in state.items()}
        constant = {k: v for k, v in self.decoder.state_dict().items() if "hamming_" in k}
        return self.decoder.load_state_dict(ours | constant)  # strict


def official_names() -> dict[str, list[int]]:
    shapes = json.loads((GOLDEN / "keys_mask2former_r50.json").read_text())
    return {key.removeprefix(PREFIX): shape for key, shape in shapes.items() if key.startswith(PREFIX)}


def golden_decoder(meta: dict[str, Any]) -> nn.Module:
    decoder = upgrade_(pixel_decoder(meta["kwargs"]).double(), init="paper")
    layers = range(meta["kwargs"]["transformer_enc_layers"])
    names = [
        name
        for name in official_names()
        if not name.endswith("init_pos") and (".layers." not in name or int(name.split(".")[3]) in layers)
    ]
    fill_by_rule(OfficialNames(decoder, names))
    return decoder


def test_every_official_parameter_has_its_place() -> None:
    options = {
        "backbone_channels": [256, 512, 1024, 2048],
        "conv_dim": 256,
        "mask_dim": 256,
        "transformer_enc_layers": 6,
        "transformer_dim_feedforward": 1024,
        "transformer_nheads": 8,
        "common_stride": 4,
    }
    decoder = upgrade_(pixel_decoder(options), init="paper", verify=False)
    ours = {key: list(value.shape) for key, value in decoder.state_dict().items()}
    official = {pixel_decoder_key(key): shape for key, shape in official_names().items()}
    constant = {key: official.pop(key) for key in list(official) if key.endswith("init_pos")}
    assert len(constant) == 3
    assert official == ours

    state = decoder.state_dict() | {key: torch.zeros(shape) for key, shape in constant.items()}
    decoder.load_state_dict(state)  # strict: the constants are taken and dropped


def outputs(output: Any) -> dict[str, Tensor]:
    return {"mask_features": output.mask_features} | {
        f"multi_scale/{i}": x for i, x in enumerate(output.multi_scale_features)
    }


@pytest.mark.parametrize("name", ["m2f_a_small", "m2f_a_real_r50"])
@torch.no_grad()
def test_equals_the_official_pixel_decoder(name: str) -> None:
    meta, arrays = load_golden(name)
    decoder = golden_decoder(meta)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == meta["n_params"]
    with record_features(decoder) as recorded:
        results = outputs(decoder([arrays[f"in/res{i}"] for i in range(2, 6)]))
    for i, point in enumerate(POINTS_OF_FUSION):
        for side, result in zip(("hr", "lr"), recorded[f"fusions.{point}"].outputs, strict=True):
            results[f"freqfusion_call{i}_{side}"] = result
    expected = {
        key.partition("/")[2]: value for key, value in arrays.items() if key.startswith(("out/", "mid/"))
    }
    assert len(expected) == (10 if name == "m2f_a_small" else 4)
    for key, value in expected.items():
        # the official positions are rounded to float32
        assert_close(key, results[key], value, 1e-12 if key[:16] in BEFORE_THE_ENCODER else 1e-6)


def test_gradients_equal_those_of_the_official_pixel_decoder() -> None:
    meta, arrays = load_golden("m2f_a_small")
    decoder = golden_decoder(meta)
    features = [arrays[f"in/res{i}"].requires_grad_() for i in range(2, 6)]
    results = outputs(decoder(features))
    sum((result * arrays[f"cot/{key}"]).sum() for key, result in results.items()).backward()
    for i, feature in enumerate(features):
        assert feature.grad is not None
        assert_close(f"res{i + 2}", feature.grad, arrays[f"grad/in/res{i + 2}"], 1e-6)
    parameters = dict(decoder.named_parameters())
    norms = {key.removeprefix("gradnorm/"): x for key, x in arrays.items() if key.startswith("gradnorm/")}
    assert {pixel_decoder_key(key) for key in norms} == set(parameters)
    for key, (norm, _) in norms.items():
        gradient = parameters[pixel_decoder_key(key)].grad
        assert gradient is not None
        assert_close(key, gradient.norm(), norm, 1e-6)


def features(decoder: Any) -> list[Tensor]:
    """Maps as of an image of 107 x 139; not all are twice as large as the next."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(27, 35), (14, 18), (7, 9), (4, 5)]
    channels = decoder.feature_channels
    return [torch.randn(2, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)]


@torch.no_grad()
def test_the_three_joints_follow_the_published_wiring_at_any_size() -> None:
    decoder: Any = upgrade_(pixel_decoder(TINY), init="paper")
    maps = features(decoder)
    with record_features(decoder) as recorded:
        output = decoder(maps)
    fpn = recorded["fusions.out_4"]
    joined = torch.stack(fpn.outputs).sum(dim=0)
    torch.testing.assert_close(fpn.inputs[0], decoder.adapter_1(maps[0]))
    torch.testing.assert_close(fpn.inputs[1], output.multi_scale_features[-1])
    torch.testing.assert_close(output.mask_features, decoder.mask_projection(decoder.layer_1(joined)))
    coarse = decoder.input_projections[0](maps[3])
    for i, point in enumerate(POINTS_OF_FUSION[:2]):
        fusion = recorded[f"fusions.{point}"]
        torch.testing.assert_close(fusion.inputs[0], decoder.input_projections[i + 1](maps[2 - i]))
        torch.testing.assert_close(fusion.inputs[1], coarse)
        coarse = torch.stack(fusion.outputs).sum(dim=0)


def test_freqfusion_has_the_published_options() -> None:
    decoder: Any = upgrade_(pixel_decoder(TINY))
    for point in POINTS_OF_FUSION:
        fusion = decoder.fusions[point].fusion
        assert isinstance(fusion, FreqFusion)
        assert fusion.hr_channel_compressor.out_channels == TINY["conv_dim"] // 4
        assert fusion.hamming_lowpass.numel() == 1
        assert fusion.dysampler is not None
        assert fusion.dysampler.norm_hr is None
    decoder = upgrade_(pixel_decoder(TINY), compressed_channels=16, hamming_window=True)
    assert decoder.fusions["in_8"].fusion.hr_channel_compressor.out_channels == 16
    assert decoder.fusions["in_8"].fusion.hamming_lowpass.numel() == 25


@torch.no_grad()
def test_the_simple_variant_fuses_after_the_encoder_alone() -> None:
    decoder: Any = pixel_decoder(TINY)
    maps = features(decoder)
    before = outputs(decoder(maps))
    upgrade_(decoder, init="paper", filter_fn=lambda site: "out_" in site.path)
    fused = {site.path: decoder.get_submodule(site.path).fusion for site in find_sites(decoder)}
    assert [path for path, fusion in fused.items() if fusion is not None] == ["fusions.out_4"]
    after = outputs(decoder(maps))
    for key, value in before.items():
        assert torch.equal(after[key], value) == key.startswith("multi_scale")


@pytest.mark.parametrize(
    ("name", "method", "only"),
    [
        ("Mask2FormerForUniversalSegmentation", "bilinear", "out_"),
        ("OneFormerForUniversalSegmentation", "bilinear", ""),
        ("MaskFormerForInstanceSegmentation", "nearest", ""),
    ],
)
@torch.no_grad()
def test_without_gates_the_hosts_own_interpolation_gives_the_hosts_outputs(
    name: str, method: str, only: str
) -> None:
    case = CASES[name]
    model, image = case.model(), case.image(case.odd_size)
    expected = case.run(model, image)
    upgrade_(model, method, init="paper", filter_fn=lambda site: only in site.path)
    for one, other in zip(case.run(model, image), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@torch.no_grad()
def test_maskformer_adds_what_is_fused_to_the_lateral_map() -> None:
    model: Any = upgrade_(CASES["MaskFormerForInstanceSegmentation"].model(), init="paper")
    layer = model.model.pixel_level_module.decoder.fpn.layers[1]
    down, left = torch.randn(1, 32, 5, 6), torch.randn(1, 8, 9, 11)
    _, hr_feat, lr_feat = layer.fusions["up"].fusion(layer.proj(left), down)
    torch.testing.assert_close(layer(down, left), layer.block(hr_feat + lr_feat))


@pytest.mark.parametrize(("common_stride", "names"), [(8, []), (4, ["out_4"]), (2, ["out_8", "out_4"])])
@torch.no_grad()
def test_any_number_of_pyramid_levels(common_stride: int, names: list[str]) -> None:
    decoder: Any = pixel_decoder(TINY | {"common_stride": common_stride})
    maps = features(decoder)
    expected = decoder(maps, output_attentions=True)
    upgrade_(decoder)
    assert list(decoder.fusions) == ["in_16", "in_8", *names]
    output = decoder(maps, output_attentions=True)
    assert output.keys() == expected.keys()
    assert len(output.attentions) == TINY["transformer_enc_layers"]
    for key, value in outputs(expected).items():
        torch.testing.assert_close(outputs(output)[key], value, rtol=0, atol=0)
    if names:
        upgrade_(downgrade_(decoder), "bilinear", init="paper", filter_fn=lambda site: "out_" in site.path)
        torch.testing.assert_close(decoder(maps).mask_features, expected.mask_features, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_half_precision_starts_as_the_original(case: HostCase, dtype: torch.dtype) -> None:
    model, image = case.model().to(dtype), case.image().to(dtype)
    expected = case.run(model, image)
    upgrade_(model)
    for one, other in zip(case.run(model, image), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Twice(nn.Module):
    """A decoder under two names: export then shows modules under classes of its own while it traces."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = self.same = decoder

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return list(tensors(self.decoder(maps)))


@torch.no_grad()
def test_export() -> None:
    model = Twice(upgrade_(pixel_decoder(TINY), "bilinear"))
    maps = features(model.decoder)
    exported, expected = torch.export.export(model, (maps,)).module()(maps), model(maps)
    assert len(expected) == 4
    for one, other in zip(exported, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
