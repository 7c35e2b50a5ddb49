"""The ratios of a benchmark as a PNG, drawn by matplotlib."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from teamlora_export.bench.measure import Benchmark
from teamlora_export.bench.report import Panel, panels
from teamlora_export.page import MARK, write_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW_INCHES, _FRAME_INCHES = 0.3, 0.9


def require_matplotlib() -> None:
    """Find out before anything is measured.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    # It takes settings from the current folder, which may be a bundle's.
    with contextlib.chdir(Path(__file__).parent):
        import matplotlib  # noqa: F401


def write_plot(benchmark: Benchmark, name: str, path: Path) -> None:
    """A panel for each quantity of each workload, as on the page.

    Raises:
        ExportError: there is something else of that name, or it cannot be written.
    """
    require_matplotlib()
    # Without pyplot, which would look for a screen.
    from matplotlib.figure import Figure

    shown = panels(benchmark)
    heights = [_ROW_INCHES * len(panel.marks) + _FRAME_INCHES for panel in shown]
    figure = Figure(figsize=(9, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(shown), squeeze=False, height_ratios=heights)
    for panel, place in zip(shown, axes[:, 0], strict=True):
        _draw(panel, place)
    figure.suptitle(_escaped(f"{name}: time over {benchmark.baseline!r}"))
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks is a box.
        warnings.simplefilter("ignore")
        figure.savefig(drawn, format="png", dpi=120, metadata={"Software": MARK})
    write_report(path, drawn.getvalue())


def _draw(panel: Panel, axes: Axes) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.axvspan(1 - panel.noise, 1 + panel.noise, color="#eef1f4", label="noise")
    axes.axvline(1, color="#57606a", linewidth=1)
    for place, mark in enumerate(panel.marks):
        ratio = mark.ratio
        axes.plot([ratio.low, ratio.high], [place, place], color="#0b5cad", linewidth=2)
        axes.plot([ratio.median], [place], "o", color="#0b5cad")
        if mark.floor is not None:
            axes.plot([mark.floor], [place], "|", color="#b3141d", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(panel.marks)), [_escaped(mark.row) for mark in panel.marks])
    axes.set_ylim(len(panel.marks) - 0.5, -0.5)
    axes.set_xlim(panel.low, panel.high)


def _escaped(text: str) -> str:
    """A dollar sign would begin a formula."""
    return text.replace("$", r"\$")
