"""Pictures and pages that show what a model does: masks, overlays, error maps, curves, HTML reports.

The modules behind the names load on first use, so that importing this package needs torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from freqfusion._optional import require

if TYPE_CHECKING:
    from freqfusion.analysis import figures, report

__all__ = ["figures", "report"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for package in ("numpy", "PIL", "matplotlib", "jinja2"):
        require(package, "train")
    return import_module(f"{__name__}.{name}")
