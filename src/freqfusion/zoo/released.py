"""The small trained networks of the package ``freqfusion-weights``, which this repository builds (``weights/``)."""

from importlib.util import find_spec
from pathlib import Path

from torch import nn

from freqfusion.zoo.pretrained import CONFIG, from_pretrained

EXAMPLE_PHOTOGRAPH = "example.jpg"
"""A photograph in each folder, on which the network can be tried."""


def list_released() -> list[str]:
    """Names of the trained networks of the installed package ``freqfusion-weights``.

    Raises:
        ImportError: if it is not installed; the message holds the ``pip install`` line.
    """
    return sorted(path.parent.name for path in _home().glob(f"*/{CONFIG}"))


def released_folder(name: str) -> Path:
    """The folder of a released network, as :func:`freqfusion.save_pretrained` wrote it, with a model card
    (``README.md``) and a photograph (``example.jpg``).

    Raises:
        ImportError: if ``freqfusion-weights`` is not installed; the message holds the ``pip install`` line.
        ValueError: for another name.
    """
    known = list_released()
    if name not in known:
        raise ValueError(f"there is no released network {name!r}; choose one of {', '.join(known)}")
    return _home() / name


def load_released(name: str) -> nn.Module:
    """A released network, in evaluation mode on the CPU, in float32; its files hold float16.

    ``freqfusion predict IMAGE --model NAME --out FOLDER`` draws what it sees.

    Args:
        name: one of :func:`list_released`; its folder holds a model card.

    Raises:
        ImportError: if ``freqfusion-weights`` is not installed; the message holds the ``pip install`` line.
        ValueError: for another name.
    """
    return from_pretrained(released_folder(name)).float()


def _home() -> Path:
    found = find_spec("freqfusion_weights")
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "the released networks are not installed. Run: python -m pip install freqfusion-weights (in a clone of "
            "the repository: python -m pip install ./weights)"
        )
    return Path(next(iter(found.submodule_search_locations)))
