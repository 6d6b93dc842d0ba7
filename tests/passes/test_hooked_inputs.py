"""Layers that learn locally, and whose input a hook may change unseen by the graph."""

import copy

import pytest
import torch
from support import laws
from torch import nn
from torch.nn.utils import prune

import fxlocal
from fxlocal import Custom, Freeze, Hebbian, LocalPrefix, Oja, Plan, PlanError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def covariance(weight, pre, post, product):
    return product(pre, post)


def made():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def prefix(until, rule):
    return Plan(local=LocalPrefix(until, rule=rule))


@pytest.mark.parametrize("rule", [Hebbian(), Oja(), Custom(covariance)])
def test_a_layer_that_learns_is_refused_and_left_as_it_was(rule):
    model = made()
    model[2].register_forward_pre_hook(lambda layer, args: (args[0].sign(),))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=r"layer '2' has forward pre-hooks.*use Freeze\(\)"):
        fxlocal.transform(model, prefix("4", rule))
    laws.assert_equal(model.state_dict(), before, "state")


@pytest.mark.parametrize("plan", [prefix("2", Hebbian()), prefix("4", Freeze())])
def test_a_layer_behind_the_prefix_or_a_frozen_one_is_not(plan):
    model = made()
    model[2].register_forward_pre_hook(lambda layer, args: (args[0].sign(),))
    assert torch.equal(fxlocal.transform(model, plan)(X), model(X))


def test_one_that_comes_later_is_refused_until_it_is_removed():
    model = made()
    network = fxlocal.transform(model, prefix("2", Hebbian()))
    handle = model[0].register_forward_pre_hook(lambda layer, args: (args[0].sign(),))
    with pytest.raises(PlanError, match="layer '0' has forward pre-hooks"):
        network(X)
    handle.remove()
    network(X)


def test_hooks_of_torchs_own_which_leave_the_input_alone_are_not():
    model = made()
    prune.l1_unstructured(model[0], "bias", 0.5)
    before = model[0].weight.clone()
    fxlocal.transform(model, prefix("2", Hebbian()))(X)
    assert not torch.equal(model[0].weight, before)
