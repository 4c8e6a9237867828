import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from freqfusion.drawing.page_parts import (
    Code,
    Curve,
    Curves,
    Figures,
    Report,
    Section,
    Strip,
    Swatches,
    Table,
    Text,
    render,
    write_report,
)

PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture(scope="module")
def page():
    blocks = [
        Figures([("+1.0", "mIoU", "points")]),
        Table(["method", "mIoU"], [["bilinear", "1.0"], ["freqfusion", "2.0"]], {1: 1}, note="a note"),
        Curves([Curve("loss", {"bilinear": [(0, 1.0), (1, 0.5)]})]),
        Swatches(["sky", "wall"], [(255, 0, 16), (0, 0, 0)]),
        Strip(["image", "truth"], [[PICTURE, PICTURE[::-1]]], caption="a caption"),
        Text("<script>alert(1)</script> & more"),
        Code("freqfusion quickstart --seed 0"),
    ]
    return render(Report("title", "headline", "lede", [Section("results", blocks)], footer="end"))


def images(page):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'"data:image/png;base64,([^"]+)"', page)
    ]


def test_page_is_self_contained(page):
    assert page.startswith("<!DOCTYPE html>")
    addresses = re.findall(r'(?:src|srcset|href)\s*=\s*"([^"]*)"', page)
    assert len(addresses) == 4
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page


def test_images_decode_to_the_pictures(page):
    dark, light, first, second = images(page)
    assert dark.shape == light.shape
    assert (dark != light).any()
    np.testing.assert_array_equal(first, PICTURE)
    np.testing.assert_array_equal(second, PICTURE[::-1])


def test_every_block_is_on_the_page(page):
    for text in ("title", "headline", "lede", "results", "a note", "a caption", "end", "#ff0010"):
        assert text in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "freqfusion quickstart --seed 0" in page
    assert re.findall(r'<td class="best">([^<]*)</td>', page) == ["2.0"]


def test_write_report(tmp_path):
    write_report(tmp_path / "deep" / "report.html", Report("ä", "b", "c", []))
    assert "<title>ä</title>" in (tmp_path / "deep" / "report.html").read_text("utf-8")
