import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from freqfusion.training.callbacks import print_results
from freqfusion.training.checkpoints import greatest_weight
from tiny_training import tiny_fit


def poison_after(monkeypatch, step, where):
    """Make the loss, or a weight, NaN at a step."""
    from freqfusion.tasks import SegmentationModule

    original = SegmentationModule.training_step

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        if self.trainer.global_step + 1 == step:
            if where == "loss":
                return loss * math.nan
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(SegmentationModule, "training_step", training_step)


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("where, what", [("loss", "the loss is nan"), ("gradient", "a weight is nan")])
def test_a_run_that_turns_nan_ends_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, where, what):
    poison_after(monkeypatch, 4, where)
    message = f"{what} at step 4 of 10, so training has ended; .*last.ckpt holds step 3"
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path, "plain", max_epochs=2)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == 3
    assert all(value.isfinite().all() for value in content["state_dict"].values())


@pytest.mark.usefixtures("tiny_networks")
def test_going_on_is_an_option_that_keeps_good_weights_too(tmp_path, monkeypatch):
    poison_after(monkeypatch, 4, "loss")
    with pytest.warns(UserWarning, match="the loss is nan at step 4 of 10; the run goes on"):
        weights, trainer = tiny_fit(tmp_path, "plain", max_epochs=2, stop_at_nan=False)
    assert trainer.global_step == 10
    assert any(value.isnan().any() for value in weights.values())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_two_classes_are_judged_with_weights_that_are_nan():
    """A run that goes on is judged to its end; Dice, sensitivity and AUC say that nothing was found."""
    from freqfusion.tasks import SegmentationModule

    module = SegmentationModule(num_classes=2, network="fpn_small", fusion="bilinear").eval()
    for parameter in module.parameters():
        nn.init.constant_(parameter, math.nan)
    mask = torch.zeros(1, 32, 32, dtype=torch.long)
    mask[:, 8:20, 4:30] = 1
    module.validation_step({"image": torch.zeros(1, 3, 32, 32), "mask": mask, "name": ["a"]}, 0)
    assert {name: float(value) for name, value in module.binary.compute().items()} == {
        "dice": 0.0,
        "sensitivity": 0.0,
        "specificity": 1.0,
        "auc": 0.5,
    }


def test_greatest_weight():
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.weight, -3.0)
    nn.init.constant_(layer.bias, 2.0)
    assert greatest_weight(layer) == 3
    layer.bias.data[:] = math.nan
    assert greatest_weight(layer).isnan()


def test_class_names_are_text_and_no_markup(capsys):
    figure = SimpleNamespace(label="IoU", name="iou", per_class="iou", mean="miou")
    module = SimpleNamespace(
        results={"iou": [0.5, 0.25], "miou": 0.375},
        classes=("a[/]", "b\x1b[31m" + "c" * 10_000),
        metric_labels={"miou": "mIoU"},
        class_metrics=(figure,),
    )
    print_results(module, "validation")
    shown = capsys.readouterr().out
    assert "a[/]" in shown
    assert "\x1b[31m" not in shown
    assert len(shown) < 2000
