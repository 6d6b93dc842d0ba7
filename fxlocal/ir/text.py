"""Print graphs and diff them, keep the record of what each pass did, and lay out tables."""

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx

from ..facts import TensorSpec
from ..plan import Plan
from .contexts import context_changes
from .nodes import BLOCK, CHECKPOINT, STAGE, Origin, graph_module
from .source import train_mode

__all__ = [
    "History",
    "Listing",
    "Record",
    "diff_graphs",
    "diff_texts",
    "format_graph",
    "format_table",
]


class _Entry(NamedTuple):
    """A node as it was."""

    node: fx.Node
    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]


class Listing:
    """A graph as it is now, which ``str`` prints then: most diffs are never read.

    Two are equal if nothing has changed between them.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._entries = [
            _Entry(node, node.name, node.op, node.target, node.args, node.kwargs, dict(node.meta))
            for node in gm.graph.nodes
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Listing) and self._entries == other._entries

    def __str__(self) -> str:
        return "\n".join(_lines(self._entries))


@dataclass
class Record:
    """One pass that ran: its name with its arguments, and the graph before and after."""

    name: str
    arguments: str
    listings: tuple[Listing, Listing] | None

    @cached_property
    def diff(self) -> str:
        """What the pass changed, a line behind - or + each."""
        assert self.listings is not None
        before, after = map(str, self.listings)
        self.listings = None  # they hold the graph
        return diff_texts(before, after)

    def __getstate__(self) -> dict[str, Any]:
        _ = self.diff  # graphs hold what cannot be pickled
        return vars(self)


@dataclass(frozen=True)
class History:
    """What the runner left in ``gm.meta["fxlocal"]``: the plan and what each pass did."""

    plan: Plan
    records: tuple[Record, ...]


def format_graph(gm: Callable[..., Any]) -> str:
    """Return the graph as text: a line per node, and one where a context or a stage begins or ends.

    ``%name: dtype[shape] = opcode target(arguments)  # pass @layer``, the shape if known, the
    comment where a rewrite inserted the node. Of a network, that of training in either mode.

    Args:
        gm: a GraphModule, or what `Driver.network` returned.

    Raises:
        TypeError: if it is something else.

    Example:
        >>> from torch import nn
        >>> from fxlocal.tracing.capture import capture
        >>> print(format_graph(capture(nn.Sequential(nn.Linear(4, 2)))))
        %input_1 = placeholder input
        %_0 = call_module 0(%input_1)
        output %_0
    """
    network = graph_module(gm, "format_graph")
    with train_mode(network):
        return "\n".join(_lines(network.graph.nodes))


def _lines(nodes: Iterable[Any]) -> Iterator[str]:
    opened: list[str] = []
    stage = heading = ""
    for node, ended, begun in context_changes(nodes):
        for _ in range(ended):
            yield f"end {opened.pop()}"
        for context in begun:
            opened.append(context.source)
            yield f"with {context.source}:"
        if STAGE in node.meta:
            again = ", computed again in backward" if CHECKPOINT in node.meta else ""
            heading = f"stage {node.meta[STAGE]}{again}:"
        if heading != stage:
            stage = heading
            yield stage
        yield _line(node)


def _line(node: fx.Node | _Entry) -> str:
    if node.op == "output":
        return f"output {_value(node.args[0])}"
    text = f"%{node.name}{_type(node)} = {node.op} {_target(node.target)}"
    if node.op.startswith("call"):
        arguments = [_value(a) for a in node.args]
        arguments += [f"{name}={_value(value)}" for name, value in node.kwargs.items()]
        text += f"({', '.join(arguments)})"
    origin = node.meta.get("fxlocal")
    if isinstance(origin, Origin):
        text += f"  # {origin.pass_name} @{origin.layer}"
    if BLOCK in node.meta:
        text += f"  # if kept[{node.meta[BLOCK][0]}]"
    return text


def _type(node: fx.Node | _Entry) -> str:
    value = node.meta.get("val")
    if not isinstance(value, (torch.Tensor, TensorSpec)):
        return ""
    return f": {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", type(target).__name__))


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_value(v) for v in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if callable(value):
        return _target(value)
    return repr(value)


def diff_graphs(a: Callable[..., Any], b: Callable[..., Any]) -> str:
    """Return what turns the text of ``a`` into that of ``b``: a unified diff without context."""
    return diff_texts(format_graph(a), format_graph(b))


def diff_texts(a: str, b: str) -> str:
    """Return the changed lines between two printed graphs, each behind - or +."""
    before, after = a.splitlines(), b.splitlines()
    lines = _diff_in_order(before, after)
    if lines is None:
        lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return "\n".join(line for line in lines if not line.startswith("@@"))


def _diff_in_order(before: list[str], after: list[str]) -> list[str] | None:
    """Diff two texts whose common lines stand in the same order; None if they do not.

    Rewrites insert, drop and change lines but move none, and difflib is quadratic in such texts.
    """
    kept = set(before) & set(after)
    if [line for line in before if line in kept] != [line for line in after if line in kept]:
        return None
    lines, at = [], 0
    for line in [*before, None]:
        if line is not None and line not in kept:
            lines.append(f"-{line}")
            continue
        while at < len(after) and after[at] not in kept:
            lines.append(f"+{after[at]}")
            at += 1
        at += 1
    return lines


def format_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Collection[str]
) -> str:
    """Return columns of text, those whose heading is in ``numeric`` aligned to the right."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    styles = [f"{'>' if h in numeric else '<'}{w}" for h, w in zip(header, widths, strict=True)]
    lines = ("  ".join(map(format, row, styles)).rstrip() for row in table)
    return "\n".join(lines)
