"""Models of other libraries, as these make them."""

import copy
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from freqfusion._optional import require
from freqfusion.fusion import create_fusion
from freqfusion.zoo.spec import EXAMPLES, ModelSpec


def build_library(spec: ModelSpec) -> nn.Module:
    """A model of a library, or of code of the user's, before any upgrade.

    Its weights are fresh; nothing is downloaded unless an option asks for it.

    Raises:
        ImportError: if the library is not installed.
        ValueError: if it has no such model, or what was named does not make one.
        TypeError: for an argument that the constructor does not take.
    """
    library, _, name = spec.name.rpartition(":")
    options = copy.deepcopy(spec.options)  # transformers takes entries out of nested dicts
    build = _BUILDERS.get(library)
    model = build(name, options) if build else _find_function(library, name)(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} made a {type(model).__name__}, not a torch.nn.Module")
    return model


def _find_function(source: str, name: str) -> Callable[..., Any]:
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"there is no file {path} to take {name} from")
        file = importlib.util.spec_from_file_location(path.stem, path)
        assert file is not None  # a .py file has a loader
        assert file.loader is not None
        module = importlib.util.module_from_spec(file)
        file.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name != source.partition(".")[0]:
                raise
            raise ValueError(
                f"there is neither a library nor a Python module {source!r}; write the model like one of "
                f"these:\n{EXAMPLES}"
            ) from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{source} has no function or class {name!r}")
    found: Callable[..., Any] = function
    return found


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
            "ultralytics is not installed; freqfusion does not install it, as its licence is AGPL-3.0. If that "
            "suits you, run: python -m pip install ultralytics"
        ) from error
    model: Any = (RTDETR if "rtdetr" in name else YOLO)(name).model
    if arguments:  # the wrapper passes none on
        model = type(model)(name, verbose=False, **arguments)
    built: nn.Module = model
    return built


def _fusion(name: str, arguments: dict[str, Any]) -> nn.Module:
    return create_fusion(name, **arguments)


_BUILDERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "smp": _smp,
    "transformers": _transformers,
    "monai": _monai,
    "ultralytics": _ultralytics,
    "fusion": _fusion,
}
