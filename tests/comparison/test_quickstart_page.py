from freqfusion.comparison.quickstart import Run
from freqfusion.comparison.quickstart_page import headline, leads, table_rows


def runs_with(bilinear, ours):
    return {
        name: Run(name, 1000, 60.0, test={"miou": miou, "boundary_iou": boundary, "pixel_accuracy": 0.9})
        for name, (miou, boundary) in (("bilinear", bilinear), ("freqfusion", ours))
    }


def test_headline_says_what_came_out():
    wins = runs_with((0.8, 0.6), (0.8144, 0.6312))
    assert headline(wins) == "FreqFusion leads by 1.4 points of mIoU and 3.1 points of boundary IoU"
    loses = runs_with((0.8144, 0.6312), (0.8, 0.6))
    assert headline(loses) == "FreqFusion trails by 1.4 points of mIoU and 3.1 points of boundary IoU"
    mixed = runs_with((0.8, 0.6), (0.79, 0.6))
    assert headline(mixed).endswith("is -1.0 in mIoU, +0.0 in boundary IoU")


def test_lead_is_the_difference_of_the_printed_figures():
    runs = runs_with((0.80049, 0.6), (0.80151, 0.6))
    header, rows, best = table_rows(runs)
    assert header == ["", "mIoU", "boundary IoU", "parameters", "training time"]
    assert rows == [
        ["Bilinear", "80.0", "60.0", "1,000", "60 s"],
        ["FreqFusion", "80.2", "60.0", "1,000", "60 s"],
    ]
    assert best == {1: 1}
    assert leads(runs) == {"miou": 0.2, "boundary_iou": 0.0}
