"""What goes into a model's fusions and what comes out, without changing the model."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from freqfusion.fusion import FusedFeatures, Fusion
from freqfusion.upgrade import FusionSlot
from freqfusion.upgrade.core import plain_slots


class Recorded(NamedTuple):
    """The tensors of a module's last call, detached.

    Of a fusion site: the fine and the coarse map ``(B, C, H, W)`` and ``(B, C, h, w)`` in, and both at the fine
    size out. Of any other module: all tensors of its arguments and of what it returned, in order.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def fusion_sites(model: nn.Module) -> list[str]:
    """Paths of the fusions of a model: those of an upgraded host, and those that it was built with.

    A site that was left as it was counts too; gates are part of their site.

    >>> from freqfusion import create_model
    >>> fusion_sites(create_model("fpn_small", num_classes=2))
    ['decode_head.fpn.fusions.0', 'decode_head.fpn.fusions.1', 'decode_head.fpn.fusions.2']
    """
    junctions = [path for path, module in model.named_modules() if isinstance(module, FusionSlot)]
    inside = tuple(f"{path}." for path in junctions)
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (FusionSlot, Fusion)) and not path.startswith(inside)
    ]


@contextmanager
def record_features(model: nn.Module, sites: Sequence[str] | None = None) -> Iterator[dict[str, Recorded]]:
    """Record what goes in and out at fusion sites while the model runs inside the ``with`` block.

    Args:
        model: any model. Where a supported host (see :func:`freqfusion.find_sites`) is not upgraded, what it does at
            its sites is recorded all the same: how it enlarges the coarse map.
        sites: paths of modules, sites or others; by default every site.

    Yields:
        A dict by path, filled when the model runs: each call replaces the one before. It stays filled after
        the block, when the model is as it was.

    Raises:
        ValueError: for a path that the model does not have, or a model without a site if none is named.

    >>> import torch
    >>> from freqfusion import create_model
    >>> model = create_model("fpn_small", num_classes=2, fusion="carafe")
    >>> with record_features(model) as recorded:
    ...     scores = model(torch.rand(1, 3, 64, 96))
    >>> [tuple(x.shape[-2:]) for x in recorded["decode_head.fpn.fusions.0"].inputs]
    [(8, 12), (4, 6)]
    """
    recorded: dict[str, Recorded] = {}
    with ExitStack() as stack:
        stack.enter_context(plain_slots(model))
        paths = fusion_sites(model) if sites is None else list(sites)
        if not paths:
            raise ValueError(
                f"this {type(model).__name__} has no fusion site; name the modules to record, sites=['layer4', ...]"
            )
        modules = dict(model.named_modules())
        for path in paths:
            if path not in modules:
                known = ", ".join(fusion_sites(model)) or "none"
                raise ValueError(f"the model has no module {path!r}; its fusion sites are {known}")

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                given = [*args, *kwargs.values()]
                if isinstance(module, (FusionSlot, Fusion)):
                    named = dict(zip(("hr_feat", "lr_feat"), args, strict=False)) | kwargs
                    given = [named["hr_feat"], named["lr_feat"]]
                if isinstance(output, FusedFeatures):
                    output = (output.hr_feat, output.lr_feat)
                recorded[path] = Recorded(tuple(_tensors(given)), tuple(_tensors(output)))

            handle = modules[path].register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield recorded


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
