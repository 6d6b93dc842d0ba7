"""The runner: a failed pass is named, and code is generated only for networks that run."""

import copy
import gc
import inspect
import weakref
from functools import partial

import pytest
import torch
from torch import fx, nn

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan
from fxlocal.compiler.runner import run_passes
from fxlocal.errors import NoEffectWarning, PassError
from fxlocal.ir.codegen import Ungenerated

X, PLAN = torch.ones(3, 4), Plan(local=LocalPrefix(until="2", rule=Freeze()))


def make() -> fxlocal.ir.network.Network:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return fxlocal.transform(model, PLAN)


def is_generated(net) -> bool:
    return not isinstance(inspect.getattr_static(type(net), "forward"), Ungenerated)


def unsort(gm, *, name):
    node = next(node for node in gm.graph.nodes if node.name == name)
    node.prepend(next(iter(node.users)))


def fall_over_it(gm):
    gm.graph.lint()


def do_nothing(gm):
    pass


@pytest.mark.filterwarnings("ignore::fxlocal.errors.NoEffectWarning")
@pytest.mark.parametrize("before, behind", [(0, 1), (1, 0), (1, 1), (0, 0)])
def test_the_pass_that_broke_the_graph_is_named_whichever_noticed(before, behind):
    captured = make().meta["captured"]
    passes = [*[do_nothing] * before, partial(unsort, name="_1"), *[fall_over_it] * behind]
    with pytest.raises(PassError, match="the pass unsort failed: RuntimeError: Argument"):
        run_passes(captured, passes, PLAN)
    captured.graph.lint()


def test_a_pass_that_does_nothing_is_named():
    with pytest.warns(NoEffectWarning, match="the pass do_nothing"):
        run_passes(make().meta["captured"], [do_nothing], PLAN)


@pytest.mark.parametrize(
    "ask",
    [
        lambda net: net(X),
        lambda net: net.eval()(X),
        lambda net: net.forward(X),
        lambda net: net.code,
        lambda net: str(net),
        lambda net: inspect.signature(net.forward).parameters["input"],
        lambda net: fx.symbolic_trace(net.train()),
        lambda net: net.recompile(),
        lambda net: torch.compile(net, backend="eager", fullgraph=True)(X),
        lambda net: torch.compile(lambda x: net(x) + 1, backend="eager", fullgraph=True)(X),
    ],
)
def test_code_is_generated_when_it_is_asked_for(ask):
    net = make()
    assert not is_generated(net) and not is_generated(net.meta["captured"])
    ask(net)
    assert is_generated(net) and not is_generated(net.meta["captured"])
    assert "with torch.no_grad():" in net.code
    torch.testing.assert_close(net.train()(X), net.source_model(X))


def test_code_is_generated_behind_a_class_that_was_put_before():
    net = make()
    net.__class__ = type("Sharded", (type(net),), {})  # as fully_shard does
    expected = net.source_model(X)
    torch.testing.assert_close(net(X), expected)
    net.recompile()
    torch.testing.assert_close(net(X), expected)
    assert type(net).__name__ == "Sharded"


def test_a_copy_does_not_keep_the_first_model_alive():
    net = make()
    copied, model = copy.deepcopy(net), weakref.ref(net.source_model)
    del net
    gc.collect()
    assert model() is None and "insert_cuts" in fxlocal.explain(copied)
