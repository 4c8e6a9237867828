"""What the golden files do not say of SAPA-G, SAPA-D, FADE-Lite, LDA-AQU and ReSFU: other ratios, borders, types."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion import create_fusion, ops
from freqfusion.fusion import LDAAQU, SAPA, SAPAD, FADELite, Fusion, ReSFU
from freqfusion.fusion._points import attend
from support import assert_close

NEWER = ("sapa-g", "sapa_d", "fade_lite", "lda_aqu", "resfu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(fusion: Fusion, std: float = 0.3) -> Fusion:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.copy_(parameter.normal_(std=std, generator=generator))
    return fusion.double()


def sample(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """``x`` ``(C, h, w)`` at one place, zero outside, a pixel at a time."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            share = (1 - (row - i).abs()).clamp_min(0) * (1 - (column - j).abs()).clamp_min(0)
            total = total + share * x[:, i, j]
    return total


def test_attention_to_points_is_its_definition() -> None:
    """Two groups, three heads that cut the channels elsewhere, places inside and far outside."""
    query, key, value = random(1, 6, 2, 3), random(1, 6, 3, 2, seed=1), random(1, 12, 3, 2, seed=2)
    rows, columns = 2 * random(1, 4, 2, 2, 3, seed=3) + 1, 2 * random(1, 4, 2, 2, 3, seed=4) + 0.5
    bias = random(1, 4, 3, 2, 3, seed=5)
    inputs = [x.requires_grad_() for x in (query, key, value, rows, columns, bias)]
    expected = torch.zeros(1, 12, 2, 3, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            keys, values = (
                torch.stack(
                    [
                        torch.cat(
                            [
                                sample(part, rows[0, p, g, i, j], columns[0, p, g, i, j])
                                for g, part in enumerate(x)
                            ]
                        )
                        for p in range(4)
                    ]
                )
                for x in (key[0].chunk(2), value[0].chunk(2))
            )
            for head in range(3):
                part, out = slice(2 * head, 2 * head + 2), slice(4 * head, 4 * head + 4)
                logits = 0.5 * (keys[:, part] @ query[0, part, i, j] + bias[0, :, head, i, j])
                expected[0, out, i, j] = logits.softmax(0) @ values[:, out]
    actual = attend(*inputs[:5], heads=3, scale=0.5, bias=bias)
    assert_close("values", actual, expected, 1e-12)
    cotangent = random(1, 12, 2, 3, seed=6)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for x, y in zip(torch.autograd.grad(actual, inputs, cotangent), wanted, strict=True):
        assert_close("gradient", x, y, 1e-11)


def test_attention_keeps_no_samples_for_the_backward_pass() -> None:
    query, key, value = (
        random(1, c, *size).requires_grad_() for c, size in ((8, (24, 24)), (8, (12, 12)), (32, (12, 12)))
    )
    rows, columns = (6 + 3 * random(1, 9, 1, 24, 24, seed=seed) for seed in (1, 2))
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attend(query, key, value, rows, columns, heads=1)
    enlarged = 9 * (8 + 32) * 24 * 24 * 8
    assert sum(sizes.values()) < 0.25 * enlarged


@pytest.mark.parametrize("ratio", [(7, 11), (4, 5), (9, 13)])
def test_sapa_d_takes_the_nearest_sub_pixels_offset(ratio: tuple[int, int]) -> None:
    """Zero keys make all points weigh the same, so the result is the mean of the samples at parent plus offset."""
    fusion = shaken(SAPAD(3, 4, groups=2, num_point=3, embedding_dim=2))
    nn.init.zeros_(fusion.k.weight)
    nn.init.zeros_(fusion.k.bias)
    lr = random(1, 4, 4, 5)
    out = fusion(random(1, 3, *ratio), lr).lr_feat
    offsets = F.pixel_shuffle(fusion.offset(lr), 2)[0].unflatten(0, (2, 3, 2))
    for i, j in ((0, 0), (ratio[0] - 1, ratio[1] - 1), (ratio[0] // 2, 1)):
        parent = i * 4 // ratio[0], j * 5 // ratio[1]
        near = i * 8 // ratio[0], j * 10 // ratio[1]
        for group, part in enumerate(lr[0].chunk(2)):
            right, down = offsets[group, :, :, near[0], near[1]].unbind(1)
            points = [sample(part, parent[0] + y, parent[1] + x) for x, y in zip(right, down, strict=True)]
            assert_close(f"{i}, {j}", out[0, 2 * group : 2 * group + 2, i, j], sum(points) / 3, 1e-12)


@pytest.mark.parametrize(
    ("hr_size", "lr_size"), [((1, 1), (1, 1)), ((1, 6), (1, 3)), ((5, 1), (2, 1)), ((4, 6), (1, 1))]
)
def test_lda_aqu_on_a_single_row_or_column(hr_size: tuple[int, int], lr_size: tuple[int, int]) -> None:
    """A side of one coarse pixel is read as it is, so a constant along the other side comes through."""
    fusion = shaken(LDAAQU(2, 8))
    lr = random(2, 8, 1, 1).expand(2, 8, *lr_size)
    hr = torch.zeros(2, 2, *hr_size, dtype=torch.float64)
    out = fusion(hr, lr).lr_feat
    assert torch.isfinite(out).all()
    nn.init.zeros_(fusion.conv_offset[3].weight)
    nn.init.zeros_(fusion.conv_offset[3].bias)
    middle = fusion(hr, lr).lr_feat[..., hr_size[0] // 2, hr_size[1] // 2]
    if 1 in (min(hr_size), max(lr_size)):
        centre = lr[..., 0, 0]
        assert_close("middle", middle, centre, 1e-12)


def test_lda_aqu_rounds_the_width_of_queries_to_its_groups() -> None:
    assert LDAAQU(1, 6).proj_q.out_channels == 2
    assert LDAAQU(1, 20).proj_q.out_channels == 4
    assert LDAAQU(1, 256).proj_q.out_channels == 64


def test_fade_lite_has_a_gate_between_equal_channels_only() -> None:
    assert FADELite(8, 8).gate_generator is not None
    assert FADELite(8, 6).gate_generator is None
    lr = torch.ones(1, 6, 9, 9, dtype=torch.float64)
    out = shaken(FADELite(8, 6))(random(1, 8, 18, 18), lr).lr_feat
    assert_close("a constant within the border", out[..., 4:14, 4:14], torch.ones(1, 6, 10, 10), 1e-12)


def test_sapa_g_blends_both_queries() -> None:
    """Against a loop over pixels; the query's coarse part reads the map as it came."""
    fusion = SAPA(4, 6, up_kernel_size=3, embedding_dim=5, gating=True)
    assert {name.split(".")[0] for name in fusion.state_dict()} == {
        "norm_x",
        "norm_y",
        "qy",
        "qx",
        "gate",
        "k",
    }
    shaken(fusion)
    hr, lr = random(1, 4, 6, 8), random(1, 6, 3, 4, seed=1)
    x, y = F.group_norm(lr, 2, fusion.norm_x.weight, fusion.norm_x.bias), fusion.norm_y(hr)
    keys = F.pad(fusion.k(x), (1, 1, 1, 1))[0]
    values = F.pad(lr, (1, 1, 1, 1))[0]
    out = fusion(hr, lr).lr_feat
    for i, j in ((0, 0), (3, 5), (5, 7), (2, 0)):
        parent = (..., i // 2, j // 2)
        share = torch.sigmoid(fusion.gate(x)[parent])
        query = share * fusion.qy(y)[..., i, j] + (1 - share) * fusion.qx(lr)[parent]
        window = (slice(None), slice(i // 2, i // 2 + 3), slice(j // 2, j // 2 + 3))
        weights = torch.einsum("e,euv->uv", query[0], keys[window]).flatten().softmax(0)
        assert_close(f"{i}, {j}", out[0, :, i, j], values[window].flatten(1) @ weights, 1e-12)


def test_sapa_g_takes_weights_stored_as_matrices() -> None:
    fusion = create_fusion("sapa-g", 4, 6, norm="layer")
    matrices = {k: v.flatten(1) if v.ndim == 4 else v for k, v in fusion.state_dict().items()}
    other = create_fusion("sapa-g", 4, 6, norm="layer")
    other.load_state_dict(matrices)
    assert torch.equal(other.qx.weight, fusion.qx.weight)


@pytest.mark.parametrize(
    "sizes", [((8, 12), (4, 6)), ((9, 13), (4, 5)), ((16, 16), (1, 2)), ((5, 6), (5, 6))]
)
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_resfu_reads_between_coarse_pixels(
    sizes: tuple[tuple[int, int], tuple[int, int]], kernel_size: int
) -> None:
    """One reassembly by the wider kernels is the mean of bilinear samples that the definition asks for."""
    (height, width), (h, w) = sizes
    fusion = ReSFU(1, 2, kernel_size=kernel_size, scale_factor=2)
    scores, lr = random(1, kernel_size**2, height, width), random(1, 2, h, w, seed=1)
    kernels = fusion._kernels(scores, (h, w))
    assert_close("sum", kernels.sum(1), torch.ones(1, height, width), 1e-12)
    out = ops.carafe(lr, kernels, kernel_size + 2)
    radius = kernel_size // 2
    for i, j in ((0, 0), (height - 1, width - 1), (height // 2, width // 3), (1, width - 2)):
        logits, points = [], []
        for u in range(-radius, radius + 1):
            for v in range(-radius, radius + 1):
                inside = 0 <= i + 2 * u < height and 0 <= j + 2 * v < width
                logits.append(
                    scores[0, len(logits), i, j] if inside else torch.tensor(-math.inf, dtype=torch.float64)
                )
                row = min(max((i + 0.5) * h / height - 0.5 + u, 0), h - 1)
                column = min(max((j + 0.5) * w / width - 0.5 + v, 0), w - 1)
                points.append(sample(lr[0], *torch.tensor([row, column], dtype=torch.float64)))
        expected = torch.stack(logits).softmax(0) @ torch.stack(points)
        assert_close(f"{i}, {j}", out[0, :, i, j], expected, 1e-12)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 2), (11, 13)])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_guided_filter_on_maps_smaller_than_its_box(height: int, width: int, scale: int) -> None:
    """A map that is a linear function of its guide comes back, whatever the size (but for ``eps``)."""
    from freqfusion.fusion.resfu import GuidedFilter

    guide = random(1, 3, height, width)
    out = GuidedFilter(3, radius=8, eps=1e-12, scale=scale)(guide, 2 * guide + 1)
    thinned = max(1, height // scale) * max(1, width // scale)
    expected = 2 * guide + 1 if thinned > 1 else (2 * guide[..., :1, :1] + 1).expand_as(guide)
    assert_close("map", out, expected, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NEWER)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fusion = create_fusion(name, 16, 16)
    hr, lr = random(2, 16, 13, 18).float(), random(2, 16, 6, 9, seed=1).float()
    expected = fusion(hr, lr).lr_feat
    half = fusion.to(dtype)(hr.to(dtype), lr.to(dtype)).lr_feat
    assert half.dtype == dtype
    assert_close(name, half.float(), expected, 2e-2)


@pytest.mark.parametrize("name", ["sapa_d", "lda_aqu"])
def test_places_are_kept_in_float32(name: str) -> None:
    """At a thousand columns half precision would move a sample by half a pixel: a ramp shows it."""
    fusion = create_fusion(name, 4, 8).to(torch.bfloat16)
    if isinstance(fusion, SAPAD):
        nn.init.zeros_(fusion.offset.weight)
    ramp = torch.linspace(0, 1, 512).expand(1, 8, 2, 512).to(torch.bfloat16)
    out = fusion(torch.zeros(1, 4, 4, 1024, dtype=torch.bfloat16), ramp).lr_feat[0, 0, 1, 8:-8].float()
    fine = torch.arange(8.0, 1016)
    expected = (fine / 2).floor() / 511 if name == "sapa_d" else fine / 1023
    assert_close(name, out, expected, 1 / 256)


@pytest.mark.parametrize("name", NEWER)
def test_gradients_twice(name: str) -> None:
    """Second derivatives, as for gradient penalties; the recomputed samples take part."""
    fusion = shaken(create_fusion(name, 8, 8))
    hr, lr = random(1, 8, 4, 4).requires_grad_(), random(1, 8, 2, 2, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(fusion(hr, lr).lr_feat.square().sum(), lr, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), lr)
    step = 1e-6 * random(1, 8, 2, 2, seed=2)

    def squared(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(fusion(hr, x).lr_feat.square().sum(), x)[0].square().sum()

    difference = squared(lr + step) - squared(lr - step)
    assert float(difference) == pytest.approx(2 * float((second * step).sum()), rel=1e-4)


@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_deconv_with_a_kernel_of_2_fills_each_pixels_square(size: tuple[int, int]) -> None:
    fusion = shaken(create_fusion("deconv", 1, 3, kernel_size=2))
    lr = random(2, 3, 2, 3)
    out = fusion(random(2, 1, *size), lr).lr_feat
    squares = torch.einsum("ncij,cdab->ndiajb", lr, fusion.weight).reshape(2, 3, 4, 6)
    assert_close("map", out, (squares + fusion.bias[:, None, None])[..., : size[0], : size[1]], 1e-12)
