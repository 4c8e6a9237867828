"""Who takes part along an axis, and for how long."""

from dataclasses import replace

import pytest
import torch

from freqfusion.benchmarks import scaling
from freqfusion.benchmarks.cases import PASSES, Shape, Work
from freqfusion.benchmarks.runner import Result, Settings
from freqfusion.benchmarks.scaling import AXES, measure_scaling

SETTINGS = Settings(torch.device("cpu"), torch.float32, threads=1, rounds=1)


def test_axes():
    axes = {axis.name: axis for axis in AXES}
    assert list(axes) == ["pixels", "channels", "batch", "threads"]
    pixels = axes["pixels"]
    assert pixels.shape(pixels.values[0]).fine == (32, 32)
    assert pixels.shape(pixels.values[-1]) == Shape(1, scaling.CHANNELS, (512, 512), (1024, 1024))
    assert axes["channels"].shape(256).channels == 256
    assert axes["batch"].shape(8).batch == 8
    for axis in AXES:
        assert list(axis.values) == sorted(set(axis.values))


@pytest.fixture
def asked(monkeypatch):
    """The measurement replaced by one where the peer takes a microsecond a pixel, and fails above 64 images."""
    asked = []

    def measure(case, contestants, settings, step):
        shape = case.shape
        seconds = 1e-6 * shape.batch * shape.fine[0] * shape.fine[1]
        asked.append((shape, tuple(contestants), settings.threads))
        step("now")
        return [
            Result(case, name, pass_name, Work(1, 1), () if shape.batch > 64 else (seconds,))
            for pass_name in PASSES
            for name in contestants
        ]

    monkeypatch.setattr(scaling, "measure_case", measure)
    return asked


def test_the_peer_leaves_where_it_would_take_too_long(asked, monkeypatch):
    pixels, _, batch, threads = AXES
    monkeypatch.setattr(
        scaling,
        "AXES",
        (
            replace(pixels, values=(2**20, 2**22, 2**24)),
            replace(batch, values=(1, 128, 256)),
            replace(threads, values=(1, 2)),
        ),
    )
    said = []
    points = list(measure_scaling(["unfold", "torch"], SETTINGS, said.append))
    assert [contestants for _, contestants, _ in asked] == [
        ("unfold", "torch"),  # 1 s
        ("unfold", "torch"),  # 4 s, next would be 17
        ("torch",),
        ("unfold", "torch"),
        ("unfold", "torch"),  # fails
        ("torch",),
        ("unfold", "torch"),
        ("unfold", "torch"),
    ]
    assert [count for *_, count in asked] == [1] * 6 + [1, 2]
    assert [(point.axis.name, point.value) for point in points][-2:] == [("threads", 1), ("threads", 2)]
    assert said[0] == "pixels: now"


def test_threads_are_the_processors_alone(asked):
    points = measure_scaling(["torch"], replace(SETTINGS, device=torch.device("meta")))
    assert {point.axis.name for point in points} == {"pixels", "channels", "batch"}
