"""The kinds of tasks, each with its module and its data."""

from freqfusion.tasks.base import TaskModule
from freqfusion.tasks.detection import DetectionModule
from freqfusion.tasks.feature_data import FeatureData
from freqfusion.tasks.features import FeatureModule
from freqfusion.tasks.image_data import ImageData, SegmentationData
from freqfusion.tasks.mask_classification import MaskClassificationModule
from freqfusion.tasks.object_data import ObjectData
from freqfusion.tasks.semantic import SegmentationModule

TASKS: dict[str, tuple[type[TaskModule], type[ImageData]]] = {
    SegmentationModule.task: (SegmentationModule, SegmentationData),
    DetectionModule.task: (DetectionModule, ObjectData),
    MaskClassificationModule.task: (MaskClassificationModule, ObjectData),
    FeatureModule.task: (FeatureModule, FeatureData),
}
"""By what ``task:`` in a recipe says; the first is meant where it says nothing."""


def find_task(name: str) -> tuple[type[TaskModule], type[ImageData]]:
    """Module and data of a task.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]
