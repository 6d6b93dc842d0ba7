"""Edits of a network's graph, and tools of torch.fx that copy it, in train mode."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

import fxlocal
from fxlocal import Checkpoint, Freeze, Hebbian, LocalPrefix, Plan, StochasticDepth

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        for layer in (self.a, self.b, self.c, self.d):
            x = x + layer(x).relu()
        return self.head(x)


def make(plan):
    torch.manual_seed(0)
    model = Residual()
    return model, fxlocal.transform(model, plan, X)


def edited(plan):
    model, network = make(plan)
    out = network.graph.output_node()
    with network.graph.inserting_before(out):
        out.args = (network.graph.call_function(torch.tanh, out.args),)
    network.recompile()
    assert torch.equal(network(X), model(X).tanh())
    return model, network


PREFIX = Plan(local=LocalPrefix("c", Freeze()))


@pytest.mark.parametrize("plan", [Plan(), PREFIX], ids=["plain", "prefix"])
def test_an_edit_is_kept_or_its_loss_refused(plan):
    model, network = edited(plan)
    for same in (copy.copy(network), copy.deepcopy(network)):
        assert torch.equal(same(X), model(X).tanh())
    with pytest.raises(TypeError, match="graph was edited"):
        pickle.dumps(network)
    model.head.bias.requires_grad_(False)
    for one in (network, copy.copy(network)):
        with pytest.raises(RuntimeError, match="graph was edited"):
            one(X)
    model.head.bias.requires_grad_(True)
    assert torch.equal(network(X), model(X).tanh())


def test_a_network_that_was_not_edited_follows_frozen_weights_and_is_pickled():
    model, network = make(PREFIX)
    network(X)
    model.head.bias.requires_grad_(False)
    assert torch.equal(pickle.loads(pickle.dumps(network))(X), network(X))


TOOLS = {
    "transformer": lambda network: fx.Transformer(network).transform(),
    "graph module": lambda network: fx.GraphModule(network, network.graph),
    "copied graph": lambda network: fx.GraphModule(network, copy.deepcopy(network.graph)),
    "interpreter": lambda network: fx.Interpreter(network).run,
}
PLANS = {
    "freeze": PREFIX,
    "hebbian": Plan(local=LocalPrefix("c", Hebbian(0.01))),
    "checkpoint": Plan(checkpoint=Checkpoint(2, balance="blocks")),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("plan", PLANS)
def test_tools_compute_and_learn_the_same(plan, tool, called):
    (model, network), (other, expected) = make(PLANS[plan]), make(PLANS[plan])
    if called:
        network(X), expected(X)
    found, wanted = TOOLS[tool](network)(X), expected(X)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(p.grad, q.grad)


def test_a_copy_that_could_not_draw_blocks_is_refused():
    _, network = make(Plan(drop=StochasticDepth(0.5, mode="block")))
    with pytest.raises(RuntimeError, match="only its network draws"):
        fx.GraphModule(network, network.graph)


def test_contexts_are_in_the_code_of_a_copied_graph():
    _, network = make(PREFIX)
    copied = fx.GraphModule(network, copy.deepcopy(network.graph))
    assert "with torch.no_grad():" in copied.code and "evaluate" not in copied.code


def test_a_graph_that_another_module_has_taken_still_evaluates():
    model, network = make(PLANS["hebbian"])
    taken = fx.GraphModule(network, network.graph)
    before = model.a.weight.clone()
    network.eval()
    assert torch.equal(network(X), model(X))
    network.recompile()
    network(X)
    assert torch.equal(model.a.weight, before)
    assert "evaluate" in network.code and "evaluate" not in taken.code


def test_an_edited_capture_and_code_that_is_only_made_again_are_followed():
    model = make(Plan())[0]
    captured = fxlocal.capture(model)
    out = captured.graph.output_node()
    with captured.graph.inserting_before(out):
        out.args = (captured.graph.call_function(torch.tanh, out.args),)
    captured.recompile()
    network = fxlocal.transform(captured, PREFIX)
    with pytest.raises(TypeError, match="graph was edited"):
        pickle.dumps(network)
    model.head.bias.requires_grad_(False)
    assert torch.equal(network(X), model(X).tanh())
    again = fxlocal.transform(model, PREFIX)
    again(X)
    again.recompile()
    model.head.bias.requires_grad_(True)
    again(X)
    pickle.dumps(again)
