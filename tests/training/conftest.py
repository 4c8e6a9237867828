import pytest

from tiny_training import create_tiny


@pytest.fixture
def tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks ``noisy`` and ``plain`` in place of the real ones."""
    monkeypatch.setattr("freqfusion.training.module.create_model", create_tiny)
