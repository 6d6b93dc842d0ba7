"""The plots of a comparison: error, boundary and memory over time, accuracy against speed-up.

A line is the mean over the seeds that finished, the band around it reaches from the lowest to the
highest; runs of different lengths have a line each. A run whose loss stopped being a number is a
thin line of its own that ends in a cross.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from ..data.task import SCORES
from ..training.growth import growing_runs
from ..training.results import has_diverged, is_number, runs_of, speed_seconds

__all__ = [
    "COLORS",
    "DASHED",
    "DOTTED",
    "INK",
    "MARKERS",
    "add_legend",
    "color_of",
    "look_of",
    "memory_name",
    "new_figure",
    "new_speed_figure",
    "plot_results",
    "style_axes",
]

Results: TypeAlias = Mapping[str, Any]
Run: TypeAlias = Mapping[str, Any]
Points: TypeAlias = list[tuple[float, float]]

# Okabe and Ito's colours, which the colour-blind can tell apart, with grey in place of yellow.
COLORS = ("#0072b2", "#e69f00", "#5d6973", "#cc79a7", "#009e73", "#d55e00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#22292f"
DOTTED: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": ":"}
DASHED: dict[str, Any] = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3))}


def plot_results(results: Results) -> dict[str, Figure]:
    """Return the plots by file name: those that the results hold numbers for.

    The error over time and epochs needs runs that carry the errors of single epochs; the loss over
    epochs is always there.
    """
    error, memory = f"test {results['metric']} (%)", f"{memory_name(results)} (MiB)"
    curves: list[tuple[str, str, Callable[[Run], Points], bool]] = [
        ("Error over time", error, _error_over_time, False),
        ("Error over epochs", error, _error_over_epochs, False),
        ("Loss over epochs", "training loss", _over_epochs("loss"), False),
        ("Boundary over epochs", "boundary (layer)", _over_epochs("boundary"), True),
        ("Memory over epochs", memory, _over_epochs("saved_bytes", 2**20), True),
    ]
    if growing_runs(results):
        curves.append(("Batch over epochs", "images per step", _over_epochs("batch_size"), True))
    if any(len(set(run.get("flops", ()))) > 1 for run in results["runs"]):
        curves.append(
            ("FLOPs over epochs", "MFLOPs of an image", _over_epochs("flops", 10**6), True)
        )
    figures = {
        f"{title.lower().replace(' ', '_')}.png": _plot_curves(
            results, title, label, points, stepped
        )
        for title, label, points, stepped in curves
        if any(map(points, results["runs"]))
    }
    if any(is_number(row["speedup"]) for row in results["summary"]):
        figures["accuracy_against_speedup.png"] = _plot_speed(results)
    return figures


def memory_name(results: Results) -> str:
    """Say what ``saved_bytes`` counts on the device of the results."""
    if str(results["device"]).startswith("cuda"):
        return "peak GPU memory"
    return "saved for backward" + (" (predicted)" if results["compile"] else "")


def _error_over_time(run: Run) -> Points:
    return [(run["seconds"][int(epoch) - 1], error) for epoch, error in _error_over_epochs(run)]


def _error_over_epochs(run: Run) -> Points:
    return list(zip(run["error_epochs"], run["errors"], strict=True))


def _over_epochs(key: str, unit: int = 1) -> Callable[[Run], Points]:
    return lambda run: [(i, y / unit) for i, y in enumerate(run[key], 1) if is_number(y)]


# What every plot is made of


def color_of(index: int) -> str:
    """Return the colour of the strategy at ``index`` in the summary."""
    return COLORS[index % len(COLORS)]


def look_of(index: int) -> dict[str, Any]:
    """Return its colour and marker, as matplotlib takes them."""
    return {"color": color_of(index), "marker": MARKERS[index % len(MARKERS)]}


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.2), **sharing: Any
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure in the report's style, and its panels."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)


def style_axes(axes: Axes, title: str, x_label: str, y_label: str, **style: Any) -> None:
    """Give a panel the report's style; further options are the title's."""
    style = {"loc": "left", "fontsize": 12, "fontweight": "bold", "color": INK, **style}
    axes.set_title(title, **style).set_parse_math(False)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dde2e6", linewidth=0.7)
    axes.set_axisbelow(True)


def new_speed_figure(results: Results) -> tuple[Figure, Axes]:
    """Return an empty plot of the score, 100 % less the error, against the speed-up."""
    score = SCORES[results["metric"]]
    figure, (axes,) = new_figure()
    labels = "speed-up against sgd (training time)", f"test {score} (%)"
    style_axes(axes, f"{score[:1].upper()}{score[1:]} against speed-up", *labels)
    return figure, axes


def add_legend(
    figure: Figure,
    entries: Sequence[tuple[str, Mapping[str, Any]]],
    loc: Any = "outside lower center",
    **style: Any,
) -> Legend:
    """Explain what each line or mark means, by its name and how it looks."""
    handles = [Line2D([], [], label=label, **look) for label, look in entries]
    style = {"ncols": min(3, len(handles)), "frameon": False, **style}
    legend: Legend = figure.legend(handles=handles, loc=loc, **style)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a name is a dollar
    return legend


# Drawing


def _plot_curves(
    results: Results, title: str, y_label: str, points: Callable[[Run], Points], stepped: bool
) -> Figure:
    """Draw one curve per strategy through the ``points`` of its runs.

    With ``stepped``, for what stands still within an epoch and strategies often share, earlier
    strategies get broader lines, so that each shows under the next.
    """
    figure, (axes,) = new_figure()
    over_time = title.endswith("time")
    style_axes(axes, title, "training time (s)" if over_time else "epoch", y_label)
    strategies = runs_of(results)
    for i, runs in enumerate(strategies.values()):
        style = {"linewidth": 1.8, **look_of(i)}
        curves = [curve for run in runs if not has_diverged(run) and (curve := points(run))]
        if stepped:
            width = 1.6 + min(2.6 * (len(strategies) - 1 - i), 8)
            style |= {"linewidth": width, "ds": "steps-mid"}
            if any(len(curve) > 1 for curve in curves):  # a step of one epoch has no length
                del style["marker"]
        # Runs of different lengths have no mean: after the end of the shortest it would jump.
        same_length = len({len(curve) for curve in curves}) < 2
        for alike in [curves] if same_length else [[curve] for curve in curves]:
            _draw_mean(axes, alike, style)
        for run in filter(has_diverged, runs):
            _draw_diverged(axes, points(run), color_of(i), "steps-mid" if stepped else "default")
    if not over_time:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if stepped:
        top = axes.get_ylim()[1]
        axes.set_ylim(-0.04 * top, 1.05 * top)
    else:
        _use_log_scale_if_wide(axes)
    _add_strategies(figure, strategies)
    return figure


def _draw_mean(axes: Axes, curves: list[Points], style: dict[str, Any]) -> None:
    """Draw the mean of the curves, and a band from the lowest to the highest."""
    columns = list(zip(*curves, strict=False))
    x = [fmean(x for x, _ in column) for column in columns]
    values = [[y for _, y in column] for column in columns]
    axes.plot(x, list(map(fmean, values)), markersize=4.5, **style)
    low, high = list(map(min, values)), list(map(max, values))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _draw_diverged(axes: Axes, points: Points, color: str, drawstyle: str) -> None:
    """Draw what a diverged run showed before it ended, with a cross at the end."""
    x, y = [x for x, _ in points], [y for _, y in points]
    axes.plot(x, y, color=color, linewidth=1, ls=(0, (4, 2)), ds=drawstyle, zorder=4)
    axes.plot(x[-1:], y[-1:], color=color, marker="x", markersize=9, zorder=4)


def _plot_speed(results: Results) -> Figure:
    """Draw accuracy against speed-up: a large mark for the mean, a small one for each run.

    A run is measured against sgd from the same seed, which ran at about the same hour.
    """
    figure, axes = new_speed_figure(results)
    strategies = runs_of(results)
    finished = [run for run in results["runs"] if not has_diverged(run)]
    sgd = {run["seed"]: speed_seconds(run) for run in finished if run["strategy"] == "sgd"}
    for i, row in enumerate(results["summary"]):
        if not is_number(row["speedup"]):
            continue
        runs = [r for r in finished if r["strategy"] == row["strategy"] and r["seed"] in sgd]
        speedups = [sgd[run["seed"]] / speed_seconds(run) for run in runs]
        accuracies = [100 - run["error_percent"] for run in runs]
        axes.plot(speedups, accuracies, ls="", markersize=5, alpha=0.45, **look_of(i))
        mean = 100 - row["error_percent_mean"]
        axes.plot([row["speedup"]], [mean], ls="", markersize=11, mec="white", **look_of(i))
    axes.axvline(1, **DOTTED)
    axes.margins(0.15)
    _add_strategies(figure, strategies)
    return figure


def _use_log_scale_if_wide(axes: Axes) -> None:
    """Keep the end of a curve readable that starts far above it."""
    low, high = axes.dataLim.intervaly
    if 0 < low < high / 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _add_strategies(figure: Figure, strategies: Mapping[str, list[Run]]) -> None:
    entries = []
    for i, (name, runs) in enumerate(strategies.items()):
        diverged = sum(map(has_diverged, runs))
        note = f" ({diverged} of {len(runs)} diverged)" if diverged else ""
        entries.append((name + note, look_of(i)))
    add_legend(figure, entries)
