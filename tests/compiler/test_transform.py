"""transform: which boundary a plan means, what it refuses, what moves and what memory is kept."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support.memory import kept_bytes
from support.nets import NETS
from torch import nn
from torch.nn.utils import parametrizations

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan, PlanError

RATE = 0.125


def local(until, rule=None, norm="train"):
    return Plan(local=LocalPrefix(until, rule or Hebbian(RATE), norm))


def copies(tensors):
    return {name: t.detach().clone() for name, t in tensors}


# --- where the boundary lies ----------------------------------------------------------------------

# stem.0, block1.conv1, block1.conv2, block2.conv1, block2.conv2, block2.shortcut.0, fc: 0 to 6
UNTIL = [
    (0, 0),
    (2, 2),
    (6, 6),
    ("stem.0", 0),
    ("stem", 0),
    ("block1", 1),
    ("block1.conv2", 2),
    ("block2", 3),
    ("block2.shortcut", 5),
    ("block2.shortcut.0", 5),
    ("fc", 6),
    (0.1, 0),
    (1 / 7, 1),
    (0.4, 1),
    (3 / 7, 3),
    (0.8, 3),
    (6 / 7, 6),
    (0.999, 6),
]


@pytest.mark.sample(8)
@pytest.mark.parametrize("until,index", UNTIL)
def test_a_path_an_index_and_a_fraction_mean_a_layer(until, index):
    model = NETS["residual"].build()
    analysis = fxlocal.analyze(model)
    assert analysis.boundaries == (0, 1, 3, 6)
    assert analysis.boundary(until) == index
    ours = fxlocal.format_graph(fxlocal.transform(model, local(until)))
    assert ours == fxlocal.format_graph(fxlocal.transform(model, local(index)))


@pytest.mark.parametrize("until", range(1, 7))
def test_each_boundary_splits_the_layers_in_two(until):
    model, inputs = NETS["residual"].build(), NETS["residual"].inputs()
    layers = fxlocal.analyze(model).layers
    weights = copies(model.named_parameters())
    laws.step(fxlocal.transform(model, local(until)), inputs)
    for layer in layers:
        weight = model.get_parameter(layer.weight)
        assert (weight.grad is None) == (layer.index < until)
        assert torch.equal(weight.detach(), weights[layer.weight]) == (layer.index >= until)


@pytest.mark.parametrize("plan", [Plan(), local(0), local("stem"), local(0.01)])
def test_no_boundary_is_plain_training_bit_for_bit(plan):
    eager, ours = NETS["dropout"].build(), NETS["dropout"].build()
    eager.stem, ours.stem = nn.Identity(), nn.Conv2d(3, 3, 1)  # never called
    plan = Plan() if plan.local and plan.local.until == "stem" else plan
    networks = eager, fxlocal.transform(ours, plan)
    for model, net in zip((eager, ours), networks, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(3):
            laws.step(net, NETS["dropout"].inputs())
            optimizer.step()
            optimizer.zero_grad()
    state = {name: t for name, t in ours.state_dict().items() if not name.startswith("stem")}
    laws.assert_equal(state, dict(eager.state_dict()), "state")


# --- refusals -------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A weight under two names; ``by_product`` uses it once more without a layer."""

    def __init__(self, by_product=False):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.by_product = by_product
        if not by_product:
            self.second.weight = self.first.weight

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        x = x @ self.first.weight if self.by_product else x
        return self.last(torch.relu(x))


def normed(model, path):
    parametrizations.weight_norm(model.get_submodule(path))
    return model


REFUSED = {
    "unknown path": (NETS["residual"].build, local("block1.conv9"), r"'block1\.conv1'"),
    "not a layer": (NETS["residual"].build, local("block1.bn1"), r"'block1'"),
    "past the last": (NETS["residual"].build, local(7), r"7 layers, 0 to 6"),
    "far past it": (NETS["residual"].build, local(700), r"until=700.*past the last layer"),
    "no layers": (lambda: nn.Sequential(nn.ReLU()), local("x"), r"until='x'"),
    "no layers, index": (lambda: nn.Sequential(nn.ReLU()), local(1), r"past the last layer"),
    "tied": (Tied, local("second", Freeze()), r"'first\.weight'.*'second\.weight'.*one side"),
    "tied, by a product": (lambda: Tied(True), local(1), r"'first\.weight'.*one side"),
    "called twice": (NETS["shared"].build, local(2), r"'conv\.weight'.*one side"),
    "parametrised": (lambda: normed(NETS["chain"].build(), "conv1"), local(1), r"'conv1'.*Freeze"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("training", [True, False])
def test_a_plan_that_does_not_fit_leaves_everything_as_it_was(name, training):
    make, plan, message = REFUSED[name]
    model = make().train(training)
    captured = fxlocal.capture(model)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i))
    text, names = fxlocal.format_graph(captured), laws._attributes(model)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    for target in (model, captured):
        with pytest.raises(PlanError, match=message):
            fxlocal.transform(target, plan)
    assert fxlocal.format_graph(captured) == text
    assert laws._attributes(model) == names
    assert [m.training for m in model.modules()] == modes
    laws.assert_equal(model.state_dict(), state, "state")
    for i, parameter in enumerate(model.parameters()):
        assert parameter.grad is not None and bool((parameter.grad == i).all())


def test_a_parametrised_weight_may_be_frozen_or_lie_after_the_boundary():
    for path, plan in (("conv1", local(1, Freeze())), ("conv2", local(1))):
        model = normed(NETS["chain"].build(), path)
        for law in (laws.l2_output_is_exact, laws.l3_cut_blocks, laws.l4_no_leak):
            law(model, NETS["chain"].inputs(), plan)


@pytest.mark.parametrize("by_product", [False, True], ids=["two names", "used without a layer"])
def test_no_forward_sees_a_half_updated_weight(by_product):
    torch.manual_seed(0)
    inputs = (torch.randn(3, 4),)
    laws.l2_output_is_exact(Tied(by_product), inputs, local("last"))
    laws.l3_cut_blocks(Tied(by_product), inputs, local("last"))
    laws.l9_delta_is_closed_form(Tied(by_product), inputs, local("last"))


# --- what an optimizer may move -------------------------------------------------------------------

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
ADAM = {"lr": 0.01, "weight_decay": 0.1}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, **SGD),
    "sgd nesterov": partial(torch.optim.SGD, **SGD, nesterov=True),
    "sgd foreach": partial(torch.optim.SGD, **SGD, foreach=True),
    "sgd fused": partial(torch.optim.SGD, **SGD, fused=True),
    "adam": partial(torch.optim.Adam, **ADAM),
    "adam fused": partial(torch.optim.Adam, **ADAM, fused=True),
    "adamw": partial(torch.optim.AdamW, **ADAM),
    "adamw foreach": partial(torch.optim.AdamW, **ADAM, foreach=True),
}


@pytest.mark.sample(14)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("rule", [Hebbian(RATE), Freeze()], ids=["hebbian", "freeze"])
def test_the_prefix_moves_by_the_local_rule_alone(name, set_to_none, rule):
    """Though the optimizer holds momentum, weight decay and, from plain training, gradients."""
    model, inputs = NETS["chain"].build(), NETS["chain"].inputs()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(2):
        laws.step(model, inputs)
        optimizer.step()
    net = fxlocal.transform(model, local(2, rule))
    before, rest = ("conv1", "bn1", "conv2", "bn2"), ("conv3.weight", "fc.weight", "fc.bias")
    updated = {"conv1.weight", "conv2.weight"} if rule == Hebbian(RATE) else set()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        start = copies(model.named_parameters())
        laws.step(net, inputs)
        forward = copies(model.named_parameters())
        optimizer.step()
        end = copies(model.named_parameters())
        for parameter in (n for n in start if n.startswith(before)):
            assert torch.equal(end[parameter], forward[parameter]), f"optimizer moved {parameter}"
            moved = float((forward[parameter] - start[parameter]).norm())
            # 1e-5: the weight's own float32 rounding
            assert moved == pytest.approx(RATE if parameter in updated else 0, rel=1e-5), parameter
        for parameter in rest:
            assert torch.equal(forward[parameter], start[parameter])
            assert not torch.equal(end[parameter], start[parameter])


def test_a_layer_that_the_user_froze_stays():
    model, inputs = NETS["chain"].build(), NETS["chain"].inputs()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.requires_grad_(False)
    start = copies(model.named_parameters())
    laws.step(fxlocal.transform(model, local(2)), inputs)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {"conv2.weight"}
    assert model.fc.weight.grad is None and model.fc.bias.grad is not None


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_moves_no_local_layer_of_a_residual_network(kind):
    """Momentum and weight decay have state from a plain step; each weight moves by RATE alone."""
    model, inputs = NETS["residual"].build(), NETS["residual"].inputs()
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **extra)
    laws.step(model, inputs)
    optimizer.step()
    network = fxlocal.transform(model, local("block2"))
    start = copies(model.named_parameters())
    laws.step(network, inputs)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = float((parameter.detach() - start[name]).norm())
        if name.startswith(("stem.0", "block1.conv")):
            assert moved == pytest.approx(RATE, rel=1e-5), name
        else:
            assert (moved == 0) == name.startswith(("stem", "block1")), name


def test_a_rate_of_zero_moves_nothing():
    model, inputs = NETS["residual"].build(), NETS["residual"].inputs()
    start = copies(model.named_parameters())
    laws.step(fxlocal.transform(model, local("fc", Hebbian(0))), inputs)
    laws.assert_equal(copies(model.named_parameters()), start, "parameter")


def test_a_second_forward_under_one_autocast_sees_the_update_of_the_first():
    """Autocast caches the casts of weights until its outermost region ends."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    outputs, x = [], torch.ones(3, 4)
    for num_regions in (1, 2):
        net = fxlocal.transform(copy.deepcopy(source), local(1, Hebbian(1.0)))
        for _ in range(num_regions):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = [net(x) for _ in range(2 // num_regions)][-1]
        outputs.append(output)
    assert torch.equal(*outputs)


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Hebbian(RATE), Freeze()], ids=["hebbian", "freeze"])
def test_running_statistics_follow_the_plan(rule):
    inputs = NETS["chain"].inputs()
    start = copies(NETS["chain"].build().named_buffers())
    eager, trained, kept = (NETS["chain"].build() for _ in range(3))
    laws.step(eager, inputs)
    laws.step(fxlocal.transform(trained, local(2, rule, "train")), inputs)
    laws.assert_equal(copies(trained.named_buffers()), copies(eager.named_buffers()), "buffer")
    laws.step(fxlocal.transform(kept, local("conv2", rule, "eval")), inputs)
    end = copies(kept.named_buffers())
    for name, value in start.items():  # bn1 lies before the boundary, bn2 after it
        assert torch.equal(end[name], value) == name.startswith("bn1"), name


def test_norms_in_evaluation_mode_use_the_running_statistics():
    model, inputs = NETS["chain"].build(), NETS["chain"].inputs()
    model.bn1.running_mean.uniform_(-1, 1)
    model.bn1.running_var.uniform_(0.5, 2)
    reference = copy.deepcopy(model)
    reference.bn1.eval()
    net = fxlocal.transform(model, local("conv2", Freeze(), "eval"))
    laws.assert_equal(laws.step(net, inputs), laws.step(reference, inputs), "output")


# --- memory ---------------------------------------------------------------------------------------


def parts_of_residual(model):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)
    return {0: model.stem, 1: model.block1, 3: model.block2, 6: head}


@pytest.mark.sample(4)
@pytest.mark.parametrize("rule", [Hebbian(RATE), Freeze()], ids=["hebbian", "freeze"])
@pytest.mark.parametrize("until", [0, 1, 3, 6])
def test_only_the_layers_after_the_boundary_keep_activations(until, rule):
    model = NETS["residual"].build()
    (x,) = NETS["residual"].inputs()
    state = [*model.parameters(), *model.buffers()]
    parts = parts_of_residual(model)
    with torch.no_grad():
        value = nn.Sequential(*(parts[k] for k in parts if k < until))(x)
    after = nn.Sequential(*(parts[k] for k in parts if k >= until))
    expected = kept_bytes(lambda _: after(value), (x,), (x, *state))
    net = fxlocal.transform(model, local(until, rule))
    ours = kept_bytes(net, (x,), (x, *state))
    assert ours == expected > 0
    assert fxlocal.analyze(model, x).saved_bytes(until) == expected


# --- functions -----------------------------------------------------------------------------------


def test_functional_layers_learn_like_modules():
    weights = []
    for functional in (True, False):
        torch.manual_seed(0)
        first, last = nn.Linear(4, 6), nn.Linear(6, 2)

        class Net(nn.Module):
            def __init__(self, functional, first, last):
                super().__init__()
                self.functional, self.first, self.last = functional, first, last

            def forward(self, x):
                if self.functional:
                    return self.last(F.linear(x, weight=self.first.weight, bias=self.first.bias))
                return self.last(self.first(x))

        model = Net(functional, first, last)
        fxlocal.transform(model, local(1))(torch.ones(2, 3, 4))
        weights.append(first.weight)
    assert torch.equal(*weights)
