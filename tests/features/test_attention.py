"""The attention by tiles against one dense matrix; its windows."""

import pytest
import torch
from torch import Tensor

from freqfusion.features import _attention
from freqfusion.features._attention import around, attend, every, neighbourhood
from support import assert_close

RULES = {
    "neighbourhood": lambda fine, coarse: neighbourhood(fine, coarse, 3, "rows"),
    "parent": lambda fine, coarse: neighbourhood(fine, coarse, 1, "rows"),  # all windows together: the map
    "around": lambda fine, coarse: around(fine, coarse, 0.15),
    "every": every,
}


def _dense(
    queries: Tensor, keys: Tensor, values: Tensor, rows: Tensor, columns: Tensor, heads: int, mean: bool
) -> Tensor:
    size = queries.shape[-2:]
    counts = (rows[:, None, :, None] * columns[None, :, None, :]).double()
    counts = counts.flatten(2).flatten(0, 1)
    q, k, v = (x.flatten(2).unflatten(1, (heads, -1)) for x in (queries, keys, values))
    logits = torch.einsum("bndq,bndk->bnqk", q, k) * q.shape[2] ** -0.5
    weights = (logits + counts.log()).softmax(-1)
    if mean:
        weights = weights.mean(1, keepdim=True).expand_as(weights)
    return torch.einsum("bnqk,bnck->bncq", weights, v).flatten(1, 2).unflatten(2, size)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("budget", [1000, 2**23])
@pytest.mark.parametrize(
    "sizes", [((18, 22), (9, 11)), ((13, 17), (5, 7)), ((33, 40), (4, 9)), ((5, 7), (5, 7))]
)
def test_tiles_equal_one_matrix(rule, mean, budget, sizes, monkeypatch) -> None:
    monkeypatch.setattr(_attention, "MAX_WEIGHTS", budget)
    (height, width), (h, w) = sizes
    torch.manual_seed(0)
    queries, keys, values, cotangent = (
        torch.randn(2, channels, *size, dtype=torch.float64)
        for channels, size in ((8, (height, width)), (8, (h, w)), (12, (h, w)), (12, (height, width)))
    )
    rest = rule(height, h), rule(width, w), 4, mean
    results = []
    for function in (attend, _dense):
        inputs = [x.clone().requires_grad_() for x in (queries, keys, values)]
        out = function(*inputs, *rest)
        results.append([out, *torch.autograd.grad((out * cotangent).sum(), inputs)])
    for name, mine, expected in zip(("out", "queries", "keys", "values"), *results, strict=True):
        assert_close(name, mine, expected, 1e-12)
    with torch.no_grad():
        assert_close("without gradients", attend(queries, keys, values, *rest), results[1][0], 1e-12)


def test_windows_that_are_the_map_only_together() -> None:
    queries, keys, values = torch.randn(3, 1, 4, 2, 3, dtype=torch.float64).unbind()
    call = queries, keys, values, around(2, 2, 0.1), around(3, 3, 0.1), 2, False
    assert_close("out", attend(*call), _dense(*call), 1e-12)
    assert_close("each pixel sees its own alone", attend(*call), values, 1e-12)


def test_the_window_is_that_of_neighbourhood_attention() -> None:
    # 13 rows from 5: dilation 2; row 0 sees rows 0, 2, 4 of 13, which copy coarse rows 0, 0, 1
    counts = neighbourhood(13, 5, 3, "rows")
    assert counts[0].tolist() == [2, 1, 0, 0, 0]
    assert counts[12].tolist() == [0, 0, 0, 1, 2]
    assert bool((counts.sum(1) == 3).all())
    whole = neighbourhood(12, 4, 3, "rows").view(4, 3, 4)  # x3: that of the parent, shifted inside
    assert whole.tolist() == [[row] * 3 for row in ([1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1])]


def test_large_maps_are_cut_small() -> None:
    cut = _attention._cut(every(64, 64), torch.zeros(()), most=4)
    assert cut.rows <= 4
    assert cut.window == 64
    assert cut.bias is None
