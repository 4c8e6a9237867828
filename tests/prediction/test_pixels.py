import pytest
import torch
import torch.nn.functional as F
from torch import nn

from freqfusion.prediction import pixels as predict
from freqfusion.prediction.pixels import enlarged_argmax, predict_mask


@pytest.mark.parametrize("source", [(5, 7), (1, 1), (4, 4), (9, 3)])
@pytest.mark.parametrize("size", [(13, 17), (1, 1), (4, 4), (40, 2)])
@pytest.mark.parametrize("band", [1, 150, 1 << 26])
def test_enlarged_argmax_is_that_of_the_resized_logits(monkeypatch, source, size, band):
    monkeypatch.setattr(predict, "_BAND_VALUES", band)
    torch.manual_seed(0)
    logits = torch.randn(5, *source, dtype=torch.float64)
    expected = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(enlarged_argmax(logits, size), expected)


@pytest.mark.parametrize("size", [(70, 45), (33, 1), (32, 64)])
def test_tiles_give_what_the_whole_image_gives(monkeypatch, size):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 4, 5, padding=2)).double()
    network = nn.Sequential(_Double(), network)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    whole = predict_mask(network, image)
    monkeypatch.setattr(predict, "LARGE_PIXELS", 8)
    monkeypatch.setattr(predict, "TILE", 16)
    monkeypatch.setattr(predict, "MARGIN", 4)
    seen = []
    network[0].register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[-2:])))
    tiled = predict_mask(network, image)
    assert tiled.dtype == torch.uint8
    assert len(whole.unique()) > 1
    assert torch.equal(tiled, whole)
    assert len(seen) == -(-size[0] // 16) * -(-size[1] // 16)
    assert all(height <= 24 and width <= 24 for height, width in seen)


class _Double(nn.Module):
    def forward(self, x):
        return x.double()


def test_mask_is_wide_enough_for_many_classes():
    network = nn.Conv2d(3, 300, 1)
    nn.init.zeros_(network.weight)
    network.bias.data = torch.arange(300.0)
    mask = predict_mask(network, torch.zeros(3, 2, 3, dtype=torch.uint8))
    assert mask.dtype == torch.int32
    assert mask.tolist() == [[299] * 3] * 2
