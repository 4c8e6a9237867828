"""Frequency-aware feature fusion (FreqFusion, TPAMI 2024) for dense prediction.

The names load on first use: the command line sets up the process before torch is imported.
"""

from typing import TYPE_CHECKING

from freqfusion._optional import lazy

if TYPE_CHECKING:
    from freqfusion.checkpoints import from_pretrained, push_to_hub, save_pretrained
    from freqfusion.fusion import (
        FreqFusion,
        FusedFeatures,
        Fusion,
        create_fusion,
        describe_fusions,
        list_fusions,
        register_fusion,
    )
    from freqfusion.integrations import downgrade_, find_sites, register_host, upgrade_
    from freqfusion.ops import carafe, local_similarity, normalize_kernels, resample, window_similarity

__version__ = "0.1.0"

__all__ = [
    "FreqFusion",
    "FusedFeatures",
    "Fusion",
    "carafe",
    "create_fusion",
    "describe_fusions",
    "downgrade_",
    "find_sites",
    "from_pretrained",
    "list_fusions",
    "local_similarity",
    "normalize_kernels",
    "push_to_hub",
    "register_fusion",
    "register_host",
    "resample",
    "save_pretrained",
    "upgrade_",
    "window_similarity",
]

_HOMES = {
    **dict.fromkeys(("from_pretrained", "push_to_hub", "save_pretrained"), "checkpoints"),
    **dict.fromkeys(("FreqFusion", "FusedFeatures", "Fusion", "create_fusion", "describe_fusions"), "fusion"),
    **dict.fromkeys(("list_fusions", "register_fusion"), "fusion"),
    **dict.fromkeys(("downgrade_", "find_sites", "register_host", "upgrade_"), "integrations"),
    **dict.fromkeys(
        ("carafe", "local_similarity", "normalize_kernels", "resample", "window_similarity"), "ops"
    ),
    **{name: name for name in ("checkpoints", "decoders", "fusion", "integrations", "models", "ops")},
}
__getattr__ = lazy(__name__, _HOMES)
