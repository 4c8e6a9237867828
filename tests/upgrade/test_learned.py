import torch
from torch import nn

from freqfusion.upgrade.learned import averaged, fitted


def test_averaging_undoes_copied_pixels() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for factors in ((2, 2), (1, 3), (4, 1)):
        enlarged = nn.functional.interpolate(x, scale_factor=factors)
        torch.testing.assert_close(averaged(enlarged, (4, 5)), x)


def test_a_map_takes_the_size_of_the_fine_map() -> None:
    x = torch.randn(1, 2, 6, 10)
    fitting = fitted(x, (6, 10))
    assert torch.equal(fitting, x)
    assert fitting.data_ptr() == x.data_ptr(), "copied for nothing"
    assert torch.equal(fitted(x, (5, 9)), x[..., :5, :9])
    assert torch.equal(fitted(x, (7, 9)), torch.cat((x, x[..., -1:, :]), dim=2)[..., :9])
