"""Hooks that modules get after `transform`: run, told of, or refused."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import Driver, Freeze, LocalPrefix, Plan, PlanError, Zero
from fxlocal.schedules import Static

X = torch.ones(3, 4)


def nested() -> nn.Sequential:
    inner = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
    return nn.Sequential(*inner, nn.Linear(4, 2))


def ignore(*_):
    return None


PLANS = {
    "plain": Plan(),
    "prefix": Plan(local=LocalPrefix(until=1, rule=Freeze())),
    "approximated": Plan(weight_grads={"0.0": Zero()}),
}


@pytest.mark.parametrize("path", ["1", ""])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("plan", PLANS)
def test_those_that_the_graph_does_not_run_are_warned_of_once(plan, kind, path, no_warnings):
    model = nested()
    net = fxlocal.transform(model, PLANS[plan], X)
    net(X)
    getattr(model.get_submodule(path), f"register_{kind}_hook")(ignore)
    direction = "backward" if "backward" in kind else "forward"
    said = f"{direction} hooks of '{path or 'the model'}' will not run"
    with pytest.warns(UserWarning, match=said) as told:
        net(X)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(X)
        copy.deepcopy(net)(X)


def test_a_network_that_a_driver_makes_later_tells_of_them():
    model = nested()
    driver = Driver(model, Static(epochs=4), torch.optim.SGD(model.parameters(), lr=0.1))
    model[1].register_forward_hook(ignore)
    with pytest.warns(UserWarning, match="forward hooks of '1' will not run"):
        driver.start_epoch()
        driver.network()(X)


@pytest.mark.parametrize("plan", PLANS)
def test_one_of_a_leaf_runs(plan, no_warnings):
    model, seen = nested(), []
    net = fxlocal.transform(model, PLANS[plan], X)
    handle = model[1][0].register_forward_hook(lambda *_: seen.append(True))
    net(X)
    handle.remove()
    net(X)
    assert seen == [True]


def test_they_leave_the_graph_as_it_was_edited():
    model = nested()
    net = fxlocal.transform(model, PLANS["prefix"], X)
    (relu,) = (n for n in net.graph.nodes if n.target == "1.1")
    relu.replace_all_uses_with(relu.args[0])
    net.recompile()
    expected = net(X)
    model[1][0].register_forward_hook(ignore)
    assert torch.equal(net(X), expected)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_one_of_an_approximated_layer_is_refused_until_it_is_removed(kind):
    model = nested()
    net = fxlocal.transform(model, PLANS["approximated"], X)
    handle = getattr(model[0][0], f"register_{kind}_hook")(ignore)
    for _ in range(2):
        with pytest.raises(PlanError, match=r"'0\.0' has hooks, which would not run"):
            net(X)
    handle.remove()
    net(X)


def test_one_of_a_norm_with_fixed_statistics_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    plan = Plan(local=LocalPrefix(until=1, rule=Freeze(), norm="eval"))
    net = fxlocal.transform(model, plan, X)
    model[1].register_forward_hook(ignore)
    with pytest.raises(PlanError, match="'1': it has forward hooks"):
        net(X)


@pytest.mark.parametrize("before", [True, False])
def test_those_of_an_attached_model_itself_run(before, no_warnings):
    model, seen = nested(), []
    if before:
        model.register_forward_hook(lambda *_: seen.append(True))
    driver = fxlocal.attach(model, Static(epochs=4))
    driver.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    driver.start_epoch()
    if not before:
        model.register_forward_hook(lambda *_: seen.append(True))
    model(X)
    assert seen == [True]


@pytest.fixture
def doubled():
    """A hook of all modules, which doubles what the inner ones return."""

    def double(module, args, output):
        return output * 2 if type(module) is nn.Sequential and len(module) == 2 else None

    handle = nn.modules.module.register_module_forward_hook(double)
    yield
    handle.remove()


def test_hooks_of_all_modules_are_warned_of_and_no_part_of_a_capture(request, no_warnings):
    model = nested()
    early = fxlocal.transform(model, Plan(), X)
    early(X)
    expected = model(X)
    request.getfixturevalue("doubled")
    for network in (early, None):
        with pytest.warns(UserWarning, match="global hooks of 'all modules' will not run"):
            network = network or fxlocal.transform(model, Plan(), X)
            found = network(X)
        assert torch.equal(found, expected)
        network(X)  # told once
    assert not torch.equal(model(X), expected)


def test_counters_of_torch_are_none(no_warnings):
    network = fxlocal.transform(nested(), Plan(), X)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        network(X)
    assert counter.get_total_flops() > 0


def test_hooks_of_all_modules_are_not_copied():
    class Locked:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, *_):
            return None

    network = fxlocal.transform(nested(), Plan(), X)
    handle = nn.modules.module.register_module_forward_hook(Locked())
    try:
        with pytest.warns(UserWarning, match="global hooks"):
            copied = copy.deepcopy(network)
        copied(X)
    finally:
        handle.remove()
