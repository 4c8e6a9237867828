"""The kinds of tasks, each with its module and its data."""

from freqfusion.training.data import ImageData, SegmentationData
from freqfusion.training.detection import DetectionModule
from freqfusion.training.masks import MaskModule
from freqfusion.training.module import SegmentationModule
from freqfusion.training.objects import ObjectData
from freqfusion.training.task import TaskModule

TASKS: dict[str, tuple[type[TaskModule], type[ImageData]]] = {
    SegmentationModule.task: (SegmentationModule, SegmentationData),
    DetectionModule.task: (DetectionModule, ObjectData),
    MaskModule.task: (MaskModule, ObjectData),
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
