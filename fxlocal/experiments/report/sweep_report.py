"""Write the report of a sweep: the plots as PNGs, and one self-contained HTML page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training.sweep import value_text
from .page import render_page, write_plots
from .sweep_plots import plot_sweep

__all__ = ["write_sweep_report"]


def write_sweep_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write ``report.html`` and its plots into ``folder``; return the path of the page.

    Args:
        results: the content of ``sweep.json``; further entries at the top, such as the command,
            are listed in the table of where it ran.
        folder: made if it is missing.
    """
    plots = write_plots(plot_sweep(results), folder)
    path = folder / "report.html"
    seeds = dict.fromkeys(str(run["seed"]) for run in results["runs"])
    lead = (
        f"{len(results['summary']) - 1} settings of {results['strategy']}, with sgd beside them. "
        f"Seeds: {', '.join(seeds)}. Epochs: {results['epochs']}."
    )
    page = render_page(
        results,
        plots,
        template="sweep.html.jinja",
        lead=lead,
        entries=results["summary"],
        names=list(results["vary"]),
        value_text=value_text,
    )
    path.write_text(page, encoding="utf-8")
    return path
