"""Self-contained HTML reports: one file, pictures inlined, readable in light and in dark."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jinja2
from matplotlib.figure import Figure

from freqfusion._files import write_atomically
from freqfusion.drawing.figures import Picture, figure_bytes, plot_bars, plot_curves, png_bytes


def inline_png(data: bytes) -> str:
    """PNG bytes as the ``data:`` address of an ``<img>``."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


@dataclass(frozen=True)
class Table:
    """A table: the first column names the rows, the others hold figures.

    ``best`` maps a column's index to the row that leads in it; that cell is set bold.
    """

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: Mapping[int, int] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """One frame of named curves; drawn twice, for light and for dark pages."""

    title: str
    histories: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str = "step"
    y_label: str = ""

    @property
    def description(self) -> str:
        """What the frame shows, for those who cannot see it."""
        return f"{self.title}: {' and '.join(self.histories)}"

    def source(self, dark: bool) -> str:
        """The drawn frame as a ``data:`` address."""
        figure = plot_curves(
            self.histories,
            title=self.title,
            x_label=self.x_label,
            y_label=self.y_label,
            dark=dark,
            size=(4.2, 3.0),
        )
        return inline_png(figure_bytes(figure, transparent=True))


@dataclass(frozen=True)
class Bars:
    """One frame of bars (see :func:`freqfusion.drawing.figures.plot_bars`); drawn for light and dark pages."""

    title: str
    values: Mapping[str, Sequence[float]]
    x_label: str = ""
    highlight: str = ""

    @property
    def description(self) -> str:
        """What the frame shows, for those who cannot see it."""
        return f"{self.title}: {', '.join(self.values)}"

    def source(self, dark: bool) -> str:
        """The drawn frame as a ``data:`` address."""
        height = 1.0 + 0.27 * len(self.values)
        figure = plot_bars(
            self.values,
            title=self.title,
            x_label=self.x_label,
            highlight=self.highlight,
            dark=dark,
            size=(4.6, height),
        )
        return inline_png(figure_bytes(figure, transparent=True))


@dataclass(frozen=True)
class Drawing:
    """Any figure; ``draw`` makes it for a dark page (True) and for a light one."""

    description: str
    """What the frame shows, for those who cannot see it."""
    draw: Callable[[bool], Figure]

    def source(self, dark: bool) -> str:
        """The drawn frame as a ``data:`` address."""
        return inline_png(figure_bytes(self.draw(dark), transparent=True))


@dataclass(frozen=True)
class Curves:
    """Frames of curves, bars or other figures side by side."""

    kind: ClassVar[str] = "curves"
    frames: Sequence[Curve | Bars | Drawing]
    note: str = ""


@dataclass(frozen=True)
class Strip:
    """Pictures in a grid, a title over each column; enlarged pixels stay squares."""

    kind: ClassVar[str] = "strip"
    titles: Sequence[str]
    rows: Sequence[Sequence[Picture]]
    caption: str = ""

    def sources(self) -> list[list[str]]:
        """``data:`` addresses of the pictures, row by row."""
        return [[inline_png(png_bytes(picture)) for picture in row] for row in self.rows]


@dataclass(frozen=True)
class Swatches:
    """A legend: name and ``#rrggbb`` colour of each class."""

    kind: ClassVar[str] = "swatches"
    names: Sequence[str]
    colours: Sequence[tuple[int, int, int]]

    def pairs(self) -> list[tuple[str, str]]:
        """Names and colours as HTML wants them."""
        return [
            (name, "#{:02x}{:02x}{:02x}".format(*colour))
            for name, colour in zip(self.names, self.colours, strict=True)
        ]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    """Lines to paste into a shell."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Figures:
    """A row of large figures: ``(value, what it is, small print)`` each."""

    kind: ClassVar[str] = "figures"
    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Html:
    """HTML as it is; whoever made it has escaped its texts."""

    kind: ClassVar[str] = "html"
    html: str


Block = Table | Curves | Strip | Swatches | Text | Code | Figures | Html


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """A page: title, headline (the result in one sentence), lede (how it came about), sections."""

    title: str
    headline: str
    lede: str
    sections: Sequence[Section]
    footer: str = ""


def render(report: Report) -> str:
    """The page as HTML that refers to nothing outside itself; all text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("freqfusion.drawing", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(report=report).lstrip()


def write_report(path: str | Path, report: Report) -> None:
    """Write the page atomically."""
    write_atomically(path, render(report).encode("utf-8"))
