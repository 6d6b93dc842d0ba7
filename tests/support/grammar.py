"""Hypothesis: small models written out as Python source, of what people write in a forward.

A `Writer` draws statement after statement; each reads values that earlier ones made, and may write
into them. A value is a map of 4 channels, 6x6 or 3x3, or their positions as tokens, or one vector
per sample. What the source means is decided by running it: whoever takes a program checks that it
trains in eager PyTorch at all.
"""

import itertools
import linecache
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

PRELUDE = """\
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *, scale=1.0):
        return x + scale * self.inner(x)


class NormRelu(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Centre(nn.Module):
    def forward(self, weight):
        return weight - weight.mean()

"""
ODD = ("source", "code", "graph", "meta", "clone", "device", "nan", "inf", "fxlocal", "history")
ODD += ("rate", "additions", "stage_0", "source_model", "forward_", "delta", "_source", "args")
KEYS = ("one", "two", "class", "it's", "a-b", "0", "lambda", 'the "first"', "None", "state")
INPUTS = ("x", "x", "x", "x", "input", "device", "nan", "slice", "source", "f", "rate")
_numbers = itertools.count()


@dataclass(frozen=True)
class Program:
    """A model's source, and its input."""

    source: str

    def __repr__(self) -> str:
        return f"\n{self.source}"

    def build(self) -> nn.Module:
        """Return the model, in float64 and in train mode, the same each time."""
        name = f"<program {next(_numbers)}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        scope: dict[str, Any] = {"__name__": "program"}
        exec(compile(self.source, name, "exec"), scope)
        torch.manual_seed(0)
        model: nn.Module = scope["Model"]().double()
        return model

    def inputs(self) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return (torch.randn(3, 4, 6, 6, generator=generator, dtype=torch.float64),)


@dataclass(frozen=True)
class Value:
    """A name in the forward; ``kind`` is "map", "tokens" or "flat", ``size`` its positions."""

    name: str
    kind: str
    size: int


class Writer:
    """Writes one model; ``draw`` is that of a composite strategy."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.init: list[str] = []
        self.body: list[str] = []
        self.values: list[Value] = []
        self.parts: list[tuple[Value, str]] = []  # a view of a value's first two channels
        self.convs: list[str] = []  # calls that keep a 4-channel map's size
        self.linears: list[str] = []
        self.names = itertools.count()
        self.homes: set[str] = set()
        self.depth = 0

    # --- drawing and emitting

    def choose(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def rarely(self, one_in: int) -> bool:
        return self.draw(st.integers(1, one_in)) == one_in

    def fresh(self, stem: str) -> str:
        return f"{stem}{next(self.names)}"

    def emit(self, line: str) -> None:
        self.body.append("    " * self.depth + line)

    @contextmanager
    def indented(self, head: str):
        self.emit(head)
        self.depth += 1
        before = len(self.body)
        yield
        if len(self.body) == before:
            self.emit("pass")
        self.depth -= 1

    def pick(self, *kinds: str, like: Value | None = None) -> Value:
        """Draw one of the newest values of these kinds, or of the shape of another."""
        fits = [v for v in self.values if v.kind in kinds or not kinds]
        if like is not None:
            fits = [v for v in fits if (v.kind, v.size) == (like.kind, like.size)]
        if not fits:
            return self.as_map()
        return fits[-1 - min(self.draw(st.integers(0, 4)), len(fits) - 1)]

    def as_map(self) -> Value:
        return next(v for v in self.values if v.kind == "map")

    def make(self, expression: str, like: Value, kind: str = "", size: int = 0) -> Value:
        """Emit the assignment of a new value, of the shape of ``like`` unless told."""
        value = Value(self.fresh("v"), kind or like.kind, size or like.size)
        self.emit(f"{value.name} = {expression}")
        self.values.append(value)
        return value

    # --- state of the model

    def attribute(self, stem: str) -> str:
        name = self.choose(*ODD) if self.rarely(30) else self.fresh(stem)
        if name in self.homes:
            name = self.fresh(stem)
        self.homes.add(name)
        return name

    def module(self, expression: str) -> str:
        """Give the model a module, at a drawn place; return how the forward names it."""
        place = self.choose("attribute", "attribute", "attribute", "list", "dict", "nested")
        if place == "attribute":
            name = self.attribute("layer")
            self.init.append(f"self.{name} = {expression}")
            return f"self.{name}"
        if place == "list":
            return self._stored("self.many", "nn.ModuleList()", f".append({expression})")
        if place == "nested":
            made = "nn.Sequential(nn.Identity(), nn.Sequential())"
            return self._stored("self.nest", made, f"[1].append({expression})", "[1]")
        key = self.choose(*KEYS) if self.rarely(6) else self.fresh("key")
        if key in self.homes:
            key = self.fresh("key")
        self.homes.add(key)
        self._once("self.named = nn.ModuleDict()")
        self.init.append(f"self.named[{key!r}] = {expression}")
        return f"self.named[{key!r}]"

    def _once(self, line: str) -> None:
        if line not in self.init:
            self.init.append(line)

    def _stored(self, owner: str, made: str, added: str, inside: str = "") -> str:
        self._once(f"{owner} = {made}")
        at = sum(line.startswith(f"{owner}{inside}.append(") for line in self.init)
        self.init.append(f"{owner}{added}")
        return f"{owner}{inside}[{at}]"

    def parameter(self, *shape: int) -> str:
        value = f"nn.Parameter(0.4 * torch.randn{shape})"
        if self.rarely(4):
            return self._stored("self.weights", "nn.ParameterList()", f".append({value})")
        name = self.attribute("weight")
        self.init.append(f"self.{name} = {value}")
        return f"self.{name}"

    def buffer(self, value: str) -> str:
        name = self.fresh("state")
        self.init.append(f"self.register_buffer({name!r}, {value})")
        return f"self.{name}"

    # --- the source

    def source(self, given: str, returned: str) -> str:
        lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.init]
        lines += ["", f"    def forward(self, {given}):"]
        lines += [f"        {line}" for line in [*self.body, f"return {returned}"]]
        return PRELUDE + "\n" + "\n".join(lines) + "\n"


Statement = Callable[[Writer], Any]


def write(draw: st.DrawFn, statements: tuple[Statement, ...], most: int) -> Program:
    """Write a stem, up to ``most`` drawn statements, and a head over the newest values."""
    w = Writer(draw)
    given = w.choose(*INPUTS)
    w.values.append(Value(given, "map", 6))
    stem = w.module("nn.Conv2d(4, 4, 3, padding=1)")
    w.convs.append(stem)
    w.make(f"{stem}({given})", w.values[0])
    if not w.rarely(8):
        del w.values[0]  # seldom is the input itself read, or written into, again
    for _ in range(w.choose(3, most // 2, most - 2, most)):
        w.choose(*statements)(w)
    return Program(w.source(given, _head(w)))


def _head(w: Writer) -> str:
    """Emit the last layer; return the expression that the forward returns."""
    used = " ".join(w.body[1:])
    last = w.values[-1]
    loose = [v for v in w.values if used.count(v.name) < 2 or v is last]
    if w.rarely(4):
        loose = loose[-1:]  # the others are computed for nothing
    means = {"map": ".mean((2, 3))", "tokens": ".mean(1)", "flat": ""}
    w.emit(f"pooled = {' + '.join(v.name + means[v.kind] for v in loose)}")
    w.init.append("self.head = nn.Linear(4, 2)")
    form = w.choose("{0}", "{0}", "{0}", "({0}, {1})", "{{'out': {0}, 'last': {1}}}", "[{1}, {0}]")
    return form.format("self.head(pooled)", f"{last.name}.mean()")
