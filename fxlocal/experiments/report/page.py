"""Write the report of a comparison: the plots as PNGs, and one self-contained HTML page."""

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from ..training.baselines import other_lengths
from ..training.growth import growing_runs
from ..training.results import (
    boundary_text,
    count_text,
    has_diverged,
    is_number,
    note_of,
    other_models,
    range_text,
    runs_of,
)
from .plots import color_of, error_name, memory_name, plot_results

__all__ = ["render_page", "write_plots", "write_report"]

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
    path = folder / "report.html"
    path.write_text(render_page(results, plots, picture), encoding="utf-8")
    return path


def write_plots(figures: Mapping[str, Figure], folder: Path) -> dict[str, bytes]:
    """Write each figure as a PNG into ``folder``, made if it is missing; return their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {name: _png(figure) for name, figure in figures.items()}
    for name, content in plots.items():
        (folder / name).write_bytes(content)
    return plots


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
        error=error_name(results),
        memory=memory_name(results),
        summary=_summary_rows(results),
        runs=_run_rows(results),
        facts=_facts(results),
        plots={name: base64.b64encode(png).decode("ascii") for name, png in plots.items()},
        picture=picture,
        **more,
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _summary_rows(results: Results) -> list[dict[str, Any]]:
    strategies = runs_of(results)
    rows = []
    for i, entry in enumerate(results["summary"]):
        runs = strategies[entry["strategy"]]
        finished = [run for run in runs if not has_diverged(run)]
        rows.append(
            {
                "strategy": entry["strategy"],
                "color": color_of(i),
                "error": _decimal(entry["error_percent_mean"], 2),
                "spread": _decimal(entry["error_percent_std"], 2),
                "seconds": _mean(run["train_seconds"] for run in finished),
                "speedup": _decimal(entry["speedup"], 2, "\u00d7"),
                "compiling": _mean(run["compile_seconds"] for run in finished),
                "memory_first": _mean(run["saved_bytes"][0] / 2**20 for run in finished),
                "memory_last": _mean(run["saved_bytes"][-1] / 2**20 for run in finished),
                "boundary": boundary_text(results, entry["strategy"], finished),
                "batch": range_text(n for run in finished for n in run["batch_size"]),
                "images": _decimal(entry["images_per_second"], 0),
                "seeds": len(runs),
                "note": note_of(runs),
            }
        )
    return rows


def _run_rows(results: Results) -> list[dict[str, Any]]:
    names = list(runs_of(results))
    return [
        {
            "strategy": run["strategy"],
            "color": color_of(names.index(run["strategy"])),
            "seed": run["seed"],
            "error": "" if has_diverged(run) else _decimal(run["error_percent"], 2),
            "seconds": _decimal(run["train_seconds"], 1),
            "compiling": _decimal(run["compile_seconds"], 1),
            "epochs": len(run["loss"]),
            "loss": _decimal(run["loss"][-1], 4) if run["loss"] else "",
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


def _decimal(value: object, digits: int, unit: str = "") -> str:
    return f"{value:.{digits}f}{unit}" if is_number(value) else ""


def _mean(values: Iterable[float]) -> str:
    numbers = list(values)
    return _decimal(fmean(numbers), 1) if numbers else ""
