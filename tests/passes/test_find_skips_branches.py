"""Small residuals in a branch, tables, and concats of what layers of their own made."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from fxlocal.passes import find_skips
from support.nets import Written, conv_norm
from torch import nn

import fxlocal


def counted(model):
    kinds = Counter()
    for edge in find_skips(fxlocal.capture(model)):
        marks = [m for m in ("projection", "long_range") if getattr(edge, m)]
        kinds[" ".join([edge.kind, *marks])] += 1
    return dict(kinds)


class LowRank(nn.Module):
    """A linear layer with a low-rank update beside it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.a, self.b = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * 0.5


class Attention(nn.Module):
    """Self-attention; subclasses change its parts."""

    linear = nn.Linear

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), self.linear(8, 24), self.linear(8, 8)
        self.register_buffer("cos", torch.rand(5, 8))
        self.register_buffer("sin", torch.rand(5, 8))

    def turned(self, x):
        return x

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.out(x)


class LowRankAttention(Attention):
    linear = LowRank


class Rotary(Attention):
    def turned(self, x):
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin


class ClassToken(Attention):
    """The first token is left out of what turns the others."""

    def turned(self, x):
        rest = x[:, 1:]
        return torch.cat([x[:, :1], rest * self.cos[1:] + rest.flip(-1) * self.sin[1:]], 1)


class Adapter(Attention):
    """A small residual of its own behind the output."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x):
        x = super().forward(x)
        return x + self.up(torch.relu(self.down(x)))


class Shifted(Attention):
    """Scaled and shifted by a learned pair."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Linear(8, 16)

    def forward(self, x):
        scale, shift = self.pair(x.mean(1, keepdim=True)).chunk(2, -1)
        return super().forward(x) * (1 + scale) + shift


class Transformer(nn.Module):
    def __init__(self, attention, depth=6):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.attention = nn.ModuleList(attention() for _ in range(depth))
        self.norm = nn.ModuleList(nn.LayerNorm(8) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(depth))

    def forward(self, x):
        x = self.embed(x)
        for attention, norm, up, down in zip(
            self.attention, self.norm, self.up, self.down, strict=True
        ):
            x = x + attention(x)
            x = x + down(F.gelu(up(norm(x))))
        return self.head(x.mean(1))


BRANCHES = {
    "plain": (Attention, {"residual": 12}),
    "rotary tables": (Rotary, {"residual": 12}),
    "a class token": (ClassToken, {"residual": 12}),
    "low-rank updates": (LowRankAttention, {"residual": 12, "residual projection": 12}),
    "adapters": (Adapter, {"residual": 18}),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", BRANCHES)
def test_two_plain_residuals_per_transformer_block(name):
    attention, counts = BRANCHES[name]
    model = Transformer(attention)
    assert counted(model) == counts
    analysis = fxlocal.analyze(model, torch.randn(2, 5, 8))
    paths = {analysis.layers[edge].path for edge in analysis.boundaries}
    first = "qkv.base" if attention is LowRankAttention else "qkv"
    begins = {f"attention.{i}.{first}" for i in range(6)} | {f"up.{i}" for i in range(6)}
    assert paths == {"embed", "head", *begins}


def test_a_learned_shift_bypasses_nothing():
    assert counted(Transformer(Shifted)) == {"residual": 12}


class CrossStage(nn.Module):
    """Half of the channels pass bottlenecks, and the result of each is kept (YOLO's C2f)."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.up = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
        self.down = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = self.one(x)
        parts = [x[:, :2], x[:, 2:]]
        for up, down in zip(self.up, self.down, strict=True):
            parts.append(parts[-1] + down(torch.relu(up(parts[-1]))))
        return self.two(torch.cat(parts, 1))


def test_a_concat_over_bottlenecks_is_not_long_range():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), CrossStage(), CrossStage(), nn.Conv2d(4, 2, 1))
    kinds = counted(model)
    assert kinds["residual"] == 4
    assert not any("long_range" in kind for kind in kinds)


def test_a_residual_over_residual_blocks_is_long_range():
    body = [Transformer(Attention, 1).attention[0] for _ in range(3)]

    def forward(net, x):
        first = x = net.stem(x)
        for one in net.row:
            x = x + one(x)
        return net.head(first + net.last(x))

    layers = {name: nn.Linear(8, 8) for name in ("stem", "last", "head")}
    model = Written(forward, row=nn.ModuleList(body), **layers)
    assert counted(model) == {"residual": 3, "residual long_range": 1}


# --- concats whose operand is projected or gated -------------------------------------------------


class Projected(nn.Module):
    """An encoder and a decoder; ``side`` makes of a feature what is concatenated."""

    def __init__(self, side, depth=2):
        super().__init__()
        self.side = nn.ModuleList(side() for _ in range(depth))
        self.enc = nn.ModuleList(conv_norm(3 if i == 0 else 4, 4) for i in range(depth))
        self.middle = conv_norm(4, 4)
        self.up = nn.ModuleList(nn.ConvTranspose2d(4, 4, 2, stride=2) for _ in range(depth))
        self.join = nn.ModuleList(conv_norm(8, 4) for _ in range(depth))

    def forward(self, x):
        kept = []
        for enc in self.enc:
            kept.append(enc(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.middle(x)
        for side, up, join in zip(self.side, self.up, self.join, strict=True):
            x = up(x)
            x = join(torch.cat([side(kept.pop(), x), x], 1))
        return x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv_norm(4, 4)

    def forward(self, skip, x):
        return self.conv(skip)


class TwoLayers(Layer):
    def forward(self, skip, x):
        return skip.tanh() + self.conv(skip)


class Gated(nn.Module):
    """Attention gate: what comes up says which of the skip passes."""

    def __init__(self):
        super().__init__()
        self.x, self.g, self.psi = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 1, 1)

    def forward(self, skip, x):
        return skip * torch.sigmoid(self.psi(torch.relu(self.g(x) + self.x(skip))))


class Plain(nn.Module):
    def forward(self, skip, x):
        return skip


SIDES = {"a layer": Layer, "layers": TwoLayers, "a gate": Gated}


@pytest.mark.sample(5)
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("name", SIDES)
def test_a_concat_of_what_layers_or_a_gate_let_pass_is_a_long_range_edge(name, depth):
    model = Projected(SIDES[name], depth)
    edges = [edge for edge in find_skips(fxlocal.capture(model)) if edge.kind == "concat"]
    assert [(edge.projection, edge.long_range) for edge in edges] == [(True, True)] * depth
    assert [edge.source for edge in edges] == [f"enc_{i}_2" for i in reversed(range(depth))]
    encoder = {f"enc.{i}.0" for i in range(depth)}
    analysis = fxlocal.analyze(model)
    assert encoder <= {analysis.layers[edge].path for edge in analysis.boundaries}


def test_a_concat_of_the_feature_itself_has_no_projection():
    assert counted(Projected(Plain, 3)) == {"concat long_range": 3}


class Pyramid(nn.Module):
    """Parallel branches, of which one is pooled and resized (ASPP)."""

    def __init__(self):
        super().__init__()
        self.stem, self.join = conv_norm(3, 4), nn.Conv2d(12, 4, 1)
        self.one, self.pooled = conv_norm(4, 4), nn.Conv2d(4, 4, 1)
        self.three = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), conv_norm(4, 4))

    def forward(self, x):
        x = self.stem(x)
        pooled = F.interpolate(self.pooled(F.adaptive_avg_pool2d(x, 1)), scale_factor=8.0)
        return self.join(torch.cat([self.one(x), self.three(x), pooled], 1))


def test_parallel_branches_bypass_nothing():
    assert counted(Pyramid()) == {}


def test_the_scales_that_one_concat_fuses():
    class Fused(nn.Module):
        """Each scale is projected and resized, the smallest first (Segformer)."""

        def __init__(self):
            super().__init__()
            self.enc = nn.ModuleList(conv_norm(3 if i == 0 else 4, 4, 2) for i in range(4))
            self.linear = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))
            self.head = nn.Conv2d(16, 2, 1)

        def forward(self, x):
            kept = []
            for enc in self.enc:
                x = enc(x)
                kept.append(x)
            scales = [
                F.interpolate(linear(one), size=(16, 16))
                for linear, one in reversed(list(zip(self.linear, kept, strict=True)))
            ]
            return self.head(torch.cat(scales, 1))

    assert counted(Fused()) == {"concat projection long_range": 3}
