"""Run a list of rewrites on a copy of a captured graph, and keep the record of each.

The runner owns what every pass would otherwise repeat: the copy, the lint, the printed diff, the
context of an error. A pass owns one idea.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from ..errors import NoEffectWarning, PassError, PlanError
from ..ir.network import Network
from ..ir.text import History, Record, diff_texts, format_graph
from ..plan import Plan
from .debug import dump_folder, report_pass, skipped_passes

__all__ = ["Rewrite", "run_passes"]

Rewrite: TypeAlias = Callable[[Network], None]


def run_passes(captured: Network, passes: Sequence[Rewrite], plan: Plan) -> Network:
    """Return a copy of ``captured`` with each of ``passes`` run on it, in order.

    The record says that they carry out ``plan``.

    Raises:
        PlanError: as a pass raises it; the plan does not fit the model.
        PassError: if a pass fails otherwise, or leaves a graph that does not lint.
    """
    network = captured.clone(generate=False)
    skipped = skipped_passes()
    text = format_graph(network)
    report_pass(0, Record("capture", "", ""), text)
    records: list[Record] = []
    for index, rewrite in enumerate(passes, start=1):
        name, arguments = _describe(rewrite)
        if name in skipped:
            warnings.warn(f"FXLOCAL_SKIP leaves out the pass {name}", stacklevel=3)
            continue
        _run(network, rewrite, name, records)
        before, text = text, format_graph(network)
        record = Record(name, arguments, diff_texts(before, text))
        records.append(record)
        report_pass(index, record, text)
        if not record.diff:
            warnings.warn(
                f"the pass {name}({arguments}) changed nothing: the plan asks for nothing that "
                "this model has",
                NoEffectWarning,
                stacklevel=3,
            )
    network.recompile()
    network.meta["fxlocal"] = History(plan, tuple(records))
    return network


def _run(network: Network, rewrite: Rewrite, name: str, records: Sequence[Record]) -> None:
    try:
        rewrite(network)
        network.graph.lint()
    except PlanError:
        raise
    except Exception as error:
        done = ", ".join(record.name for record in records) or "none"
        dumped = dump_folder()
        where = f"in {dumped}" if dumped else "not dumped; set FXLOCAL_DUMP=folder"
        raise PassError(
            f"the pass {name} failed: {error}. Passes that ran before: {done}. Graphs: {where}. "
            "This is a mistake of fxlocal's: please report it with the model"
        ) from error


def _describe(rewrite: Rewrite) -> tuple[str, str]:
    """Return a pass's name and its arguments as text, sequences by their length."""
    if not isinstance(rewrite, partial):
        return getattr(rewrite, "__name__", type(rewrite).__name__), ""
    arguments = ", ".join(f"{name}={_short(value)}" for name, value in rewrite.keywords.items())
    return rewrite.func.__name__, arguments


def _short(value: Any) -> str:
    return f"<{len(value)}>" if isinstance(value, tuple) else repr(value)
