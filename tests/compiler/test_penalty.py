"""A penalty over all weights in the user's loss: the prefix is none of back-propagation's."""

import copy

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import Driver, Freeze, Hebbian, LocalPrefix, Plan, schedules

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
FROZEN = Plan(local=LocalPrefix(until="2", rule=Freeze()))


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def squares(net, output):
    return output.square().mean() + 1e-2 * sum(p.square().sum() for p in net.parameters())


def absolute(net, output):
    return output.square().mean() + 1e-2 * sum(p.abs().sum() for p in net.parameters())


def before(net, _):
    """The penalty's graph is there before the network's."""
    penalty = sum(p.square().sum() for p in net.parameters())
    return net(X).square().mean() + penalty


def orthogonal(net, output):
    weight = net.get_parameter("0.weight")
    return output.mean() + (weight.t() @ weight - torch.eye(4)).square().sum()


LOSSES = [squares, absolute, before, orthogonal]
RUNS = {
    "eager": lambda net: net,
    "compiled": lambda net: torch.compile(net, backend="eager", fullgraph=True),
    "copied": copy.deepcopy,
}


@pytest.mark.sample(10)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_penalty_moves_no_frozen_prefix(loss, run, optimizer):
    net = RUNS[run](fxlocal.transform(make_model(), FROZEN))
    model = net.source_model
    optimizer = optimizer(net.parameters(), lr=0.1)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        loss(net, net(X)).backward()
        assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True)]
    assert same == [True, True, False, False]


def test_a_locally_trained_prefix_moves_by_its_rule_alone():
    one, other = make_model(), make_model()
    plan = Plan(local=LocalPrefix(until="2", rule=Hebbian(0.1)))
    for model, loss in ((one, squares), (other, lambda net, output: output.square().mean())):
        net = fxlocal.transform(model, plan)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loss(net, net(X)).backward()
        optimizer.step()
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_the_penalty_gives_behind_the_boundary_is_the_models():
    model, net = make_model(), fxlocal.transform(make_model(), FROZEN)
    squares(net, net(X)).backward()
    squares(model, model(X)).backward()
    for p, q in zip(net.source_model[2].parameters(), model[2].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_training_without_the_network_is_as_before():
    model = make_model()
    net = fxlocal.transform(model, FROZEN)
    squares(net, net(X)).backward()
    squares(model, model(X)).backward()
    assert all(p.grad is not None for p in model.parameters())
    squares(net, net(X)).backward()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
    net.eval()
    squares(net, net(X)).backward()  # the model's own forward and backward
    assert all(p.grad is not None for p in model.parameters())


def test_outputs_in_containers_count():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.last(self.first(x))
            return {"mean": x.mean(), "all": [x]}

    net = fxlocal.transform(Pair(), Plan(local=LocalPrefix(until="last", rule=Freeze())))
    squares(net, net(X)["all"][0]).backward()
    assert net.get_parameter("first.weight").grad is None


def test_a_driver_without_its_optimizer_keeps_the_prefix():
    model = make_model()
    driver = Driver(model, schedules.Constant(FROZEN))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = model[0].weight.detach().clone()
    driver.start_epoch()
    net = driver.network()
    squares(net, net(X)).backward()
    optimizer.step()
    assert torch.equal(model[0].weight, start)


def test_gradients_of_the_input_arrive():
    net = fxlocal.transform(make_model(), Plan())
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(net(x).sum(), x)
    assert found.abs().sum() > 0
