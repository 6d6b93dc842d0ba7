"""Where a model is split into local modules, what stands at the borders, and which head fits."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.nets import NETS, Written
from torch import nn

import fxlocal
from fxlocal import ConvHead, InfoProHead, LinearHead, LocalModules, PlanError
from fxlocal.compiler.heads import build_heads
from fxlocal.compiler.split import find_split, find_stage_boundaries, find_units
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.facts import BlockInput


def chain(widths, *, classifier=True):
    """Convolutions of these widths; the bytes that each keeps grow with its width."""
    layers, before = [], 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.Tanh()]
        before = width
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 5)] if classifier else []
    return fxlocal.analyze(nn.Sequential(*layers, *tail), torch.zeros(2, 3, 8, 8))


def sizes(analysis, **options):
    starts = find_split(analysis, LocalModules(num_classes=5, **options))
    ends = [*starts[1:], len(find_units(analysis))]
    return [end - start for start, end in zip(starts, ends, strict=True)]


@pytest.fixture(scope="module")
def resnet110():
    model = build_model("resnet110", num_classes=10, width=2, seed=0)
    return fxlocal.analyze(model, torch.zeros(1, 3, 8, 8))


def test_equal_counts_are_the_papers(resnet110):
    """BackLink, section 3.1: 55 basic layers in 16 modules are {4} x 7 + {3} x 9."""
    assert len(find_units(resnet110)) == 55
    assert sizes(resnet110, count=16, balance="blocks") == [4] * 7 + [3] * 9


@pytest.mark.parametrize("link", [0, 1, 2])
@pytest.mark.parametrize("balance", ["memory", "time"])
def test_the_dearest_module_costs_least(balance, link):
    analysis = chain([2, 8, 8, 4, 2, 2, 16])

    def cost(block):
        cost = analysis.block_cost(analysis.blocks[block])
        return cost.saved_bytes if balance == "memory" else cost.flops

    units = [cost(i) for i in range(6)] + [cost(6) + cost(7)]

    def dearest(starts):
        pairs = zip(starts, [*starts[1:], 7], strict=True)
        return max(sum(units[max(0, a - link * (a > 0)) : b]) for a, b in pairs)

    starts = find_split(analysis, LocalModules(3, link=link, num_classes=5, balance=balance))
    least = max(link, 1)
    choices = [
        (0, a, b) for a in range(least, 7) for b in range(a + least, 7)
    ]  # all of them, by hand
    assert dearest(starts) == min(map(dearest, choices))


class Region(nn.Module):
    """Convolutions that run under ``make()``."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        with self.make():
            for conv in self.convs:
                x = torch.relu(conv(x))
        return x.float()


@pytest.mark.parametrize(
    ("make", "second"),
    [
        (nullcontext, "4.convs.1"),  # eight alike
        (torch.no_grad, "6.convs.2"),  # the first five keep nothing
        (partial(torch.autocast, "cpu", torch.bfloat16), "4.convs.2"),  # or less
    ],
)
def test_memory_that_a_region_of_the_models_own_saves_moves_the_split(make, second):
    blocks = [Region(make) for _ in range(5)] + [Region(nullcontext) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * 64, 5))
    analysis = fxlocal.analyze(model, torch.zeros(2, 4, 8, 8))
    starts = find_split(analysis, LocalModules(2, num_classes=5, balance="memory"))
    assert [analysis.blocks[i].name for i in starts] == ["0.convs.0", second]


def test_the_time_of_attention_moves_the_split():
    """Two blocks that attend, on a CPU, against six that do not."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v)
            return x + self.out(attended.transpose(1, 2).flatten(2))

    dense = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)]
    model = nn.Sequential(nn.Linear(8, 8), Attention(), Attention(), *dense)
    analysis = fxlocal.analyze(model, torch.zeros(2, 64, 8))
    assert [block.name for block in analysis.blocks][:4] == ["0", "1", "2", "3.0"]
    linear = 2 * 2 * 64 * 8 * 8
    flops = [analysis.block_cost(block).flops for block in analysis.blocks]
    attention = 4 * linear + 4 * 2 * 64 * 64 * 8
    assert flops == [linear, attention, attention, *[linear] * 6]
    assert find_split(analysis, LocalModules(2, num_classes=5, balance="time")) == (0, 2)


def test_only_a_lone_linear_classifier_joins_the_block_before_it():
    assert len(find_units(chain([4, 4]))) == 2
    assert len(find_units(chain([4, 4], classifier=False))) == 2
    mlp = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5))
    assert len(find_units(fxlocal.analyze(mlp))) == 3


def test_names_begin_the_modules_after_the_first():
    analysis = fxlocal.analyze(build_model("resnet14", num_classes=5, seed=0))
    named = LocalModules(3, num_classes=5, balance=("layer2", "layer3.1"))
    starts = find_split(analysis, named)
    assert [analysis.blocks[i].name for i in starts] == ["conv1", "layer2.0", "layer3.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 9}, "the model has 4 blocks, its classifier '9' counted"),
        ({"count": 3, "link": 2}, "needs 2"),
        ({"count": 2, "balance": ("nowhere",)}, "balance: until='nowhere': no such layer"),
        ({"count": 3, "balance": ("4", "2")}, "'2' does not lie behind"),
        ({"count": 3, "link": 1, "balance": ("2", "2")}, "'2' does not lie behind"),
        ({"count": 3, "link": 2, "balance": ("2", "4")}, "needs 2"),
        ({"count": 2, "link": 2, "balance": ("2",)}, "longer than module 0, which has 1 block"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(options, message):
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Conv2d(3, 3, 1), nn.Tanh())])
    model.append(nn.Flatten()).append(nn.Linear(3 * 16, 5))
    analysis = fxlocal.analyze(model, torch.zeros(2, 3, 4, 4))
    with pytest.raises(PlanError, match=message):
        find_split(analysis, LocalModules(num_classes=5, **options))


def test_a_balance_of_costs_needs_example_inputs():
    analysis = fxlocal.analyze(build_model("resnet8", num_classes=5))
    with pytest.raises(PlanError, match="give example inputs, or balance='blocks'"):
        find_split(analysis, LocalModules(2, num_classes=5))


def test_edges_are_the_main_values_and_their_shapes():
    net = NETS["unet"]
    analysis = fxlocal.analyze(net.build(), *net.inputs())
    shapes = [edge.shape for edge in analysis.block_inputs]
    assert analysis.block_inputs[0].value == "x"
    assert shapes[0] == (2, 3, 8, 8)
    assert shapes[1] == (2, 4, 4, 4)  # pooled; the skip to the decoder is the other value there
    assert shapes[-1] == (2, 2, 8, 8)


def test_an_edge_where_a_tuple_crosses_is_what_the_tuple_was_made_of():
    def split(net, x):
        left, right = net.first(x).chunk(2, dim=1)
        return torch.cat([left, net.second(right)], 1).mean((2, 3))

    analysis = fxlocal.analyze(
        Written(split, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(2, 4, 1)), torch.zeros(2, 3, 4, 4)
    )
    assert analysis.block_inputs[1] == BlockInput("first", (2, 4, 4, 4))


def test_tokens_have_their_channels_last():
    net = NETS["tokens"]
    analysis = fxlocal.analyze(net.build(), *net.inputs())
    assert analysis.block_inputs[1].channels_at == 2


def test_the_error_flows_back_to_the_prefix_and_no_further():
    model = build_model("resnet20", num_classes=5, width=2, seed=0)
    analysis = fxlocal.analyze(model, torch.zeros(1, 3, 8, 8))
    modules = LocalModules(3, link=2, num_classes=5, balance=("layer2.0", "layer3.0"))
    tails = {
        0: ["layer1_1_conv1", "layer2_1_conv1"],
        analysis.boundary("layer1.1"): ["layer1_1_conv1", "layer2_1_conv1"],
        analysis.boundary("layer1.2"): ["layer1_2_conv1", "layer2_1_conv1"],
        analysis.boundary("layer1.2") + 1: [None, "layer2_1_conv1"],
        analysis.boundary("layer2.0"): [None, "layer2_1_conv1"],
        analysis.boundary("layer2.2"): [None, "layer2_2_conv1"],
    }
    for boundary, expected in tails.items():
        borders = find_stage_boundaries(analysis, find_split(analysis, modules), 2, boundary)
        layers = [b.tail and next_layer(analysis, b.tail) for b in borders]
        assert layers == expected, boundary
    split, boundary = find_split(analysis, modules), analysis.boundary("layer2.0")
    first, second = find_stage_boundaries(analysis, split, 2, boundary)
    assert (first.learns, second.learns) == (False, True)


def next_layer(analysis, start):
    return next(n.node for n in analysis.layers if analysis.order[n.node] >= analysis.order[start])


IMAGE, LABEL, MASK = (
    BlockInput("x", (2, 3, 8, 8)),
    BlockInput("fc", (2, 5)),
    BlockInput("out", (2, 5, 8, 8)),
)


@pytest.mark.parametrize("head", [LinearHead(), ConvHead(7), LinearHead(pool=9)])
@pytest.mark.parametrize(
    "features",
    [
        BlockInput("maps", (2, 6, 4, 4)),
        BlockInput("small", (2, 6, 1, 1)),
        BlockInput("signal", (2, 6, 9)),
        BlockInput("flat", (2, 6)),
        BlockInput("tokens", (2, 9, 6), channels_at=2),
        BlockInput("patches", (2, 3, 3, 6), channels_at=3),
    ],
    ids=lambda edge: edge.value,
)
def test_heads_score_features_of_any_kind(head, features):
    modules = LocalModules(2, head=head, num_classes=5)
    (built,) = build_heads(modules, [features], IMAGE, LABEL, torch.empty(0))
    assert built(torch.randn(features.shape)).shape == (2, 5)
    other = (4, *features.shape[1:])  # no batch size is built in
    assert built(torch.randn(other)).shape == (4, 5)


@pytest.mark.parametrize("head", [LinearHead(), ConvHead(7)])
def test_heads_score_pixels_where_the_model_does(head):
    features = BlockInput("maps", (2, 6, 4, 4))
    modules = LocalModules(2, head=head, num_classes=5)
    (built,) = build_heads(modules, [features], IMAGE, MASK, torch.empty(0))
    assert built(torch.randn(features.shape)).shape == MASK.shape


def test_the_decoder_reconstructs_the_input():
    modules = LocalModules(2, head=InfoProHead(7), num_classes=5)
    (built,) = build_heads(
        modules, [BlockInput("maps", (2, 6, 4, 4))], IMAGE, LABEL, torch.empty(0)
    )
    assert built["decoder"](torch.randn(2, 6, 4, 4)).shape == IMAGE.shape
    with pytest.raises(PlanError, match="reconstructs images"):
        build_heads(modules, [BlockInput("flat", (2, 6))], IMAGE, LABEL, torch.empty(0))


def test_heads_are_where_and_what_the_model_is():
    modules = LocalModules(2, head=ConvHead(), num_classes=5)
    like = torch.empty(0, dtype=torch.float64)
    maps = BlockInput("maps", (2, 6, 4, 4), dtype="float64")
    (head,) = build_heads(modules, [maps], IMAGE, LABEL, like)
    assert {p.dtype for p in head.parameters()} == {torch.float64}


def overwriting(shape):
    return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(5))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda shape: 3, "returned int"),
        (lambda shape: 1 / 0, "raised ZeroDivisionError"),
        (lambda shape: nn.Linear(99, 5), "cannot take features of shape"),
        (overwriting, "overwrites its input"),
    ],
)
def test_a_users_head_that_does_not_fit_is_refused(head, message):
    modules = LocalModules(2, head=head)
    with pytest.raises(PlanError, match=message):
        build_heads(modules, [BlockInput("maps", (2, 6, 4, 4))], IMAGE, LABEL, torch.empty(0))


def test_a_lazy_head_gets_its_parameters_before_an_optimizer_asks_for_them():
    modules = LocalModules(2, head=lambda shape: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)))
    (head,) = build_heads(modules, [BlockInput("maps", (2, 6, 4, 4))], IMAGE, LABEL, torch.empty(0))
    assert [tuple(p.shape) for p in head.parameters()] == [(5, 96), (5,)]
