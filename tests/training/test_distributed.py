import pytest
import torch

from freqfusion.training import load_checkpoint
from tiny_training import read_history, run_script, tiny_fit

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without distributed"
)


def test_two_processes_equal_one(tmp_path, tiny_networks):
    """Same global batches, so the same losses, weights and figures; 11 images to judge leave one over."""
    run_script("two_processes", tmp_path / "two")
    whole, _ = tiny_fit(tmp_path / "one", "plain", data={"length": 11}, max_epochs=2)
    shared = torch.load(tmp_path / "two" / "last.ckpt", weights_only=True)
    for key, value in whole.items():
        torch.testing.assert_close(shared["state_dict"][key], value, rtol=1e-4, atol=1e-6)
    assert len(shared["rng_states"]) == 2

    assert len(read_history(tmp_path / "one")) == len(read_history(tmp_path / "two")) == 4
    for one, two in zip(read_history(tmp_path / "one"), read_history(tmp_path / "two"), strict=True):
        for column, value in one.items():
            assert bool(value) == bool(two[column]), column
            if value:
                assert float(two[column]) == pytest.approx(float(value), rel=1e-4), column


def test_shards_equal_one(tmp_path, tiny_networks):
    """Parameters and optimizer states in shards: the weights of a single process, resumed or not, in one file."""
    run_script("sharded", tmp_path)
    whole, _ = tiny_fit(tmp_path / "one", "plain", data={"length": 11}, max_epochs=2, gradient_clip_val=0.5)
    sharded, resumed = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("sharded", "resumed")
    )
    assert sharded["state_dict"].keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(sharded["state_dict"][key], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(resumed["state_dict"][key], sharded["state_dict"][key]), key
    assert resumed["global_step"] == sharded["global_step"] == 4
    module, _, _ = load_checkpoint(tmp_path / "sharded" / "last.ckpt")
    assert all(torch.equal(value, sharded["state_dict"][key]) for key, value in module.state_dict().items())
