"""What a family of published models says of itself."""

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from freqfusion.fusion import FreqFusion
from freqfusion.fusion.freqfusion import SIMILARITY_CHANNELS
from freqfusion.weights.fill import OwnKeys, Reasons, same_key


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of an official file's tensors by key; asking for a key that it lacks is a ValueError."""

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise ValueError(f"it has no {key}")

    def count(self, prefix: str) -> int:
        """How many modules a list holds, given the beginning of its keys, such as ``"backbone.layers."``."""
        return len({key.removeprefix(prefix).partition(".")[0] for key in self if key.startswith(prefix)})


class Plan(NamedTuple):
    """How the tensors of one official file become a model."""

    title: str
    """What it is, for people: the variant and what else was found."""
    model: nn.Module
    """The model with fresh weights; its ``spec`` says how it is made."""
    own_keys: OwnKeys = same_key
    """The model's key for an official one; several if the official tensor holds them one after another along its
    first axis; none if unknown."""
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
                f"its FreqFusion {prefix} predicts {rows} numbers per pixel, which are not kernels of odd sides"
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
