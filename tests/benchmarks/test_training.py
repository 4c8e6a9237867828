"""Training steps of whole networks: every method takes part, figures by hand, one failure costs one figure."""

from functools import partial

import pytest
import torch

from freqfusion import create_model
from freqfusion.benchmarks import training
from freqfusion.benchmarks.runner import Settings
from freqfusion.benchmarks.training import METHODS, NETWORKS, Network, Throughput, find_networks, shrunk

SETTINGS = Settings(torch.device("cpu"), torch.float32, threads=1, rounds=2)
SMALL = Network(
    "fpn_small", 2, (32, 48), "bilinear", partial(create_model, "fpn_small", training.NUM_CLASSES)
)


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_method_is_measured(channels_last):
    steps = []
    results = training.measure_training(SMALL, channels_last, SETTINGS, steps.append)
    assert [result.method for result in results] == ["bilinear", *METHODS]
    for result in results:
        assert not result.note
        assert len(result.samples) == 2
        assert result.images_per_second > 0
        assert result.peak_bytes is None  # a CPU does not count what one step allocates
    assert results[0].cost == 1
    assert steps[0] == f"fpn_small, {'NHWC' if channels_last else 'NCHW'}: bilinear, first step"


def test_figures_by_hand():
    assert Throughput(SMALL, "carafe", False, (0.5, 0.25, 4.0)).images_per_second == 4


def test_a_failure_costs_its_own_figure_alone():
    def create(fusion):
        if fusion == "carafe":
            raise RuntimeError("no room\nat all")
        return SMALL.create(fusion)

    results = training.measure_training(Network("x", 1, (32, 32), "bilinear", create), False, SETTINGS)
    assert {result.method: result.note for result in results if result.note} == {"carafe": "no room"}
    assert sum(bool(result.samples) for result in results) == len(METHODS)


def test_networks_by_name():
    assert find_networks([]) == list(NETWORKS.values())
    assert [network.name for network in find_networks(["segnext_t"])] == ["segnext_t"]
    with pytest.raises(ValueError, match="there is no network 'unet' here; choose among segnext_t, "):
        find_networks(["unet"])
    small = shrunk(NETWORKS["fpn_resnet50"], 8)
    assert (small.batch, small.size) == (1, (100, 168))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_networks_train(name):
    run = training._Training(shrunk(NETWORKS[name], 8), "freqfusion", True, SETTINGS.device)
    before = [parameter.detach().clone() for parameter in run.module.parameters()]
    run.step()
    after = list(run.module.parameters())
    assert any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
