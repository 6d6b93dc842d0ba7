"""What one step of training did to each layer: facts, and the table that shows them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Literal, TypeAlias

from ..ir.text import format_table

__all__ = ["HeadReport", "LayerReport", "Training", "Verification", "format_bytes"]

Training: TypeAlias = Literal["local rule", "back-propagation", "frozen", "nothing"]


@dataclass(frozen=True)
class LayerReport:
    """What one step did to one layer.

    Attributes:
        path: module path.
        kind: "conv" or "linear".
        trained_by: "local rule": the forward moved the weight. "back-propagation": the optimizer
            did, by a gradient that is not zero. "frozen": nothing tried to, because the weight
            requires no gradient or the layer ran without recording one. Else "nothing", which is
            suspicious.
        requires_grad: the weight requires a gradient.
        gradient: L2 length of the weight's gradient; None if none arrived.
        moved: L2 length of the weight's change over the step.
        relative: the same, as a part of the weight's L2 length.
        finite: the weight holds no NaN and no infinity after the step.
        saved_bytes: bytes kept for backward that no later layer keeps too.
        statistics_moved: running statistics changed between here and the next layer; None if
            there are none.
        weight_gradient_kernels: weight-gradient products issued, in forward and backward.
    """

    path: str
    kind: Literal["conv", "linear"]
    trained_by: Training
    requires_grad: bool
    gradient: float | None
    moved: float
    relative: float
    finite: bool
    saved_bytes: int
    statistics_moved: bool | None
    weight_gradient_kernels: int

    @property
    def has_gradient(self) -> bool:
        """A gradient arrived, be it zero."""
        return self.gradient is not None


@dataclass(frozen=True)
class HeadReport:
    """What one step did to the head of a local module.

    Attributes:
        module: whose it is, from 0.
        gradient: L2 length of its gradient; None if none arrived.
        moved: L2 length of its change over the step.
    """

    module: int
    gradient: float | None
    moved: float

    def __str__(self) -> str:
        gradient = "none" if self.gradient is None else f"{self.gradient:.2e}"
        return f"head of module {self.module}: gradient {gradient}, moved {self.moved:.2e}"


@dataclass(frozen=True)
class Verification:
    """What one step did. ``print`` it for a table.

    Attributes:
        layers: one report per layer, in execution order.
        loss: the loss of the step.
        unmet: what the plan asks and the step did not show, a sentence each.
        heads: one report per head of a local module.
    """

    layers: tuple[LayerReport, ...]
    loss: float
    unmet: tuple[str, ...] = ()
    heads: tuple[HeadReport, ...] = ()

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return each layer's report by its path; by ``path#2`` for its second call."""
        return {
            name: {**asdict(layer), "has_gradient": layer.has_gradient}
            for name, layer in zip(_call_names(self.layers), self.layers, strict=True)
        }

    def __str__(self) -> str:
        rows = map(_row, count(), _call_names(self.layers), self.layers)
        header = ["#", "layer", "kind", "trained by", *_LENGTHS, *_KEPT, "statistics"]
        table = format_table(header, rows, ["#", *_LENGTHS, *_KEPT])
        heads = map(str, self.heads)
        return "\n".join([table, _totals(self.layers), *heads, *_complaints(self)])


_LENGTHS = ("gradient", "moved", "of weight")
_KEPT = ("kernels", "kept KiB")


def _call_names(layers: Sequence[LayerReport]) -> Iterator[str]:
    """Yield each layer's path, numbered from its second call on."""
    calls: Counter[str] = Counter()
    for path in (layer.path for layer in layers):
        calls[path] += 1
        yield f"{path}#{calls[path]}" if calls[path] > 1 else path


def _row(index: int, name: str, layer: LayerReport) -> tuple[str, ...]:
    statistics = {None: "", True: "moved", False: "kept"}
    return (
        str(index),
        name,
        layer.kind,
        layer.trained_by,
        "none" if layer.gradient is None else f"{layer.gradient:.2e}",
        f"{layer.moved:.2e}" if layer.moved else "0",
        f"{layer.relative:.2%}" if layer.moved else "0",
        str(layer.weight_gradient_kernels),
        f"{layer.saved_bytes / 1024:,.1f}",
        statistics[layer.statistics_moved],
    )


def _totals(layers: Sequence[LayerReport]) -> str:
    counts: Counter[str] = Counter(layer.trained_by for layer in layers)
    parts = [f"{counts[way]} {words}" for way, words in _WAYS.items() if counts[way]]
    kernels = sum(layer.weight_gradient_kernels for layer in layers)
    kept = format_bytes(sum(layer.saved_bytes for layer in layers))
    layer = "layer" if len(layers) == 1 else "layers"
    trained = f"{len(layers)} {layer}: {', '.join(parts)}" if parts else "0 layers"
    return f"{trained}; {kernels} weight-gradient kernels; {kept} kept for backward"


_WAYS = {
    "local rule": "by a local rule",
    "back-propagation": "by back-propagation",
    "frozen": "frozen",
    "nothing": "by nothing",
}


def format_bytes(num_bytes: int) -> str:
    """Return ``num_bytes`` in KiB or MiB."""
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / 2**10:,.1f} KiB"


def _complaints(verification: Verification) -> Iterator[str]:
    if broken := [layer.path for layer in verification.layers if not layer.finite]:
        yield f"NaN or infinite after the step: {', '.join(broken)}"
    if not math.isfinite(verification.loss):
        yield f"the loss is {verification.loss}"
    yield from verification.unmet
