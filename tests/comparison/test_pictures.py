"""Which part of an image is enlarged, and how columns become a strip."""

import numpy as np
import pytest
import torch

from freqfusion.comparison.pictures import _strip, _thin_window, thin_parts


def test_thin_parts():
    mask = torch.zeros(20, 20, dtype=torch.uint8)
    mask[:, 9:11] = 1  # a pole
    mask[2:9, 12:19] = 2  # a block
    mask[15:, :5] = 255
    thin = thin_parts(mask)
    assert bool(thin[:, 9:11].all())
    assert not bool(thin[2:9, 12:19].any())
    assert not bool(thin[:13, :8].any())
    assert bool(thin[16:, 5:9].all())  # ground pressed between the pole and what is not judged
    assert not bool(thin[mask == 255].any())


@pytest.mark.parametrize("size", [(96, 96), (60, 200), (200, 60), (9, 30)])
def test_the_enlarged_part_has_the_proportions_of_the_image(size):
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[:, size[1] // 2] = 1
    rows, columns = _thin_window(mask)
    assert 0 <= rows.start < rows.stop <= size[0]
    assert columns.start <= size[1] // 2 < columns.stop <= size[1]
    tall, wide = rows.stop - rows.start, columns.stop - columns.start
    assert tall / wide == pytest.approx(size[0] / size[1], rel=0.15)


@pytest.mark.parametrize("methods, shape", [(2, (2, 6)), (3, (4, 4)), (7, (4, 8))])
def test_enlarged_parts_stand_beside_or_below(methods, shape):
    picture = np.zeros((30, 40, 3), np.uint8)
    columns = {f"column {index}": [picture, picture] for index in range(methods + 1)}
    strip = _strip(columns, (slice(3, 9), slice(4, 12)), "caption")
    assert (len(strip.rows), len(strip.titles)) == shape
    assert len({entry.shape for row in strip.rows for entry in row}) == 1
    assert strip.rows[0][0].max() == 255  # the frame of the part
    assert strip.rows[-1][-1].max() == 0


def test_objects_have_no_enlarged_part():
    picture = np.zeros((600, 800, 3), np.uint8)
    strip = _strip({"truth": [picture], "a": [picture]}, None, "")
    assert (len(strip.rows), strip.titles) == (1, ["truth", "a"])
    assert strip.rows[0][0].shape == (405, 540, 3)
