"""Fusion modules in models that already exist: one call, any supported host, weights kept.

A file here for every host library; :mod:`freqfusion.integrations.hosts` says which.
"""

from freqfusion.integrations.base import Gate, Joint, Junction, Upgraded
from freqfusion.integrations.hosts import register_host
from freqfusion.integrations.spec import load_model
from freqfusion.integrations.upgrade import Site, Upgrade, downgrade_, find_sites, upgrade_

__all__ = [
    "Gate",
    "Joint",
    "Junction",
    "Site",
    "Upgrade",
    "Upgraded",
    "downgrade_",
    "find_sites",
    "load_model",
    "register_host",
    "upgrade_",
]
