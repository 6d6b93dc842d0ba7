"""Parameters that are other ones after `transform`: taken up, or refused."""

import copy
import types

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan

X = torch.linspace(-1, 1, 12).view(3, 4)
FROZEN = Plan(local=LocalPrefix(until="2", rule=Freeze()))


def chain():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def assign(model, net):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    net.load_state_dict(state, assign=True)


def replace(model, net):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def swap_out(model, net):
    model._apply(lambda p: p.clone(), recurse=True)


@pytest.mark.parametrize("change", [assign, replace, swap_out])
def test_a_prefix_of_other_parameters_stays_where_it_is(change):
    model = chain()
    net = fxlocal.transform(model, FROZEN)
    net(X)
    change(model, net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = model[0].weight.clone()
    penalty = sum(p.square().sum() for p in net.parameters())
    (net(X).sum() + penalty).backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert model[2].weight.grad is not None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_made_after_parameters_were_replaced_keeps_its_prefix(copied):
    model = chain()
    net = fxlocal.transform(model, FROZEN)
    assign(model, net)
    twin = copied(net)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    before = twin.get_parameter("0.weight").clone()
    penalty = sum(p.square().sum() for p in twin.parameters())
    (twin(X).sum() + penalty).backward()
    optimizer.step()
    assert torch.equal(twin.get_parameter("0.weight"), before)


@pytest.mark.parametrize("plan", [Plan(), FROZEN], ids=["plain", "frozen"])
def test_weights_tied_since_then_are_refused(plan):
    model = chain()
    net = fxlocal.transform(model, plan)
    net(X)
    model[2].weight = model[0].weight
    with pytest.raises(RuntimeError, match=r"'2\.weight' is another .* tied weights"):
        net(X)


def test_weights_untied_since_then_are_refused():
    model = chain()
    model[2].weight = model[0].weight
    net = fxlocal.transform(model, Plan())
    net(X)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"'2\.weight' is another"):
        net(X)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.register_parameter("scale", None)

    def forward(self, x):
        return self.layer(x) if self.scale is None else self.layer(x) * self.scale


def test_a_parameter_that_was_none_is_refused_once_it_is_there():
    model = Scaled()
    net = fxlocal.transform(model, Plan())
    net(X)
    model.scale = nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match="'scale' is another"):
        net(X)


def test_a_bias_that_a_leaf_gets_is_its_own_matter():
    model = Scaled()
    net = fxlocal.transform(model, Plan())
    net(X)
    model.layer.bias = nn.Parameter(torch.ones(4))
    assert torch.equal(net(X), model(X))


class Asking(nn.Module):
    """Asks which weights are frozen, so that the graph has the answer."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.last, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x):
        if self.how == "branch":
            hidden = self.layer(x)
            return self.last(hidden if self.layer.weight.requires_grad else hidden.detach())
        learned = (p.square().sum() for p in self.parameters() if p.requires_grad)
        return self.last(self.layer(x)).sum() + sum(learned)


@pytest.mark.parametrize("how", ["branch", "penalty"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_forward_that_asks_what_is_frozen_is_refused_when_that_changes(how, frozen):
    model = Asking(how)
    model.layer.requires_grad_(not frozen)
    net = fxlocal.transform(model, Plan(), X)
    assert torch.equal(net(X), model(X))
    model.layer.requires_grad_(frozen)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the forward asks which are, at .*requires_grad"):
            net(X)
    model.layer.requires_grad_(not frozen)
    assert torch.equal(net(X), model(X))


def test_a_wrapped_forward_does_not_keep_old_code():
    model = chain()
    net = fxlocal.transform(model, Plan(local=LocalPrefix(until="2", rule=Hebbian(0.1))))
    wrapped = torch.autocast("cpu", torch.bfloat16)(net.forward.__func__)
    net.forward = types.MethodType(wrapped, net)
    net(X)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    with pytest.raises(RuntimeError, match="the network's forward was wrapped"):
        net(X)
    assert torch.equal(model[0].weight, before)
