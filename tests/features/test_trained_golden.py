"""FeatUp, LoftUp and UPLiFT equal their authors' code; parameters are named and ordered like theirs."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from features_golden import Case
from freqfusion.features import FeatUpJBU, FeatureUpsampler, LoftUp, UPLiFT, create_upsampler
from freqfusion.features.featup import JBUStage
from support import GOLDEN

KEYS = json.loads((GOLDEN / "keys_features_trained.json").read_text())
STACKS = (
    "jbu_stack_x16",
    "full_jbu_stack_c384",
    "loftup_dim8_nf4",
    "loftup_learnable_pe",
    "loftup_train_batch2",
    "full_loftup_c384",
    "uplift_x2_p16",
    "uplift_x4_p14",
    "full_uplift_s14_x4",
)


def _build(meta: dict[str, Any]) -> FeatureUpsampler:
    options = dict(meta["constructor"])
    if meta["method"] == "jbu_stack":
        return FeatUpJBU(options["feat_dim"])
    if meta["method"] == "loftup":
        channels = options.pop("dim")
        assert options.pop("color_feats")
        assert options.pop("num_conv_layers") == 1
        return LoftUp(channels, **options)
    plan = options["cfg"]
    encoder, decoder = (
        [block["hc"][0] for name, block in plan[part].items() if name.startswith("block_")]
        for part in ("encoder", "decoder")
    )
    return UPLiFT(
        options["in_channels"], options["patch_size"], plan["attender"], encoder, decoder, iters=meta["iters"]
    )


def _size(meta: dict[str, Any], inputs: dict[str, Tensor]) -> tuple[int, int]:
    height, width = inputs["features"].shape[-2:]
    if meta["method"] == "jbu_stack":
        return 16 * height, 16 * width
    if meta["method"] == "loftup":
        return tuple(inputs["image"].shape[-2:])
    factor = 2 ** meta["iters"]
    return tuple(meta["output_size"] or (factor * height, factor * width))


@pytest.mark.parametrize("name", STACKS)
def test_equals_the_authors_code(name: str) -> None:
    case = Case(name)
    upsampler = case.fill(_build(case.meta))
    inputs = case.inputs()
    out = upsampler.upsample(inputs["features"], inputs["image"], _size(case.meta, inputs), None)
    case.check(upsampler, inputs, out)


@pytest.mark.parametrize("name", ["jbu_one_x2", "jbu_one_nonint_r2"])
def test_one_stage_equals_the_authors_code(name: str) -> None:
    case = Case(name)
    options = case.options
    stage = case.fill(JBUStage(options["guidance_dim"], options["key_dim"], options["radius"]))
    inputs = case.inputs()
    case.check(stage, inputs, stage(inputs["features"], inputs["guidance"]))


@pytest.mark.parametrize("name", [name for name in STACKS if not name.startswith("full")])
def test_float32(name: str) -> None:
    case = Case(name)
    upsampler = case.fill(_build(case.meta)).float()
    inputs = {key: value.float() for key, value in case.inputs().items()}
    out = upsampler.upsample(inputs["features"], inputs["image"], _size(case.meta, inputs), None)
    error = float((out.detach() - case.arrays["out"]).abs().max())
    assert error <= (5e-3 if "loftup" in name else 5e-5)


def test_loftup_in_float32_rounds_like_the_authors_code() -> None:
    case, single = Case("loftup_dim8_nf4"), Case("loftup_dim8_nf4_float32")
    upsampler = case.fill(_build(case.meta)).float()
    inputs = {key: value.float() for key, value in case.inputs().items()}
    out = upsampler.upsample(inputs["features"], inputs["image"], _size(case.meta, inputs), None)
    rounded = single.arrays["out"]

    def distance(x: Tensor) -> float:
        """Relative, over all values: the largest of them alone differs from processor to processor."""
        return float((x - rounded).norm() / rounded.norm())

    assert distance(out.detach().double()) <= 3e-7
    assert distance(case.arrays["out"]) > 1e-4  # without rounding


@pytest.mark.parametrize(
    ("method", "channels", "listed"),
    [
        ("featup_jbu", 384, "jbu_stack_384"),
        ("featup_jbu", 512, "jbu_stack_512"),
        ("featup_jbu", 2048, "jbu_stack_2048"),
        ("loftup", 384, "loftup_384"),
        ("loftup", 512, "loftup_512"),
        ("loftup", 768, "loftup_768"),
        ("uplift", 384, "uplift_dinov2_s14"),
    ],
)
def test_keys_shapes_and_order_are_the_released_ones(method: str, channels: int, listed: str) -> None:
    with torch.device("meta"):
        module: nn.Module = create_upsampler(method, channels)
    expected = KEYS[listed]
    for kind, entries in (
        ("parameters", module.named_parameters()),
        ("buffers", module.named_buffers()),
    ):
        assert {name: list(value.shape) for name, value in entries} == expected[kind]
    assert [name for name, _ in module.named_parameters()] == list(expected["parameters"])
    assert sum(parameter.numel() for parameter in module.parameters()) == expected["n_params"]
