"""Checkpointed stages compute what plain training computes, bit for bit, and keep less."""

import copy

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from fxlocal.passes import assign_stages, insert_checkpoints
from support import laws
from support.checkpoints import IMAGES, both, checkpointed, steps
from support.memory import kept_bytes
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import PlanError, StageBoundary, diff_graphs


def cut_before(model, *names, start=None):
    """The rewrite alone, with stages that begin at these nodes."""
    network = fxlocal.capture(model).clone()
    stages = [StageBoundary(k, name, None, None, True) for k, name in enumerate(names)]
    assign_stages(network, stages=stages)
    insert_checkpoints(network, start=start)
    network.recompile()
    return network


# --- golden --------------------------------------------------------------------------------------


def test_stages_are_tagged():
    network = fxlocal.transform(NETS["chain"].build(), checkpointed(3))
    assert_expected_inline(
        fxlocal.explain(network),
        """\
Plan(checkpoint=Checkpoint(count=3, balance='blocks'))

1. assign_stages(stages=<2>)
+stage 0:
+stage 1:
+stage 2:

2. insert_checkpoints(start=None)
+stage 0, computed again in backward:
-stage 1:
+stage 1, computed again in backward:""",
    )


class Regions(nn.Module):
    """An autocast region over the border, a weight and a plain value that both stages use."""

    def __init__(self):
        super().__init__()
        self.a, self.stage_0 = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        size = x.size(0)
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.relu(self.a(x).view(size, 4))
            x = torch.relu(self.stage_0(x * self.scale))
        return F.linear(x.float() * self.scale, self.a.weight).view(size, 4)


def test_a_stage_becomes_a_function_with_contexts_of_its_own():
    network = cut_before(Regions(), "relu", "stage_0")
    assert_expected_inline(
        network.code.replace(" \n", "\n").strip(),
        """\
def forward(self, x):
    if not self.trains:
        return self.evaluate(x)
    def stage_0_(x):
        size = x.size(0)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=True):
            a = self.a(x);  x = None
            view = a.view(size, 4);  a = None
        return size, view
    size, view = self.run_checkpointed(0, stage_0_, x)
    scale = self.scale
    def stage_1(view):
        scale = self.scale
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=True):
            relu = torch.relu(view);  view = None
            mul = relu * scale;  relu = None
        return mul
    mul = self.run_checkpointed(1, stage_1, view)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=True):
        stage_0 = self.stage_0(mul);  mul = None
        relu_1 = torch.relu(stage_0);  stage_0 = None
    float_1 = relu_1.float();  relu_1 = None
    mul_1 = float_1 * scale;  float_1 = scale = None
    a_weight = self.a.weight
    linear = torch._C._nn.linear(mul_1, a_weight);  mul_1 = a_weight = None
    view_1 = linear.view(size, 4);  linear = size = None
    return view_1""",
    )


# --- oracle --------------------------------------------------------------------------------------


class Tracking(nn.Module):
    """A norm of every kind of statistics, a buffer of the user's, and a functional norm."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.cumulative = nn.BatchNorm2d(3, momentum=None)
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)
        self.fc = nn.Linear(3, 10)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        x = self.cumulative(self.convs[0](x))
        x = self.instance(self.convs[1](x))
        x = self.plain(self.convs[2](x))
        x = F.batch_norm(self.convs[3](x), self.mean, self.var, training=True)
        return self.fc(self.convs[4](x).mean((2, 3)))


class Masked(nn.Module):
    """An input with a default."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3) for _ in range(3))
        self.fc = nn.Linear(3, 10)

    def forward(self, x, mask=None):
        x = self.convs[2](self.convs[1](self.convs[0](x).relu()))
        return self.fc((x if mask is None else x * mask).mean((2, 3)))


class Counting(nn.Module):
    """Buffers that move and are read, a spectral norm's among them, and a norm that is fixed."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3) for _ in range(3))
        self.spectral = nn.utils.spectral_norm(nn.Conv2d(3, 3, 3))
        self.fixed, self.fc = nn.BatchNorm2d(3).eval(), nn.Linear(3, 10)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        x = torch.relu(self.spectral(self.convs[0](x) * self.calls.clone()))
        x = torch.relu(self.fixed(self.convs[1](x)))
        return self.fc(self.convs[2](x).mean((2, 3)))


FEW_BLOCKS = {"shared", "dropout", "functional", "gate"}
MODELS = {name: net.model for name, net in NETS.items()}
MODELS |= {"tracking": Tracking, "masked": Masked, "counting": Counting}


@pytest.mark.sample(7)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_buffers_are_those_of_plain_training(name, count):
    count = min(count, 2) if name in FEW_BLOCKS else count
    network, ours, theirs = both(MODELS[name], checkpointed(count))
    assert network.code.count("self.run_checkpointed") == count - 1
    losses, random = steps(ours, network), torch.get_rng_state()
    assert losses == steps(theirs, theirs)
    assert torch.equal(random, torch.get_rng_state())
    laws.assert_equal(ours.state_dict(), theirs.state_dict(), "state")
    laws.assert_equal(laws.gradients(ours), laws.gradients(theirs), "gradient")


def test_two_forwards_before_their_backwards_are_each_computed_again_as_they_were():
    network, ours, theirs = both(Counting, checkpointed(3))
    for net in (network, theirs):
        sum(laws.loss_of(net(x)) for x in (IMAGES, 2 * IMAGES)).backward()
    laws.assert_equal(laws.gradients(ours), laws.gradients(theirs), "gradient")
    laws.assert_equal(ours.state_dict(), theirs.state_dict(), "state")


def test_values_that_skip_a_stage_are_handed_on():
    network = fxlocal.transform(NETS["unet"].build(), checkpointed(4))
    stage = {node: node.meta["fxlocal_stage"] for node in network.graph.nodes}
    made = [n for n in stage if n.op.startswith("call") and stage[n] == 0]
    (skip,) = (n for n in made if any(stage[user] > 1 for user in n.users))
    assert f"(1, stage_1, {skip.name}" not in network.code
    assert f", {skip.name})" in network.code


def test_autocast_holds_in_both_forwards():
    network, ours, theirs = both(MODELS["dropout"], checkpointed(2))
    for net in (network, theirs):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = laws.loss_of(net(IMAGES))
        loss.backward()
    laws.assert_equal(laws.gradients(ours), laws.gradients(theirs), "gradient")


def test_contexts_of_the_model_hold_in_both_forwards():
    ours = Regions()
    theirs = copy.deepcopy(ours)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for net in (cut_before(ours, "relu", "stage_0"), theirs):
        net(x).sum().backward()
    laws.assert_equal(laws.gradients(ours), laws.gradients(theirs), "gradient")


def test_a_checkpointed_stage_keeps_nothing():
    network = cut_before(NETS["chain"].build(), "mean")
    (x,) = NETS["chain"].inputs()
    classifier = 2 * 8 * x.element_size()  # what it takes
    assert kept_bytes(network, [x], network.state_dict().values()) == x.nbytes + classifier


# --- what is changed in place --------------------------------------------------------------------


class Mutating(nn.Module):
    """The value of the first layer is changed in place, and maybe used later."""

    def __init__(self, change, later=False):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act, self.change, self.later = nn.SiLU(inplace=True), change, later

    def forward(self, x):
        x = self.first(x)
        y = self.second(self.change(self, x).square())
        return y + x if self.later else y


CHANGES = {
    "module": (lambda net, x: net.act(x), "act"),
    "view": (lambda net, x: net.act(x.view(-1, 2)).view(-1, 4), "view"),
    "item": (lambda net, x: x.sort(1)[0].mul_(2), "getitem"),
}


@pytest.mark.parametrize("stage", ["middle", "last"])
@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_stage_changes_in_place_is_taken_unchanged_twice(kind, stage):
    change, start = CHANGES[kind]
    torch.manual_seed(0)
    ours = Mutating(change)
    theirs = copy.deepcopy(ours)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    starts = [start, "second"] if stage == "middle" else [start]
    network = cut_before(ours, *starts)
    network(x).sum().backward()
    theirs(x).sum().backward()
    laws.assert_equal(laws.gradients(ours), laws.gradients(theirs), "gradient")


def test_only_what_is_changed_is_cloned():
    network = cut_before(Mutating(CHANGES["item"][0]), "getitem", "second")
    assert_expected_inline(
        diff_graphs(fxlocal.capture(Mutating(CHANGES["item"][0])), network),
        """\
+stage 0:
+stage 0, computed again in backward:
-%getitem = call_function getitem(%sort, 0)
+stage 1, computed again in backward:
+%clone_all = call_function clone_all(%sort)  # insert_checkpoints @stage 1
+%getitem = call_function getitem(%clone_all, 0)
+stage 2:""",
    )


@pytest.mark.parametrize("kind", ["module", "view"])
def test_what_is_changed_in_place_and_used_later_is_refused(kind):
    change, start = CHANGES[kind]
    model = Mutating(change, later=True)
    with pytest.raises(PlanError, match="stage 1 changes 'first' in place"):
        cut_before(model, start, "second")


@pytest.mark.parametrize("layer", [nn.RReLU(), nn.RReLU(inplace=True)])
def test_rrelu_is_refused_in_a_checkpointed_stage(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(PlanError, match="rrelu saves its noise before it draws it"):
        fxlocal.transform(model, fxlocal.Plan(checkpoint=fxlocal.Checkpoint(2)), torch.ones(2, 4))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.utils.spectral_norm(nn.Linear(4, 4))])
def test_a_retained_graph_goes_back_twice(norm):
    layers = (nn.Linear(4, 4), norm, nn.Dropout(0.5), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model = nn.Sequential(*copy.deepcopy(layers))
    plain, x = copy.deepcopy(model), torch.linspace(-1, 1, 12).view(3, 4)
    net = fxlocal.transform(model, fxlocal.Plan(checkpoint=fxlocal.Checkpoint(2)), x)
    for run in (net, plain):
        torch.manual_seed(0)
        loss = run(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
