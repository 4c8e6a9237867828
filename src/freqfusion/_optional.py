"""Lazy imports: optional packages with an error that names the install line, and names that load on first use."""

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


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


def lazy(package: str, homes: Mapping[str, str], *needs: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose names load on first use.

    Args:
        package: ``__name__`` of the package.
        homes: each name and the module inside the package that has it; a module of the package under its own
            name stands for itself.
        *needs: optional packages (extra ``train``) that the names need.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        for module in needs:
            require(module, "train")
        home = importlib.import_module(f"{package}.{homes[name]}")
        value = home if homes[name] == name else getattr(home, name)
        setattr(sys.modules[package], name, value)
        return value

    return load
