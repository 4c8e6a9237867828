"""Models by a line of text: ``torchvision:maskrcnn_resnet50_fpn?num_classes=5``."""

import ast
import copy
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from torch import nn

from freqfusion import models
from freqfusion._optional import require
from freqfusion._untrusted import check_arguments, check_name
from freqfusion.fusion import create_fusion

EXAMPLES = """\
torchvision:maskrcnn_resnet50_fpn?num_classes=5
smp:Unet?encoder_name=resnet18&classes=2
transformers:Mask2Former, transformers:SegformerForSemanticSegmentation?num_labels=19
monai:BasicUNet?spatial_dims=2&in_channels=1&out_channels=2
ultralytics:yolo11n.yaml
freqfusion:segnext_t?num_classes=19
fusion:freqfusion?hr_channels=64&lr_channels=128
package.module:function?width=32, or path/to/file.py:function"""


@dataclass(frozen=True)
class ModelSpec:
    """How a model is made.

    A constructor's name in a library and its arguments, which are plain values; ``str()`` gives the line that
    :meth:`parse` reads.
    """

    source: str
    """One of ``torchvision smp transformers monai ultralytics freqfusion fusion``, else a Python module or file."""
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "ModelSpec":
        """Read ``library:name?argument=value&...``; values are Python literals, other words are strings.

        Raises:
            ValueError: if it is not of that form.

        >>> ModelSpec.parse("smp:Unet?encoder_name=resnet18&classes=2")
        ModelSpec(source='smp', name='Unet', arguments={'encoder_name': 'resnet18', 'classes': 2})
        """
        target, _, query = text.partition("?")
        source, colon, name = target.rpartition(":")
        if not (source and colon and name):
            raise ValueError(f"{text!r} does not name a model; write it like one of these:\n{EXAMPLES}")
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        return cls(source, name, {key: _literal(value) for key, value in pairs})

    def __str__(self) -> str:
        query = urlencode({key: _text(value) for key, value in self.arguments.items()})
        return f"{self.source}:{self.name}" + (f"?{query}" if query else "")

    @property
    def is_known(self) -> bool:
        """Whether the library is one of those above, so that building runs no code that the text names."""
        return self.source in _BUILDERS

    def build(self) -> nn.Module:
        """The model with fresh weights; nothing is downloaded unless an argument asks for it.

        Raises:
            ImportError: if the library is not installed.
            ValueError: if it has no such model, or what was named does not make one.
            TypeError: for an argument that the constructor does not take.
        """
        build = _BUILDERS.get(self.source)
        arguments = copy.deepcopy(self.arguments)  # transformers takes entries out of nested dicts
        model = build(self.name, arguments) if build else self._python()(**arguments)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self} made a {type(model).__name__}, not a torch.nn.Module")
        model.freqfusion_host = self  # type: ignore[assignment]
        return model

    def _python(self) -> Callable[..., Any]:
        if self.source.endswith(".py"):
            path = Path(self.source)
            if not path.is_file():
                raise ValueError(f"there is no file {path} to take {self.name} from")
            source = importlib.util.spec_from_file_location(path.stem, path)
            assert source is not None  # a .py file has a loader
            assert source.loader is not None
            module = importlib.util.module_from_spec(source)
            source.loader.exec_module(module)
        else:
            try:
                module = importlib.import_module(self.source)
            except ModuleNotFoundError as error:
                if error.name != self.source.partition(".")[0]:
                    raise
                raise ValueError(
                    f"there is neither a library nor a Python module {self.source!r}; write the model like one of "
                    f"these:\n{EXAMPLES}"
                ) from error
        function: Any = getattr(module, self.name, None)
        if not callable(function):
            raise ValueError(f"{self.source} has no function or class {self.name!r}")
        found: Callable[..., Any] = function
        return found


def load_model(spec: str) -> nn.Module:
    """Build a model from a line of text, with fresh weights.

    Args:
        spec: ``library:name?argument=value&...``, for example
            ``torchvision:maskrcnn_resnet50_fpn?num_classes=5`` or ``smp:Unet?encoder_name=resnet18``;
            or ``package.module:function`` or ``file.py:function`` for a constructor of your own.

    Returns:
        The model; it remembers ``spec``, so that :func:`freqfusion.save_pretrained` can write it down.

    Raises:
        ImportError: if the library is not installed.
        ValueError: for another form, or a name that the library does not have.
        TypeError: for an argument that the constructor does not take.
    """
    return ModelSpec.parse(spec).build()


def check_spec(spec: ModelSpec, source: str | Path) -> None:
    """Refuse a model of a library, named by a file, whose constructor would fetch or open something.

    Raises:
        ValueError: naming the argument.
    """
    check_name(spec.name, source)
    check_arguments(spec.arguments, source, spec.source)
    if spec.source == "ultralytics":
        # it looks in the working directory first, for the name with and without its size
        names = (spec.name, re.sub(r"(\d+)[nslmx]", r"\1", spec.name))
        found = next((name for name in names if Path(name).exists()), None)
        if found is not None:
            raise ValueError(
                f"{source} names {spec.name}, and {found} in the working directory would be read for it: run this "
                "in another directory"
            )


def _model_class(module: Any, name: str, library: str) -> type[nn.Module]:
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{library} has no model {name!r}")
    return found


def _torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    models = require("torchvision.models", "vision")
    if name not in models.list_models():
        raise ValueError(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them")
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        arguments.setdefault("weights_backbone", None)
    model: nn.Module = models.get_model(name, **arguments)
    return model


def _smp(name: str, arguments: dict[str, Any]) -> nn.Module:
    smp = require("segmentation_models_pytorch", "hosts")
    return _model_class(smp, name, "smp")(**{"encoder_weights": None, **arguments})


_TASKS = (
    "",
    "ForUniversalSegmentation",
    "ForInstanceSegmentation",
    "ForSemanticSegmentation",
    "ForDepthEstimation",
    "ForObjectDetection",
)


def _transformers(name: str, arguments: dict[str, Any]) -> nn.Module:
    transformers = require("transformers", "hosts")
    candidates: Iterator[Any] = (getattr(transformers, name + task, None) for task in _TASKS)
    classes: list[Any] = [
        cls for cls in candidates if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    ]
    if not classes:
        raise ValueError(
            f"transformers has no model {name!r}, nor one of that name with {', '.join(_TASKS[1:])}"
        )
    model: nn.Module = classes[0](classes[0].config_class.from_dict(arguments))
    return model


def _monai(name: str, arguments: dict[str, Any]) -> nn.Module:
    network = _model_class(require("monai.networks.nets", "medical"), name, "monai")
    if "pretrained" in inspect.signature(network).parameters:  # some download weights unless told otherwise
        arguments.setdefault("pretrained", False)
    return network(**arguments)


def _ultralytics(name: str, arguments: dict[str, Any]) -> nn.Module:
    if not name.endswith(".yaml"):  # a .pt file is a pickle, which could run anything
        raise ValueError(
            f"an ultralytics model is named by its configuration, such as yolo11n.yaml, not {name!r}"
        )
    try:
        from ultralytics import RTDETR, YOLO
    except ModuleNotFoundError as error:
        raise ImportError(
            "ultralytics is not installed; freqfusion does not bring it, as its licence is AGPL-3.0. If that "
            "suits you, run: python -m pip install ultralytics"
        ) from error
    model: Any = (RTDETR if "rtdetr" in name else YOLO)(name).model
    if arguments:  # the wrapper passes none on
        model = type(model)(name, verbose=False, **arguments)
    built: nn.Module = model
    return built


def _freqfusion(name: str, arguments: dict[str, Any]) -> nn.Module:
    create: Any = models.create_detector if name.startswith(models.DETECTORS) else models.create_model
    model: nn.Module = create(name, **arguments)
    return model


def _fusion(name: str, arguments: dict[str, Any]) -> nn.Module:
    return create_fusion(name, **arguments)


_BUILDERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "smp": _smp,
    "transformers": _transformers,
    "monai": _monai,
    "ultralytics": _ultralytics,
    "freqfusion": _freqfusion,
    "fusion": _fusion,
}


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
        raise ValueError(f"{json.dumps(value, default=repr)} is no plain value and cannot be written down")
    return text
