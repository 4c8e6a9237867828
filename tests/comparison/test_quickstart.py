import pytest
import torch

from freqfusion.comparison import quickstart
from freqfusion.comparison.quickstart import steps_for
from freqfusion.tasks import SegmentationModule


def test_steps_follow_from_minutes_alone():
    assert [steps_for(minutes) for minutes in (4, 1, 0.1, 1e-9)] == [900, 225, 22, 1]
    with pytest.raises(ValueError, match="above 0, got -1"):
        steps_for(-1)


def test_both_networks_start_from_the_same_weights():
    modules = quickstart._build(seed=5, steps=10, num_classes=4)
    bilinear, ours = (modules[name].network.state_dict() for name in ("bilinear", "freqfusion"))
    assert bilinear.keys() < ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in bilinear.items())
    other = quickstart._build(seed=6, steps=10, num_classes=4)["bilinear"].network.state_dict()
    assert not torch.equal(other["decode_head.conv_seg.weight"], bilinear["decode_head.conv_seg.weight"])


def test_both_networks_see_the_same_batches(tmp_path, monkeypatch):
    for name, value in {"VAL_SCENES": 8, "TEST_SCENES": 8}.items():
        monkeypatch.setattr(quickstart, name, value)
    seen = {"bilinear": [], "freqfusion": []}
    rates = {"bilinear": [], "freqfusion": []}
    original = SegmentationModule.training_step

    def spy(self, batch, batch_idx):
        seen[self.hparams["fusion"]].append((batch["name"], batch["image"].clone(), batch["mask"].clone()))
        rates[self.hparams["fusion"]].append(
            [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        )
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationModule, "training_step", spy)
    quickstart.compare(0.013, tmp_path, 0, quickstart.Console())
    assert len(seen["bilinear"]) == len(seen["freqfusion"]) == 3
    for (names, images, masks), (other_names, other_images, other_masks) in zip(*seen.values(), strict=True):
        assert names == other_names
        assert torch.equal(images, other_images)
        assert torch.equal(masks, other_masks)
    assert len({name for names, _, _ in seen["bilinear"] for name in names}) == 3 * 8  # none seen twice
    assert [step[0] for step in rates["bilinear"]] == [step[0] for step in rates["freqfusion"]]
    assert len({rate for step in (*rates["bilinear"], *rates["freqfusion"]) for rate in step}) == 3
