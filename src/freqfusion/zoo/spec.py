"""How a model is made: one value that is text, JSON and a model's attribute ``spec``."""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from torch import nn

from freqfusion._untrusted import MAX_CLASSES, check_arguments, check_name, check_plain, without_outside
from freqfusion.upgrade import Upgrade, Upgraded

LIBRARIES = ("torchvision", "smp", "transformers", "monai", "ultralytics", "fusion")
"""Which names before a colon are libraries, so that building runs no code that a text names."""
EXAMPLES = """\
segnext_t, unet_convnext_tiny, mask_rcnn_r50, mask2former_swin_b (freqfusion.list_models() has more)
torchvision:maskrcnn_resnet50_fpn
smp:Unet?encoder_name=resnet18
transformers:Mask2Former, transformers:SegformerForSemanticSegmentation
monai:BasicUNet?spatial_dims=2&in_channels=1
ultralytics:yolo11n.yaml
fusion:freqfusion?hr_channels=64&lr_channels=128
package.module:function?width=32, or path/to/file.py:function"""


@dataclass(frozen=True)
class ModelSpec:
    """How a model is made, upgraded, and what its classes are called.

    ``str()`` gives the line of text that :meth:`parse` reads, of name and options; :meth:`to_json` has everything.
    """

    name: str
    """``segnext_t``; ``library:name`` with one of :data:`LIBRARIES`; ``module:function`` or ``file.py:function``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the constructor, plain values. None names weights to start from."""
    upgrade: Upgrade | None = None
    """What :func:`freqfusion.upgrade_` did to it."""
    classes: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelSpec":
        """Read ``name?option=value&...``; values are Python literals, other words are strings.

        Raises:
            ValueError: if it is not of that form.

        >>> ModelSpec.parse("smp:Unet?encoder_name=resnet18&classes=2").options
        {'encoder_name': 'resnet18', 'classes': 2}
        """
        name, _, query = text.partition("?")
        if not name or name.startswith(":") or name.endswith(":"):
            raise ValueError(f"{text!r} does not name a model; write it like one of these:\n{EXAMPLES}")
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        return cls(name, {key: _literal(value) for key, value in pairs})

    def __str__(self) -> str:
        query = urlencode({key: _text(value) for key, value in self.options.items()})
        return self.name + (f"?{query}" if query else "")

    @property
    def library(self) -> str:
        """What stands before the colon; ``""`` for networks of this package."""
        return self.name.rpartition(":")[0]

    @property
    def is_known(self) -> bool:
        """Whether it is of this package or of a library, so that building runs no code that the text names."""
        return self.library in ("", *LIBRARIES)

    def without_outside(self) -> "ModelSpec":
        """The same without options that make a known library fetch or open something."""
        return replace(self, options=without_outside(self.options, self.library)) if self.is_known else self

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any, source: str | Path = "the spec") -> "ModelSpec":
        """Read what :meth:`to_json` gave, in a file that may be somebody else's.

        Raises:
            ValueError: for another form, or what would fetch or open something outside.
        """
        check_plain(content, source)
        parts = content if isinstance(content, Mapping) else {}
        upgrade, classes = parts.get("upgrade"), parts.get("classes")
        _check_types(parts, {"name": str, "options": dict}, source, "spec")
        if upgrade is not None:
            _check_types({"upgrade": upgrade}, {"upgrade": dict}, source, "spec")
            kinds: dict[str, type] = {"fusion": str, "init": str, "sites": (list, tuple), "options": dict}  # type: ignore[dict-item]
            _check_types(upgrade, kinds, source, "spec.upgrade")
            check_arguments(upgrade["options"], source)
            upgrade = Upgrade(
                upgrade["fusion"], upgrade["init"], tuple(upgrade["sites"]), dict(upgrade["options"])
            )
        if classes is not None and not (
            isinstance(classes, (list, tuple))
            and len(classes) <= MAX_CLASSES
            and all(isinstance(name, str) for name in classes)
        ):
            raise ValueError(
                f"{source} was changed: classes must be at most {MAX_CLASSES} texts. Copy it again"
            )
        spec = cls(
            parts["name"], dict(parts["options"]), upgrade, None if classes is None else tuple(classes)
        )
        if spec.is_known:
            _check_known(spec, source)
        return spec


def spec_of(model: nn.Module, host: str | None = None) -> ModelSpec:
    """How a model is made and upgraded as it is now.

    Args:
        model: upgraded or not.
        host: how it is made before its upgrade, where it does not know that itself.

    Raises:
        ValueError: if that cannot be told.
    """
    known: Any = getattr(model, "spec", None)
    if host is not None:
        spec = replace(ModelSpec.parse(host), classes=getattr(known, "classes", None))
    elif isinstance(known, ModelSpec):
        spec = known
    else:
        spec = _spec_of_library(model)
    return replace(spec.without_outside(), upgrade=getattr(model, "freqfusion_upgrade", None))


def _spec_of_library(model: nn.Module) -> ModelSpec:
    host = type(model).host_class() if isinstance(model, Upgraded) else type(model)
    library = host.__module__.partition(".")[0]
    config: Any = getattr(model, "config", None)
    if library == "transformers" and config is not None:
        return ModelSpec(f"transformers:{host.__name__}", config.to_dict())
    if library == "segmentation_models_pytorch" and config is not None:
        return ModelSpec(f"smp:{host.__name__}", {**config, "encoder_weights": None})
    raise ValueError(
        f"cannot tell how this {host.__name__} is made; pass host=, for example "
        'host="torchvision:maskrcnn_resnet50_fpn?num_classes=5" or host="my_package.models:build"'
    )


def _check_types(parts: Mapping[str, Any], kinds: Mapping[str, Any], source: str | Path, place: str) -> None:
    for name, kind in kinds.items():
        if not isinstance(parts.get(name), kind):
            raise ValueError(f"{source} was changed: {place}.{name} is {parts.get(name)!r}. Copy it again")


def _check_known(spec: ModelSpec, source: str | Path) -> None:
    """Refuse a model, named by a file, whose constructor would fetch or open something."""
    name = spec.name.removeprefix(f"{spec.library}:")
    check_name(name, source)
    check_arguments(spec.options, source, spec.library)
    if spec.library == "ultralytics":
        # it looks in the working directory first, for the name with and without its size
        found = next((x for x in (name, re.sub(r"(\d+)[nslmx]", r"\1", name)) if Path(x).exists()), None)
        if found is not None:
            raise ValueError(
                f"{source} names {name}, and {found} in the working directory would be read for it: run this "
                "in another directory"
            )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _text(value: Any) -> str:
    """What :func:`_literal` reads as ``value``."""
    if isinstance(value, str):
        return value if _literal(value) == value else repr(value)
    text = repr(value)
    if _literal(text) != value:
        raise ValueError(f"{json.dumps(value, default=repr)} is not a plain value and cannot be written")
    return text
