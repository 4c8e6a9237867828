"""Fusion modules in models that already exist: one call, any supported host, weights kept.

``hosts`` has a file for every library and says which class replaces which.
"""

from freqfusion.upgrade.base import FusionPoint, FusionSlot, Gate, Upgraded
from freqfusion.upgrade.core import Site, Upgrade, downgrade_, find_sites, upgrade_
from freqfusion.upgrade.hosts import register_host

__all__ = [
    "FusionPoint",
    "FusionSlot",
    "Gate",
    "Site",
    "Upgrade",
    "Upgraded",
    "downgrade_",
    "find_sites",
    "register_host",
    "upgrade_",
]
