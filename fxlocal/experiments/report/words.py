"""What is said in words: of each measure, and each strategy, of the model and of its blocks.

Every table, chart and page has one word for a measure. Of time and bytes the share is shown; its
inverse has the papers' word where a paper's number stands beside ours, or ranks should add up.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from ...compiler.analysis import Analysis
from ...compiler.split import find_split
from ...facts import Block
from ...plan import Freeze, Hebbian, Oja, Rule
from ..bench.spread import NOISY, find_spread, is_noisy, spread_text
from ..training.results import count_text, finished_runs, other_models, speed_seconds
from ..training.settings import Experiment
from ..training.specs import Spec

__all__ = [
    "COMPILE",
    "EPOCH",
    "FIRST",
    "KEPT",
    "OF_BYTES",
    "OF_TIME",
    "SPEEDUP",
    "STEP",
    "TRAIN",
    "describe_block",
    "describe_picture",
    "describe_rule",
    "describe_strategies",
    "explain_noise",
    "judge",
    "memory_heading",
    "memory_name",
    "short",
    "shortened",
    "time_text",
]

OF_TIME = "of SGD's time"  # own seconds / SGD's
SPEEDUP = "speed-up"  # SGD's seconds / own
KEPT = "kept MiB"  # the most kept for backward at a time; of a GPU the peak
OF_BYTES = "of SGD's bytes"
STEP, EPOCH, FIRST = "step ms", "epoch s", "first s"
TRAIN, COMPILE = "train s", "compile s"
LONGEST_NAME = 26


def time_ratios(results: Mapping[str, Any], name: str) -> list[float]:
    """Return a strategy's seconds over sgd's, for each seed that both finished."""
    finished = finished_runs(results)
    sgd = {run["seed"]: speed_seconds(run) for run in finished.get("sgd", ())}
    pairs = ((speed_seconds(r), sgd.get(r["seed"])) for r in finished.get(name, ()))
    return [own / plain for own, plain in pairs if plain]


EQUAL = ("work", "batch_size", "flops")


def differ_when_equal(results: Mapping[str, Any]) -> list[float]:
    """Return by how many percent the seconds of epochs differ whose steps compute the same.

    Each is set against the same epoch of the first strategy that has it, from the same seed: as of
    a frozen prefix before its boundary first moves. Nothing but the machine tells these apart.
    """
    first, found = dict[Any, float](), list[float]()
    for name, runs in finished_runs(results).items():
        for run in runs if name not in other_models(results) else ():
            work = run.get("work", ())
            if not work or len(work) != len(run["seconds"]):
                continue  # of an older version
            for epoch, (begin, end) in enumerate(pairwise([0.0, *run["seconds"]])):
                same = run["seed"], epoch, *(run[key][epoch] for key in EQUAL)
                before = first.setdefault(same, end - begin)
                if work[epoch] and before != end - begin:  # else it is one, or a copy of it
                    found.append(100 * abs((end - begin) / before - 1))
    return found


def time_text(ratio: float, seeds: Sequence[float], apart: Sequence[float]) -> tuple[str, str]:
    """Return a share of SGD's time, and from where to where the seeds have it if there are several.

    It is marked if they have it on both sides of 1, or it is no farther from 1 than the upper
    quartile of what `differ_when_equal` returns.
    """
    low, high = min(seeds, default=ratio), max(seeds, default=ratio)
    _, machine = find_spread(percent=apart or [0.0])["percent_quartiles"]
    noisy = is_noisy(low, high, 1) or 0 < 100 * abs(ratio - 1) <= machine
    several = len(seeds) > 1 and {*seeds} != {1.0}  # those of SGD itself
    return NOISY * noisy + f"{ratio:.2f}", f"({low:.2f}..{high:.2f})" if several else ""


def explain_noise(results: Mapping[str, Any]) -> str:
    """Say how far equal epochs are apart, if there are some, and what the mark means."""
    text = f"{NOISY}: too noisy to say which is faster"
    if apart := differ_when_equal(results):
        machine = spread_text(find_spread(percent=apart), "percent", ".1f")
        text += (
            f"; the machine alone differs by {machine} % between equal epochs "
            f"({count_text(len(apart), 'pair')})"
        )
    return text


def judge(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each strategy but sgd: its time and error beside sgd's.

    Only seeds count that both finished, in pairs: they share first weights, batches and about the
    hour on the machine. The spread is the standard deviation of the pairs' differences; what is
    no larger may be chance.
    """
    finished, apart, lines = finished_runs(results), differ_when_equal(results), list[str]()
    sgd = {run["seed"]: run for run in finished.get("sgd", ())}
    for row in results["summary"]:
        name = row["strategy"]
        pairs = [(sgd[r["seed"]], r) for r in finished.get(name, ()) if r["seed"] in sgd]
        if name == "sgd":
            continue
        if not pairs:
            why = "no seed finished" if name not in finished else "no run of sgd to compare it with"
            lines.append(f"{name}: {why}")
            continue
        plain, own = (sum(map(speed_seconds, side)) for side in zip(*pairs, strict=True))
        time, between = time_text(own / plain, time_ratios(results, name), apart)
        text = f"{name}: {time} {OF_TIME} {between}".rstrip()
        lines.append(f"{text}, {_error(results['metric'], pairs)}")
    return lines


def _error(metric: str, pairs: Sequence[tuple[Any, Any]]) -> str:
    gaps = [run["error_percent"] - sgd["error_percent"] for sgd, run in pairs]
    gap = fmean(gaps)
    text = f"{gap:+.2f} points of {metric}"
    if len(gaps) < 2:
        return f"{text}, on one seed, which says nothing of the spread"
    spread = stdev(gaps)
    where = "inside" if abs(gap) <= spread else "outside"
    seeds = count_text(len(gaps), "seed")
    return f"{text}, {where} the seeds' spread (+- {spread:.2f} over {seeds})"


def memory_name(device: str, predicted: bool = False) -> str:
    """Say what ``saved_bytes`` counts on a device, by its name; of compiled networks predicted."""
    if device.startswith("cuda"):
        return "peak of GPU memory"
    return "kept for backward" + (" (predicted)" if predicted else "")


def memory_heading(device: str) -> str:
    """Return `memory_name` as short as a column is."""
    return "peak MiB" if device.startswith("cuda") else KEPT


# --- the picture of the blocks ----------------------------------------------------------------


def describe_strategies(
    specs: Mapping[str, Spec], experiment: Experiment, analysis: Analysis
) -> dict[str, dict[str, Any]]:
    """Return what the page's picture needs to know of strategies, by name, as JSON has it.

    Returns:
        "prefixes": how the layers before a boundary learn, of those that have one;
        "module_starts": the first layer of each local module or checkpointed stage.
    """
    prefixes, starts = dict[str, str](), dict[str, list[int]]()
    for name, spec in specs.items():
        if (rule := spec.rule(experiment.settings.epochs)) is not None:
            prefixes[name] = describe_rule(rule)
        plan = experiment.by(spec).schedule.plan(analysis, 0)
        if stages := plan.modules or plan.checkpoint:
            starts[name] = [analysis.blocks[i].layers[0] for i in find_split(analysis, stages)]
    return {"prefixes": prefixes, "module_starts": starts}


def describe_rule(rule: Rule | None) -> str:
    """Say how the layers before a boundary learn."""
    if isinstance(rule, Freeze):
        return "frozen"
    if isinstance(rule, (Hebbian, Oja)):
        return f"local rule ({type(rule).__name__}, rate {rule.rate:g})"
    return "local rule"


def describe_picture(analysis: Analysis, boundary: int, rule: Rule | None) -> tuple[str, str]:
    """Say in two lines what the picture shows."""
    layers, blocks = len(analysis.layers), len(analysis.blocks)
    head = f"{layers} layers in {blocks} blocks, all learn by back-propagation"
    if boundary:
        how = "are frozen" if isinstance(rule, Freeze) else "learn by the local rule"
        path = analysis.layers[boundary].path
        head = f"{boundary} of {layers} layers {how}; back-propagation stops at {path}"
    if analysis.costs is None:
        return head, "Height of a block: its number of layers"
    flops = sum(cost.flops for cost in analysis.costs)
    kept, whole = (f"{(analysis.saved_bytes(b) or 0) / 2**20:.1f}" for b in (boundary, 0))
    saved = f"{kept} of {whole} MiB" if boundary else f"{whole} MiB without a boundary"
    return head, (
        f"Height of a block: FLOPs of its forward, {short(flops)} in all. "
        f"Kept for backward: {saved}{_batch_text(analysis)}"
    )


def _batch_text(analysis: Analysis) -> str:
    """Say of how many images the numbers are, if that is known."""
    first = analysis.block_inputs[0].shape if analysis.block_inputs else None
    return f"; for {count_text(first[0], 'image')}" if first else ""


def describe_block(analysis: Analysis, block: Block) -> str:
    """Return the tooltip of a block: its layers and what they cost."""
    names = [analysis.layers[i].path for i in block.layers]
    shown = names if len(names) <= 12 else [*names[:11], f"and {len(names) - 11} more"]
    lines = [f"{block.name}: layers {block.layers[0]} to {block.layers[-1]}", *shown]
    if (cost := analysis.block_cost(block)) is not None:
        lines.append(
            f"{cost.parameters:,} parameters; {short(cost.flops)} FLOPs forward; "
            f"{cost.saved_bytes / 2**20:.2f} MiB kept for backward"
        )
    if count := analysis.attentions_of(block):
        lines.append(f"attends {count_text(count, 'time')}: softmax(Q K\u1d40) V")
    return "\n".join(lines)


def short(number: float) -> str:
    """Return ``number`` with three digits and a unit, as 1.85G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            digits = number / size
            return f"{digits:.{0 if digits >= 99.95 else 1 if digits >= 9.995 else 2}f}{unit}"
    return f"{number:.3g}"


def shortened(path: str) -> str:
    """Keep the end of a long path, which tells it from its neighbours, from a dot on."""
    if len(path) <= LONGEST_NAME:
        return path
    end = path[-LONGEST_NAME:]
    return "\u2026" + (end.partition(".")[2] or end)
