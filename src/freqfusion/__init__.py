"""Frequency-aware feature fusion (FreqFusion, TPAMI 2024) for dense prediction.

The names load on first use: the command line sets up the process before torch is imported.
"""

from typing import TYPE_CHECKING

from freqfusion._optional import lazy

if TYPE_CHECKING:
    from freqfusion.fusion import (
        FreqFusion,
        FusedFeatures,
        Fusion,
        create_fusion,
        describe_fusions,
        list_fusions,
        register_fusion,
    )
    from freqfusion.ops import carafe, local_similarity, normalize_kernels, resample, window_similarity
    from freqfusion.upgrade import downgrade_, find_sites, register_host, upgrade_
    from freqfusion.zoo import (
        create_model,
        from_pretrained,
        list_models,
        list_released,
        load_released,
        push_to_hub,
        register_model,
        save_pretrained,
    )

__version__ = "0.1.0"

__all__ = [
    "FreqFusion",
    "FusedFeatures",
    "Fusion",
    "carafe",
    "create_fusion",
    "create_model",
    "describe_fusions",
    "downgrade_",
    "find_sites",
    "from_pretrained",
    "list_fusions",
    "list_models",
    "list_released",
    "load_released",
    "local_similarity",
    "normalize_kernels",
    "push_to_hub",
    "register_fusion",
    "register_host",
    "register_model",
    "resample",
    "save_pretrained",
    "upgrade_",
    "window_similarity",
]

_HOMES = {
    "decoders": "*",
    "features": "*",
    "fusion": "* FreqFusion FusedFeatures Fusion create_fusion describe_fusions list_fusions register_fusion",
    "models": "*",
    "ops": "* carafe local_similarity normalize_kernels resample window_similarity",
    "upgrade": "* downgrade_ find_sites register_host upgrade_",
    "zoo": "* create_model from_pretrained list_models list_released load_released push_to_hub register_model "
    "save_pretrained",
}
__getattr__ = lazy(__name__, _HOMES)
