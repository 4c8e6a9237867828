import pytest
import torch
from torch import nn

from freqfusion import FreqFusion, create_model
from freqfusion.tasks.schedule import AdamWSettings, Schedule
from tiny_training import NoisyNet


def test_every_parameter_is_in_exactly_one_group():
    network = create_model("segnext_t", num_classes=4)
    groups = AdamWSettings(6e-4, 0.1, (0.9, 0.999), 0.01).groups(network)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in grouped}) == len(grouped)
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in network.parameters()}


def test_head_learns_ten_times_faster_and_norms_are_not_decayed():
    network = NoisyNet(4)
    network.decode_head = nn.Sequential(network.decode_head, nn.GroupNorm(2, 4))
    groups = {group["name"]: group for group in AdamWSettings(6e-4, 0.1, (0.9, 0.999), 0.01).groups(network)}
    settings = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert settings == {
        "backbone": (pytest.approx(6e-5), 0.01),
        "backbone_norm": (pytest.approx(6e-5), 0.0),
        "head": (pytest.approx(6e-4), 0.01),
        "head_norm": (pytest.approx(6e-4), 0.0),
    }
    norm = network.backbone[1]
    assert [id(parameter) for parameter in groups["backbone_norm"]["params"]] == [
        id(norm.weight),
        id(norm.bias),
    ]


def test_fusions_have_a_learning_rate_of_their_own():
    network = create_model("segnext_t", num_classes=4)
    settings = AdamWSettings(1e-3, 0.1, (0.9, 0.999), 0.01, fusion_lr_factor=0.25)
    groups = {group["name"]: group for group in settings.groups(network)}
    grouped = {id(parameter) for name in ("fusion", "fusion_norm") for parameter in groups[name]["params"]}
    fusions = [module for module in network.modules() if isinstance(module, FreqFusion)]
    assert grouped == {id(parameter) for fusion in fusions for parameter in fusion.parameters()} != set()
    assert groups["fusion"]["lr"] == groups["fusion_norm"]["lr"] == pytest.approx(2.5e-4)
    assert groups["head"]["lr"] == pytest.approx(1e-3)


def test_frozen_and_shared_parameters():
    network = NoisyNet(4)
    network.backbone[0].requires_grad_(False)
    network.alias = network.decode_head
    grouped = [
        parameter
        for group in AdamWSettings(1.0, 1.0, (0.9, 0.999), 0.1).groups(network)
        for parameter in group["params"]
    ]
    assert len(grouped) == 4
    assert all(parameter.requires_grad for parameter in grouped)


def test_learning_rate_of_the_published_run():
    factor = Schedule(1500, 1e-6, poly_power=1.0).factor(160_000)
    assert factor(0) == pytest.approx(1e-6)
    assert factor(750) == pytest.approx((1 - 750 / 160_000) * (1e-6 + (1 - 1e-6) * 0.5))
    assert factor(1500) == pytest.approx(1 - 1500 / 160_000)
    assert factor(80_000) == 0.5
    assert factor(160_000) == 0.0
    assert factor(160_001) == 0.0


def test_power_and_no_warmup():
    factor = Schedule(poly_power=0.9).factor(100)
    assert factor(0) == 1.0
    assert factor(50) == pytest.approx(0.5**0.9)


def test_scheduler_steps_once_an_optimiser_step(tiny_networks, tmp_path):
    from tiny_training import tiny_fit

    _, trainer = tiny_fit(
        tmp_path, "plain", max_epochs=2, accumulate_grad_batches=2, enable_checkpointing=False
    )
    # 22 images are 5 batches of 4: three steps per epoch, the last one of a single batch
    assert trainer.global_step == 6
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 6
    assert torch.tensor([group["lr"] for group in trainer.optimizers[0].param_groups]).abs().max() == 0
