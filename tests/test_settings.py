import math

import pytest

from freqfusion._settings import BOUNDS, check_settings


@pytest.mark.parametrize("group", BOUNDS)
def test_no_number_may_be_infinite_or_nan(group):
    for name, bound in BOUNDS[group].items():
        for number in (math.nan, math.inf, -math.inf, 10**400):
            for value in (number, [number, number]):
                with pytest.raises(ValueError, match=f"^{name} is .*, expected "):
                    check_settings(group, {name: value})
        assert check_settings(group, {name: None}) == {name: None}
        assert str(bound)


@pytest.mark.parametrize(
    "group, name, good, bad",
    [
        (
            "data",
            "crop_size",
            [(1, 16384), [48, 64]],
            [(0, 4), (4, 16385), (4,), (4, 4, 4), 4, "4", (True, 4)],
        ),
        ("data", "workers", [0, 256], [-1, 257, 1.5, False]),
        ("semantic", "lr", [1e-9, 1e30], [0, -1, 1e38, "1", [1]]),
        ("semantic", "betas", [(0, 0.999)], [(0, 1), (0.9,)]),
        ("semantic", "window", [1, (3, 4)], [0, (3,), (0, 3)]),
        ("semantic", "boundary_width", [3, 0.02], [0, 0.0, 1.5, -1]),
        ("detection", "milestones", [[], [0.5, 1]], [[-1], [8]]),
        ("masks", "milestones", [[], [0.9, 1]], [[1.1]]),
        ("trainer", "max_epochs", [1, -1], [0, -2]),
        ("trainer", "devices", [1, -1, "auto", "2", "0,1", [0, 1]], [0, "0", -2, "-3", [], [-1]]),
        ("trainer", "limit_train_batches", [1, 0.5, 100], [0, 0.0, 1.5]),
        ("trainer", "fast_dev_run", [True, False, 3], [-1]),
        ("trainer", "val_check_interval", [0.25, 100, "00:01:00:00"], [0, 2.5, "-1", "0"]),
    ],
)
def test_bounds(group, name, good, bad):
    for value in good:
        assert check_settings(group, {name: value}) == {name: value}
    for value in bad:
        with pytest.raises(ValueError, match="expected"):
            check_settings(group, {name: value})


def test_whole_floats_are_taken():
    checked = check_settings(
        "data", {"crop_size": (48.0, 64.0), "batch_size": 4.0, "ratio_range": (1.0, 2.0)}
    )
    assert repr(checked) == "{'batch_size': 4, 'crop_size': (48, 64), 'ratio_range': (1.0, 2.0)}"
    with pytest.raises(ValueError, match=r"crop_size is \(48.5, 64\)"):
        check_settings("data", {"crop_size": (48.5, 64)})


@pytest.mark.parametrize(
    "group, settings, message",
    [
        ("semantic", {"window": 8, "stride": 9}, "--stride 9 is larger than the window 8"),
        ("semantic", {"window": (8, 4), "stride": 6}, r"--stride 6 is larger than the window \(8, 4\)"),
        ("semantic", {"stride": 9}, "--stride is 9, without a window"),
        ("semantic", {"class_weights": [0, 0.0]}, "nothing would be learnt"),
        ("data", {"ratio_range": (2, 1)}, "smaller factor first"),
        ("data", {"jitter": [2, 1]}, "smaller factor first"),
    ],
)
def test_numbers_that_do_not_fit_together(group, settings, message):
    with pytest.raises(ValueError, match=message):
        check_settings(group, settings, "--{}")
