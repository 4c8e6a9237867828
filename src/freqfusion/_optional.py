"""Lazy imports: optional packages with an error that names the install line, and names that load on first use."""

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

IMPORT_VARIABLE = "FREQFUSION_IMPORT"
"""The environment variable that names the Python files and modules that the user has imported."""


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
        raise _absent(error.name, extra) from error


def lazy(package: str, homes: Mapping[str, str], extra: str = "") -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose names load on first use.

    Args:
        package: ``__name__`` of the package.
        homes: for each module of the package the names in it that are the package's too, separated by spaces; an
            asterisk stands for the module itself.
        extra: what brings the packages that the modules import.
    """
    places = {
        module if name == "*" else name: module for module, names in homes.items() for name in names.split()
    }

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            home = importlib.import_module(f"{package}.{places[name]}")
        except ModuleNotFoundError as error:
            if not extra or error.name is None or error.name.partition(".")[0] == __package__:
                raise
            raise _absent(error.name, extra) from error
        value = home if places[name] == name else getattr(home, name)
        setattr(sys.modules[package], name, value)
        return value

    return load


def _absent(module: str, extra: str) -> ImportError:
    return ImportError(
        f"{module.partition('.')[0]} is not installed, and this part of freqfusion needs it. "
        f'Run: python -m pip install "freqfusion[{extra}]"'
    )
