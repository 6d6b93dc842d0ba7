"""Run a list of rewrites on a copy of a captured graph, and keep the record of each.

The runner owns what every pass would otherwise repeat: the copy, the lint, the printed diff, the
context of an error. A pass owns one idea.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from .. import passes
from ..errors import NoEffectWarning, PassError, PlanError
from ..ir.network import Network
from ..ir.text import History, Listing, Record
from ..plan import Plan
from .debug import dump_folder, report_pass, skipped_passes

__all__ = ["Rewrite", "run_passes"]

Rewrite: TypeAlias = Callable[[Network], None]
OURS = frozenset(passes.__all__)


def run_passes(captured: Network, rewrites: Sequence[Rewrite], plan: Plan) -> Network:
    """Return a copy of ``captured`` with each of ``rewrites`` run on it, in order.

    The record says that they carry out ``plan``. The graph is linted once; if something failed,
    all run again and are linted one by one, so that the error names the pass.

    Raises:
        PlanError: as a pass raises it; the plan does not fit the model. Or if an environment
            variable says what there is not.
        PassError: if a pass fails otherwise, or leaves a graph that does not lint.
    """
    folder = dump_folder(plan)
    try:
        return _run_all(captured, rewrites, plan, folder, lints_each=False)
    except PassError:
        return _run_all(captured, rewrites, plan, folder, lints_each=True)


def _run_all(
    captured: Network,
    rewrites: Sequence[Rewrite],
    plan: Plan,
    folder: Path | None,
    lints_each: bool,
) -> Network:
    network = captured.clone()
    described = [_describe(rewrite) for rewrite in rewrites]
    skipped = skipped_passes({*OURS, *(name for name, _ in described)})
    each, listing = lints_each or bool(skipped), Listing(network)
    report_pass(0, Record("capture", "", (listing, listing)), listing, folder)
    records: list[Record] = []
    for index, (rewrite, told) in enumerate(zip(rewrites, described, strict=True), start=1):
        name, arguments = told
        if name in skipped:
            warnings.warn(f"FXLOCAL_SKIP leaves out the pass {name}", stacklevel=4)
            continue
        lints = each or index == len(rewrites)
        _run(network, rewrite, name, records, folder, lints=lints)
        before, listing = listing, Listing(network)
        record = Record(name, arguments, (before, listing))
        records.append(record)
        report_pass(index, record, listing, folder)
        if before == listing:
            warnings.warn(
                f"the pass {name}({arguments}) changed nothing: the plan asks for nothing that "
                "this model has",
                NoEffectWarning,
                stacklevel=4,
            )
    network.generate_later()
    network.meta["fxlocal"] = History(plan, tuple(records))
    return network


def _run(
    network: Network,
    rewrite: Rewrite,
    name: str,
    records: Sequence[Record],
    folder: Path | None,
    *,
    lints: bool,
) -> None:
    try:
        rewrite(network)
        if lints:
            network.graph.lint()
    except PlanError:
        raise
    except Exception as error:
        done = ", ".join(record.name for record in records) or "none"
        where = f"in {folder}" if folder else "not dumped; set FXLOCAL_DUMP=folder"
        home = str(getattr(_function(rewrite), "__module__", ""))
        blame = "This is a mistake of fxlocal's: please report it with the model"
        if home.partition(".")[0] != __name__.partition(".")[0]:
            blame = f"The pass is not fxlocal's but of {home}"
        raise PassError(
            f"the pass {name} failed: {type(error).__name__}: {error}. Passes that ran before: "
            f"{done}. Graphs: {where}. {blame}"
        ) from error


def _function(rewrite: Rewrite) -> Any:
    return rewrite.func if isinstance(rewrite, partial) else rewrite


def _describe(rewrite: Rewrite) -> tuple[str, str]:
    """Return a pass's name and its arguments as text, sequences by their length."""
    function = _function(rewrite)
    called = getattr(function, "__name__", type(function).__name__)
    if not isinstance(rewrite, partial):
        return called, ""
    arguments = ", ".join(f"{name}={_short(value)}" for name, value in rewrite.keywords.items())
    return called, arguments


def _short(value: Any) -> str:
    return f"<{len(value)}>" if isinstance(value, tuple) else repr(value)
