"""The recipes that come with the package, and how a file of settings is found and read."""

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "recipes"
GROUPS = ("model", "data", "trainer")
VARIANTS = "variants"
"""Where a recipe says what differs for some networks and fusion methods."""


def list_recipes() -> dict[str, Path]:
    """The recipes of the package by name, such as ``ade20k/segnext``."""
    return {
        path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.glob("*/*.yaml"))
    }


def find_recipe(name: str) -> Path:
    """The file that ``name`` means: a path, or else the name of a recipe of the package.

    Raises:
        ValueError: if it is neither.
    """
    path, recipes = Path(name), list_recipes()
    if path.exists() and not path.is_dir():
        return path
    known = name.removesuffix(".yaml")
    if known in recipes:
        return recipes[known]
    longer = [recipe for recipe in recipes if known.startswith(f"{recipe}_")]  # with network or method added
    near = longer or difflib.get_close_matches(known, recipes, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`freqfusion recipes` lists them"
    raise ValueError(f"there is no recipe {name}, neither a file nor one that comes with the package; {hint}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The content of a recipe, without running anything in it.

    Raises:
        ValueError: if it is not of a recipe's form.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    except (RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        held = "is empty" if recipe is None else f"holds {type(recipe).__name__} {str(recipe)[:40]!r}"
        raise ValueError(f"{path} {held}, expected settings such as 'model:' with 'lr: 0.001' below it")
    variants = recipe.get(VARIANTS, {})
    if not isinstance(variants, dict) or not all(
        isinstance(settings, dict) for settings in variants.values()
    ):
        given = str(variants)[:40]
        raise ValueError(
            f"{path}: {VARIANTS} is {given!r}, expected names such as segnext_b_* with settings below each"
        )
    for settings in (recipe, *variants.values()):
        for group in GROUPS:
            if not isinstance(settings.get(group, {}), dict):
                raise ValueError(
                    f"{path}: {group} is {str(settings[group])[:40]!r}, expected settings below it"
                )
    return recipe


def choose_variant(recipe: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """The settings of a recipe for one network and fusion method.

    Args:
        recipe: its content. Each key of ``variants`` is a pattern of names, as of files; the settings below it
            come over those of the recipe where the pattern fits, in the order of the file.
        name: ``NETWORK_FUSION``; None for the recipe without its variants.
    """
    settings = {key: value for key, value in recipe.items() if key != VARIANTS}
    for pattern, changes in recipe.get(VARIANTS, {}).items():
        if name is not None and fnmatchcase(name, str(pattern)):
            settings = _merge(settings, changes)
    return settings


def needs_network(recipe: Mapping[str, Any]) -> bool:
    """Whether settings outside the network itself differ between networks."""
    return any(
        set(changes) - {"model"} or set(changes.get("model", {})) - {"network_options"}
        for pattern, changes in recipe.get(VARIANTS, {}).items()
        if not str(pattern).startswith("*_")
    )


def _merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = _merge(before, value)
        merged[key] = value
    return merged
