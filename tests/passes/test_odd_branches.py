"""Stochastic depth where a branch is not a plain row for each sample of one input."""

import pytest
import torch
from support.nets import Written
from torch import nn

from fxlocal import Plan, PlanError, StochasticDepth, transform
from fxlocal.ops import drop


def _asserts(net, x):
    y = net.a(x)
    torch._assert(y.ndim == 2, f"expected 2 dimensions, got {y.ndim}")
    return x + net.b(y)


def _scaled(net, x):  # a learned table with as many rows as the batch, and one made of its size
    x = x + 1
    return x + net.a(x) * net.b.weight.T[:, 0] * net.one.expand(x.shape[0], 1)


def _widened(net, x):  # the branch is wider than the shortcut, or narrower
    return x.mean(1, keepdim=True) + net.a(x) + net.b(x).mean(1, keepdim=True)


@pytest.mark.parametrize("forward", [_asserts, _scaled, _widened])
@pytest.mark.parametrize("indices", [False, True], ids=["stretches", "indices"])
def test_each_row_is_the_model_s_or_without_the_branch(forward, indices, monkeypatch):
    """Of equal rows, those that survive have the same value, and their mean is the model's."""
    model = Written(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)).double()
    model.register_buffer("one", torch.ones(1, 1).double())
    x = torch.linspace(-1, 1, 4).double().expand(4, 4).clone()
    net = transform(model, Plan(drop=StochasticDepth(0.5, curve="uniform")), x)
    assert any(node.target is drop.add_rows for node in net.graph.nodes)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: indices)
    output = net(x)
    torch.testing.assert_close(output.mean(0), model(x)[0], rtol=0, atol=1e-12)
    output.sum().backward()
    found = model.a.weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(found, model.a.weight.grad, rtol=0, atol=1e-12)


def _over_the_batch(net, x):
    return x + net.a(x).mean(0, keepdim=True)


def _without_the_batch(net, x):
    return x + net.a(x).mean(0)


@pytest.mark.parametrize("forward", [_over_the_batch, _without_the_batch])
def test_a_branch_without_the_rows_is_refused(forward):
    """Else its first rows, of features, would be added to the rows that survive."""
    model, x = Written(forward, a=nn.Linear(2, 2)), torch.ones(4, 2)
    plan = Plan(drop=StochasticDepth(0.5))
    with pytest.raises(PlanError, match="'mean', which has not the 4 rows"):
        transform(model, plan, x)
    with pytest.raises(RuntimeError, match=r"of 2 rows, to be added to \(4, 2\).*mode='block'"):
        transform(model, plan)(x)
    transform(model, Plan(drop=StochasticDepth(0.5, "block")), x)(x)
