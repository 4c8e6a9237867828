from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from host_cases import HostCase


class _Backbone(nn.Module):
    """Three strided convolutions and a pyramid, as ``BackboneWithFPN`` has them."""

    def __init__(self, extra: nn.Module | None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 4, 1)
        self.stages = nn.ModuleList(nn.Conv2d(8 * 2**i, 16 * 2**i, 3, 2, 1) for i in range(3))
        self.fpn = FeaturePyramidNetwork([16, 32, 64], 32, extra)
        self.out_channels = 32

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps, x = OrderedDict(), self.stem(x).relu()
        for i, stage in enumerate(self.stages):
            x = stage(x).relu()
            maps[str(i)] = x
        return self.fpn(maps)


def _detector(cls: type[nn.Module], **options: Any) -> nn.Module:
    extra = LastLevelP6P7(32, 32) if cls in (RetinaNet, FCOS) else LastLevelMaxPool()
    levels = 5 if cls in (RetinaNet, FCOS) else 4
    sizes = tuple((8 * 2**i,) for i in range(levels))
    anchors = AnchorGenerator(sizes, ((1.0,),) * levels)
    name = "anchor_generator" if cls in (RetinaNet, FCOS) else "rpn_anchor_generator"
    return cls(_Backbone(extra), 4, min_size=32, max_size=128, **{name: anchors}, **options)


def _two_stage(cls: type[nn.Module]) -> nn.Module:
    names = ["0", "1", "2"]
    options: dict[str, Any] = {"box_roi_pool": MultiScaleRoIAlign(names, 3, 1)}
    if cls is MaskRCNN:
        options["mask_roi_pool"] = MultiScaleRoIAlign(names, 4, 1)
    return _detector(cls, box_detections_per_img=5, rpn_post_nms_top_n_test=20, **options)


def _detect(model: nn.Module, image: Tensor) -> Any:
    if not model.training:
        return model(list(image))
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, *image.shape[-2:], dtype=torch.uint8)
    return model(list(image), [target] * len(image))


CASES = [
    HostCase("FeaturePyramidNetwork", lambda: _Backbone(None), sites=2),
    HostCase("FasterRCNN", lambda: _two_stage(FasterRCNN), _detect, compiles="backbone", sites=2),
    HostCase("MaskRCNN", lambda: _two_stage(MaskRCNN), _detect, compiles="backbone", sites=2),
    HostCase(
        "RetinaNet",
        lambda: _detector(RetinaNet, score_thresh=0.0, detections_per_img=5),
        _detect,
        compiles="backbone",
        sites=2,
    ),
    HostCase(
        "FCOS",
        lambda: _detector(FCOS, score_thresh=0.0, detections_per_img=5),
        _detect,
        compiles="backbone",
        sites=2,
    ),
]
