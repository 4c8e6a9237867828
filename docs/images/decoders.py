"""Draws decoders.svg: how the three decoders join four maps. Run: python docs/images/decoders.py"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from freqfusion._files import write_atomically
from freqfusion.drawing.figures import figure_bytes

INK, MAP, FUSION, JOIN, CONVOLUTION = "#222222", "#CFE3F2", "#D55E00", "#009E73", "#EFE3B8"
PANELS = (
    ("FPN: add", "+", False, ("c", "c", "c", "c")),
    ("U-Net: concatenate, convolve", "C", True, ("c", "c", "c", "c")),
    ("Progressive: concatenate", "C", False, ("4c", "3c", "2c", "c")),
)
STRIDES = (4, 8, 16, 32)
LEFT, FUSED, JOINED, CONVOLVED, RIGHT = 0.0, 2.3, 3.4, 4.5, 5.8


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.1) -> None:
    corner = (x - width / 2, y - 0.2)
    patch = FancyBboxPatch(corner, width, 0.4, boxstyle="round,pad=0,rounding_size=0.07", fc=colour, ec=INK)
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)


def node(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.add_patch(Circle((x, y), 0.21, fc=colour, ec="none", zorder=3))
    axes.text(x, y, text, ha="center", va="center", fontsize=10, color="white", fontweight="bold", zorder=4)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


def draw_panel(axes: Axes, title: str, join: str, convolve: bool, widths: tuple[str, ...]) -> None:
    coarsest = len(STRIDES) - 1
    for level, (stride, channels) in enumerate(zip(STRIDES, widths, strict=True)):
        y = 0.95 * level
        box(axes, LEFT, y, f"$x_{level + 1}$   1/{stride}", MAP)
        box(axes, RIGHT, y, f"$y_{level + 1}$   {channels}", MAP)
        axes.text(1.15, y + 0.1, "1x1, c", ha="center", fontsize=7.5, color=INK)
        if level == coarsest:
            arrow(axes, (LEFT + 0.55, y), (RIGHT - 0.55, y))
            continue
        node(axes, FUSED, y, "F", FUSION)
        node(axes, JOINED, y, join, JOIN)
        arrow(axes, (LEFT + 0.55, y), (FUSED - 0.21, y))
        arrow(axes, (RIGHT - 0.3, y + 0.75), (FUSED + 0.13, y + 0.17), bend=-0.06)
        arrow(axes, (FUSED + 0.19, y + 0.09), (JOINED - 0.19, y + 0.09))
        arrow(axes, (FUSED + 0.19, y - 0.09), (JOINED - 0.19, y - 0.09))
        if convolve:
            arrow(axes, (JOINED + 0.21, y), (CONVOLVED - 0.4, y))
            box(axes, CONVOLVED, y, "2 conv", CONVOLUTION, width=0.8)
            arrow(axes, (CONVOLVED + 0.4, y), (RIGHT - 0.55, y))
        else:
            arrow(axes, (JOINED + 0.21, y), (RIGHT - 0.55, y))
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlim(-0.65, 6.45)
    axes.set_ylim(-0.3, 3.15)
    axes.set_aspect("equal")
    axes.axis("off")


def draw() -> Figure:
    figure = Figure(figsize=(13, 2.75), dpi=120, layout="constrained")
    for axes, panel in zip(figure.subplots(1, 3), PANELS, strict=True):
        draw_panel(axes, *panel)
    note = (
        "F  fusion: brings the coarse map to the fine size, may refine both      +  add      C  concatenate"
    )
    figure.supxlabel(note + "      c  channels", x=0.01, ha="left", fontsize=9, color=INK)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "decoders"  # the same file every time
    write_atomically(Path(__file__).with_suffix(".svg"), figure_bytes(draw(), "svg"))
