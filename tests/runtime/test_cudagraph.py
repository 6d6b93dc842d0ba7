"""CUDA graphs: what is captured when, and that nothing else changes. No GPU is needed."""

import copy

import pytest
import torch
from support.nets import NETS

from fxlocal import Driver, Hebbian, LocalPrefix, Plan
from fxlocal.compiler.transform import transform
from fxlocal.runtime import cudagraph
from fxlocal.runtime.cudagraph import GraphedNetwork
from fxlocal.schedules import Constant, Static

PLAN = Plan(local=LocalPrefix(1, Hebbian(0.125)))


def test_on_a_cpu_it_runs_the_network_and_says_so_once():
    net = NETS["chain"]
    ours, theirs = net.build(), net.build()
    driver = Driver(ours, Constant(PLAN), compile="cudagraph")
    driver.start_epoch()
    with pytest.warns(UserWarning, match="does not apply.*not on a CUDA device") as seen:
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
    with pytest.raises(ValueError, match="compile='cudagraphs': give True, 'blocks', a dict"):
        Driver(NETS["chain"].build(), Constant(PLAN), compile="cudagraphs")


@pytest.fixture
def captures(monkeypatch):
    """Stand in for the GPU: run what would be captured as a warm-up does, then replay it.

    Like a capture, the stand-in refuses a parameter whose gradient somebody else accumulates.
    """
    made = []

    def make(function, samples):
        assert not torch.is_autocast_cache_enabled()
        for _ in range(3):
            output = function(*samples)
            wanted = [s for s in samples if s.requires_grad]
            torch.autograd.grad(output.sum(), wanted, allow_unused=True)
        made.append(samples)
        return function

    monkeypatch.setattr(cudagraph, "_make_graphed", make)
    monkeypatch.setattr(cudagraph, "_obstacle", lambda *_: "")
    return made


@pytest.mark.parametrize("name", ["chain", "residual", "unet", "shared", "dropout"])
def test_a_replayed_network_trains_as_the_network_does(captures, name):
    """Through aliases of the parameters: the same updates, gradients, buffers and draws."""
    net = NETS[name]
    states = []
    for wrap in (lambda network: network, GraphedNetwork):
        torch.manual_seed(3)
        model = net.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        network = wrap(transform(model, PLAN))
        for _ in range(3):
            network(*net.inputs()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append((model.state_dict(), torch.rand(3)))
    for key, value in states[0][0].items():
        assert torch.equal(value, states[1][0][key]), key
    assert torch.equal(states[0][1], states[1][1])
    assert len(captures) == 1


def test_capture_leaves_weights_buffers_and_random_state_alone(captures):
    model = NETS["dropout"].build()
    graphed = GraphedNetwork(transform(model, PLAN))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    seen = []
    graphed.network.register_forward_pre_hook(
        lambda *_: seen.append((copy.deepcopy(model.state_dict()), torch.get_rng_state()))
    )
    graphed(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert len(captures) == 1 and len(seen) == 4  # three to warm up, then the step itself
    for state, generator in (seen[0], seen[-1]):
        assert torch.equal(generator, random)
        assert all(torch.equal(state[key], before[key]) for key in before)
    assert torch.is_autocast_cache_enabled()


def test_what_is_captured_are_no_parameters_but_their_memory(captures):
    model = NETS["chain"].build()
    graphed = GraphedNetwork(transform(model, PLAN))
    loss = graphed(torch.randn(2, 3, 8, 8)).sum()
    loss.backward()
    aliases = captures[0][1:]
    for parameter, alias in zip(model.parameters(), aliases, strict=True):
        assert alias is not parameter and alias.grad is None
        assert alias.data_ptr() == parameter.data_ptr()
        assert alias.requires_grad == parameter.requires_grad


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


CHANGES = {
    "frozen": lambda model: model.fc.weight.requires_grad_(False),
    "a norm in evaluation mode": lambda model: model.bn1.eval(),
    "other memory": lambda model: setattr(model.fc.weight, "data", model.fc.weight.data.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_captured_again(captures, change):
    model = NETS["chain"].build()
    graphed = GraphedNetwork(transform(model, PLAN))
    for _ in range(2):
        graphed(torch.randn(2, 3, 8, 8))
    CHANGES[change](model)
    for _ in range(2):
        graphed(torch.randn(2, 3, 8, 8))
    assert len(captures) == 2
    assert len(graphed._captured) == 1


def test_a_backward_after_the_next_forward_is_refused(captures):
    graphed = GraphedNetwork(transform(NETS["chain"].build(), PLAN))
    first, second = (graphed(torch.randn(2, 3, 8, 8)).sum() for _ in range(2))
    with pytest.raises(RuntimeError, match="call backward once after each forward"):
        (first + second).backward()


def test_a_second_backward_is_refused(captures):
    loss = GraphedNetwork(transform(NETS["chain"].build(), PLAN))(torch.randn(2, 3, 8, 8)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once after each forward"):
        loss.backward()


def test_a_failed_capture_warns_and_changes_nothing(monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cudagraph, "_make_graphed", fail)
    monkeypatch.setattr(cudagraph, "_obstacle", lambda *_: "")
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
        networks = [graphed for _, graphed in driver.networks.values()]
        held.append(sum(len(graphed._captured) for graphed in networks))
        driver.end_epoch()
    assert driver.history == [0, 0, 1, 2]
    assert held == [1, 1, 1, 1]
