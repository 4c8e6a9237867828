"""Content-aware reassembly of features (CARAFE)."""

from freqfusion.ops.carafe.function import carafe
from freqfusion.ops.carafe.naive import carafe_naive

__all__ = ["carafe", "carafe_naive"]
