"""The data of the benchmarks is well-formed, every case runs, floors by hand."""

import itertools

import pytest
import torch

from freqfusion.benchmarks import cases
from freqfusion.benchmarks.cases import (
    BOTH,
    FORWARD,
    GROUPS,
    OPERATIONS,
    PASSES,
    SHAPE_SETS,
    Case,
    Problem,
    Shape,
    Work,
    explain_case,
    image,
    least_work,
    list_contestants,
    make_cases,
    why_not,
)
from freqfusion.benchmarks.machine import Limits
from support import assert_close

CPU = torch.device("cpu")
TINY = Shape(2, 8, (3, 4), (6, 8))


def tiny(name):
    return Case(name, image(1, 64, 64) if OPERATIONS[name].whole_model else TINY)


def test_shape_sets():
    for name, (maps, picture) in SHAPE_SETS.items():
        for shape in maps:
            assert shape.batch >= 1, name
            assert all(1 <= low <= high for low, high in zip(shape.coarse, shape.fine, strict=True)), name
        assert picture is None or picture.channels == 3, name
    assert Shape(2, 256, (100, 168), (200, 336)) in SHAPE_SETS["coco"].maps
    assert SHAPE_SETS["cityscapes"].maps == (Shape(1, 256, (128, 256), (256, 512)),)
    sides = [side for shape in SHAPE_SETS["odd"].maps for side in (*shape.coarse, *shape.fine)]
    assert all(side % 2 for side in sides)


def test_full_is_every_set_and_has_each_case_once():
    full = make_cases(GROUPS, ["full"])
    assert len(full) == len(set(full))
    assert set(full) == set(make_cases(GROUPS, list(SHAPE_SETS)))
    assert {case.name for case in full} == set(OPERATIONS)
    assert {case.shape for case in full if case.name == "segnext_t"} == {
        picture for _, picture in SHAPE_SETS.values() if picture
    }


@pytest.mark.parametrize(
    ("groups", "shapes", "message"),
    [
        (["karafe"], ["small"], "no operation 'karafe'; choose among carafe, "),
        (["carafe"], ["tiny"], "no set of shapes 'tiny'; choose among small, .*full"),
        (["segnext_t"], ["one-pixel"], "cannot be measured at one-pixel"),
    ],
)
def test_wrong_names_are_answered(groups, shapes, message):
    with pytest.raises(ValueError, match=message):
        make_cases(groups, shapes)


@pytest.mark.parametrize("name", OPERATIONS)
def test_contestants_compute_the_same(name):
    results = {}
    for contestant in list_contestants():
        problem = Problem(tiny(name), contestant, CPU, torch.float64)
        torch.manual_seed(1)  # the decomposition in SegNeXt's head starts from random bases
        outputs = problem.forward()
        assert not any(x.requires_grad for x in outputs)
        torch.manual_seed(2)
        problem.gradients = tuple(torch.randn(x.shape, dtype=x.dtype) for x in outputs)
        gradients = [x for x in problem.forward_backward() if x is not None]
        assert len(gradients) >= len(problem.inputs) - OPERATIONS[name].whole_model
        results[contestant] = outputs, gradients
    expected = results.pop("torch")
    assert "unfold" in results
    for contestant, result in results.items():
        for kind, ours, theirs in zip(("output", "gradient"), expected, result, strict=True):
            for index, (one, other) in enumerate(zip(theirs, ours, strict=True)):
                if kind == "output" or not OPERATIONS[name].whole_model:  # training has dropout
                    assert_close(f"{contestant}, {kind} {index}", one, other, 1e-9)


@pytest.mark.parametrize("contestant", ["unfold", "torch"])
def test_layout_of_the_maps(contestant):
    problem = Problem(Case("carafe k5 x2, NHWC", TINY), contestant, CPU, torch.float32)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in problem.inputs)
    assert all(x.requires_grad for x in problem.inputs)


def test_images_ask_for_no_gradient_and_passes_for_their_mode():
    problem = Problem(tiny("fpn_small"), "torch", CPU, torch.float32)
    problem.run(FORWARD)
    assert not problem.module.training
    problem.run(BOTH)
    assert problem.module.training
    assert not problem.inputs[0].requires_grad


def test_least_work_of_carafe_by_hand():
    x, kernels, out = 2 * 8 * 3 * 4, 2 * 25 * 6 * 8, 2 * 8 * 6 * 8
    forward = 2 * 25 * out
    assert least_work(Case("carafe k5 x2", TINY), torch.float32) == {
        FORWARD: Work(forward, 4 * (x + kernels + out)),
        BOTH: Work(3 * forward, 4 * (3 * (x + kernels) + 2 * out)),
    }
    halves = least_work(Case("carafe k5 x2, NHWC", TINY), torch.bfloat16)
    assert halves[BOTH] == Work(3 * forward, 2 * (3 * (x + kernels) + 2 * out))


def test_least_work_of_a_model_counts_weights_and_no_gradient_of_the_image():
    case = tiny("fpn_small")
    work = least_work(case, torch.float32)
    problem = Problem(case, "torch", CPU, torch.float32)
    weights = sum(x.numel() for x in problem.parameters())
    pixels = 64 * 64
    assert work[FORWARD].bytes == 4 * (weights + 3 * pixels + cases.NUM_CLASSES * pixels)
    assert work[BOTH].bytes - 2 * work[FORWARD].bytes == 4 * weights
    assert work[BOTH].flops > 2 * work[FORWARD].flops > 1e7


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("fpn_small", "segnext_t")])
def test_work_grows_with_the_batch(name):
    once, twice = (least_work(Case(name, Shape(batch, 8, (3, 4), (6, 8))), torch.float32) for batch in (1, 2))
    for pass_name in PASSES:
        assert twice[pass_name].flops == 2 * once[pass_name].flops > 0
        assert once[pass_name].bytes < twice[pass_name].bytes <= 2 * once[pass_name].bytes


def test_floor_is_the_slower_of_both_limits():
    limits = Limits(bytes_per_second=20.0, flops_per_second=100.0)
    assert limits.floor(Work(flops=100, bytes=40)) == (2.0, "memory")
    assert limits.floor(Work(flops=300, bytes=40)) == (3.0, "FMA")


def test_why_a_contestant_is_left_out():
    unusable = "native" not in list_contestants()
    carafe, normalize, fusion = (Case(name, TINY) for name in ("carafe k3 x1", "normalize k5", "FreqFusion"))
    for case, dtype in itertools.product((carafe, normalize, fusion), (torch.float32, torch.float16)):
        assert why_not(case, "unfold", CPU, dtype) == why_not(case, "torch", CPU, dtype) == ""
    assert bool(why_not(fusion, "native", CPU, torch.float32)) == unusable
    if not unusable:
        assert "float16" in why_not(carafe, "native", CPU, torch.float16)


def test_explanations_name_operators_and_sizes():
    explanations = explain_case(Case("FreqFusion", Shape(1, 256, (29, 43), (57, 85))), CPU, torch.float32)
    assert list(explanations) == [
        "carafe(1x256x29x43, 1x25x57x85)",
        "carafe(1x256x57x85, 1x9x57x85)",
        "local_similarity(1x64x57x85)",
        "resample(1x256x57x85, 1x8x57x85)",
        "normalize_kernels(1x25x57x85)",
    ]
    for explanation in explanations.values():
        assert explanation.cannot[explanation.backend] == ""
    at_strides = explain_case(Case("segnext_t", image(1, 227, 339)), CPU, torch.float32)
    assert "carafe(1x256x15x22, 1x25x29x43)" in at_strides


def test_mmcv_takes_part_where_it_has_the_operator(monkeypatch):
    """With a stand-in of its signature, ``carafe(features, masks, kernel_size, group_size, scale_factor)``."""
    assert "mmcv" not in list_contestants()

    def carafe(features, masks, kernel_size, group_size, scale_factor):
        assert [scale_factor * side for side in features.shape[-2:]] == list(masks.shape[-2:])
        return cases.carafe(features, masks, kernel_size, group_size)

    monkeypatch.setattr(cases, "_mmcv_carafe", lambda: carafe)
    assert list_contestants()[-1] == "mmcv"
    cuda = torch.device("cuda")
    for name in ("carafe k5 x2", "carafe k3 x1, NHWC"):
        assert why_not(tiny(name), "mmcv", cuda, torch.float16) == ""
        assert "CUDA" in why_not(tiny(name), "mmcv", CPU, torch.float32)
        assert "CUDA" in why_not(tiny(name), "mmcv", cuda, torch.bfloat16)
        (ours,) = Problem(tiny(name), "torch", CPU, torch.float32).forward()
        (theirs,) = Problem(tiny(name), "mmcv", CPU, torch.float32).forward()
        assert_close(name, theirs, ours, 1e-6)
    uneven = Case("carafe k5 x2", Shape(1, 8, (3, 4), (7, 8)))
    assert "whole ratios" in why_not(uneven, "mmcv", cuda, torch.float32)
    assert "carafe" in why_not(tiny("FreqFusion"), "mmcv", cuda, torch.float32)
