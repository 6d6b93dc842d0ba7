"""Parameters and buffers reached by another way than their attribute are the model's own."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support.captures import BOTH_WAYS, EXAMPLE
from torch import nn

import fxlocal
from fxlocal import CaptureError, Hebbian, LocalPrefix, Plan

SHARED = {}


class Reached(nn.Module):
    """Holds its state in containers too; ``by_shape`` defeats symbolic tracing."""

    def __init__(self, body, by_shape):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("scale", torch.rand(4) + 1)
        self.last, self.body, self.by_shape = nn.Linear(4, 2), body, by_shape
        self.flat, self.named = [self.weight], {"scale": self.scale}
        self.nested = {"heads": ({"bias": self.last.bias},)}
        self.other = types.SimpleNamespace(weight=self.weight)
        self.constant = torch.rand(4)

    def forward(self, x):
        if self.by_shape and x.shape[0] > 1:
            x = x * 2
        return self.last(self.body(self, x).relu())


WAYS = {
    "list": lambda net, x: F.linear(x, net.flat[0]),
    "dict": lambda net, x: x * net.named["scale"],
    "nested": lambda net, x: x + net.nested["heads"][0]["bias"].sum(),
    "object": lambda net, x: x @ net.other.weight,
    "global": lambda net, x: x @ SHARED[id(net.flat)],
    "arithmetic alone": lambda net, x: x @ (net.flat[0].abs() + 1),
    "arithmetic of a buffer": lambda net, x: x * (net.named["scale"] + 1).rsqrt(),
    "detached": lambda net, x: x @ net.flat[0].detach().softmax(1),
    "transposed": lambda net, x: x @ net.flat[0].T,
    "an item": lambda net, x: x * net.flat[0][1],
    "among others": lambda net, x: x @ torch.stack([net.flat[0], net.weight]).sum(0),
    "on the left": lambda net, x: net.named["scale"] - x,
    "in place": lambda net, x: x * net.named["scale"].add_(1),
    "in place by an operator": lambda net, x: x * net.named["scale"].__iadd__(1),
    "its shape": lambda net, x: x.reshape(-1, net.flat[0].shape[1]) * net.flat[0].size(0),
}


def build(way, by_shape):
    model = Reached(WAYS[way], by_shape)
    SHARED[id(model.flat)] = model.weight
    return model


@pytest.mark.sample(12)
@BOTH_WAYS
@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_reached_by_another_way_learns_and_follows(way, by_shape):
    """Two steps, between which all state changes: a constant would show."""
    model, eager = build(way, by_shape), build(way, by_shape)
    before = copy.deepcopy(model.state_dict())
    captured = fxlocal.capture(model, EXAMPLE)
    laws.assert_equal(model.state_dict(), before, "state")
    for _ in range(2):
        laws.assert_equal(laws.step(captured, (EXAMPLE,)), laws.step(eager, (EXAMPLE,)), "output")
        laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")
        laws.assert_equal(model.state_dict(), eager.state_dict(), "state")
        for net in (model, eager):
            net.zero_grad()
            with torch.no_grad():
                for value in (*net.parameters(), *net.buffers()):
                    value.mul_(1.5)


@BOTH_WAYS
@pytest.mark.parametrize("way", ["list", "closure"])
def test_a_weight_reached_by_another_way_learns_locally(way, by_shape):
    def closed(weight):
        return lambda net, x: F.linear(x, weight)

    model = Reached(WAYS["list"], by_shape)
    if way == "closure":
        model.body = closed(model.weight)
    before, plan = model.weight.detach().clone(), Plan(local=LocalPrefix("last", Hebbian(0.1)))
    fxlocal.transform(model, plan, EXAMPLE)(EXAMPLE)
    assert not torch.equal(model.weight, before)


def in_a_list(net, x):
    return x @ net.hidden[0]


def computed_alone(net, x):
    return x @ (net.hidden[0].detach() * 2)


def of_a_module(net, x):
    return net.hidden[1](x)


def of_its_weight(net, x):
    return F.linear(x, net.hidden[1].weight)


def no_leaf(net, x):
    return x @ net.hidden[2]


def no_parameter(net, x):
    return x * net.hidden[3]


HIDDEN = [in_a_list, computed_alone, of_a_module, of_its_weight, no_leaf, no_parameter]


def hide(body, by_shape):
    model = Reached(body, by_shape)
    other = nn.Parameter(torch.randn(4, 4))
    model.hidden = [other, nn.Linear(4, 4), other * 2, torch.rand(4, requires_grad=True)]
    return model


@BOTH_WAYS
@pytest.mark.parametrize("body", HIDDEN, ids=lambda body: body.__name__)
def test_what_would_learn_and_is_not_registered_is_refused(body, by_shape):
    with pytest.raises(CaptureError, match=r"register it .*nn\.ModuleList") as refused:
        fxlocal.capture(hide(body, by_shape), EXAMPLE)
    assert "net.hidden" in str(refused.value)


@BOTH_WAYS
@pytest.mark.parametrize("body", [in_a_list, of_its_weight, of_a_module], ids=lambda b: b.__name__)
def test_what_is_frozen_and_not_registered_is_a_constant_that_follows(body, by_shape):
    model = hide(body, by_shape)
    for value in (model.hidden[0], *model.hidden[1].parameters()):
        value.requires_grad_(False)
    captured = fxlocal.capture(model, EXAMPLE)
    assert torch.equal(captured(EXAMPLE), model(EXAMPLE))
    model.hidden[0].mul_(2)  # as the average of a teacher moves
    model.hidden[1].weight.mul_(2)
    assert torch.equal(captured(EXAMPLE), model(EXAMPLE))


COUNTS = {"calls": torch.zeros(())}


@BOTH_WAYS
@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: x * net.constant.add_(1),
        lambda net, x: x * COUNTS["calls"].add_(1),
        lambda net, x: x * COUNTS["calls"].add_(x.mean()),
        lambda net, x: (COUNTS["calls"].__setitem__((), 3.0), x * COUNTS["calls"])[1],
        lambda net, x: x * torch.add(COUNTS["calls"], 1, out=COUNTS["calls"]),
    ],
    ids=["attribute", "global", "global by input", "item", "out"],
)
def test_a_tensor_that_is_no_buffer_is_not_changed_while_tracing(body, by_shape):
    model = Reached(body, by_shape)
    constant, calls = model.constant.clone(), COUNTS["calls"].clone()
    with pytest.raises(CaptureError, match="register_buffer"):
        fxlocal.capture(model, EXAMPLE)
    assert torch.equal(model.constant, constant) and torch.equal(COUNTS["calls"], calls)


def test_a_plain_attribute_that_the_inputs_change_is_changed_by_the_graph():
    model = Reached(lambda net, x: x * net.constant.add_(x.mean()), False)
    eager = copy.deepcopy(model)
    captured = fxlocal.capture(model)
    for _ in range(2):
        assert torch.equal(captured(EXAMPLE), eager(EXAMPLE))
    assert torch.equal(model.constant, eager.constant)


@BOTH_WAYS
def test_a_view_of_a_tensor_that_is_no_buffer_is_changed_by_the_graph_or_refused(by_shape):
    calls = torch.zeros(4)
    model = Reached(lambda net, x: x * calls.view(1, 4).add_(1), by_shape)
    try:
        captured = fxlocal.capture(model, EXAMPLE)
    except CaptureError:
        captured = model
    assert torch.equal(calls, torch.zeros(4))
    first = captured(EXAMPLE)
    assert torch.equal(calls, torch.ones(4))
    calls.zero_()
    assert torch.equal(first, model(EXAMPLE))
