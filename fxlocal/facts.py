"""What the analyses find: frozen facts about one captured graph, by name, never by Node."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import add
from typing import Any, Literal, TypeAlias

__all__ = [
    "Block",
    "BlockInput",
    "Branch",
    "ChannelAxis",
    "ChannelRole",
    "ChannelUse",
    "Channels",
    "ConvGeometry",
    "Cost",
    "DropPath",
    "Layer",
    "Shapes",
    "SkipEdge",
    "StageBoundary",
    "TensorSpec",
    "TopKTime",
    "map_size",
]


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution slides; every tuple has one entry per spatial dimension.

    Attributes:
        pad_input: what the layer pads its input with before it convolves, in the order of
            `torch.nn.functional.pad` (last dimension first); empty for none.
        pad_mode: the mode of that padding ("constant", "reflect", "replicate", "circular").
        output_padding: of a transposed convolution; empty for none.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    pad_input: tuple[int, ...] = ()
    pad_mode: str = "constant"
    output_padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or linear layer.

    Attributes:
        index: place in execution order, from 0.
        path: module path ("layer1.0.conv1"); for a functional call, its weight's path.
        kind: "conv" (of any dimension, transposed too) or "linear".
        node: name of the call's node.
        weight: qualified name of the weight Parameter; None where the weight is computed.
        pre: name of the node that feeds it.
        geometry: how a convolution slides; None for a linear layer.
        transposed: a linear layer's weight is (inputs, outputs), as in ``x @ weight``.
        start: name of the first node that computes its weight; empty where none does.
    """

    index: int
    path: str
    kind: Literal["conv", "linear"]
    node: str
    weight: str | None
    pre: str
    geometry: ConvGeometry | None = None
    transposed: bool = False
    start: str = ""


@dataclass(frozen=True)
class SkipEdge:
    """An edge that bypasses at least one block.

    Attributes:
        source: name of the node where the paths part.
        target: name of the merge node.
        kind: "residual" (merged by add), "concat" (by cat) or "gate" (by mul).
        long_range: its span is made of blocks, or has a fall and a rise in resolution.
        operand: name of the merge's operand that the skip arrives by.
        projection: the shortcut has layers of its own.
    """

    source: str
    target: str
    kind: Literal["residual", "concat", "gate"]
    long_range: bool
    operand: str
    projection: bool = False


@dataclass(frozen=True)
class DropPath:
    """What a model itself leaves out of a branch: some rows, by noise that is multiplied with all.

    Attributes:
        value: name of the node that it multiplies.
        survival: the probability of a row to survive.
        scale: what surviving rows are multiplied by.
        nodes: names of those that make the noise and use it, in order.
    """

    value: str
    survival: float
    scale: float
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Branch:
    """What a residual sum adds to its shortcut, and nothing else takes.

    Attributes:
        name: the module path that its layers share, or its first layer's path.
        source: name of the node where the ways of branch and shortcut part.
        merge: name of the sum.
        last: name of the node whose value is added.
        nodes: names of its nodes, in order.
        drop_path: the model's own DropPath at its end, if there is one.
    """

    name: str
    source: str
    merge: str
    last: str
    nodes: tuple[str, ...]
    drop_path: DropPath | None = None


@dataclass(frozen=True)
class Block:
    """Layers between two boundaries, in execution order.

    Attributes:
        name: the module path that its layers share, or its first layer's path.
        layers: indices of its layers, consecutive.
        start: name of its first node; a boundary at this block cuts just before it.
        values: names of what crosses there and is learned from, long-range skips of what the main
            path takes too aside; empty for the first block. Local modules need it to be one.
    """

    name: str
    layers: tuple[int, ...]
    start: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor looks like, without its data.

    Attributes:
        shape: its sizes.
        dtype: its dtype's name ("float32", "bfloat16", ...).
        device: type of the device that it is on ("cpu", "cuda", ...).
        stride: steps between elements, per dimension; empty if it is not strided.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    stride: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockInput:
    """What enters a block, or leaves the last one; long-range skips aside.

    Attributes:
        value: name of the node that makes it; the model's first input, at the first block.
        shape, dtype: for the example inputs, batch first; None and idle if it is no tensor.
        channels_at: which dimension the channels are in: 1, or the last one after a linear layer.
    """

    value: str
    shape: tuple[int, ...] | None
    channels_at: int = 1
    dtype: str = "float32"


@dataclass(frozen=True)
class StageBoundary:
    """Where one stage of a network ends and the next begins.

    Attributes:
        stage: index of the stage before it.
        start: name of the first node behind it.
        value: name of the value that the head of a local module takes; None without shapes.
        tail: name of the first node that the next stage runs again; None without a link.
        learns: the stage before it has layers that are back-propagated through.
        inner: names of the first nodes of the tail's blocks after its first.
    """

    stage: int
    start: str
    value: str | None
    tail: str | None
    learns: bool
    inner: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What one layer, with the nodes up to the next layer, costs in one training step.

    Attributes:
        flops: floating-point operations of the forward (a multiply-add counts two).
        saved_bytes: bytes kept for backward that no later layer keeps too, so that the bytes kept
            with the boundary at layer k are the sum over the layers from k on.
        parameters: number of parameter elements, each counted at its first use.
    """

    flops: int
    saved_bytes: int
    parameters: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(add, vars(self).values(), vars(other).values()))


@dataclass(frozen=True)
class Shapes:
    """What one layer meets in the example inputs.

    Attributes:
        pre: shape of its input.
        post: shape of its output.
        weight: shape of its weight, outputs first where it is linear.
        dtype: of its output, autocast included ("float32", "bfloat16", ...).
        device: type of the device ("cpu", "cuda", ...).
        channels_last: its input lies in memory with the channels innermost.
    """

    pre: tuple[int, ...]
    post: tuple[int, ...]
    weight: tuple[int, ...]
    dtype: str
    device: str
    channels_last: bool


def map_size(layer: Layer, shapes: Shapes) -> tuple[int, ...]:
    """Return the size of the map that a layer makes: all but batch and channels."""
    sliding = layer.geometry
    return shapes.post[1:-1] if sliding is None else shapes.post[-len(sliding.stride) :]


@dataclass(frozen=True)
class TopKTime:
    """What a layer's weight gradient is predicted to take, in milliseconds.

    Attributes:
        exact: the exact one.
        topk: that of the largest errors alone.
    """

    exact: float
    topk: float


ChannelRole: TypeAlias = Literal["out", "in", "depthwise", "other"]


@dataclass(frozen=True)
class ChannelUse:
    """An axis of a parameter or buffer, and the channel that each of its entries belongs to.

    Attributes:
        tensor: its qualified name.
        axis: of the tensor.
        channels: number of the channel of each entry; what can only be cut together has one.
        role: outputs or inputs of a layer's weight, a depthwise convolution's, or anything else.
    """

    tensor: str
    axis: int
    channels: tuple[int, ...]
    role: ChannelRole


@dataclass(frozen=True)
class Channels:
    """Which channels of which tensors can only be cut together.

    Attributes:
        uses: every axis that holds channels.
        outputs: the channels of each layer's output, by the layer's path.
        fixed: the channels that cannot be cut, and why.
    """

    uses: tuple[ChannelUse, ...]
    outputs: Mapping[str, tuple[int, ...]]
    fixed: Mapping[int, str]


@dataclass(frozen=True)
class ChannelAxis:
    """The axis of a value that its channels lie on.

    Attributes:
        channels: along it.
        dim: its place, from the end: -1 is the last.
        rank: of the value; None if unknown.
        spread: each channel has become an unknown number of features, one after the other.
    """

    channels: tuple[int, ...]
    dim: int
    rank: int | None
    spread: bool = False

    @property
    def is_second(self) -> bool:
        """Whether it is surely the one behind that of the batch."""
        return self.rank is not None and self.rank + self.dim == 1

    def entering(self, dim: int, count: int) -> tuple[int, ...] | None:
        """Return the channels of the ``count`` entries of axis ``dim``; None if not known."""
        times, rest = divmod(count, len(self.channels))
        if self.dim != dim or rest or times < 1 or (times > 1 and not self.spread):
            return None
        return tuple(channel for channel in self.channels for _ in range(times))

    def flattened(self, start: int, end: int) -> "ChannelAxis | None":
        """Return it once the axes from ``start`` to ``end`` are one; None if not known."""
        if self.rank is None:
            return None
        start, end = (d if d < 0 else d - self.rank for d in (start, end))
        if start < self.dim <= end:
            return None
        gone, spread = end - start, self.spread or start == self.dim < end
        dim = self.dim + (gone if end >= self.dim else 0)
        return replace(self, dim=dim, rank=self.rank - gone, spread=spread)

    def reduced(self, dim: Any = None, keepdim: bool = False, **_: Any) -> "ChannelAxis | None":
        """Return it once a mean over the axes ``dim`` is taken; None if it is one of them."""
        dims = (dim,) if isinstance(dim, int) else dim or ()
        if not (dims and all(isinstance(d, int) and (self.rank or d < 0) for d in dims)):
            return None
        gone = {d if d < 0 else d - (self.rank or 0) for d in dims}
        if self.dim in gone or keepdim:
            return None if self.dim in gone else self
        rank = None if self.rank is None else self.rank - len(gone)
        return replace(self, dim=self.dim + sum(d > self.dim for d in gone), rank=rank)
