"""Published segmentation networks that transformers can build: their sizes and settings by a short name.

Sources: NVlabs/SegFormer (``local_configs``), mmsegmentation's and ConvNeXt's UPerNet configurations,
facebookresearch/Mask2Former (``configs``; those of the FreqFusion release are built on them).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from freqfusion._optional import require

STAGES = ["stage1", "stage2", "stage3", "stage4"]


class Published(NamedTuple):
    """A network of transformers: the classes' names, and what its configuration sets apart from the defaults."""

    architecture: str
    """``{architecture}Config`` is the configuration's class."""
    task: str
    """``{architecture}For{task}`` is the model's class."""
    settings: Mapping[str, Any]
    backbone: str = ""
    """``{backbone}Config`` is the class of the backbone's configuration, where that is one of its own."""
    backbone_settings: Mapping[str, Any] = {}


def _segformer(widths: list[int], depths: list[int], head: int) -> Published:
    settings = {
        "hidden_sizes": widths,
        "depths": depths,
        "num_attention_heads": [1, 2, 5, 8],
        "decoder_hidden_size": head,
        "drop_path_rate": 0.1,
        "classifier_dropout_prob": 0.1,
    }
    return Published("Segformer", "SemanticSegmentation", settings)


def _swin(width: int, depths: list[int], heads: int, window: int) -> dict[str, Any]:
    return {
        "embed_dim": width,
        "depths": depths,
        "num_heads": [heads, 2 * heads, 4 * heads, 8 * heads],
        "window_size": window,
        "drop_path_rate": 0.3,
    }


_SWINS = {
    "t": _swin(96, [2, 2, 6, 2], 3, 7),
    "s": _swin(96, [2, 2, 18, 2], 3, 7),
    "b": _swin(128, [2, 2, 18, 2], 4, 12),
    "l": _swin(192, [2, 2, 18, 2], 6, 12),
}
"""Windows as in the ImageNet weights of the published runs: 224 pixels for T and S, 384 for B and L."""

_CONVNEXT_T = {
    "hidden_sizes": [96, 192, 384, 768],
    "depths": [3, 3, 9, 3],
    "drop_path_rate": 0.4,
    "layer_scale_init_value": 1.0,
}


def _upernet(backbone: str, settings: Mapping[str, Any], stage3: int) -> Published:
    head = {"hidden_size": 512, "auxiliary_in_channels": stage3}
    return Published("UperNet", "SemanticSegmentation", head, backbone, settings)


def _mask2former(backbone: str, settings: Mapping[str, Any]) -> Published:
    return Published("Mask2Former", "UniversalSegmentation", {}, backbone, settings)


PUBLISHED: dict[str, Published] = {
    "segformer_b0": _segformer([32, 64, 160, 256], [2, 2, 2, 2], 256),
    "segformer_b1": _segformer([64, 128, 320, 512], [2, 2, 2, 2], 256),
    "segformer_b2": _segformer([64, 128, 320, 512], [3, 4, 6, 3], 768),
    "segformer_b3": _segformer([64, 128, 320, 512], [3, 4, 18, 3], 768),
    "segformer_b4": _segformer([64, 128, 320, 512], [3, 8, 27, 3], 768),
    "segformer_b5": _segformer([64, 128, 320, 512], [3, 6, 40, 3], 768),
    "upernet_swin_t": _upernet("Swin", _SWINS["t"], 384),
    "upernet_swin_s": _upernet("Swin", _SWINS["s"], 384),
    "upernet_swin_b": _upernet("Swin", _SWINS["b"], 512),
    "upernet_convnext_t": _upernet("ConvNext", _CONVNEXT_T, 384),
    "mask2former_r50": _mask2former("ResNet", {"depths": [3, 4, 6, 3]}),
    "mask2former_r101": _mask2former("ResNet", {"depths": [3, 4, 23, 3]}),
    "mask2former_swin_t": _mask2former("Swin", _SWINS["t"]),
    "mask2former_swin_s": _mask2former("Swin", _SWINS["s"]),
    "mask2former_swin_b": _mask2former("Swin", _SWINS["b"]),
    "mask2former_swin_l": _mask2former("Swin", _SWINS["l"]),
}
"""Mask2Former is the same but for its backbone and has 100 queries; the published instance and panoptic networks
with Swin-L have 200 (``num_queries=200``)."""


def build_published(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A network of :data:`PUBLISHED` with fresh weights, in training mode; nothing is downloaded.

    Args:
        name: one of the names.
        num_classes: number of classes K, without background.
        options: settings of the configuration to change, ``num_queries=200`` for example; ``backbone_config`` is a
            dict of those of the backbone's.

    Raises:
        ImportError: if transformers is not installed.
        TypeError: for a setting that the configuration does not have.
    """
    transformers = require("transformers", "hosts")
    published = PUBLISHED[name]
    backbone_options = options.pop("backbone_config", {}) if published.backbone else {}
    settings = {**published.settings, **options}
    if published.backbone:
        settings["backbone_config"] = _configure(
            getattr(transformers, f"{published.backbone}Config"),
            {**published.backbone_settings, **backbone_options, "out_features": STAGES},
            f"{name}: backbone_config",
        )
    config = _configure(getattr(transformers, f"{published.architecture}Config"), settings, name)
    config.num_labels = num_classes
    model: nn.Module = getattr(transformers, f"{published.architecture}For{published.task}")(config)
    return model


def _configure(config_class: Any, settings: Mapping[str, Any], name: str) -> Any:
    known = config_class().to_dict().keys()  # the constructors take any name
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise TypeError(f"{name}: a {config_class.__name__} has no {', '.join(unknown)}")
    return config_class(**settings)
