"""Generate a network's forward: its evaluation branch, ``with`` and ``if`` blocks, stages.

A checkpointed stage becomes a function, and a call of it through the network::

    def stage_0(x):
        conv = self.conv(x);  x = None
        relu = self.relu(conv);  conv = None
        return relu
    relu = self.run_checkpointed(0, stage_0, x)

A residual branch that is left out in some steps becomes an ``if``::

    kept = self.draw_blocks((0.75, 0.5))
    if kept[0]:
        conv = self.conv(x)
        add = torch.add(x, conv, alpha = 1.3333333333333333)
    else:
        add = x.clone()
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from inspect import getattr_static
from itertools import count, groupby
from threading import RLock
from typing import Any, TypeAlias
from weakref import WeakMethod

import torch
from torch import fx
from torch.fx.graph import CodeGen

from ..ops.local_modules import backward
from .contexts import Context, context_changes
from .nodes import BLOCK, CHECKPOINT

__all__ = ["Generator", "Ungenerated", "learns"]

# What generated code means by a name, which may be that of an input; torch.fx renames that.
_MEANT = {
    "torch": ["import torch\n"],
    "device": ["from torch import device\n"],
    "nan": ["from math import nan\n"],
    "inf": ["from math import inf\n"],
    "slice": ["from builtins import slice\n"],
}
_COUNTER = "# COUNTER: "

# A node, how many contexts end before it, which begin, and its lines.
_Piece: TypeAlias = tuple[fx.Node, int, tuple[Context, ...], list[str]]


class Ungenerated:
    """The forward of a network whose code has not been generated: asked for, it is.

    Captures, and what is only looked at, never run. It is no function that generates when called:
    Dynamo, tracers and signatures ask for the real one.

    Args:
        generate: a method of the network that puts the forward in this one's place.
    """

    _lock = RLock()

    def __init__(self, generate: Callable[[], Any]) -> None:
        self._generate = WeakMethod(generate)

    def __get__(self, network: Any, kind: type) -> Any:
        generate = self._generate()
        with self._lock:
            if generate and getattr_static(kind, "forward") is self:
                generate()
        return getattr(kind if network is None else network, "forward")  # noqa: B009


class Generator(CodeGen):
    """Generates the forward of a network's graph, and of what tools of `torch.fx` copy from it.

    A copied graph belongs to no network: its contexts are kept, and no stage is computed again.
    What was set by ``graph.on_generate_code`` is not kept.
    """

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> Any:
        graph = nodes.graph
        self._body_transformer = partial(_generate_body, graph, graph.owning_module)
        try:
            return super()._gen_python_code(nodes, *args, **kwargs)
        finally:
            self._body_transformer = None  # a graph is copied with its generator


def _generate_body(graph: fx.Graph, owner: Any, body: list[str]) -> list[str]:
    """Add to the generated lines of a forward what `torch.fx` does not know of.

    ``torch.fx`` marks the lines of node i with a comment, ``# COUNTER: i``, and removes it later.
    """
    of_network = hasattr(owner, "call_of_source")
    call = owner.call_of_source() if of_network else ""
    lines = ["if not self.trains:\n", f"    return {call}\n"] if call else []
    text = "".join(body)
    head, *parts = _parts(text)
    lines += head
    for node, part in zip(graph.nodes, parts, strict=True):
        if node.op == "placeholder":
            part += _MEANT.get(str(node.target), ())
    changes = context_changes(graph.nodes)
    pieces = [(*change, part) for change, part in zip(changes, parts, strict=True)]
    kept = ""
    if survivals := dict(n.meta[BLOCK] for n in graph.nodes if BLOCK in n.meta):
        if not of_network:
            raise RuntimeError(
                "a graph with stochastic depth by block, of which only its network draws which "
                "branches a step computes: copy the network, or take mode='row'"
            )
        kept = _unused("kept", text)
        lines.append(f"{kept} = self.draw_blocks({(*survivals.values(),)})\n")
    fetches = {node: part for node, _, _, part in pieces if node.op == "get_attr"}
    for stage, found in groupby(pieces, lambda piece: piece[0].meta.get(CHECKPOINT)):
        if stage is None or not of_network:
            lines += _indented(found, kept)
        else:
            name = _unused(f"stage_{stage}", text)
            lines += _checkpointed(list(found), fetches, stage, name, kept)
    return lines


def _unused(name: str, text: str) -> str:
    """Return ``name``, or one that begins so and is not in ``text``."""
    return next(n for n in (name + "_" * i for i in count()) if not re.search(rf"\b{n}\b", text))


def _parts(text: str) -> Iterator[list[str]]:
    """Yield what stands before the first node, then the lines of each node."""
    part: list[str] = []
    for line in text.splitlines(keepends=True):
        if _COUNTER in line:
            yield part
            part = []
        part.append(line)
    yield part


def _indented(pieces: Iterable[_Piece], kept: str) -> Iterator[str]:
    """Yield the lines of nodes in their contexts; all contexts are closed before them."""
    for block, found in groupby(pieces, lambda piece: piece[0].meta.get(BLOCK)):
        if block is None:
            yield from _in_contexts(found)
            continue
        inside = list(found)
        merge = inside[-1][0]
        yield f"if {kept}[{block[0]}]:\n"
        yield from ("    " + line for line in _in_contexts(inside))
        yield "else:\n"
        yield f"    {merge.name} = {merge.args[0]}.clone()\n"


def _in_contexts(pieces: Iterable[_Piece]) -> Iterator[str]:
    depth = 0
    for _, ended, begun, lines in pieces:
        depth -= min(ended, depth)
        for context in begun:
            yield "    " * depth + f"with {context.source}:\n"
            depth += 1
        yield from ("    " * depth + line if line.strip() else line for line in lines)


def _checkpointed(
    pieces: list[_Piece], fetches: dict[fx.Node, list[str]], stage: int, name: str, kept: str
) -> Iterator[str]:
    """Yield the function of a stage, and its call.

    It fetches its own attributes, as the second forward has other buffers. What it takes besides
    are arguments and no free variables: `torch.fx` lets go of a value, ``x = None``, where it is
    used last.
    """
    computed = [piece for piece in pieces if piece[0] not in fetches]
    nodes = dict.fromkeys(piece[0] for piece in computed)
    used = dict.fromkeys(v for n in nodes for v in n.all_input_nodes if v not in nodes)
    taken = [value.name for value in used if value not in fetches]
    made = ", ".join(n.name for n in nodes if any(user not in nodes for user in n.users))
    for node, _, _, lines in pieces:
        if node in fetches and any(CHECKPOINT not in user.meta for user in node.users):
            yield from lines
    yield f"def {name}({', '.join(taken)}):\n"
    yield from ("    " + line for value in used for line in fetches.get(value, ()))
    yield from ("    " + line for line in _indented(computed, kept))
    yield f"    return {made}\n"
    yield f"{made} = " if made else ""
    yield f"self.run_checkpointed({', '.join([str(stage), name, *taken])})\n"


def learns(node: fx.Node) -> bool:
    """Tell whether a forward that runs ``node`` learns: it moves a weight, or back-propagates."""
    target = node.target
    return target is backward or (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "fxlocal"
        and target._schema.is_mutable
    )
