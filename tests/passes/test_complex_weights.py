"""Complex weights: trained exactly or frozen, and refused by name elsewhere."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlocal
from fxlocal import Custom, Freeze, Hebbian, LocalPrefix, Oja, Plan, PlanError, Random, TopK, Zero

X = torch.randn(4, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
METHODS = [Zero(), Random(), TopK(1, force=True)]


def made():
    torch.manual_seed(0)
    layers = (nn.Linear(6, size, dtype=torch.complex64) for size in (6, 3))
    return nn.Sequential(next(layers), nn.Tanh(), next(layers))


def custom(weight, pre, post):
    return weight


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_another_weight_gradient_is_refused(method):
    with pytest.raises(PlanError, match="layer '2' has a complex weight"):
        fxlocal.transform(made(), Plan(weight_grads={"2": method}))


@pytest.mark.parametrize("rule", [Hebbian(), Oja(), Custom(custom)], ids=repr)
def test_a_local_rule_is_refused(rule):
    with pytest.raises(PlanError, match=r"layer '0' has a complex weight.*Freeze\(\)"):
        fxlocal.transform(made(), Plan(local=LocalPrefix("2", rule=rule)))


def test_a_frozen_prefix_trains_the_rest_exactly():
    model = made()
    eager = copy.deepcopy(model)
    eager[0].requires_grad_(False)
    network = fxlocal.transform(model, Plan(local=LocalPrefix("2", rule=Freeze())))
    for one in (network, eager):
        one(X).abs().sum().backward()
    for ours, theirs in zip(model[2].parameters(), eager[2].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert model[0].weight.grad is None


class Joined(nn.Module):
    """A weight that real parameters make up."""

    def __init__(self):
        super().__init__()
        self.real, self.imaginary = (nn.Parameter(torch.ones(3, 6)) for _ in range(2))

    def forward(self, x):
        return F.linear(x, torch.complex(self.real, self.imaginary))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_weight_that_becomes_complex_is_refused_when_it_does(method):
    network = fxlocal.transform(Joined(), Plan(weight_grads={"linear": method}))
    with pytest.raises(ValueError, match=r"weight of torch\.complex64"):
        network(X)


def test_a_rule_for_a_weight_that_becomes_complex_is_refused():
    plan = Plan(local=LocalPrefix("1", rule=Hebbian(computed=True)))
    model = nn.Sequential(Joined(), nn.Linear(3, 2, dtype=torch.complex64))
    with pytest.raises(PlanError, match="has a complex weight"):
        fxlocal.transform(model, plan)
