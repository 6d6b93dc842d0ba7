"""The plots of a comparison: error, boundary and memory over time, accuracy against speed-up.

A line is the mean over the seeds that finished, the band around it reaches from the lowest to the
highest; runs of different lengths have a line each. A run whose loss stopped being a number is a
thin line of its own that ends in a cross.
"""

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from ..data.task import SCORES
from ..training.growth import growing_runs
from ..training.results import has_diverged, is_number, runs_of, speed_seconds

__all__ = [
    "COLORS",
    "INK",
    "MARKERS",
    "color_of",
    "error_name",
    "memory_name",
    "new_figure",
    "plot_results",
    "score_name",
    "style_axes",
]

Results = Mapping[str, Any]
Run = Mapping[str, Any]
Points = list[tuple[float, float]]

# Okabe and Ito's colours, which the colour-blind can tell apart, with grey in place of yellow.
COLORS = ("#0072b2", "#e69f00", "#5d6973", "#cc79a7", "#009e73", "#d55e00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#22292f"


def plot_results(results: Results) -> dict[str, Figure]:
    """Return the plots by file name: those that the results hold numbers for.

    The error over time and epochs needs runs that carry the errors of single epochs; the loss over
    epochs is always there.
    """
    error, memory = f"test {error_name(results)} (%)", f"{memory_name(results)} (MiB)"
    loss, boundary, saved = map(_over_epochs, ("loss", "boundary", "saved_bytes"))
    batch = _over_epochs("batch_size") if growing_runs(results) else lambda run: []
    curves: dict[str, tuple[Callable[[Run], Points], str, str, str]] = {
        "error_over_time": (_error_over_time, "Error over time", "training time (s)", error),
        "error_over_epochs": (_error_over_epochs, "Error over epochs", "epoch", error),
        "loss_over_epochs": (loss, "Loss over epochs", "epoch", "training loss"),
        "boundary_over_epochs": (boundary, "Boundary over epochs", "epoch", "boundary (layer)"),
        "memory_over_epochs": (saved, "Memory over epochs", "epoch", memory),
        "batch_over_epochs": (batch, "Batch over epochs", "epoch", "images per step"),
    }
    figures = {
        f"{name}.png": _plot_curves(results, *curve, stepped=curve[0] in (boundary, saved, batch))
        for name, curve in curves.items()
        if any(curve[0](run) for run in results["runs"])
    }
    if any(is_number(row["speedup"]) for row in results["summary"]):
        figures["accuracy_against_speedup.png"] = _plot_speed(results)
    return figures


# --- asking the results -------------------------------------------------------------------------


def memory_name(results: Results) -> str:
    """Say what ``saved_bytes`` counts on the device of the results."""
    if str(results["device"]).startswith("cuda"):
        return "peak GPU memory"
    return "saved for backward" + (" (predicted)" if results["compile"] else "")


def error_name(results: Results) -> str:
    """Say what ``error_percent`` is."""
    return str(results["metric"])


def score_name(results: Results) -> str:
    """Say what 100 % less the error is."""
    return SCORES[error_name(results)]


def color_of(index: int) -> str:
    """Return the colour of the strategy at ``index`` in the summary."""
    return COLORS[index % len(COLORS)]


def _error_over_time(run: Run) -> Points:
    points = zip(run["error_epochs"], run["errors"], strict=True)
    return [(run["seconds"][epoch - 1], error) for epoch, error in points]


def _error_over_epochs(run: Run) -> Points:
    return list(zip(run["error_epochs"], run["errors"], strict=True))


def _over_epochs(key: str) -> Callable[[Run], Points]:
    unit = 2**20 if key == "saved_bytes" else 1
    return lambda run: [(i, y / unit) for i, y in enumerate(run[key], 1) if is_number(y)]


# --- drawing ------------------------------------------------------------------------------------


def _plot_curves(
    results: Results,
    points: Callable[[Run], Points],
    title: str,
    x_label: str,
    y_label: str,
    *,
    stepped: bool,
) -> Figure:
    """Draw one curve per strategy through the ``points`` of its runs.

    With ``stepped``, for what stands still within an epoch and strategies often share, earlier
    strategies get broader lines, so that each shows under the next.
    """
    figure, axes = new_figure(title, x_label, y_label)
    strategies = runs_of(results)
    for i, runs in enumerate(strategies.values()):
        style: dict[str, Any] = {"linewidth": 1.8, "marker": MARKERS[i % len(MARKERS)]}
        if stepped:
            style = {"linewidth": 1.6 + min(2.6 * (len(strategies) - 1 - i), 8), "ds": "steps-mid"}
        curves = [points(run) for run in runs if not has_diverged(run)]
        curves = [curve for curve in curves if curve]
        if all(len(curve) == 1 for curve in curves):  # a step of one epoch has no length
            style["marker"] = MARKERS[i % len(MARKERS)]
        # Runs of different lengths have no mean: after the end of the shortest it would jump.
        same_length = len({len(curve) for curve in curves}) < 2
        for alike in [curves] if same_length else [[curve] for curve in curves]:
            _draw_mean(axes, alike, color_of(i), style)
        for run in filter(has_diverged, runs):
            _draw_diverged(axes, points(run), color_of(i), "steps-mid" if stepped else "default")
    if x_label == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if stepped:
        top = axes.get_ylim()[1]
        axes.set_ylim(-0.04 * top, 1.05 * top)
    else:
        _use_log_scale_if_wide(axes)
    _add_legend(figure, strategies)
    return figure


def _draw_mean(axes: Axes, curves: list[Points], color: str, style: dict[str, Any]) -> None:
    """Draw the mean of the curves, and a band from the lowest to the highest."""
    columns = list(zip(*curves, strict=False))
    x = [fmean(x for x, _ in column) for column in columns]
    values = [[y for _, y in column] for column in columns]
    axes.plot(x, [fmean(column) for column in values], color=color, markersize=4.5, **style)
    low, high = [min(column) for column in values], [max(column) for column in values]
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def _draw_diverged(axes: Axes, points: Points, color: str, drawstyle: str) -> None:
    """Draw what a diverged run showed before it ended, with a cross at the end."""
    x, y = [x for x, _ in points], [y for _, y in points]
    axes.plot(x, y, color=color, linewidth=1, ls=(0, (4, 2)), ds=drawstyle, zorder=4)
    axes.plot(x[-1:], y[-1:], color=color, marker="x", markersize=9, zorder=4)


def _plot_speed(results: Results) -> Figure:
    """Draw accuracy against speed-up: a large mark for the mean, a small one for each run.

    A run is measured against sgd from the same seed, which ran at about the same hour.
    """
    score = score_name(results)
    title = f"{score[:1].upper()}{score[1:]} against speed-up"
    figure, axes = new_figure(title, "speed-up against sgd (training time)", f"test {score} (%)")
    strategies = runs_of(results)
    finished = [run for run in results["runs"] if not has_diverged(run)]
    sgd = {run["seed"]: speed_seconds(run) for run in finished if run["strategy"] == "sgd"}
    for i, row in enumerate(results["summary"]):
        if not is_number(row["speedup"]):
            continue
        style: dict[str, Any] = {"color": color_of(i), "marker": MARKERS[i % len(MARKERS)]}
        runs = [r for r in finished if r["strategy"] == row["strategy"] and r["seed"] in sgd]
        speedups = [sgd[run["seed"]] / speed_seconds(run) for run in runs]
        accuracies = [100 - run["error_percent"] for run in runs]
        axes.plot(speedups, accuracies, ls="", markersize=5, alpha=0.45, **style)
        mean = 100 - row["error_percent_mean"]
        axes.plot([row["speedup"]], [mean], ls="", markersize=11, mec="white", **style)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.margins(0.15)
    _add_legend(figure, strategies)
    return figure


def new_figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Return an empty plot in the report's style."""
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, title, x_label, y_label)
    return figure, axes


def style_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Give a panel the report's style."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dde2e6", linewidth=0.7)
    axes.set_axisbelow(True)


def _use_log_scale_if_wide(axes: Axes) -> None:
    """Keep the end of a curve readable that starts far above it."""
    low, high = axes.dataLim.intervaly
    if 0 < low < high / 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _add_legend(figure: Figure, strategies: Mapping[str, list[Run]]) -> None:
    handles = []
    for i, (name, runs) in enumerate(strategies.items()):
        diverged = sum(map(has_diverged, runs))
        note = f" ({diverged} of {len(runs)} diverged)" if diverged else ""
        marker = MARKERS[i % len(MARKERS)]
        handles.append(Line2D([], [], label=f"{name}{note}", color=color_of(i), marker=marker))
    columns = min(3, len(handles))
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a name is a dollar
