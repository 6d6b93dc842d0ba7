"""Which edges bypass layers: by kind, on the small nets and on torchvision's."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from expecttest import assert_expected_inline
from fxlocal.passes import find_skips
from support.nets import NETS, conv_norm
from torch import nn

from fxlocal import capture


def skips_of(model):
    return find_skips(capture(model))


def listed(model):
    def line(edge):
        marks = [m for m in ("projection", "long_range") if getattr(edge, m)]
        return " ".join([edge.kind, edge.source, "->", edge.target, "by", edge.operand, *marks])

    return "\n".join(map(line, skips_of(model)))


# --- golden --------------------------------------------------------------------------------------


def test_residual_with_identity_and_with_projection():
    assert_expected_inline(
        listed(NETS["residual"].build()),
        """\
residual stem_2 -> add by block1_shortcut
residual block1_relu_1 -> add_1 by block2_shortcut_1 projection""",
    )


def test_long_range_concats():
    assert_expected_inline(
        listed(NETS["unet"].build()),
        """\
concat enc2_2 -> cat by enc2_2 long_range
concat enc1_2 -> cat_1 by enc1_2 long_range""",
    )


def test_in_place_sums():
    assert_expected_inline(
        listed(NETS["preactivation"].build()),
        """\
residual stem -> add by stem
residual add -> add_1 by add""",
    )


def test_gate_inside_a_residual():
    assert_expected_inline(
        listed(NETS["gate"].build()),
        """\
gate conv_2 -> mul by conv_2
residual stem_2 -> add by stem_2""",
    )


# --- oracle: counts that the architectures' papers give ------------------------------------------


def build(name):
    arguments = {"init_weights": False} if name == "googlenet" else {}
    device = "cpu" if name.startswith("regnet") else "meta"  # only the structure matters
    with torch.device(device):
        return torchvision.models.get_model(name, weights=None, **arguments)


COUNTS = {
    "resnet18": {"residual": 8, "projection": 3},
    "resnet50": {"residual": 16, "projection": 4},
    "mobilenet_v2": {"residual": 10},
    "vgg11_bn": {},
    "alexnet": {},
    "googlenet": {},  # parallel branches bypass nothing
    "vit_b_16": {"residual": 24},
    "regnet_y_400mf": {"residual": 16, "projection": 4, "gate": 16},
    "efficientnet_b0": {"residual": 9, "gate": 16},
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_torchvision_models(name):
    edges = skips_of(build(name))
    counts = Counter(edge.kind for edge in edges)
    counts["projection"] = sum(edge.projection for edge in edges)
    assert +counts == Counter(COUNTS[name])
    assert not any(edge.long_range for edge in edges)


class DeepUNet(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.down = nn.ModuleList(conv_norm(3 if i == 0 else 4, 4) for i in range(depth))
        self.middle = conv_norm(4, 4)
        self.up = nn.ModuleList(nn.ConvTranspose2d(4, 4, 2, stride=2) for _ in range(depth))
        self.join = nn.ModuleList(conv_norm(8, 4) for _ in range(depth))

    def forward(self, x):
        kept = []
        for down in self.down:
            kept.append(down(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.middle(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([kept.pop(), up(x)], 1))
        return x


def test_unet_of_depth_four_has_four_long_range_concats():
    edges = skips_of(DeepUNet(4))
    assert [(edge.kind, edge.long_range) for edge in edges] == [("concat", True)] * 4
    assert [edge.source for edge in edges] == [f"down_{i}_2" for i in (3, 2, 1, 0)]


class Sum(nn.Module):
    """``merge(x, conv(x))`` behind a stem."""

    def __init__(self, merge):
        super().__init__()
        self.merge = merge
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.merge(x, self.conv(x))


MERGES = {
    "operator": (lambda x, y: x + y, "residual"),
    "operator, turned round": (lambda x, y: y + x, "residual"),
    "function": (lambda x, y: torch.add(y, x), "residual"),
    "method": (lambda x, y: y.add(x), "residual"),
    "in place": (lambda x, y: y.add_(x), "residual"),
    "concat": (lambda x, y: torch.cat((y, x), 1), "concat"),
    "concat of three": (lambda x, y: torch.concat([x.tanh(), y, x], dim=1), "concat"),
    "gate": (lambda x, y: x * torch.sigmoid(y), "gate"),
    "dropped": (lambda x, y: F.dropout(x, 0.1) + y, "residual"),
    "cropped": (lambda x, y: x[:, :, 1:-1, 1:-1] + y[:, :, 1:-1, 1:-1], "residual"),
}


@pytest.mark.parametrize("merge", MERGES)
def test_each_way_to_merge(merge):
    function, kind = MERGES[merge]
    (edge,) = skips_of(Sum(function))
    assert (edge.kind, edge.source, edge.projection) == (kind, "stem", False)
    assert not edge.long_range


@pytest.mark.parametrize("merge", ["dropped", "cropped"])
def test_exported_selections_are_looked_through_as_traced_ones_are(merge):
    class Refused(Sum):
        """Defeats symbolic tracing."""

        def forward(self, x):
            return super().forward(x) if x.shape[0] > 1 else x

    captured = capture(Refused(MERGES[merge][0]), torch.zeros(2, 3, 4, 4))
    assert all(node.op != "call_module" for node in captured.graph.nodes)
    (edge,) = find_skips(captured)
    assert (edge.kind, edge.source, edge.projection) == ("residual", "conv2d", False)


class Projection(nn.Module):
    """Two layers beside a shortcut of one, in either order of execution."""

    def __init__(self, shortcut_first):
        super().__init__()
        self.shortcut_first, self.stem = shortcut_first, nn.Conv2d(3, 4, 1)
        self.one, self.two, self.shortcut = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        first = self.shortcut(x) if self.shortcut_first else None
        out = self.two(torch.relu(self.one(x)))
        return out + (self.shortcut(x) if first is None else first)


@pytest.mark.parametrize("shortcut_first", [True, False])
def test_projection_is_the_shorter_way_whichever_runs_first(shortcut_first):
    (edge,) = skips_of(Projection(shortcut_first))
    assert (edge.source, edge.operand, edge.projection) == ("stem", "shortcut", True)


# --- does nothing when it should -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain", "diamond", "shared", "dropout", "functional"])
def test_networks_without_skip_edges(name):
    assert skips_of(NETS[name].build()) == ()


@pytest.mark.parametrize(
    "merge",
    [
        lambda x, y: x.relu() + x,  # bypasses no layer
        lambda x, y: y + 1.0,
        lambda x, y: y * x.size(0),
        lambda x, y: y + y,
    ],
)
def test_sums_that_bypass_no_layer(merge):
    assert skips_of(Sum(merge)) == ()


def test_sum_with_a_parameter_is_no_skip():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.position = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.fc(x + self.position) + self.position

    assert skips_of(Position()) == ()
