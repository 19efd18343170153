"""One style for all figures, and their display in notebooks. All notebooks use it."""

import inspect
import io
import textwrap
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# The colours of Okabe and Ito can be told apart with every common kind of colour blindness. Both
# colour maps only grow lighter, so they can be read without colours.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLOUR_MAP = "cividis"
HEAT = "inferno"  # for overlays on photographs
DPI = 80
LARGE = 60_000  # bytes of PNG above which a figure is stored as JPEG
STYLE: Any = {
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#DDDDDD",
    "image.cmap": COLOUR_MAP,
    "savefig.dpi": DPI,
}


def use_style() -> None:
    """Make CapGen's style the default of this process, also for figures that a notebook draws."""
    mpl.rcParams.update(STYLE)


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.0, 3.2), **grid: Any
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of ``size`` in inches in the course's style, and its axes by row."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False, **grid).flat)


def horizontal(ax: Axes) -> Axes:
    """Prepare an axis for horizontal bars, the first one on top."""
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return ax


def alt(figure: Figure, text: str) -> Any:
    """Return ``figure`` as an image that a notebook displays, with ``text`` for screen readers."""
    from IPython.display import Image as Display

    data, kind = rendered(figure)
    return Display(data=data, format=kind, alt=text)


def rendered(figure: Figure) -> tuple[bytes, str]:
    """Return a figure as an image file and its kind: ``png``, or ``jpeg`` for large photographs."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    if len(stream.getvalue()) < LARGE:
        return stream.getvalue(), "png"
    small = io.BytesIO()  # a fifth of the size
    Image.open(stream).convert("RGB").save(small, format="JPEG", quality=88)
    return small.getvalue(), "jpeg"


def show_source(thing: Any) -> Any:
    """Return the source of a function or class of the package, as a notebook displays it.

    The code that a text discusses is the code that runs: the two cannot drift apart.
    """
    from IPython.display import Markdown

    source = textwrap.dedent(inspect.getsource(thing)).rstrip()
    return Markdown(f"`{thing.__module__}`:\n\n```python\n{source}\n```")
