from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from freqfusion.fusion import CARAFE, DySample, FreqFusion, list_fusions
from support import assert_close, fill_by_rule, load_golden

pytest.importorskip("mmengine")
pytest.importorskip("mmcv")

from mmcv.cnn import build_upsample_layer
from mmengine.config import Config
from mmengine.registry import MODELS, Registry

from freqfusion.upgrade.hosts.mm import TYPES, FreqFusionFPN

pytestmark = pytest.mark.mm


def test_every_method_has_a_type() -> None:
    assert sorted(TYPES.values()) == sorted(list_fusions())
    assert {"FreqFusion", "CARAFE", "DySample", "DySample-S+"} < set(TYPES)
    child = Registry("model", parent=MODELS, scope="a_library_of_a_test")
    assert child.get("CARAFE") is MODELS.get("CARAFE") is not None


@torch.no_grad()
def test_layers_of_one_input() -> None:
    x = torch.rand(2, 16, 5, 7)
    layer = build_upsample_layer({"type": "CARAFE", "up_kernel": 3}, channels=16, scale_factor=2)
    assert isinstance(layer.fusion, CARAFE)
    assert (layer.fusion.up_kernel, layer(x).shape) == (3, (2, 16, 10, 14))
    norm, act = {"type": "BN"}, {"type": "ReLU"}
    unet = {"in_channels": 16, "out_channels": 4, "with_cp": False, "norm_cfg": norm, "act_cfg": act}
    layer = build_upsample_layer({"type": "DySample"}, **unet)  # as mmseg's UNet builds it
    assert isinstance(layer[0].fusion, DySample)
    assert layer(x).shape == (2, 4, 10, 14)
    assert (layer(x) >= 0).all()


@torch.no_grad()
def test_layers_of_two_inputs() -> None:
    layer = build_upsample_layer({"type": "FreqFusion", "hr_channels": 6, "lr_channels": 8})
    assert isinstance(layer, FreqFusion)
    _, fine, coarse = layer(hr_feat=torch.rand(1, 6, 9, 13), lr_feat=torch.rand(1, 8, 5, 7))
    assert (fine.shape, coarse.shape) == ((1, 6, 9, 13), (1, 8, 9, 13))
    both = build_upsample_layer({"type": "FADE"}, channels=8, scale_factor=2)
    assert (both.hr_channels, both.lr_channels) == (8, 8)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"type": "CARAFE"}, "carafe needs channels or in_channels"),
        ({"type": "FreqFusion", "in_channels": 8}, "freqfusion needs hr_channels and lr_channels"),
        ({"type": "CARAFE", "channels": 8, "kernel": 3}, "kernel"),
    ],
)
def test_wrong_arguments(config: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build_upsample_layer(config)
    with pytest.raises(ValueError, match="with_cp"):
        build_upsample_layer({"type": "CARAFE", "channels": 8, "with_cp": True})


@pytest.mark.parametrize("case", ["small_r50style", "small_panopticstyle"])
def test_neck_of_the_release(case: str) -> None:
    meta, arrays = load_golden(f"fpn_a_{case}")
    options = meta["kwargs"]
    upsample = {
        "type": "FreqFusion",
        "compressed_channels": options["out_channels"] // 4,
        "feature_resample_norm": options["feature_resample_norm"],
    }
    config = {key: options[key] for key in ("in_channels", "out_channels", "num_outs")}
    neck = MODELS.build({"type": "FreqFusionFPN", "upsample_cfg": upsample, **config}).double()
    fill_by_rule(neck, {key: key for key in neck.state_dict()})
    maps = [arrays[f"in/{i}"].requires_grad_() for i in range(4)]
    outputs = neck(maps)
    for i, output in enumerate(outputs):
        assert_close(f"level {i}", output, arrays[f"out/{i}"], 1e-9)
    sum((x * arrays[f"cot/{i}"]).sum() for i, x in enumerate(outputs)).backward()
    for i, x in enumerate(maps):
        assert_close(f"gradient of map {i}", x.grad, arrays[f"grad/in/{i}"], 1e-8)
    gradients = {key.removeprefix("gradnorm/") for key in arrays if key.startswith("gradnorm/")}
    assert gradients == {key for key, _ in neck.named_parameters()}


@torch.no_grad()
def test_levels_of_the_neck() -> None:
    maps = [torch.rand(2, 4 * 2**i, 33 // 2**i, 20 // 2**i) for i in range(4)]
    config = {"in_channels": [4, 8, 16, 32], "out_channels": 8}
    inner = FreqFusionFPN(**config, num_outs=2, start_level=1, end_level=3, upsample_cfg={"type": "DySample"})
    assert [x.shape for x in inner(maps)] == [(2, 8, *x.shape[-2:]) for x in maps[1:3]]
    norm, act = {"type": "BN"}, {"type": "ReLU", "inplace": False}
    higher = FreqFusionFPN(**config, num_outs=5, start_level=1, norm_cfg=norm, act_cfg=act)
    before = {key: x.clone() for key, x in higher.state_dict().items()}
    higher.init_weights()  # the runner's call leaves our first weights
    assert all(torch.equal(before[key], x) for key, x in higher.state_dict().items())
    outputs = higher(maps)
    assert [tuple(x.shape[-2:]) for x in outputs] == [(16, 10), (8, 5), (4, 2), (2, 1), (1, 1)]
    assert all((x >= 0).all() for x in outputs)
    with pytest.raises(ValueError, match="got 3 maps, this neck was built for 4"):
        higher(maps[1:])
    for wrong in ({"num_outs": 3}, {"num_outs": 3, "end_level": 2}):
        with pytest.raises(ValueError, match="num_outs must be"):
            FreqFusionFPN(**config, **wrong)
    with pytest.raises(ValueError, match="must be one of Nearest, Bilinear"):
        FreqFusionFPN(**config, num_outs=4, upsample_cfg={"type": "carafe"})


@torch.no_grad()
def test_example() -> None:
    config = Config.fromfile(Path(__file__).parents[2] / "examples" / "mm_config.py")
    neck = config.model.neck
    assert neck.pop("_delete_") is True
    maps = [torch.rand(1, c, 16 // 2**i, 24 // 2**i) for i, c in enumerate(neck.in_channels)]
    built = MODELS.build(neck)
    assert isinstance(built, nn.Module)
    assert [x.shape[-2:] for x in built(maps)] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
