"""Hypothesis: random networks with skip edges, shared layers and dead ends; random plans."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from fxlocal import Analysis, Freeze, Hebbian, LocalPrefix, Plan

WIDTH = 4  # every value has this many channels, so that any two can be added
PLAIN = (WIDTH, (1, 1))  # channels and stride of a convolution that any value can go through


@dataclass(frozen=True)
class Step:
    """How the next value is made of values ``a`` and ``b``, counted back from the newest."""

    kind: str
    a: int
    b: int
    kernel: int
    groups: int


KINDS = (
    *("conv", "norm", "residual", "cat", "down_up", "context"),  # a convolution of its own
    *("again", "tied", "function"),  # the weight of an earlier one, or a bare parameter
    *("add", "add_", "chunk", "drop", "no_grad"),  # none
)
STEPS = st.builds(
    Step,
    kind=st.sampled_from(KINDS),
    a=st.integers(0, 2),
    b=st.integers(0, 5),
    kernel=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, WIDTH]),
)


class RandomNet(nn.Module):
    """A stem, the steps, a linear head; with ``aux`` a second output from the middle."""

    def __init__(self, steps: tuple[Step, ...], aux: bool) -> None:
        super().__init__()
        self.steps, self.aux = steps, aux
        self.stem, self.fc = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Linear(WIDTH, 5)
        self.convs, self.norms = nn.ModuleDict(), nn.ModuleDict()
        self.weights = nn.ParameterDict()
        for i, s in enumerate(steps):
            if s.kind in ("conv", "norm", "residual", "cat", "context", "down_up", "tied"):
                inputs, groups = (2 * WIDTH, 1) if s.kind == "cat" else (WIDTH, s.groups)
                self.convs[str(i)] = nn.Conv2d(
                    inputs, WIDTH, s.kernel, 1 + (s.kind == "down_up"), s.kernel // 2, groups=groups
                )
            if s.kind == "down_up":
                self.convs[f"{i}_up"] = nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2, groups=groups)
            if s.kind == "tied":
                shape = self.convs[str(i)].weight.shape
                same = [c for c in self.convs.values() if c.weight.shape == shape]
                self.convs[str(i)].weight = same[s.b % len(same)].weight
            if s.kind in ("norm", "residual"):
                self.norms[str(i)] = nn.BatchNorm2d(WIDTH)
            if s.kind == "function":
                self.weights[str(i)] = nn.Parameter(torch.randn(WIDTH, WIDTH, 1, 1) * 0.5)
        self.relu_ = nn.ReLU(inplace=True)

    def extra_repr(self) -> str:
        return f"{self.steps}, aux={self.aux}"

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        values = [torch.relu(self.stem(x))]
        for i, s in enumerate(self.steps):
            a, b = (values[max(len(values) - 1 - back, 0)] for back in (s.a, s.b))
            values.append(self.make(i, s, a, b))
        out = self.fc(values[-1].mean((2, 3)))
        return (out, values[len(values) // 2].mean((2, 3))) if self.aux else out

    def make(self, i: int, s: Step, a: Tensor, b: Tensor) -> Tensor:
        if s.kind == "add":
            return a + b
        if s.kind == "add_":
            return a.clone().add_(b)
        if s.kind == "drop":
            return F.dropout(a, 0.3, self.training)
        if s.kind == "chunk":
            first, second = a.chunk(2, 1)
            return torch.cat([second, first], 1)
        if s.kind == "function":
            return torch.tanh(F.conv2d(a, self.weights[str(i)]))
        if s.kind == "no_grad":
            with torch.no_grad():
                return a * torch.sigmoid(b)
        if s.kind == "again":
            same = [name for name, c in self.convs.items() if (c.in_channels, c.stride) == PLAIN]
            return torch.relu(self.convs[same[s.b % len(same)]](a)) if same else a * 0.5
        conv = self.convs[str(i)]
        if s.kind == "cat":
            return self.relu_(conv(torch.cat([a, b], 1)))
        if s.kind == "context":
            return a + conv(a.mean((2, 3), keepdim=True))
        z = conv(a)
        if s.kind == "down_up":
            return torch.tanh(self.convs[f"{i}_up"](torch.relu(z)))
        if s.kind == "norm":
            return self.relu_(self.norms[str(i)](z))
        return torch.relu(self.norms[str(i)](z) + b) if s.kind == "residual" else torch.relu(z)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    steps = draw(st.lists(STEPS, min_size=2, max_size=8))
    torch.manual_seed(draw(st.integers(0, 3)))
    return RandomNet(tuple(steps), draw(st.booleans()))


@st.composite
def plans(draw: st.DrawFn, analysis: Analysis) -> Plan:
    """A valid plan for the model of ``analysis``, the boundary given in any of the three forms."""
    untils = [
        st.integers(0, len(analysis.layers) - 1),
        st.sampled_from([layer.path for layer in analysis.layers]),
        st.floats(0.01, 0.99),
    ]
    rule = draw(st.sampled_from([Hebbian(0.125), Hebbian(2.0**-10), Freeze()]))
    norm = draw(st.sampled_from(["train", "train", "eval"]))
    return Plan(local=LocalPrefix(until=draw(st.one_of(*untils)), rule=rule, norm=norm))
