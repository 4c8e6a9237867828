import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_training
from tiny_training import read_history, tiny_fit


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes_equal_one(tmp_path, tiny_networks):
    """Same global batches, so the same losses, weights and figures; 11 images to judge leave one over."""
    tests = Path(tiny_training.__file__).parent
    done = subprocess.run(
        [sys.executable, tiny_training.__file__, "two_processes", str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
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
