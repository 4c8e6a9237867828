"""The one checker and renamer: whether tensors of a file fit a model, and which of its names they get."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

LISTED = 8
"""How many keys of each kind an error message names."""
Reasons = Mapping[str, str]
"""Regular expressions for whole keys, each with the reason for the exception."""
OwnKeys = Callable[[str], Sequence[str]]
"""A model's key for one of a file; several if the file's tensor holds them one after another along its first axis;
none if unknown."""


def same_key(key: str) -> Sequence[str]:
    """Identity, for files whose names are the model's."""
    return (key,)


class Match(NamedTuple):
    """How the tensors of a file fit a model."""

    tensors: dict[str, Tensor]
    """Under the model's names."""
    unneeded: Counter[str]
    """How many were left out, by reason."""
    problems: str
    """What does not fit, in one line; ``""`` if every tensor is accounted for."""


def match(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    own_keys: OwnKeys = same_key,
    unneeded: Reasons = MappingProxyType({}),
    kept: Reasons = MappingProxyType({}),
) -> Match:
    """Find the place of every tensor.

    Args:
        state: the file's tensors by name.
        own: the model's, as ``state_dict(keep_vars=True)`` gives them; of a tensor with several names one is enough.
        own_keys: the model's names of a file's tensor.
        unneeded: names of the file without a place in the model.
        kept: names of the model that may be absent from the file.
    """
    filled: dict[str, Tensor] = {}
    left_out: Counter[str] = Counter()
    addressed: set[str] = set()
    unknown, misfits, kinds = [], [], []
    for key, value in state.items():
        reason = reason_for(key, unneeded)
        if reason:
            left_out[reason] += 1
            continue
        names = own_keys(key)
        if not names or not own.keys() >= set(names) or addressed & set(names):
            unknown.append(key)
            continue
        addressed.update(names)
        shapes = [tuple(own[name].shape) for name in names]
        expected = shapes[0] if len(names) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if tuple(value.shape) != expected:
            of = "" if names == (key,) else f" of {', '.join(names)}"
            misfits.append(f"{key} {tuple(value.shape)} instead of {expected}{of}")
            continue
        usual = value.layout == torch.strided and not (
            value.is_quantized or value.is_meta or value.is_complex()
        )
        if not usual or value.is_floating_point() < own[names[0]].is_floating_point():
            kinds.append(f"{key} ({value.dtype}, {value.layout}, {value.device})")
            continue
        pieces = [value] if len(names) == 1 else value.split([shape[0] for shape in shapes])
        filled.update(zip(names, pieces, strict=True))
    present = {id(own[name]) for name in addressed}
    problems = list_problems(
        {
            "missing": [
                name
                for name, tensor in own.items()
                if name not in addressed and id(tensor) not in present and not reason_for(name, kept)
            ],
            "without a place": unknown,
            "of another shape": misfits,
            "of another kind than the numbers expected": kinds,
        }
    )
    return Match(filled, left_out, problems)


def fill_(
    model: nn.Module,
    state: Mapping[str, Tensor],
    title: str,
    own_keys: OwnKeys = same_key,
    unneeded: Reasons = MappingProxyType({}),
    kept: Reasons = MappingProxyType({}),
) -> Counter[str]:
    """Load tensors into a model, each one checked (see :func:`match`); they take the dtype of the model's. In place.

    Args:
        title: what the model is, for messages.

    Returns:
        How many tensors were left out, by reason.

    Raises:
        ValueError: for tensors of another shape or kind, without a place in the model, and places without a tensor.
            The model is then as it was.
    """
    found = match(state, model.state_dict(keep_vars=True), own_keys, unneeded, kept)
    if found.problems:
        raise ValueError(f"its tensors do not fit {title}: {found.problems}")
    model.load_state_dict(found.tensors, strict=False)  # what is left is kept
    return found.unneeded


def list_problems(problems: Mapping[str, Sequence[str]]) -> str:
    """What is wrong with a set of weights, in one line: the first keys of each kind, or ``""`` if there are none."""
    found = []
    for kind, keys in problems.items():
        if keys:
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            found.append(f"{len(keys)} {kind}: {', '.join(keys[:LISTED])}{more}")
    return "; ".join(found)


def reason_for(key: str, reasons: Reasons) -> str:
    """Why a key is an exception, or ``""`` if it is none."""
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, key)), "")


class Renaming:
    """Names by a table, in both directions.

    Args:
        rows: an official name and ours. ``{}`` stands for a part of a name that has no dots and is the same in
            both; after a final dot anything follows, the same in both. Several names of ours are those of tensors
            that the official one holds one after another along its first axis. The first row that fits counts.

    >>> names = Renaming({"norm{}.": "norms.{}.", "qkv.{}": ("q.{}", "k.{}", "v.{}")})
    >>> names.own_keys("norm2.weight"), names.own_keys("qkv.bias"), names.own_keys("qkv.x.bias")
    (('norms.2.weight',), ('q.bias', 'k.bias', 'v.bias'), ())
    """

    def __init__(self, rows: Mapping[str, str | tuple[str, ...]]) -> None:
        self._rows = {official: (own,) if isinstance(own, str) else own for official, own in rows.items()}

    def own_keys(self, official_key: str) -> Sequence[str]:
        """Our names of an official tensor, in the order of its rows; empty for one that is not in the table."""
        for official, owns in self._rows.items():
            parts = _match(official, official_key)
            if parts is not None:
                return tuple(_put(own, parts) for own in owns)
        return ()

    def official_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under official names, given those under ours.

        Raises:
            ValueError: for names that are not in the table.
        """
        pieces: dict[str, dict[int, Tensor]] = {}
        unknown = []
        for key, value in state.items():
            found = self._official_key(key)
            if found is None:
                unknown.append(key)
            else:
                pieces.setdefault(found[0], {})[found[1]] = value
        if unknown:
            raise ValueError(f"no official names are known for {list_problems({'keys': unknown})}")
        return {
            key: torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0]
            for key, parts in pieces.items()
        }

    def _official_key(self, own_key: str) -> tuple[str, int] | None:
        for official, owns in self._rows.items():
            for i, own in enumerate(owns):
                parts = _match(own, own_key)
                if parts is not None:
                    return _put(official, parts), i
        return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{\}", r"([^.]+)")
    return re.compile(pattern + "(.+)" if template.endswith(".") else pattern)


def _match(template: str, key: str) -> Sequence[str] | None:
    found = _pattern(template).fullmatch(key)
    return None if found is None else found.groups()


def _put(template: str, parts: Sequence[str]) -> str:
    return (template + "{}" if template.endswith(".") else template).format(*parts)
