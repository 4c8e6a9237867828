"""Recording what goes in and out at fusions."""

import pytest
import torch
from torch import nn

from freqfusion import create_fusion, create_model, upgrade_
from freqfusion.analysis.record import fusion_sites, record_features


def pyramid() -> nn.Module:
    ops = pytest.importorskip("torchvision.ops")
    return ops.FeaturePyramidNetwork([8, 16, 32], 8)


def maps() -> dict[str, torch.Tensor]:
    return {str(i): torch.randn(2, 8 * 2**i, -(-30 // 2**i), -(-42 // 2**i)) for i in range(3)}


def test_models_built_with_fusions() -> None:
    model = create_model("fpn_small", num_classes=2, fusion="freqfusion").eval()
    image = torch.rand(1, 3, 60, 84)
    before = model(image)
    with record_features(model) as recorded:
        inside = model(image)
    after = model(image)
    assert torch.equal(before, inside)
    assert torch.equal(before, after)
    assert sorted(recorded) == sorted(fusion_sites(model))
    for path, (inputs, outputs) in recorded.items():
        fused = model.get_submodule(path)(*inputs)
        assert torch.equal(outputs[0], fused.hr_feat)
        assert torch.equal(outputs[1], fused.lr_feat)
        assert not outputs[0].requires_grad


def test_upgraded_hosts() -> None:
    model = upgrade_(pyramid(), init="paper").eval()
    with record_features(model) as recorded:
        model(maps())
    assert set(recorded) == {"fusions.0", "fusions.1"}
    (fine, coarse), (fine_out, coarse_out) = recorded["fusions.0"]
    assert [tuple(x.shape) for x in (fine, coarse, fine_out, coarse_out)] == [
        (2, 8, 30, 42),
        (2, 8, 15, 21),
        (2, 8, 30, 42),
        (2, 8, 30, 42),
    ]


def test_hosts_that_were_not_upgraded() -> None:
    model = pyramid().eval()
    kind, x = type(model), maps()
    expected = model(x)
    with record_features(model) as recorded:
        inside = model(x)
    assert type(model) is kind
    assert not hasattr(model, "fusions")
    assert all(torch.equal(inside[name], expected[name]) for name in expected)
    (fine, coarse), (fine_out, coarse_out) = recorded["fusions.0"]
    assert torch.equal(fine, fine_out)
    assert torch.equal(coarse_out, nn.functional.interpolate(coarse, fine.shape[-2:], mode="nearest"))


def test_the_model_is_as_it_was_after_an_error() -> None:
    model = pyramid()
    with pytest.raises(RuntimeError, match="stop"), record_features(model):
        raise RuntimeError("stop")
    assert type(model).__name__ == "FeaturePyramidNetwork"
    assert not any(module._forward_hooks for module in model.modules())


def test_any_module_by_path() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    x = torch.randn(1, 3, 5, 6)
    with record_features(model, sites=["1"]) as recorded:
        out = model(x)
    assert torch.equal(recorded["1"].outputs[0], out)
    assert torch.equal(recorded["1"].inputs[0], model[0](x))


def test_arguments_by_name_come_in_order() -> None:
    fusion = create_fusion("carafe", 4, 8)
    hr, lr = torch.randn(1, 4, 6, 6), torch.randn(1, 8, 3, 3)
    with record_features(fusion) as recorded:
        fusion(lr_feat=lr, hr_feat=hr)
    assert torch.equal(recorded[""].inputs[0], hr)
    assert torch.equal(recorded[""].inputs[1], lr)


def test_wrong_paths() -> None:
    model = create_model("fpn_small", num_classes=2)
    with (
        pytest.raises(ValueError, match=r"no module 'head'; its fusion sites are decode_head\."),
        record_features(model, ["head"]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="this Conv2d has no fusion site; name the modules"),
        record_features(nn.Conv2d(1, 1, 1)),
    ):
        pass
