"""Pages in one file that needs no other: templates, style, pictures and curves."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.ticker import LogLocator

from graincode.core.errors import one_line
from graincode.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS = 600  # of a curve


def write_page(path: Path, template: Path, **values: Any) -> Path:
    """Fill in a template of Jinja, which escapes all text and has `style`, write it to a file, and give its path."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters["number"] = number
    style = Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))
    text = page.from_string(template.read_text(encoding="utf-8")).render(style=style, **values)
    with replacing(path) as partial:
        partial.write_text("\n".join(map(one_line, text.split("\n"))), encoding="utf-8")
    return path


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def png_address(content: bytes) -> str:
    """The content of a PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def draw_curve(axes: Axes, points: np.ndarray, colour: str) -> None:
    """Draw (N, 2) points of a noisy curve: pale as they are, and smoothed; few of them as they are alone."""
    if len(points) < 20:
        axes.plot(*points.T, color=colour, linewidth=2, marker="o", markersize=3)
        return
    window = np.ones(max(1, len(points) // 20))
    smooth = np.convolve(points[:, 1], window, "same") / np.convolve(np.ones(len(points)), window, "same")
    every = slice(None, None, -(-len(points) // _MOST_POINTS))
    axes.plot(*points[every].T, color=colour, alpha=0.3, linewidth=1)
    axes.plot(points[every, 0], smooth[every], color=colour, linewidth=2)


def logarithmic(axes: Axes) -> None:
    """Make the scale of y logarithmic, with plain numbers."""
    axes.set(yscale="log")
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
