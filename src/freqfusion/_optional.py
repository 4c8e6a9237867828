"""Lazy imports of optional packages with an error that names the install line."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which the extra ``extra`` brings.

    Raises:
        ImportError: if it is absent; the message holds the ``pip install`` line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there but one of its own imports is broken: say that instead
        raise ImportError(
            f"{module.partition('.')[0]} is not installed, and this part of freqfusion needs it. "
            f'Run: python -m pip install "freqfusion[{extra}]"'
        ) from error
