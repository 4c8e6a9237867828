"""Find the places where a model upsamples coarse features, and put fusion modules there."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from freqfusion.fusion.catalog import create_fitting_fusion
from freqfusion.upgrade.base import (
    FusionPoint,
    FusionSlot,
    Gate,
    ImageStem,
    Upgraded,
    give_image,
    take_image,
)
from freqfusion.upgrade.hosts import SUPPORTED, upgraded_class

Init = Literal["identity", "paper"]

TOLERANCE = 1e-5
"""Largest difference that ``verify`` lets pass, relative to the largest value, in float32 and float64.

Half precision is held to its own rounding, 2 * eps."""


@dataclass(frozen=True)
class Site:
    """A place in a model where a coarse map meets a fine one."""

    path: str
    """Path of the fusion in the upgraded model, as ``model.get_submodule`` takes it."""
    host: str
    """Library and class of the module that holds it."""
    hr_channels: int
    lr_channels: int
    mode: str
    """How the host upsamples the coarse map: a mode of interpolation, ``"learned"`` or ``"none"``."""
    skipped: str
    """Why no fusion fits, or ``""`` where one does."""


@dataclass(frozen=True)
class Upgrade:
    """What was done to a model; kept as its attribute ``freqfusion_upgrade``, so that it can be done again."""

    fusion: str
    init: str
    sites: tuple[str, ...]
    """Paths of the sites that got a fusion."""
    options: dict[str, Any] = field(default_factory=dict)


class _UpgradePlace(NamedTuple):
    path: str
    module: nn.Module
    context: Any
    """The module with what its class has to know of its surroundings."""
    upgraded: type[Upgraded]
    points: list[FusionPoint]
    neighbour: Tensor
    """A parameter whose device and dtype new ones take."""
    owner: nn.Module | None = None
    """The module around it that gets the image, where that guides its features."""

    def site(self, point: FusionPoint) -> Site:
        host = self.upgraded.host_class()
        return Site(
            ".".join(filter(None, (self.path, "fusions", point.name))),
            f"{host.__module__.partition('.')[0]} {host.__name__}",
            point.hr_channels,
            point.lr_channels,
            point.mode,
            point.skipped,
        )


def find_sites(model: nn.Module, *, image_guide: bool = False) -> list[Site]:
    """Every place in a model, upgraded or not, where a supported host lets coarse features meet fine ones.

    Args:
        model: any model. Modules of a supported class are found wherever they are; a subclass of one is
            not, since it may do something else.
        image_guide: also the places that the option of this name of :func:`upgrade_` adds; of an upgraded model
            those that it has are there anyway.

    Returns:
        The sites, used and skipped; an empty list if there are none.

    >>> import torchvision
    >>> fpn = torchvision.ops.FeaturePyramidNetwork([64, 128, 256], out_channels=32)
    >>> [site.path for site in find_sites(fpn)]
    ['fusions.1', 'fusions.0']
    """
    return [place.site(point) for place in _places(model, image_guide) for point in place.points]


def upgrade_(
    model: nn.Module,
    fusion: str = "freqfusion",
    *,
    filter_fn: Callable[[Site], bool] | None = None,
    init: Init = "identity",
    verify: bool = True,
    image_guide: bool = False,
    **options: Any,
) -> nn.Module:
    """Let a model you have upsample its coarse features with a fusion method. In place.

    The host's modules keep their attributes, parameter names and weights, and get a submodule ``fusions``.
    New parameters take the device and dtype of the module that gets them. Do this before the optimizer is
    made and before the model is wrapped or compiled; weights may be loaded before or after.

    Args:
        model: a model with a supported host's modules; see :func:`find_sites`.
        fusion: a name of :func:`freqfusion.list_fusions`, with ``spatial_dims=3`` for a host of volumes.
        filter_fn: given a :class:`Site`, whether to use it; all by default.
        init: ``"identity"``: the outputs are the original's until training moves the gates, which start at
            zero. ``"paper"``: as published, without gates, for training from scratch.
        verify: run every changed module before and after on a small random input in evaluation mode; with
            ``"identity"`` the results must be equal, else of equal shapes.
        image_guide: over a plain vision transformer, bring the features up by maps of the image as well, which a few
            new convolutions make: in UPerNet from the tokens to 1/4, in DPT at the last enlargement. Other hosts have
            no such place. What these do is not part of ``verify``, which runs the modules without an image.
        options: further arguments of the method's constructor.

    Returns:
        The same model.

    Raises:
        ValueError: for an unknown method or ``init``, a model that is upgraded already, one without a site
            that can be used, or one that the change would not reach: wrapped, compiled, prepared by accelerate or
            Fabric, or with layers of peft; a module with a ``forward`` of its own on the instance, or quantised
            ones; values on the meta device.
        TypeError: for an option that the method does not have.
        RuntimeError: if verification fails. The model is then as it was.
    """
    if init not in get_args(Init):
        raise ValueError(f'init must be "identity" or "paper", got {init!r}')
    _check_upgradable(model)
    places = list(_places(model, image_guide))
    if image_guide and not any(place.owner for place in places):
        raise ValueError(
            f"no part of this {type(model).__name__} takes the image as a guide: that is for UPerNet and DPT of "
            "transformers over a plain vision transformer; leave out image_guide"
        )
    wanted = [site for place in places for site in map(place.site, place.points) if not site.skipped]
    if filter_fn is not None:
        wanted = [site for site in wanted if filter_fn(site)]
    if not wanted:
        raise ValueError(_why_nothing(model, places))
    paths = tuple(site.path for site in wanted)

    # all fusions are built before anything is changed, so that a wrong option leaves the model as it was
    changes = []
    for place in places:
        used = {point.name for point in place.points if place.site(point).path in paths}
        prefix = f"{place.path}." if place.path else ""
        changes_along = not place.points and any(path.startswith(prefix) for path in paths)
        if used or changes_along:
            _check_changeable(place)
            changes.append((place, _build(place, used, fusion, init, options)))
    _check_values(model)
    try:
        for place, fusions in changes:
            _change(place, fusions, init, verify)
    except BaseException:  # Ctrl-C too
        _restore(model)
        raise
    if image_guide:
        options = {"image_guide": True, **options}
    model.freqfusion_upgrade = Upgrade(fusion, init, paths, options)  # type: ignore[assignment]
    return model


def upgrade_again_(model: nn.Module, upgrade: Upgrade) -> nn.Module:
    """Do to a model what :func:`upgrade_` did to another one of the same structure. In place, no verification."""
    return upgrade_(
        model,
        upgrade.fusion,
        filter_fn=lambda site: site.path in upgrade.sites,
        init=upgrade.init,  # type: ignore[arg-type]  # upgrade_ checks it
        verify=False,
        **upgrade.options,
    )


def downgrade_(model: nn.Module) -> nn.Module:
    """Take the fusions out again: the classes, parameters and outputs of the host as it was. In place.

    Host weights that were trained meanwhile stay as trained.

    Args:
        model: what :func:`upgrade_` was called with.

    Returns:
        The same model.

    Raises:
        ValueError: if the model is not upgraded, or a ``forward`` was set on a module or its class changed since.
    """
    if not _is_upgraded(model):
        raise ValueError("this model is not upgraded; there is nothing to take out")
    for path, module in model.named_modules():
        if isinstance(module, Upgraded):
            _drop_leftover_forward(module)
            name, cls = path or type(module).__name__, type(module)
            if "forward" in vars(module):
                raise ValueError(
                    f"{name} has a forward set on the instance, which would go on running the upgraded one; take it "
                    "off first (accelerate: remove_hook_from_module(model, recurse=True))"
                )
            if cls.__bases__[1:] != (cls.host_class(),):
                raise ValueError(f"{name} was made a {cls.__name__} after the upgrade; downgrade before that")
    _restore(model)
    return model


@contextmanager
def plain_slots(model: nn.Module) -> Iterator[None]:
    """Give every host module that is not upgraded its slots for a while, each doing what the host does."""
    places = [place for place in _places(model) if place.points and not isinstance(place.module, Upgraded)]
    for place in places:
        _check_changeable(place)
    for place in places:
        place.module.fusions = _build(place, set(), "", "identity", {})
        place.module.__class__ = place.upgraded
    try:
        yield
    finally:
        for place in places:
            _take_out(place.module)


def _places(model: nn.Module, image_guide: bool = False) -> Iterator[_UpgradePlace]:
    for path, module in model.named_modules():
        upgraded = upgraded_class(module)
        if upgraded is not None:
            near = (x for part in (module, model) for x in part.parameters() if x.is_floating_point())
            try:
                context = upgraded.context(module, _around(model, path))
                points = upgraded.points(context)
                owner = None
                if image_guide or "stem" in getattr(module, "fusions", {}):
                    owner, further = _image_points(model, path, upgraded, context)
                    points = [*points, *further]
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path or 'the model'}: cannot tell where fusions fit in this {type(module).__name__} "
                    f"({error}); {_CHANGED}"
                ) from error
            yield _UpgradePlace(path, module, context, upgraded, points, next(near, torch.empty(0)), owner)


def _image_points(
    model: nn.Module, path: str, upgraded: type[Upgraded], context: Any
) -> tuple[nn.Module | None, list[FusionPoint]]:
    """The module around that gets the image, and the points whose fine maps are made of it, if there are any."""
    while path:
        path = path.rpartition(".")[0]
        around: Any = model.get_submodule(path)
        config = getattr(around, "config", None)
        if config is not None and "pixel_values" in signature(type(around).forward).parameters:
            backbone = getattr(config, "backbone_config", None) or config
            patch = getattr(backbone, "patch_size", None)
            if not isinstance(patch, int) or hasattr(backbone, "depths"):  # with stages
                break
            points = upgraded.image_points(context, patch)
            return (around if points else None), points
    return None, []


def _around(model: nn.Module, path: str) -> nn.Module | None:
    """The module that holds the one at ``path``, itself or in a list or dict; None for the model."""
    while path:
        path = path.rpartition(".")[0]
        parent = model.get_submodule(path)
        if not isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
            return parent
    return None


def _is_upgraded(model: nn.Module) -> bool:
    return any(isinstance(module, Upgraded) for module in model.modules())


def _check_upgradable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        outsider = _outsider(module)
        if outsider:
            raise ValueError(f"{path + ' is' if path else 'the model is inside'} {outsider}")
    if any(f"{base.__module__}.{base.__name__}" in _HANDLES for base in type(model).__mro__):
        raise ValueError(
            f"this {type(model).__name__} only holds the network, and changes it for another one when it trains; "
            "upgrade its attribute model, and train with freqfusion.upgrade.hosts.ultralytics.UpgradeTrainer"
        )
    if _is_upgraded(model):
        raise ValueError(
            "this model is upgraded already; call freqfusion.downgrade_(model) first, or choose among all sites "
            "with filter_fn in one call"
        )


_WRAPPERS = (
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
    "OptimizedModule",
    "ScriptModule",
    "_FabricModule",
    "AveragedModel",
)


def _outsider(module: nn.Module) -> str:
    """What ``module`` is that would not follow the change of what is in it, or ``""``."""
    name, bases = type(module).__name__, type(module).__mro__
    if any(base.__module__.partition(".")[0] == "peft" for base in bases):
        return (
            f"a {name} of peft, which would leave the fusions out when it saves; upgrade first, then call "
            "get_peft_model with every entry of fusions (decode_head.fusions.0, ...) among modules_to_save"
        )
    if any(base.__name__ in _WRAPPERS for base in bases):
        return f"a {name}, which would not see the new parameters; upgrade first, then wrap"
    if module._compiled_call_impl is not None:
        return f"a {name} that is compiled; upgrade first, then compile"
    if getattr(module, "_is_accelerate_prepared", False) or getattr(module, "_fabric", None) is not None:
        return (
            f"a {name} that accelerate or Fabric has set up, whose optimizers would not see the new parameters; "
            "upgrade first, then prepare or setup"
        )
    return ""


def _check_changeable(place: _UpgradePlace) -> None:
    """Refuse a module that would not run the upgraded code, or whose values are not plain numbers.

    Raises:
        ValueError: naming what is in the way.
    """
    module, name = place.module, place.path or type(place.module).__name__
    _drop_leftover_forward(module)
    code = {
        "forward",
        *(x for base in place.upgraded.__mro__ if issubclass(base, Upgraded) for x in vars(base)),
    }
    shadowed = next((x for x in vars(module) if x in code and callable(vars(module)[x])), None)
    if shadowed is not None:
        raise ValueError(
            f"{name} has a {shadowed} set on the instance, which would run instead of the upgraded one; {_FIRST}"
        )
    if not place.points:
        return
    for child in module.modules():
        if any(_NOT_PLAIN.match(base.__module__) for base in type(child).__mro__):
            raise ValueError(f"{name} holds a quantised {type(child).__name__}; upgrade first, then quantise")
    for key, tensor in _state(module):
        if type(tensor.data) is not Tensor:
            raise ValueError(
                f"{key} of {name} is a {type(tensor.data).__name__}, quantised or spread over devices; upgrade first"
            )


_CHANGED = "it is not as its library makes it: upgrade first, then change its parts"
_FIRST = (
    "take it off (accelerate: remove_hook_from_module(model, recurse=True)), upgrade, then put it on again"
)
_NOT_PLAIN = re.compile(r"torch\.ao\.|torchao\.|bitsandbytes\.")


def _drop_leftover_forward(module: nn.Module) -> None:
    """Take the class's own ``forward`` off the instance, where hooks that were taken off leave it."""
    found = vars(module).get("forward")
    if (
        getattr(found, "__self__", None) is module
        and getattr(found, "__func__", None) is type(module).forward
    ):
        del module.forward


def _check_values(model: nn.Module) -> None:
    empty = next((name for name, tensor in _state(model) if tensor.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"{empty} is on the meta device, without values, and the fusions would have none either, which no "
            "checkpoint of the host fills; give the model its values first (take accelerate's hooks on forward "
            "off), then upgrade"
        )


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


_HANDLES = ("ultralytics.engine.model.Model",)


def _why_nothing(model: nn.Module, places: Iterable[_UpgradePlace]) -> str:
    sites = [place.site(point) for place in places for point in place.points]
    usable = [site for site in sites if not site.skipped]
    if usable:
        return f"filter_fn refused all {len(usable)} sites: {', '.join(site.path for site in usable)}"
    if sites:
        paths: dict[str, list[str]] = {}
        for site in sites:
            paths.setdefault(site.skipped, []).append(site.path)
        reasons = "; ".join(f"{', '.join(at)}: {reason}" for reason, at in paths.items())
        return f"no site of this {type(model).__name__} can be used: {reasons}"
    graph = any(base.__name__ == "GraphModule" for module in model.modules() for base in type(module).__mro__)
    traced = " (torch.fx has taken it apart: upgrade first, then trace)" if graph else ""
    supported = "\n".join(f"  {library}: {what}" for library, what in SUPPORTED.items())
    return (
        f"found no place in this {type(model).__name__} where a supported host lets coarse features meet fine "
        f"ones{traced}. Supported are\n{supported}\nFor a module of your own write a subclass of "
        "freqfusion.upgrade.Upgraded and decorate it with freqfusion.register_host; its documentation "
        "shows one in ten lines"
    )


def _build(
    place: _UpgradePlace, used: set[str], fusion: str, init: Init, options: dict[str, Any]
) -> nn.ModuleDict:
    fusions = nn.ModuleDict()
    for point in place.points:
        built = None
        if point.name in used:
            defaults = point.freqfusion if fusion == "freqfusion" else {}
            fitting = {**defaults, **options}
            built = create_fitting_fusion(
                fusion, point.hr_channels, point.lr_channels, fitting, point.spatial_dims
            )
        fusions[point.name] = FusionSlot(point, built, init)
    channels = place.upgraded.gate_channels(place.context)
    if init == "identity" and channels and not all(point.gated for point in place.points):
        fusions["gate"] = Gate(channels)
    strides = [point.stride for point in place.points if point.name in used]
    if any(strides):
        fusions["stem"] = ImageStem(max(strides))
    like = place.neighbour
    return fusions.to(like.device, like.dtype).train(place.module.training)


def _change(place: _UpgradePlace, fusions: nn.ModuleDict, init: Init, verify: bool) -> None:
    module, name = place.module, place.path or type(place.module).__name__
    verify = verify and bool(place.points)
    example = _example(place) if verify else ()
    before, called_before = _run(name, module, example) if verify else ([], set())
    module.fusions = fusions
    module.__class__ = place.upgraded
    if (
        "stem" in fusions
        and place.owner is not None
        and give_image not in place.owner._forward_pre_hooks.values()
    ):
        place.owner.register_forward_pre_hook(give_image, with_kwargs=True)
        place.owner.register_forward_hook(take_image, always_call=True)
    if not verify:
        return
    after, called = _run(name, module, example)
    problem = _difference(before, after, exact=init == "identity")
    if problem:
        raise RuntimeError(
            f"{name}: with init={init!r} the upgraded module's {problem}. This version of the host may not be "
            "one that was tested; the model is as it was. verify=False goes on regardless"
        )
    for path, child in module.named_modules():
        _drop_leftover_forward(child)
        own = "forward" in vars(child), child._forward_hooks, child._forward_pre_hooks
        if any(own) and child in called_before - called:
            raise ValueError(
                f"{name}.{path} has a hook or a forward set on the instance, and the upgraded {name} calls its parts "
                f"instead; {_FIRST}"
            )


def _restore(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Upgraded):
            _take_out(module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (give_image, take_image)]:
                del hooks[key]
    if hasattr(model, "freqfusion_upgrade"):
        del model.freqfusion_upgrade


def _take_out(module: Any) -> None:
    del module.fusions
    module.__class__ = type(module).host_class()


def _example(place: _UpgradePlace) -> tuple[Any, ...]:
    like = place.neighbour
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        example = place.upgraded.example(place.context)
    return _map_tensors(
        example, lambda x: x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)
    )


def _run(name: str, module: nn.Module, example: tuple[Any, ...]) -> tuple[list[Tensor], set[nn.Module]]:
    """The tensors that ``module`` returns, and which modules were called."""
    called: set[nn.Module] = set()
    watch = register_module_forward_pre_hook(lambda child, inputs: called.add(child))
    try:
        with _evaluating(module), torch.no_grad():
            return list(_tensors(module(*example))), called
    except Exception as error:
        raise RuntimeError(
            f"{name}: this {type(module).__name__} does not run on small random maps ({error}); {_CHANGED}. "
            "verify=False goes on regardless"
        ) from error
    finally:
        watch.remove()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def _difference(before: list[Tensor], after: list[Tensor], exact: bool) -> str:
    """What differs between two lists of results, or ``""``."""
    if [x.shape for x in before] != [x.shape for x in after]:
        shapes = [[tuple(x.shape) for x in tensors] for tensors in (before, after)]
        return f"results have the shapes {shapes[1]} instead of {shapes[0]}"
    if not exact:
        return ""
    for one, other in zip(before, after, strict=True):
        allowed = TOLERANCE
        if one.is_floating_point():
            allowed = max(TOLERANCE, 2 * torch.finfo(one.dtype).eps if one.dtype.itemsize < 4 else 0)
        one, other = one.cpu().double(), other.cpu().double()  # not every device has doubles
        error = float((one - other).abs().max() / one.abs().max().clamp_min(1e-30)) if one.numel() else 0.0
        if not error <= allowed:
            return f"results differ by {error:.1e} (relative; {allowed:.0e} is allowed)"
    return ""


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return type(value)((key, _map_tensors(item, function)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, function) for item in value)
    return value
