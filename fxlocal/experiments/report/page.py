"""Write the report of a comparison or a sweep: the plots as PNGs, and one self-contained page."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from ..training.baselines import other_lengths
from ..training.growth import growing_runs
from ..training.results import (
    count_text,
    has_diverged,
    other_models,
    runs_of,
)
from ..training.sweep import value_text
from .plots import color_of, memory_name, plot_results
from .sweep_plots import plot_sweep
from .tables import decimal, summary_rows

__all__ = ["render_page", "write_plots", "write_report", "write_sweep_report"]

Results = Mapping[str, Any]


def write_report(results: Results, folder: Path, picture: str | None = None) -> Path:
    """Write ``report.html`` and its plots into ``folder``; return the path of the page.

    Args:
        results: the content of ``results.json``; further entries at the top, such as the command,
            are listed in the table of where it ran.
        folder: made if it is missing.
        picture: an SVG to show, as `draw_blocks` returns; it goes into the page as it is.
    """
    plots = write_plots(plot_results(results), folder)
    return _write(folder, render_page(results, plots, picture))


def write_sweep_report(results: Results, folder: Path) -> Path:
    """Do so with the content of ``sweep.json``."""
    plots = write_plots(plot_sweep(results), folder)
    seeds = dict.fromkeys(str(run["seed"]) for run in results["runs"])
    count = sum(bool(row["setting"]) for row in results["summary"])
    lead = (
        f"{count} settings of {results['strategy']}, with sgd beside them. "
        f"Seeds: {', '.join(seeds)}. Epochs: {results['epochs']}."
    )
    more = {"lead": lead, "entries": results["summary"], "names": list(results["vary"])}
    own = "sweep.html.jinja"
    page = render_page(results, plots, template=own, value_text=value_text, **more)
    return _write(folder, page)


def _write(folder: Path, page: str) -> Path:
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def write_plots(figures: Mapping[str, Figure], folder: Path) -> dict[str, bytes]:
    """Write each figure as a PNG into ``folder``, made if it is missing; return their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name)
    return {name: (folder / name).read_bytes() for name in figures}


def render_page(
    results: Results,
    plots: Mapping[str, bytes],
    picture: str | None = None,
    template: str = "report.html.jinja",
    **more: Any,
) -> str:
    """Return the page, with the plots (PNGs by file name) and the picture (SVG) inside.

    A template that extends the report's may be given, and what more it is to know.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    seeds = {run["seed"] for run in results["runs"]}
    return environment.get_template(template).render(
        title=f"{results['model']} on {results['data']}",
        subtitle=(
            f"{count_text(len(results['summary']), 'strategy', 'strategies')}, "
            f"{count_text(len(seeds), 'seed')}, {count_text(results['epochs'], 'epoch')} each"
            + "".join(f", {name} {length}" for name, length in other_lengths(results).items())
        ),
        grows=bool(growing_runs(results)),
        other_models=", ".join(other_models(results)),
        modules="; ".join(f"{name}: {text}" for name, text in results.get("modules", {}).items()),
        same_batches=not growing_runs(results) and not other_lengths(results),
        error=results["metric"],
        memory=memory_name(results),
        summary=[row | {"color": color_of(i)} for i, row in enumerate(summary_rows(results))],
        runs=_run_rows(results),
        facts=_facts(results),
        plots={name: base64.b64encode(png).decode("ascii") for name, png in plots.items()},
        picture=picture,
        **more,
    )


def _run_rows(results: Results) -> list[dict[str, Any]]:
    names = list(runs_of(results))
    return [
        {
            "strategy": run["strategy"],
            "color": color_of(names.index(run["strategy"])),
            "seed": run["seed"],
            "error": "" if has_diverged(run) else decimal(run["error_percent"], 2),
            "seconds": decimal(run["train_seconds"], 1),
            "compiling": decimal(run["compile_seconds"], 1),
            "epochs": len(run["loss"]),
            "loss": decimal(run["loss"][-1], 4) if run["loss"] else "",
        }
        for run in results["runs"]
    ]


def _facts(results: Results) -> list[tuple[str, str]]:
    """List everything but the numbers: what ran, where, with which versions."""
    return [
        (key.replace("_", " "), _plain(value))
        for key, value in results.items()
        if key not in ("runs", "summary")
    ]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)
