"""Official checkpoints made from lists of their keys, with the weights of the golden files' rule."""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from support import GOLDEN, value_by_rule


def key_list(name: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = json.loads((GOLDEN / f"keys_{name}.json").read_text())
    return shapes


def official_state(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Every tensor of the list; constants, which the rule leaves alone, are ones."""
    state = {}
    for key, shape in shapes.items():
        value = value_by_rule(key, shape)
        counts = key.endswith("num_batches_tracked")
        kept = torch.ones(tuple(shape), dtype=torch.int64 if counts else dtype)
        state[key] = kept if value is None else value.to(dtype)
    return state
