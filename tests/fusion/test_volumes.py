"""The methods for volumes: the contract, links with those for images, starts, gradients, wrong input."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.fusion import CARAFE3d, DySample3d, FreqFusion, FreqFusion3d, create_fusion, list_fusions
from freqfusion.fusion.freqfusion import OffsetGenerator
from freqfusion.ops.resize import _shuffle_last, shuffle
from freqfusion.testing import check_fusion
from support import assert_close

FAR_BELOW = -1e5
"""A logit whose tap weighs nothing."""


def volume(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list_fusions(spatial_dims=3))
def test_contract(name: str) -> None:
    check_fusion(lambda hr, lr: create_fusion(name, hr, lr, spatial_dims=3), hr_channels=8, lr_channels=16)


def put_in_the_middle(flat: nn.Module, deep: nn.Module) -> None:
    """Give ``deep`` the weights of ``flat`` in its middle slice, zeros elsewhere."""
    convolutions = dict(flat.named_modules())
    for name, layer in deep.named_modules():
        source = convolutions.get(name)
        if isinstance(layer, nn.GroupNorm):
            assert source is not None
            layer.load_state_dict(source.state_dict())
        if not isinstance(layer, nn.Conv3d) or not isinstance(source, nn.Conv2d):
            continue
        weight, bias = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
        rows, columns = places(name, layer, source), slice(None)
        if name.startswith("dysampler."):  # similarities last, of which those of the middle slice are known
            features = source.in_channels - 8
            columns = torch.tensor(
                [*range(features), *(features + n for n in (*range(9, 13), *range(13, 17)))]
            )
        elif name.startswith("content_encoder"):
            bias[:] = FAR_BELOW
        middle = torch.zeros(layer.out_channels, layer.in_channels, *source.kernel_size, dtype=torch.float64)
        inner = torch.zeros(len(rows), layer.in_channels, *source.kernel_size, dtype=torch.float64)
        inner[:, columns] = source.weight.detach()
        middle[rows] = inner
        weight[:, :, layer.kernel_size[0] // 2] = middle
        bias[rows] = source.bias.detach()
        layer.weight.data, layer.bias.data = weight, bias


def places(name: str, layer: nn.Conv3d, source: nn.Conv2d) -> Tensor:
    """Which output channels in 3D are those in 2D."""
    every = torch.arange(layer.out_channels)
    if name.startswith("content_encoder"):
        side = round(source.out_channels**0.5)
        return every.reshape(side, side**2)[side // 2]
    if name.startswith("dysampler.hr"):
        return every[: source.out_channels]  # x, y, z by group
    if name.startswith("dysampler."):
        return every.reshape(-1, 2, 4)[
            : source.out_channels // 4, 0
        ].flatten()  # the first sub-voxel in depth
    return every


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder_dilation": 2, "hr_residual": False},
        {"comp_feat_upsample": False, "feature_resample_norm": False},
        {"semi_conv": False, "upsample_mode": "bilinear"},
        {"hamming_window": False, "use_high_pass": False, "feature_resample": False},
        {"lowpass_kernel": 5},
    ],
    ids=str,
)
def test_a_volume_constant_in_depth_is_an_image(options: dict) -> None:
    """With the weights of a 2D module in the middle slice and no stride in depth, every slice is its result."""
    torch.manual_seed(0)
    options = {"lowpass_kernel": 3, "compressed_channels": 16, **options}
    flat, deep = FreqFusion(8, 12, **options).double(), FreqFusion3d(8, 12, **options).double()
    for parameter in flat.parameters():
        parameter.data.normal_(std=0.3)
    put_in_the_middle(flat, deep)
    hr, lr = volume(2, 8, 7, 9), volume(2, 12, 4, 5, seed=1)
    expected = flat(hr, lr)
    fused = deep(hr[:, :, None].expand(-1, -1, 3, -1, -1), lr[:, :, None].expand(-1, -1, 3, -1, -1))
    for part in range(3):
        assert_close("fine map", fused.hr_feat[:, :, part], expected.hr_feat, 1e-12)
        assert_close("coarse map", fused.lr_feat[:, :, part], expected.lr_feat, 1e-12)


def test_slices_turn_with_the_volume() -> None:
    """No axis is special but for the order of the offsets: weights and maps with two axes exchanged."""
    torch.manual_seed(0)
    fusion = FreqFusion3d(4, 4, compressed_channels=8, feature_resample=False).double()
    turned = FreqFusion3d(4, 4, compressed_channels=8, feature_resample=False).double()
    order = torch.arange(27).reshape(3, 3, 3).permute(2, 0, 1).flatten()
    with torch.no_grad():
        for mine, other in zip(fusion.parameters(), turned.parameters(), strict=True):
            mine.normal_(std=0.3)
            value = mine[order] if len(mine) == 27 else mine
            other.copy_(value.permute(0, 1, 4, 2, 3) if value.ndim == 5 else value)
    hr, lr = volume(1, 4, 3, 6, 7), volume(1, 4, 3, 3, 4, seed=1)
    turn = (0, 1, 4, 2, 3)
    for name, mine, other in zip(
        ("kernels", "fine map", "coarse map"),
        fusion(hr, lr),
        turned(hr.permute(turn), lr.permute(turn)),
        strict=True,
    ):
        mine = mine[:, order] if name == "kernels" else mine
        assert_close(name, other, mine.permute(turn), 1e-12)


@pytest.mark.parametrize("fine", [(2, 4, 6), (4, 4, 6), (1, 7, 5), (3, 2, 3)])
def test_methods_start_as_interpolation(fine: tuple[int, int, int]) -> None:
    lr, hr = volume(2, 8, 1, 2, 3).expand(-1, -1, 1, -1, -1), volume(2, 4, *fine)
    nearest = create_fusion("nearest", 4, 8, spatial_dims=3)(hr, lr).lr_feat
    assert_close("nearest", nearest, F.interpolate(lr, fine), 0)
    trilinear = create_fusion("bilinear", 4, 8, spatial_dims=3)(hr, lr).lr_feat
    expected = F.interpolate(lr, fine, mode="trilinear")
    assert_close("trilinear", trilinear, expected, 1e-14)
    sampler = DySample3d(4, 8).double()
    nn.init.zeros_(sampler.offset.weight)
    assert_close("dysample", sampler(hr, lr).lr_feat, expected, 1e-12)


def test_offsets_of_zero_leave_the_reassembly() -> None:
    torch.manual_seed(0)
    fusion = FreqFusion3d(4, 8).double()
    assert fusion.dysampler is not None
    for layer in (fusion.dysampler.offset, fusion.dysampler.hr_offset):
        nn.init.zeros_(layer.weight)
    maps = volume(1, 4, 3, 5, 6), volume(1, 8, 3, 3, 3, seed=1)
    moved = fusion(*maps)
    fusion.dysampler = None
    assert_close("coarse map", moved.lr_feat, fusion(*maps).lr_feat, 1e-12)


def test_kernels_start_as_a_window() -> None:
    """Kernels are nearly the Hamming window, positive and of sum one; the high-pass leaves constants alone."""
    torch.manual_seed(0)
    fusion = FreqFusion3d(4, 4, feature_resample=False).double()
    fused = fusion(torch.ones(1, 4, 6, 6, 6).double(), torch.ones(1, 4, 3, 3, 3).double())
    assert fused.lowpass_kernel is not None
    assert fused.lowpass_kernel.shape == (1, 27, 6, 6, 6)
    assert_close("sum", fused.lowpass_kernel.sum(1), torch.ones(1, 6, 6, 6), 1e-12)
    window = fusion.hamming_lowpass.flatten().double()
    assert_close("kernel", fused.lowpass_kernel[0, :, 2, 2, 2], window / window.sum(), 0.05)
    assert_close("inside", fused.hr_feat[..., 1:-1, 1:-1, 1:-1], torch.ones(1, 4, 4, 4, 4), 1e-12)
    assert_close("inside", fused.lr_feat[..., 2:-2, 2:-2, 2:-2], torch.ones(1, 4, 2, 2, 2), 1e-12)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    options = {"compressed_channels": 8, "feature_resample_group": 1, "encoder_kernel": 1}
    for fusion in (
        FreqFusion3d(1, 2, **options).double(),
        CARAFE3d(1, 2, compressed_channels=2).double(),
        DySample3d(1, 2, groups=1).double(),
    ):
        for parameter in fusion.parameters():
            parameter.data.normal_(std=0.2)

        def both(hr: Tensor, lr: Tensor, fusion: nn.Module = fusion) -> tuple[Tensor, Tensor]:
            fused = fusion(hr, lr)
            return fused.hr_feat, fused.lr_feat

        maps = volume(1, 1, 1, 3, 2).requires_grad_(), volume(1, 2, 1, 2, 1, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(both, maps)


def test_shuffle() -> None:
    x = volume(2, 3 * 8, 2, 1, 3)
    out = shuffle(x, 2)
    assert out.shape == (2, 3, 4, 2, 6)
    for channel, (d, i, j) in enumerate(torch.cartesian_prod(*[torch.arange(2)] * 3).tolist()):
        assert torch.equal(out[:, :, d::2, i::2, j::2], x[:, channel::8])


def test_shuffle_of_channels_last() -> None:
    """As torch does it on a CPU alone; elsewhere it would change the layout."""
    x = torch.randn(2, 18, 3, 5).contiguous(memory_format=torch.channels_last)
    out = _shuffle_last(x, 3)
    assert torch.equal(out, torch.nn.functional.pixel_shuffle(x, 3))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_sizes_of_the_modules() -> None:
    fusion = FreqFusion3d(8, 16)
    shapes = {name: tuple(tensor.shape) for name, tensor in fusion.state_dict().items()}
    assert shapes["hamming_lowpass"] == (1, 1, 3, 3, 3)
    assert shapes["content_encoder.weight"] == (27, 32, 3, 3, 3)
    assert shapes["dysampler.offset.weight"] == (3 * 4 * 8, 32 + 26, 3, 3, 3)
    assert list(fusion.state_dict()) == list(FreqFusion(8, 16).state_dict())
    assert OffsetGenerator(16).offset.in_channels == 24


def test_wrong_input() -> None:
    fusion = create_fusion("freqfusion", 4, 8, spatial_dims=3)
    with pytest.raises(ValueError, match=r"hr_feat must have 5 dimensions \(B, C, D, H, W\), got 4"):
        fusion(torch.zeros(1, 4, 6, 6), torch.zeros(1, 8, 3, 3))
    with pytest.raises(ValueError, match=r"hr_feat must have 4 dimensions \(B, C, H, W\), got 5"):
        create_fusion("freqfusion", 4, 8)(torch.zeros(1, 4, 2, 6, 6), torch.zeros(1, 8, 1, 3, 3))
    with pytest.raises(ValueError, match=r"size \(3, 3, 3\) is larger than hr_feat of size \(2, 6, 6\)"):
        fusion(torch.zeros(1, 4, 2, 6, 6), torch.zeros(1, 8, 3, 3, 3))
    with pytest.raises(
        ValueError, match=r"'sapa' has no form for volumes .* choose one of: nearest, bilinear, carafe"
    ):
        create_fusion("sapa", 4, 8, spatial_dims=3)
    with pytest.raises(ValueError, match=r"spatial_dims must be 2 \(images\) or 3 \(volumes\), got 1"):
        create_fusion("carafe", 4, 8, spatial_dims=1)
    with pytest.raises(ValueError, match=r"divisible by scale\*\*3 = 8, got 12"):
        create_fusion("dysample-s", 4, 12, spatial_dims=3, groups=4)
    with pytest.raises(TypeError, match="compressed_channels must be a whole number"):
        FreqFusion3d(4, 8, compressed_channels=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        FreqFusion3d(4, 8, depth=3)
