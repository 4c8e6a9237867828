"""What a family of published models says of itself, and how the tensors of an official file get into ours."""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freqfusion.fusion import FreqFusion
from freqfusion.fusion.freqfusion import SIMILARITY_CHANNELS
from freqfusion.weights.files import list_problems

Reasons = Mapping[str, str]
"""Regular expressions for whole keys, each with the reason for the exception."""


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of an official file's tensors by key; asking for a key that it lacks is a ValueError."""

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise ValueError(f"it has no {key}")

    def count(self, prefix: str) -> int:
        """How many modules a list holds, given the beginning of its keys, such as ``"backbone.layers."``."""
        return len({key.removeprefix(prefix).partition(".")[0] for key in self if key.startswith(prefix)})


def same_key(key: str) -> Sequence[str]:
    """For a family whose names are ours."""
    return (key,)


class Plan(NamedTuple):
    """How the tensors of one official file become a model."""

    title: str
    """What it is, for people: the variant and what else was found."""
    model: nn.Module
    """With fresh weights; :func:`freqfusion.save_pretrained` knows how it is made."""
    own_keys: Callable[[str], Sequence[str]] = same_key
    """The model's key for an official one; several if the official tensor holds them one after another along its
    first axis; none if it is not known."""
    unneeded: Reasons = MappingProxyType({})
    """Official keys without a place in the model."""
    kept: Reasons = MappingProxyType({})
    """Keys of the model that may be absent from the file and then stay as they were made."""
    classes: tuple[str, ...] | None = None
    """Their names, where their number is that of a data set on which such models were published."""


class Family(NamedTuple):
    """Published models that have their names in common."""

    title: str
    """A line of the list of what is known."""
    recognises: Callable[[Shapes], bool]
    """Whether a file is one of them."""
    plan: Callable[[Shapes], Plan]
    """Raises ValueError, whose message goes on after "the file is taken for one of these, but"."""


def fusion_options(
    shapes: Shapes, prefix: str, usual: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The settings of a released FreqFusion that its shapes tell, where they are not the usual ones.

    Shapes do not tell ``semi_conv``, ``comp_feat_upsample``, ``hr_residual``, ``upsample_mode``, ``padding_mode`` and
    ``encoder_dilation``.

    Args:
        shapes: of the file.
        prefix: of the module's keys, such as ``"neck.alignment.0."``.
        usual: settings that the network has by default, where they are not those of FreqFusion.

    Raises:
        ValueError: if a tensor that every FreqFusion has is missing, or the kernels are of no odd side.
    """
    taps, compressed, encoder_kernel = shapes[f"{prefix}content_encoder.weight"][:3]
    refines = f"{prefix}content_encoder2.weight" in shapes
    rows = {"lowpass": taps}
    if refines:
        rows["highpass"] = shapes[f"{prefix}content_encoder2.weight"][0]
    windows = {name: shapes[f"{prefix}hamming_{name}"] for name in rows}
    windowed = all(len(window) == 4 for window in windows.values())
    if windowed:
        sides = {name: window[-1] for name, window in windows.items()}
        groups = taps // max(1, sides["lowpass"] ** 2)
    else:
        groups = next((n for n in range(1, taps + 1) if all(_is_kernel(x, n) for x in rows.values())), 0)
        if not groups:
            raise ValueError(
                f"its FreqFusion {prefix} predicts {rows} numbers a pixel, no kernels of odd sides"
            )
        sides = {name: math.isqrt(x // groups) for name, x in rows.items()}
    found: dict[str, Any] = {
        "compressed_channels": compressed,
        "encoder_kernel": encoder_kernel,
        "up_group": groups,
        "hamming_window": windowed,
        "use_high_pass": refines,
        "feature_resample": f"{prefix}dysampler.offset.weight" in shapes,
        **{f"{name}_kernel": side for name, side in sides.items()},
    }
    if found["feature_resample"]:
        offsets, features = shapes[f"{prefix}dysampler.offset.weight"][:2]
        found |= {
            "feature_resample_group": offsets // 8,  # x and y of four sub-pixels for each group
            "feature_resample_norm": f"{prefix}dysampler.norm_hr.weight" in shapes,
            "direction_feat": "sim" if features == SIMILARITY_CHANNELS else "sim_concat",
        }
    defaults = {name: x.default for name, x in inspect.signature(FreqFusion).parameters.items()}
    return {name: value for name, value in found.items() if value != {**defaults, **usual}[name]}


def _is_kernel(rows: int, groups: int) -> bool:
    """Whether ``rows`` outputs hold kernels of an odd side for each of ``groups``."""
    side = math.isqrt(rows // groups)
    return groups * side**2 == rows and side % 2 == 1


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


def fill(plan: Plan, state: Mapping[str, Tensor]) -> Counter[str]:
    """Load an official file's tensors into a plan's model, each one checked.

    The model is in float32, or in float64 where a tensor is.

    Returns:
        How many tensors were left out, by reason.

    Raises:
        ValueError: for tensors of another shape or kind, without a place in the model, and places without a tensor.
            The model is then as it was.
    """
    own = plan.model.state_dict()
    filled: dict[str, Tensor] = {}
    unneeded: Counter[str] = Counter()
    addressed: set[str] = set()
    unknown, misfits, kinds = [], [], []
    for key, value in state.items():
        reason = reason_for(key, plan.unneeded)
        if reason:
            unneeded[reason] += 1
            continue
        names = plan.own_keys(key)
        if not names or not own.keys() >= set(names) or addressed & set(names):
            unknown.append(key)
            continue
        addressed.update(names)
        shapes = [tuple(own[name].shape) for name in names]
        expected = shapes[0] if len(names) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if tuple(value.shape) != expected:
            misfits.append(f"{key} {tuple(value.shape)} instead of {expected} of {', '.join(names)}")
            continue
        usual = value.layout == torch.strided and not (
            value.is_quantized or value.is_meta or value.is_complex()
        )
        if not usual or value.is_floating_point() < own[names[0]].is_floating_point():
            kinds.append(f"{key} ({value.dtype}, {value.layout}, {value.device})")
            continue
        pieces = [value] if len(names) == 1 else value.split([shape[0] for shape in shapes])
        filled.update(zip(names, pieces, strict=True))
    found = list_problems(
        {
            "missing": [name for name in own if name not in addressed and not reason_for(name, plan.kept)],
            "without a place": unknown,
            "of another shape": misfits,
            "of another kind than the numbers expected": kinds,
        }
    )
    if found:
        raise ValueError(f"its tensors do not fit {plan.title}: {found}")
    double = any(value.dtype == torch.float64 for value in filled.values())
    plan.model.to(torch.float64 if double else torch.float32)
    plan.model.load_state_dict(filled, strict=False)  # what is left is kept
    return unneeded


def reason_for(key: str, reasons: Reasons) -> str:
    """Why a key is an exception, or ``""`` if it is none."""
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, key)), "")
