"""What a model is set to beside its weights and the arguments it was made with: found, written down, restored.

A detector of torchvision with pretrained weights has frozen norms of another epsilon; thresholds and sizes are
changed by attribute. Neither is in a state dict, nor in the line that makes the model.
"""

import re
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from freqfusion._untrusted import check_arguments
from freqfusion.data.normalisation import Normalisation
from freqfusion.models.base import set_normalisation_

FROZEN = "frozen_norms"
ATTRIBUTES = "attributes"
NORMALISATION = "normalisation"
_OF_TRAINING = re.compile(
    r"training|_?gradient_checkpointing|use_checkpoint|grad_checkpointing|_skip_resize|warnings_issued|config"
    r"|(default|pretrained)_cfg|name_or_path|spec|freqfusion_\w+|_is_\w+|_ddp\w+|num_batches_tracked"
)
"""Attributes that say how a model is trained or where it is from, not what it computes."""
_OWN = frozenset(vars(nn.Module()))
"""What every module has for its own bookkeeping."""


def freeze_as(model: nn.Module, made: nn.Module) -> list[str]:
    """Freeze the norms of a model that was made anew where those of another one are. In place; gives their paths."""
    plain = {path for path, module in made.named_modules() if type(module) is nn.BatchNorm2d}
    frozen = [path for path, module in model.named_modules() if path in plain and _is_frozen_norm(module)]
    _freeze(made, frozen)
    return frozen


def find_attributes(model: nn.Module, made: nn.Module, maker: str) -> dict[str, dict[str, Any]]:
    """What a model is set to other than one that was made anew: plain values of attributes by path and name.

    Args:
        model: the model that is saved.
        made: what its constructor makes, with the same weights' names.
        maker: the constructor, for messages.

    Raises:
        ValueError: for a difference that cannot be written down: a layer of another class, other anchors, another
            activation.
    """
    places = dict(_places(made))
    attributes: dict[str, dict[str, Any]] = {}
    for path, part in _places(model):
        other = places.get(path)
        if other is None:  # the weights, which are compared too, tell whether that matters
            continue
        if _kind(part) != _kind(other):
            raise ValueError(
                f"{path or 'the model'} is a {type(part).__name__}, but {maker} makes a {type(other).__name__}: name "
                "a constructor of your own that makes what you have, host='my_package.models:build'"
            )
        if isinstance(part, nn.Module) and _is_hooked(part) and not _is_hooked(other):
            raise ValueError(
                f"{path or 'the model'} has a hook or a forward set on the instance, which a file cannot hold: "
                "take it away, or name a constructor of your own that sets it, host='my_package.models:build'"
            )
        for name, value in vars(part).items():
            if name not in vars(other) or name in _OWN or _OF_TRAINING.fullmatch(name):
                continue
            before = vars(other)[name]
            if _is_plain(before) and before not in (None, [], ()):  # there what forward keeps would stand
                value = _without_arrays(value)
            if _is_plain(value) and _is_plain(before):
                if _listed(value) != _listed(before):
                    attributes.setdefault(path, {})[name] = _listed(value)
            elif _is_other(value, before):
                raise ValueError(
                    f"{'.'.join(filter(None, (path, name)))} is not what {maker} makes, and not a plain value that "
                    "could be written down: name a constructor of your own, host='my_package.models:build'"
                )
    return attributes


def restore_settings(model: nn.Module, settings: Mapping[str, Any], source: str) -> None:
    """Set a model that was made anew as :func:`freeze_as` and :func:`find_attributes` found it. In place.

    Without a normalisation in the settings what was made keeps its own: ImageNet's, but for detectors of libraries.

    Raises:
        ValueError: for settings that do not fit the model, or that are not plain values.
    """
    frozen, attributes = settings.get(FROZEN, []), settings.get(ATTRIBUTES, {})
    if NORMALISATION in settings:
        set_normalisation_(model, Normalisation.from_json(settings[NORMALISATION], source))
    try:
        _freeze(model, frozen)
        places = dict(_places(model))
        for path, values in attributes.items():
            check_arguments(values, source)
            for name, value in values.items():
                own = vars(places[path])
                known = name in own and name not in _OWN and not _OF_TRAINING.fullmatch(name)
                fits = known and _is_plain(own[name]) and _fits(value, own[name])
                if fits and type(places[path]).__module__.startswith("torch.nn."):
                    fits = _can_run(name, value, own[name])
                if not fits:
                    raise KeyError(f"{path}.{name} = {value!r}"[:80])
                own[name] = _like(value, own[name])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: its settings do not fit the model it names ({error})") from error


def _places(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module, and the plain objects that modules hold, such as torchvision's box coders, by path."""
    for path, module in model.named_modules():
        yield path, module
        for name, value in vars(module).items():
            if name in _OWN or _OF_TRAINING.fullmatch(name) or isinstance(value, (Tensor, type)):
                continue
            if type(value).__module__.startswith("torchvision.") and hasattr(value, "__dict__"):
                yield f"{path}:{name}", value


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its class says; hooks of transformers only watch."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    foreign = [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")]
    return "forward" in vars(module) or bool(foreign)


def _is_frozen_norm(module: nn.Module) -> bool:
    return type(module).__name__ == "FrozenBatchNorm2d" and type(module).__module__.startswith("torchvision.")


def _freeze(model: nn.Module, paths: list[str]) -> None:
    """Put torchvision's frozen norms where there are plain ones."""
    for path in paths:
        norm = model.get_submodule(path)
        if type(norm) is not nn.BatchNorm2d:
            raise KeyError(f"{path} is not a batch norm")
        from torchvision.ops import FrozenBatchNorm2d

        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, FrozenBatchNorm2d(norm.num_features, norm.eps))


def _kind(part: Any) -> str:
    """Its class; norms that differ in how they count over processes alone are one."""
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        return "batch norm"
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(x) for key, x in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _fits(value: Any, before: Any) -> bool:
    """Whether a plain value is of the kind of the one whose place it takes; lists may be of another length."""
    if before is None:
        return _is_plain(value)
    if isinstance(before, (list, tuple)):
        listed = isinstance(value, (list, tuple))
        return listed and all(_is_plain(x) if not before else _fits(x, before[0]) for x in value)
    if isinstance(before, dict):
        kept = isinstance(value, dict) and value.keys() == before.keys()
        return kept and all(_fits(x, before[key]) for key, x in value.items())
    numbers = (int, float)
    return type(value) is type(before) or (type(value) in numbers and type(before) in numbers)


_LEAST = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0, "output_padding": 0}
"""Least values of the sizes of convolutions and poolings."""


def _can_run(name: str, value: Any, before: Any) -> bool:
    """Whether a layer of torch can compute with an attribute of the kind of ``before``, whose place it takes."""
    if name == "padding_mode":
        return value in ("zeros", "reflect", "replicate", "circular")
    if name == "groups":  # the weights say it
        return bool(value == before)
    if name not in _LEAST or value is None or isinstance(value, str):
        return name != "padding" or value in ("same", "valid") or not isinstance(value, str)
    sizes, others = ([x] if isinstance(x, int) else x for x in (value, before))
    return (others is None or len(sizes) == len(others)) and all(
        type(x) is int and _LEAST[name] <= x <= 1024 for x in sizes
    )


def _without_arrays(value: Any) -> Any:
    """Arrays, tensors and the numbers of numpy as plain lists and numbers."""
    if isinstance(value, (list, tuple)):
        return [_without_arrays(x) for x in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _listed(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, dict):
        return {key: _listed(x) for key, x in value.items()}
    return [_listed(x) for x in value] if isinstance(value, (list, tuple)) else value


def _like(value: Any, before: Any) -> Any:
    """Lists as tuples where there were tuples."""
    if isinstance(value, list) and isinstance(before, (list, tuple)):
        inner = before[0] if before else None
        found = [_like(x, inner) for x in value]
        return tuple(found) if isinstance(before, tuple) else found
    return value


def _is_other(value: Any, before: Any) -> bool:
    """Whether two functions, tensors or lists of tensors differ; unknown for other objects."""
    if isinstance(value, Tensor) and isinstance(before, Tensor):
        if value.is_meta or before.is_meta:
            return False
        return value.shape != before.shape or not torch.equal(value.cpu(), before.to("cpu", value.dtype))
    if isinstance(value, (list, tuple)) and isinstance(before, (list, tuple)):
        if len(value) != len(before):
            return True
        return any(_is_other(one, other) for one, other in zip(value, before, strict=True))
    if isinstance(value, FunctionType) and isinstance(before, FunctionType):
        return value.__code__ is not before.__code__
    functions = (FunctionType, BuiltinFunctionType)
    return isinstance(value, functions) and isinstance(before, functions) and value is not before
