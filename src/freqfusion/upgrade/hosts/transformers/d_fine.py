"""transformers: the top-down half of the hybrid encoder of D-FINE."""

from transformers.models.d_fine.modeling_d_fine import DFineRepNCSPELAN4

from freqfusion.upgrade.hosts import register_host
from freqfusion.upgrade.hosts.transformers.rt_detr import TopDownBlock


@register_host
class UpgradedDFineRepNCSPELAN4(TopDownBlock, DFineRepNCSPELAN4):
    """A top-down block of D-FINE."""
