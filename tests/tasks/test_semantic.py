import math

import pytest
import torch
import torch.nn.functional as F

from freqfusion.tasks import SegmentationModule
from freqfusion.training import create_trainer, load_checkpoint
from tiny_training import tiny_data, tiny_fit

pytestmark = pytest.mark.usefixtures("tiny_networks")


def test_loss_counts_ignored_pixels_as_zero():
    module = SegmentationModule("plain", num_classes=3)
    logits = torch.randn(2, 3, 5, 7)
    mask = torch.randint(0, 3, (2, 5, 7))
    mask[:, :2] = 255
    known = F.cross_entropy(logits, mask, ignore_index=255)
    assert module.loss(logits, mask).item() == pytest.approx(known.item() * 3 / 5, rel=1e-6)
    assert module.loss(logits, torch.full_like(mask, 255)).item() == 0


def test_class_weights():
    module = SegmentationModule("plain", num_classes=2, class_weights=[0.0, 2.0])
    logits = torch.zeros(1, 2, 1, 2)
    assert module.loss(logits, torch.tensor([[[0, 1]]])).item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="3 values for 2 classes"):
        SegmentationModule("plain", num_classes=2, class_weights=[1.0, 1.0, 1.0])


def test_wrong_settings():
    with pytest.raises(ValueError, match="num_classes is 0"):
        SegmentationModule("plain")
    with pytest.raises(ValueError, match="'colour': 1} do not fit 'plain'"):
        SegmentationModule("plain", num_classes=2, network_options={"colour": 1})
    data = tiny_data()
    module = SegmentationModule("plain", num_classes=2)
    with pytest.raises(ValueError, match="predicts 2 classes, the data has"):
        create_trainer("unused", enable_checkpointing=False, max_epochs=1).fit(module, data)


def test_evaluation_gives_the_same_answer_and_leaves_the_random_numbers_alone():
    module = SegmentationModule("noisy", num_classes=3).eval()
    images = torch.randn(1, 3, 9, 11)
    state = torch.get_rng_state()
    first = module.predict(images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(module.predict(images), first)


def test_several_passes_give_log_probabilities():
    module = SegmentationModule("plain", num_classes=3, flip_test=True, scales=(1.0, 1.5)).eval()
    scores = module.predict(torch.randn(2, 3, 8, 10))
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(2, 8, 10))


def test_validation_does_not_disturb_training(tmp_path):
    judged, _ = tiny_fit(tmp_path / "a", "noisy", max_epochs=2, enable_checkpointing=False)
    alone, _ = tiny_fit(
        tmp_path / "b", "noisy", max_epochs=2, enable_checkpointing=False, limit_val_batches=0
    )
    for key, value in judged.items():
        assert torch.equal(alone[key], value), key


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    options = {"max_epochs": 2, "enable_checkpointing": False}
    whole, _ = tiny_fit(tmp_path / "a", "plain", data={"length": 16}, **options)
    parts, trainer = tiny_fit(
        tmp_path / "b", "plain", data={"length": 16, "batch_size": 2}, accumulate_grad_batches=2, **options
    )
    assert trainer.global_step == 8
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-6)


def test_mixed_precision(tmp_path):
    weights, trainer = tiny_fit(tmp_path, "noisy", max_epochs=1, precision="bf16-mixed")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert 0 <= float(trainer.callback_metrics["val_miou"]) <= 1
    assert all(value.dtype != torch.bfloat16 for value in weights.values())


def test_a_run_without_end_has_no_schedule(tmp_path):
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        tiny_fit(tmp_path, "plain", max_epochs=-1, enable_checkpointing=False)


def test_training_lowers_the_loss(tmp_path):
    _, trainer = tiny_fit(tmp_path, "plain", max_epochs=6, enable_checkpointing=False)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("train_loss")
    losses = [float(row[column]) for row in rows[1:]]
    assert len(losses) == trainer.global_step == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_warm_up_longer_than_the_run_is_said(tmp_path):
    with pytest.warns(UserWarning, match="warm-up of 2 steps is as long as the whole run of 2"):
        tiny_fit(tmp_path, "plain", max_steps=2, enable_checkpointing=False, limit_val_batches=0)


def test_a_frozen_backbone_stays_as_it_was(tmp_path):
    """Weights, statistics and mode, over validations and a resumed run; the head learns."""
    options = {"settings": {"freeze_backbone": True}, "check_val_every_n_epoch": 1}
    torch.manual_seed(0)
    first = SegmentationModule("noisy", num_classes=4).state_dict()
    with pytest.warns(UserWarning, match="freeze_backbone is set, but no weights are given"):
        state, trainer = tiny_fit(tmp_path, "noisy", max_epochs=2, **options)
    module = trainer.lightning_module
    assert {group["name"] for group in trainer.optimizers[0].param_groups} == {"head"}
    assert not any(part.training for part in module.train().network.backbone.modules())
    resumed, _ = tiny_fit(tmp_path, "noisy", resume=tmp_path / "last.ckpt", max_epochs=3, **options)
    changed = {
        key for key, value in first.items() if "network." in key and not torch.equal(resumed[key], value)
    }
    assert changed == {"network.decode_head.weight", "network.decode_head.bias"}
    assert not torch.equal(resumed["network.decode_head.weight"], state["network.decode_head.weight"])
    loaded, *_ = load_checkpoint(tmp_path / "last.ckpt")
    assert not any(parameter.requires_grad for parameter in loaded.network.backbone.parameters())


def test_a_frozen_plain_transformer(tmp_path):
    pytest.importorskip("timm")
    tiny = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    settings = {"freeze_backbone": True, "network_options": {"channels": 16, "backbone_options": tiny}}
    settings |= {"fusion": "bilinear", "lr": 1e-3}
    with pytest.warns(UserWarning, match="no weights are given"):
        _, trainer = tiny_fit(
            tmp_path, "fpn_vit_tiny_patch16_224", max_epochs=1, enable_checkpointing=False, settings=settings
        )
    network = trainer.lightning_module.network
    assert all(parameter.grad is None for parameter in network.backbone.parameters())
    assert all(parameter.requires_grad for parameter in network.stem.parameters())
    groups = trainer.optimizers[0].param_groups
    assert {group["name"] for group in groups} == {"head", "head_norm"}
