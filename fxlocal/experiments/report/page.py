"""Write the page of a comparison or a sweep: one file that needs nothing else, no network either.

Python puts the numbers in as JSON. ``report.js`` makes the page move, ``report.css`` has its looks,
and Bokeh's own script, which draws the charts, is part of the file.
"""

import base64
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from bokeh.document import Document
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..files import write_all
from ..training.baselines import other_lengths
from ..training.growth import growing_runs
from ..training.results import (
    count_text,
    end_of,
    finished_runs,
    has_diverged,
    other_models,
    runs_of,
)
from ..training.sweep import value_text
from .charts import draw_charts, has_seconds, look_of
from .tables import decimal, summary_rows
from .words import OF_TIME, explain_noise, judge, memory_name

__all__ = ["PICTURE", "render_page", "write_page"]

Results = Mapping[str, Any]

HERE = Path(__file__).parent
PICTURE = "blocks.svg"
ABOUT = ("date", "commit", "host")  # what the page begins with


def write_page(results: Results, folder: Path, picture: str | None = None) -> Path:
    """Write ``report.html`` into ``folder`` and return its path; of a sweep, the plots as PNGs too.

    Args:
        results: the content of ``results.json`` or ``sweep.json``, of finished runs and others;
            further entries at the top, such as the command, are listed in the table of where it
            ran.
        folder: made if it is missing.
        picture: the blocks of the model as `draw_blocks` returns them, which ``blocks.svg`` keeps;
            without one, that file is shown if it is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    if "vary" in results:
        from .plots import write_plots  # matplotlib is slow to import
        from .sweep_plots import plot_sweep

        images = write_plots(plot_sweep(results), folder)
    drawn, path = folder / PICTURE, folder / "report.html"
    shown = picture
    if picture is None and drawn.exists():
        shown = drawn.read_text(encoding="utf-8")
    contents = {path: render_page(results, shown, images)}
    write_all(contents if picture is None else {drawn: picture, **contents})
    return path


def render_page(
    results: Results, picture: str | None = None, images: Mapping[str, bytes] | None = None
) -> str:
    """Return the page, with the picture (SVG) and further images (PNGs by file name) inside."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts, seeds = draw_charts(results), {run["seed"]: None for run in results["runs"]}
    document = Document()
    with document.models.freeze():  # which else looks at all of them for each
        for chart in charts:
            document.add_root(chart.figure)
    moving = _find_moving(results) if picture else {}
    told: dict[str, Any] = {"charts": document.to_json(deferred=False), "moving": moving}
    told |= {"titles": [chart.title for chart in charts]}
    swept = "vary" in results
    return environment.get_template("sweep.html.jinja" if swept else "report.html.jinja").render(
        title=f"{results['model']} on {results['data']}",
        subtitle=(
            f"{count_text(len(results['summary']), 'strategy', 'strategies')}, "
            f"{count_text(len(seeds), 'seed')}, {count_text(results['epochs'], 'epoch')} each"
            + "".join(f", {name} {length}" for name, length in other_lengths(results).items())
        ),
        seeds=", ".join(map(str, seeds)),
        results=results,
        command=results.get("command", ""),
        about=[f"{name} {results[name]}" for name in ABOUT if results.get(name)],
        grows=bool(growing_runs(results)),
        other_models=", ".join(other_models(results)),
        modules="; ".join(f"{name}: {text}" for name, text in results.get("modules", {}).items()),
        same_batches=not growing_runs(results) and not other_lengths(results),
        error=results["metric"],
        memory=memory_name(results["device"], results["compile"]),
        summary=[row | {"look": look_of(i)} for i, row in enumerate(summary_rows(results))],
        of_time=OF_TIME,
        noise=explain_noise(results),
        verdicts=[] if swept else judge(results),
        runs=_run_rows(results),
        facts=_facts(results),
        charts=charts,
        timed=has_seconds(results),
        curves=[chart.title for chart in charts if chart.over == "epoch"],
        images={
            name: base64.b64encode(png).decode("ascii") for name, png in (images or {}).items()
        },
        picture=Markup(picture) if picture else "",
        moving=moving,
        longest=max((len(run["loss"]) for run in results["runs"]), default=0),
        value_text=value_text,
        style=_read(HERE / "report.css"),
        script=_read(HERE / "report.js"),
        bokeh=_read(Path(str(files("bokeh"))) / "server/static/js/bokeh.min.js"),
        told=Markup(json.dumps(told).replace("<", "\\u003c")),
    )


@cache
def _read(path: Path) -> Markup:
    """Return a file as it is to stand in the page."""
    return Markup(path.read_text(encoding="utf-8"))


def _find_moving(results: Results) -> dict[str, dict[str, Any]]:
    """Return what the picture of the blocks shows of each strategy that trains this model.

    The boundary of each epoch is that of the first seed that finished; the borders of local modules
    are the first layers of all but the first.
    """
    finished, moving = finished_runs(results), {}
    for name, runs in runs_of(results).items():
        if name not in other_models(results):
            run = finished.get(name, runs)[0]
            borders = results.get("module_starts", {}).get(name, [])[1:]
            prefix = results.get("prefixes", {}).get(name, "local rule")
            moving[name] = {"boundary": run["boundary"], "borders": borders, "prefix": prefix}
            moving[name]["seed"] = run["seed"]
    return moving


def _run_rows(results: Results) -> list[dict[str, Any]]:
    names = list(runs_of(results))
    return [
        {
            "strategy": run["strategy"],
            "look": look_of(names.index(run["strategy"])),
            "seed": run["seed"],
            "error": "" if has_diverged(run) else decimal(run["error_percent"], 2),
            "end": end_of(run, results["epochs"]),
            "seconds": decimal(run["train_seconds"], 1),
            "compiling": decimal(run["compile_seconds"], 1),
            "epochs": len(run["loss"]),
            "loss": decimal(run["loss"][-1], 4) if run["loss"] else "",
        }
        for run in results["runs"]
    ]


def _facts(results: Results) -> list[tuple[str, str]]:
    """List everything but the numbers: what ran, where, with which versions."""
    hidden = ("runs", "summary", "module_starts", "prefixes")
    return [
        (key.replace("_", " "), _plain(value))
        for key, value in results.items()
        if key not in hidden and value not in (None, "", {}, [])
    ]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)
