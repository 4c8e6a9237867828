"""Costs of fusion methods against figures that can be computed by hand, and the published column."""

import json
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion import FusedFeatures, Fusion, create_fusion
from freqfusion.benchmarks import cost
from freqfusion.benchmarks.cost import (
    choose_device,
    count_flops,
    count_parameters,
    count_saved_bytes,
    describe_machine,
    measure_costs,
)
from freqfusion.fusion import catalog
from freqfusion.ops import carafe
from support import GOLDEN

MIB = 2**20
NAMES = {
    "Nearest": "nearest",
    "Deconv": "deconv",
    "PixelShuffle": "pixel_shuffle",
    "CARAFE": "carafe",
    "IndexNet": "indexnet",
    "A2U": "a2u",
    "FADE": "fade",
    "SAPA-B": "sapa",
    "DySample-S+": "dysample-s+",
    "DySample+": "dysample+",
    "FreqFusion": "freqfusion",
}
PUBLISHED = {
    row["method"]: row["paper_figure"]
    for row in json.loads((GOLDEN / "upsampler_params.json").read_text())["rows"]
    if row["paper_figure"] and row["paper_figure"].startswith("+")
}


class Plain(Fusion):
    """Nearest upsampling and a rectifier, which keeps its result."""

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        return FusedFeatures(None, hr_feat, F.relu(F.interpolate(lr_feat, size=hr_feat.shape[-2:])))


class Asking(Plain):
    """Looks at a value, which the meta device does not have."""

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        return super().fuse(hr_feat, lr_feat * float(lr_feat.mean() < 9))


class Failing(Fusion):
    def __init__(self, hr_channels: int, lr_channels: int) -> None:
        raise OSError("weights are missing\nand more words")

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        raise NotImplementedError


class Flaky(Plain):
    """Fails only when its time is taken."""

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        if not torch.is_grad_enabled() and not lr_feat.is_meta:
            raise RuntimeError("no time for this")
        return super().fuse(hr_feat, lr_feat)


@pytest.fixture
def small(monkeypatch):
    """Sites, images and turns that take no time, and methods of a user's own."""
    monkeypatch.setattr(cost, "SITES", ((3, 4), (1, 1), (5, 2)))
    monkeypatch.setattr(cost, "LATENCY_SITE", (3, 3))
    monkeypatch.setattr(cost, "IMAGE", (64, 64))
    monkeypatch.setattr(cost, "MIN_SECONDS", 1e-4)
    monkeypatch.setattr(cost, "MODELS", ["fpn_small"])
    monkeypatch.setattr(catalog, "_METHODS", dict(catalog._METHODS))


def maps(size, device="cpu", channels=256):
    height, width = size
    hr = torch.rand(1, channels, 2 * height, 2 * width, device=device, requires_grad=True)
    return hr, torch.rand(1, channels, height, width, device=device, requires_grad=True)


def test_published_rows_are_all_tested():
    assert set(PUBLISHED) == set(NAMES) - {"Nearest"}


@pytest.mark.parametrize("row", PUBLISHED)
def test_parameters_of_three_sites_are_the_published_column(row):
    every, weights = count_parameters(create_fusion(NAMES[row], 256, 256))
    counted = 3 * (weights if row == "A2U" else every)  # A2U's figure leaves out biases and norm affines
    published = PUBLISHED[row]
    unit = {"K": 1e3, "M": 1e6}[published[-1]]
    assert f"+{counted / unit:.1f}{published[-1]}" == published


def test_measured_parameters_are_of_three_sites(small):
    rows = measure_costs(["a2u", "freqfusion"], torch.device("cpu"), rounds=1)[:2]
    assert [(row.parameters, row.weights) for row in rows] == [(32_370, 29_184), (314_070, 312_576)]


def test_saved_bytes_of_carafe_by_hand():
    """The compressed map for the encoder, and the kernels, which softmax and reassembly share."""
    compressed, kernels = 64 * 64 * 64 * 4, 25 * 128 * 128 * 4
    assert count_saved_bytes(create_fusion("carafe", 256, 256), *maps((64, 64))) == compressed + kernels


@pytest.mark.parametrize("method", ["nearest", "bilinear", "deconv", "pixel_shuffle"])
def test_methods_that_keep_nothing_but_inputs_and_parameters(method):
    assert count_saved_bytes(create_fusion(method, 256, 256), *maps((4, 5))) == 0


class Reassembly(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, kernels: Tensor) -> Tensor:
        # the sums keep nothing themselves; what they give is kept by the reassembly
        return carafe(x + self.scale, kernels + self.scale, 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_custom_operator_saves_is_seen(device):
    x = torch.ones(2, 6, 4, 5, device=device, requires_grad=True)
    kernels = torch.ones(2, 9, 7, 10, device=device, requires_grad=True)
    assert count_saved_bytes(Reassembly(1.0), x, kernels) == 4 * (x.numel() + kernels.numel())


def test_shared_storages_count_once_and_buffers_not_at_all():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.full((4, 4), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()  # kept as its own derivative
            return y[:2] * y[2:] * self.factor[:2] + y.T.square()[:2]

    x = torch.ones(4, 4, requires_grad=True)
    # y once for all its views, and the product that met the buffer not at all: the buffer asks for no gradient
    assert count_saved_bytes(Shared(), x) == 64


def test_flops_of_carafe_by_hand():
    height, width = 6, 7
    convolutions = 2 * height * width * (64 * 256 + 100 * 64 * 9)
    reassembly = 2 * 4 * height * width * 256 * 25
    forward, backward = count_flops(create_fusion("carafe", 256, 256), *maps((height, width)))
    assert (forward, backward) == (convolutions + reassembly, 2 * (convolutions + reassembly))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_backward_of_a_convolution_costs_twice_its_forward(kind, groups):
    """Also of a grouped one, whose weight gradient torch's own formula counts as ungrouped."""
    module = kind(8, 16, 3, stride=2, groups=groups)
    x = torch.rand(2, 8, 9, 12, requires_grad=True)
    forward, backward = count_flops(module, x)
    positions = 9 * 12 if kind is nn.ConvTranspose2d else 4 * 5
    assert forward == 2 * 2 * positions * 8 * 16 * 9 // groups
    assert backward == 2 * forward
    assert count_flops(module, x.detach())[1] == forward


def test_a_method_of_the_users_own_appears_like_any_other(small):
    catalog.register_fusion("plain", Plain)
    at_sites, in_fpn = measure_costs(["plain"], torch.device("cpu"), rounds=2)
    assert (at_sites.place, at_sites.method) == (cost.THREE_SITES, "plain")
    assert at_sites.parameters == at_sites.flops_forward == at_sites.flops_backward == 0
    assert at_sites.saved_bytes == 4 * 256 * 4 * (12 + 1 + 10)  # float32, channels, x2 in both directions
    for latency in (at_sites.forward_ms, at_sites.backward_ms):
        assert 0 < latency.lower <= latency.median <= latency.upper < 1e4
    assert (in_fpn.place, in_fpn.method, in_fpn.note) == ("fpn_small", "plain", "")
    assert in_fpn.parameters > in_fpn.weights > 10_000
    assert in_fpn.flops_backward > in_fpn.flops_forward > 1e6
    assert in_fpn.saved_bytes > 1e5
    assert in_fpn.forward_ms is in_fpn.backward_ms is None


def test_models_differ_by_their_fusions(small, monkeypatch):
    monkeypatch.setattr(cost, "MODELS", ["segnext_t"])
    bilinear, freqfusion = measure_costs(["bilinear", "freqfusion"], torch.device("cpu"), rounds=1)[2:4]
    assert (
        freqfusion.parameters - bilinear.parameters == 257_380
    )  # golden/param_counts.json of the released code
    assert freqfusion.flops_forward > bilinear.flops_forward
    assert freqfusion.saved_bytes > bilinear.saved_bytes


def test_what_cannot_be_had_is_left_out_with_the_reason(small):
    for name, build in (("asking", Asking), ("failing", Failing), ("flaky", Flaky), ("plain", Plain)):
        catalog.register_fusion(name, build)
    asking, failing, flaky, plain = measure_costs(
        ["asking", "failing", "flaky", "plain"], torch.device("cpu"), rounds=1
    )[:4]
    assert asking.flops_forward is asking.flops_backward is None
    assert asking.saved_bytes == plain.saved_bytes
    assert asking.forward_ms is not None
    assert asking.note.startswith("FLOPs: ")
    assert "meta" in asking.note
    assert failing == cost.Cost(cost.THREE_SITES, "failing", note="cannot be built: weights are missing")
    assert flaky.forward_ms is flaky.backward_ms is None
    assert flaky.saved_bytes == plain.saved_bytes
    assert flaky.note == "latency: no time for this"
    assert plain.note == ""


def test_latency_follows_the_work(small, monkeypatch):
    class Sleepy(Plain):
        def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
            if not lr_feat.is_meta:
                time.sleep(0.02)
            return super().fuse(hr_feat, lr_feat)

    catalog.register_fusion("sleepy", Sleepy)
    monkeypatch.setattr(cost, "MODELS", [])
    (row,) = measure_costs(["sleepy"], torch.device("cpu"), rounds=3)
    assert row.forward_ms.lower >= 20
    assert row.backward_ms.lower < 20  # the forward pass is not part of it


def test_progress_counts_to_the_end(small):
    catalog.register_fusion("failing", Failing)
    seen = []
    measure_costs(["nearest", "failing"], torch.device("cpu"), 2, lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(len(seen)))
    assert {total for _, total, _ in seen} == {len(seen)}
    assert seen[0][2].startswith("nearest")
    assert seen[-1][2] == "fpn_small with failing"


@pytest.mark.parametrize(
    ("methods", "rounds", "message"),
    [
        (["carafe", "carrafe"], 1, "unknown fusion 'carrafe'; choose among: nearest"),
        (["carafe", "carafe"], 1, "each once"),
        ([], 1, "at least one method"),
        (["carafe"], 0, "rounds must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_answered_before_anything_is_measured(small, methods, rounds, message):
    with pytest.raises(ValueError, match=message):
        measure_costs(methods, torch.device("cpu"), rounds, lambda *step: pytest.fail("measured already"))


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for absent in ("meta", "cuda:99", "abacus"):
        with pytest.raises(ValueError, match=f"no device '{absent}' here; choose one of cpu"):
            choose_device(absent)


def test_machine_is_described():
    machine = describe_machine(torch.device("cpu"))
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert machine["device_name"]
    assert json.dumps(machine)


def test_measuring_needs_torch_alone():
    code = """
import sys, torch
before = set(sys.modules)
import freqfusion.benchmarks.cost
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"numpy", "matplotlib", "PIL", "rich", "timm", "lightning", "torchvision"}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
