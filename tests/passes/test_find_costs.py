"""What a layer costs, against the formula and against what autograd really keeps."""

import copy
import gc
import resource
import weakref
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from support import laws
from support.memory import kept_bytes
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import Cost, Freeze, LocalPrefix, Plan, analyze


def aside(model, inputs):
    """What is there without a step: parameters, buffers and the batch."""
    return [*model.state_dict().values(), *inputs]


# --- golden --------------------------------------------------------------------------------------


def test_costs_add_up_in_the_table():
    table = str(analyze(NETS["residual"].build(), torch.zeros(16, 3, 32, 32)))
    assert_expected_inline(
        table,
        """\
#  block   layers  kinds     skip edges             parameters  MFLOPs  kept KiB
0  stem.0  0       1 conv                                  116     3.5       256
1  block1  1-2     2 conv    residual                      304     9.4     1,024
2  block2  3-5     3 conv    residual (projection)         944     7.3       896
3  fc      6       1 linear                                 45     0.0         0
7 layers, 4 blocks, 2 skip edges, 1,409 parameters, 20.3 MFLOPs forward, 2.1 MiB kept for backward""",  # noqa: E501
    )


def test_the_model_can_be_freed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))  # keeps its output
    analyze(model, torch.zeros(2, 3))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- oracle --------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", NETS)
def test_saved_bytes_are_those_that_autograd_keeps(name):
    model, inputs = NETS[name].build(), NETS[name].inputs()
    analysis, previous = analyze(model, *inputs), float("inf")
    for until in range(len(analysis.layers)):
        if (name, until) == ("shared", 2):  # a layer called on both sides
            continue
        network = fxlocal.transform(model, Plan(local=LocalPrefix(until=until, rule=Freeze())))
        kept = kept_bytes(network, inputs, aside(model, inputs))
        assert kept <= previous
        previous = kept
        if (name, until) == ("autoencoder", 2):
            kept += 2 * 4 * 8 * 8 * 4  # its reflect padding keeps its input, unless that is cut
        assert analysis.saved_bytes(until) == kept, analysis.layers[until].path


class Halves(nn.Module):
    """Two convolutions, the second in a region of its own; a map takes 32 KiB."""

    def __init__(self, *regions, export=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.regions, self.export = regions, export

    def forward(self, x):
        if self.export and x.dim() == 3:  # symbolic tracing cannot follow
            return x
        x = F.relu(self.first(x)).float()
        with ExitStack() as stack:
            for make in self.regions:
                stack.enter_context(make())
            side = F.relu(self.second(x))
        return side + x


class Narrow(Halves):
    """The same, all of it in the regions."""

    def forward(self, x):
        with ExitStack() as stack:
            for make in self.regions:
                stack.enter_context(make())
            return F.relu(self.second(F.relu(self.first(x))))


class Attending(nn.Module):
    """Attention of which a part is in a region."""

    def __init__(self, *regions):
        super().__init__()
        self.regions = regions
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.attend = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        with ExitStack() as stack:
            for make in self.regions:
                stack.enter_context(make())
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = self.norm(x.float())
        return self.attend(x, x, x, need_weights=False)[0]


bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
full = partial(torch.autocast, "cpu", enabled=False)
IMAGES = torch.randn(4, 3, 16, 16)
REGIONS = {
    "no region": (),
    "no_grad": (torch.no_grad,),
    "bfloat16": (bfloat16,),
    "full precision": (full,),
    "no_grad in bfloat16": (bfloat16, torch.no_grad),
}


@pytest.mark.parametrize(
    ("build", "regions", "expected"),
    [
        (Halves, "no region", 65_536),
        (Halves, "no_grad", 32_768),
        (Narrow, "no region", 65_536),
        (Narrow, "bfloat16", 40_496),  # two maps, the input, both weights: all of two bytes
    ],
)
def test_the_models_own_regions_count(build, regions, expected):
    model = build(*REGIONS[regions])
    assert (
        analyze(model, IMAGES).saved_bytes(0)
        == expected
        == kept_bytes(model, [IMAGES], aside(model, [IMAGES]))
    )


@pytest.mark.sample(7)
@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize(
    ("build", "outside"),
    [
        *product([Halves, Narrow, Attending], [nullcontext, bfloat16, full]),
        (partial(Halves, export=True), nullcontext),  # its casts hold for one dtype
    ],
)
def test_saved_bytes_of_regions_are_those_that_autograd_keeps(build, regions, outside):
    if isinstance(build, partial) and regions == "no_grad in bfloat16":
        regions = "bfloat16"  # export drops the other, so capture refuses it
    model = build(*REGIONS[regions])
    x = torch.randn(4, 6, 8) if build is Attending else IMAGES
    with outside():
        network = fxlocal.transform(model, Plan(), x)
        assert analyze(model, x).saved_bytes(0) == kept_bytes(network, [x], aside(model, [x]))


def test_flops_of_each_kind_of_layer_are_the_formulas():
    batch, positions = 2, 8 * 8
    chain = [
        2 * batch * positions * 4 * 3 * 9,
        2 * batch * 4 * 4 * 6 * 4 * 9,  # stride 2
        2 * batch * 4 * 4 * 8 * 6,
        2 * batch * 8 * 5,
    ]
    assert [c.flops for c in analyze(NETS["chain"].build(), *NETS["chain"].inputs()).costs] == chain
    autoencoder = [
        2 * batch * 4 * 4 * 6 * 3 * 9,
        2 * batch * 4 * 4 * 6 * (4 // 2) * 9,  # transposed: per position of its input
        2 * batch * positions * 3 * 4 * 9,
    ]
    costs = analyze(NETS["autoencoder"].build(), *NETS["autoencoder"].inputs()).costs
    assert [c.flops for c in costs] == autoencoder


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", NETS)
def test_each_parameter_counts_once(name):
    model = NETS[name].build()
    costs = analyze(model, *NETS[name].inputs()).costs
    assert sum(c.parameters for c in costs) == sum(p.numel() for p in model.parameters())


def test_block_cost_is_the_sum_of_its_layers():
    analysis = analyze(NETS["residual"].build(), *NETS["residual"].inputs())
    block = analysis.blocks[1]
    assert analysis.block_cost(block) == analysis.costs[1] + analysis.costs[2]
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


# --- does nothing when it should -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "dropout"])
def test_nothing_is_computed_and_nothing_moves(name):
    model, inputs = NETS[name].build(), NETS[name].inputs()
    captured = fxlocal.capture(model)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    code = captured.code
    analyze(captured, *inputs)
    laws.assert_equal(model.state_dict(), state, "state")
    assert torch.equal(torch.get_rng_state(), random)
    assert captured.code == code
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())


def test_a_module_of_two_names_keeps_its_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model.append(model[0])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    analyze(model, torch.ones(2, 4))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name], name


def test_a_huge_batch_takes_no_memory():
    model = NETS["residual"].build()
    batch = torch.zeros(1, 3, 1024, 1024).expand(4096, 3, 1024, 1024)  # 48 GiB if it were real
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    costs = analyze(model, batch).costs
    assert sum(c.saved_bytes for c in costs) > 2**36
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB: 128 MiB


def test_no_inputs_no_costs():
    analysis = analyze(NETS["chain"].build())
    assert analysis.costs is None
    assert analysis.saved_bytes(1) is None
    assert analysis.block_cost(analysis.blocks[0]) is None


def test_costs_of_a_model_without_layers_are_not_asked_for():
    assert analyze(nn.Sequential(nn.ReLU()), torch.ones(2)).costs is None
