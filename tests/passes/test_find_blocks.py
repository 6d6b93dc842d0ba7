"""The blocks: what they are called, where they begin, and that a network can be cut there."""

import math

import pytest
import torch
import torchvision
from expecttest import assert_expected_inline
from support.nets import NETS, Written
from torch import nn

from fxlocal import analyze, capture
from fxlocal.ir.boundary import crossing_values


def listed(model):
    return "\n".join(
        f"{block.name}: layers {', '.join(map(str, block.layers))} from {block.start}"
        for block in analyze(model).blocks
    )


def build(name, **arguments):
    with torch.device("meta"):  # only the structure matters
        return torchvision.models.get_model(name, weights=None, **arguments)


# --- golden --------------------------------------------------------------------------------------


def test_residual_block_with_its_shortcut_is_one_block():
    assert_expected_inline(
        listed(NETS["residual"].build()),
        """\
stem.0: layers 0 from stem_0
block1: layers 1, 2 from block1_conv1
block2: layers 3, 4, 5 from block2_conv1
fc: layers 6 from fc""",
    )


def test_long_range_skips_do_not_hold_a_boundary_back():
    assert_expected_inline(
        listed(NETS["unet"].build()),
        """\
enc1.0: layers 0 from enc1_0
enc2.0: layers 1 from enc2_0
mid.0: layers 2 from mid_0
up2: layers 3 from up2
dec2.0: layers 4 from dec2_0
dec1.0: layers 5 from dec1_0
head: layers 6 from head""",
    )


def test_parallel_branches_are_one_block():
    assert_expected_inline(
        listed(NETS["diamond"].build()),
        """\
stem.0: layers 0 from stem_0
one: layers 1, 2, 3 from one
join.0: layers 4 from join_0
fc: layers 5 from fc""",
    )


def test_side_branch_to_another_output_is_no_hindrance():
    assert_expected_inline(
        listed(NETS["multi_output"].build()),
        """\
low.0: layers 0 from low_0
aux: layers 1 from aux
high.0: layers 2 from high_0
fc: layers 3 from fc""",
    )


class SelectedTwice(nn.Module):
    """A dropout's result goes on, and over a pool and a resize to a concat at the end."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.last, self.drop = nn.Conv2d(6, 3, 1), nn.Dropout(0.1)

    def forward(self, x):
        kept = self.drop(torch.relu(self.stem(x)))
        y = self.two(nn.functional.max_pool2d(self.one(kept), 2))
        return self.last(torch.cat([kept, nn.functional.interpolate(y, scale_factor=2)], 1))


def test_what_a_long_range_skip_selects_for_the_main_path_too_stays_on_it():
    assert_expected_inline(
        listed(SelectedTwice()),
        """\
stem: layers 0 from stem
one: layers 1 from one
two: layers 2 from two
last: layers 3 from last""",
    )


def asked_later(net, x):
    """The size of what enters ``two`` is asked behind ``three``."""
    y = torch.relu(net.one(x))
    z = torch.relu(net.two(y))
    return net.three(z).view(y.size(0), 4)


def test_what_is_later_asked_for_its_size_alone_does_not_hold_a_boundary_back():
    assert_expected_inline(
        listed(
            Written(asked_later, one=nn.Linear(4, 4), two=nn.Linear(4, 4), three=nn.Linear(4, 4))
        ),
        """\
one: layers 0 from one
two: layers 1 from two
three: layers 2 from three""",
    )


# --- oracle --------------------------------------------------------------------------------------


def test_resnet18():
    analysis = analyze(build("resnet18"))
    stages = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]
    assert [block.name for block in analysis.blocks] == ["conv1", *stages, "fc"]
    assert analysis.boundaries == (0, 1, 3, 5, 8, 10, 13, 15, 18, 20)
    # the norm, the activation and the pool of the stem stay with the stem
    assert analysis.blocks[1].start == "layer1_0_conv1"


def test_googlenet_blocks_are_its_inceptions_whatever_its_side_outputs():
    names = ["conv1.conv", "conv2.conv", "conv3.conv"]
    names += [f"inception{i}" for i in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
    names.append("fc")
    for aux_logits in (False, True):
        model = build("googlenet", init_weights=False, aux_logits=aux_logits)
        blocks = [block.name for block in analyze(model).blocks]
        assert [name for name in blocks if "aux" not in name] == names


@pytest.mark.parametrize("name", NETS)
def test_blocks_partition_the_layers(name):
    analysis = analyze(NETS[name].build())
    indices = [i for block in analysis.blocks for i in block.layers]
    assert indices == list(range(len(analysis.layers)))
    names = [block.name for block in analysis.blocks]
    assert len(set(names)) == len(names)
    places = [analysis.order[block.start] for block in analysis.blocks]
    assert places == sorted(places)
    for block in analysis.blocks:
        assert analysis.order[block.start] <= analysis.order[analysis.layers[block.layers[0]].node]


@pytest.mark.parametrize("name", ["chain", "residual", "preactivation", "diamond", "gate"])
def test_one_value_crosses_each_block_edge(name):
    """And more than one crosses everywhere else between two layers: no edge is missed."""
    captured = capture(NETS[name].build())
    analysis = analyze(captured)
    for block in analysis.blocks[1:]:
        assert len(crossing_values(captured, block.start)) == 1, block
    nodes = [node.name for node in captured.graph.nodes]
    for before, layer in zip(analysis.layers, analysis.layers[1:], strict=False):
        if layer.index not in analysis.boundaries:
            between = nodes[nodes.index(before.node) + 1 : nodes.index(layer.node) + 1]
            assert all(len(crossing_values(captured, start)) > 1 for start in between), layer


# --- does nothing when it should -----------------------------------------------------------------


class Conditioned(nn.Module):
    """A learned embedding is live all the way; ``tied`` has the first weight used last again."""

    def __init__(self, depth, tied=False):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.tied = tied

    def forward(self, x):
        time = self.embed(x)
        for layer in self.layers:
            x = torch.maximum(layer(x), time)  # no skip edge
        return self.embed(x) if self.tied else x


class Towers(nn.Module):
    """Two branches run beside each other, and meet at the end."""

    def __init__(self, depth):
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.b = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x):
        one, other = x, x * 2
        for a, b in zip(self.a, self.b, strict=True):
            one, other = a(one).relu(), b(other).relu()
        return one + other


@pytest.mark.parametrize("model", [Conditioned(15), Conditioned(40), Towers(12)])
def test_no_stretch_is_longer_than_an_eighth_of_the_layers(model):
    analysis = analyze(model)
    longest = max(len(block.layers) for block in analysis.blocks)
    assert longest <= max(math.ceil(len(analysis.layers) / 8), 4)
    assert abs(analysis.boundary(0.5) - len(analysis.layers) / 2) <= 0.15 * len(analysis.layers)
    assert any(len(block.values) > 1 for block in analysis.blocks)


def test_a_stretch_that_a_tied_weight_spans_stays_whole():
    assert len(analyze(Conditioned(40, tied=True)).blocks) == 1


def test_network_without_layers_has_no_blocks():
    analysis = analyze(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    assert (analysis.layers, analysis.blocks, analysis.boundaries) == ((), (), ())


def test_one_layer_is_one_block():
    analysis = analyze(nn.Sequential(nn.Linear(2, 2)))
    assert [(block.name, block.layers) for block in analysis.blocks] == [("0", (0,))]
