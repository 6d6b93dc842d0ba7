"""CUDA graphs: what is captured when, and that nothing else changes. No GPU is needed."""

import copy

import pytest
import torch
from models import NETS

from fxlocal import Driver, Hebbian, LocalPrefix, Plan
from fxlocal.cudagraph import GraphedNetwork
from fxlocal.schedules import Constant, Static
from fxlocal.transform import transform

PLAN = Plan(local=LocalPrefix(1, Hebbian(0.125)))


def test_on_a_cpu_it_runs_the_network_and_says_so_once():
    net = NETS["chain"]
    ours, theirs = net.build(), net.build()
    driver = Driver(ours, Constant(PLAN), compile="cudagraph")
    driver.start_epoch()
    with pytest.warns(
        UserWarning, match="'cudagraph' does not apply.*not on a CUDA device"
    ) as seen:
        for _ in range(2):
            driver.network()(*net.inputs()).sum().backward()
    assert len(seen) == 1
    plain = transform(theirs, PLAN)
    for _ in range(2):
        plain(*net.inputs()).sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is None if b.grad is None else torch.equal(a.grad, b.grad)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="compile='cudagraphs': give True, a dict"):
        Driver(NETS["chain"].build(), Constant(PLAN), compile="cudagraphs")


@pytest.fixture
def captures(monkeypatch):
    """Stand in for the GPU: record what would be captured, after the warm-up's forwards."""
    made = []

    def make(module, samples, *, allow_unused_input):
        assert allow_unused_input  # the prefix has no gradient
        assert not torch.is_autocast_cache_enabled()
        for _ in range(3):
            module(*samples)
        made.append(samples)
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    monkeypatch.setattr(GraphedNetwork, "_obstacle", lambda *_: "")
    return made


def test_capture_leaves_weights_buffers_and_random_state_alone(captures):
    model = NETS["dropout"].build()
    graphed = GraphedNetwork(transform(model, Plan(local=LocalPrefix(1, Hebbian(0.125)))))
    x = torch.randn(2, 3, 8, 8)
    seen = []

    def watch(module, inputs):
        seen.append((copy.deepcopy(model.state_dict()), torch.get_rng_state()))

    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    graphed.network.register_forward_pre_hook(watch)
    graphed(x)
    assert len(captures) == 1 and len(seen) == 4  # three to warm up, then the step itself
    for state, generator in (seen[0], seen[-1]):
        assert torch.equal(generator, random)
        assert all(torch.equal(state[key], before[key]) for key in before)
    assert torch.is_autocast_cache_enabled()


def test_each_shape_is_captured_once_and_evaluation_never(captures):
    model = NETS["chain"].build()
    graphed = GraphedNetwork(transform(model, PLAN))
    for size in (2, 2, 3, 2):
        graphed(torch.randn(size, 3, 8, 8))
    assert [len(samples[0]) for samples in captures] == [2, 3]
    with torch.no_grad():
        graphed(torch.randn(5, 3, 8, 8))
    model.eval()
    graphed(torch.randn(6, 3, 8, 8))
    assert len(captures) == 2


def test_a_failed_capture_warns_and_changes_nothing(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    monkeypatch.setattr(GraphedNetwork, "_obstacle", lambda *_: "")
    net = NETS["chain"]
    ours, theirs = net.build(), net.build()
    with pytest.warns(UserWarning, match="capture failed: operation not permitted when stream"):
        GraphedNetwork(transform(ours, PLAN))(*net.inputs())
    transform(theirs, PLAN)(*net.inputs())
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)


def test_a_moved_boundary_frees_the_graphs_of_the_one_before(captures):
    model = NETS["chain"].build()
    driver = Driver(model, Static(4, c1=2.0, c2=1.0, rule=Hebbian(0.1)), compile="cudagraph")
    held = []
    for _ in range(4):
        driver.start_epoch()
        driver.network()(*NETS["chain"].inputs())
        networks = [graphed for _, graphed in driver._networks.values()]
        held.append(sum(len(graphed._captured) for graphed in networks))
        driver.end_epoch()
    assert driver.history == [0, 0, 1, 2]
    assert held == [1, 1, 1, 1]
