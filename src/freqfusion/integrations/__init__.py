"""Fusion modules in models that already exist: one call, any supported host, weights kept.

A file here for every host library; :mod:`freqfusion.integrations.hosts` says which.
"""

from freqfusion.integrations.base import Gate, Joint, Junction, Upgraded
from freqfusion.integrations.hosts import register_host
from freqfusion.integrations.segmenters import HostSegmenter, as_segmenter, build_host, list_hosts
from freqfusion.integrations.spec import load_model
from freqfusion.integrations.upgrade import Site, Upgrade, downgrade_, find_sites, upgrade_

__all__ = [
    "Gate",
    "HostSegmenter",
    "Joint",
    "Junction",
    "Site",
    "Upgrade",
    "Upgraded",
    "as_segmenter",
    "build_host",
    "downgrade_",
    "find_sites",
    "list_hosts",
    "load_model",
    "register_host",
    "upgrade_",
]
