"""`AveragedModel` of networks, over a run whose Plan changes, against averages by hand."""

import copy
import itertools

import pytest
import torch
from support import laws
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fxlocal
from fxlocal import (
    Custom,
    Driver,
    Freeze,
    Hebbian,
    LocalModules,
    LocalPrefix,
    Plan,
    Zero,
    schedules,
)

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 0])
DECAY = 0.75


class Net(nn.Module):
    """Convolutions with norms, a constant tensor and a buffer of its own."""

    def __init__(self):
        super().__init__()
        sizes = itertools.pairwise((3, 4, 4, 4))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.register_buffer("scale", torch.tensor(0.5))
        self.offset = torch.full((1,), 0.1)  # no state: a constant of the graph
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu() * self.scale + self.offset
        return self.fc(x.mean((2, 3)))


def oja_like(weight, pre, post, product):
    return product(pre, post) - weight


class Alternate:
    """Plans in turn: by step, and their rules in turn by epoch."""

    def plan(self, analysis, epoch, step=0, rank=0):
        rule = (Hebbian(0.01), Custom(oja_like, 0.01), Freeze())[epoch % 3]
        return Plan(local=LocalPrefix(2, rule)) if step else Plan()


MODULES = LocalModules(2, num_classes=5, balance="blocks")
RISING = dict(epochs=4, largest=0.9, start=0.2)
SCHEDULES = {
    "hebbian": schedules.Static(**RISING, rule=Hebbian(0.01)),
    "frozen": schedules.Static(**RISING, rule=Freeze()),
    "a rule of the user's": schedules.Static(**RISING, rule=Custom(oja_like, 0.01)),
    "norms fixed": schedules.Static(**RISING, rule=Hebbian(0.01), norm="eval"),
    "all rules in turn": Alternate(),
    "fewer gradients": schedules.combine(
        schedules.Static(**RISING, rule=Hebbian(0.01)),
        schedules.Approximation(Zero(), batches=slice(None, None, 2)),
    ),
    "local modules": schedules.combine(
        schedules.Constant(Plan(modules=MODULES)), schedules.Static(**RISING, rule=Hebbian(0.01))
    ),
}
HOW = {
    "mean": dict(),
    "mean of buffers too": dict(use_buffers=True),
    "moving": dict(multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    "moving, of buffers too": dict(multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True),
    "one by one": dict(avg_fn=lambda average, p, n: DECAY * average + (1 - DECAY) * p),
}


def driver_of(schedule):
    torch.manual_seed(0)
    driver = Driver(Net(), schedule, example_inputs=(X,))
    driver.optimizer = torch.optim.SGD(driver.parameters(), lr=0.1, momentum=0.9)
    return driver


def steps(driver, epochs=4):
    """Train; yield each step's network, after it."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        driver.start_epoch()
        for _ in range(3):
            network, x = driver.network(), torch.randn(6, 3, 8, 8, generator=generator)
            given = network(x, Y) if len(driver.heads) else (None, network(x).square().sum())
            given[1].backward()
            driver.optimizer.step()
            driver.optimizer.zero_grad()
            yield network
        driver.end_epoch()


def by_hand(averages, state, count, how):
    """Average tensors of equal names; plain ones of a count of batches follow the last."""
    for name, value in state.items():
        is_buffer = name.endswith(("running_mean", "running_var", "num_batches_tracked", "scale"))
        if count == 0 or (is_buffer and "buffers" not in how):
            averages[name] = value.clone()
        elif "mean" in how:
            averages[name] += ((value - averages[name]) / (count + 1)).to(value.dtype)
        else:
            averages[name] = (DECAY * averages[name] + (1 - DECAY) * value).to(value.dtype)


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("name", "how", "first"),  # every pair of two of them
    [
        (name, how, 7 * ((i + j) % 2))
        for i, name in enumerate(SCHEDULES)
        for j, how in enumerate(HOW)
    ],
)
def test_averages_of_a_run_whose_plan_changes(name, how, first):
    driver, averaged, expected = driver_of(SCHEDULES[name]), None, {}
    plans = set()
    for index, network in enumerate(steps(driver)):
        plans.add(repr(network.history.plan))
        if index < first:
            continue
        averaged = averaged or AveragedModel(network, **HOW[how])
        averaged.update_parameters(network)
        state = driver.model.state_dict() | driver.heads.state_dict(prefix="fxlocal.heads.")
        by_hand(expected, state, index - first, how)
    assert len(plans) > 2
    found = averaged.module.state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    plain = Net().eval()
    plain.load_state_dict(found, strict=not len(driver.heads))
    before = copy.deepcopy(averaged.state_dict())
    assert torch.equal(averaged.eval()(X), plain(X))
    laws.assert_equal(averaged.state_dict(), before, "average")


def test_networks_of_one_model_have_equally_many_buffers_in_one_order():
    rules = [None, Hebbian(0.1), Freeze(), Custom(oja_like)]
    plans = [Plan(local=rule and LocalPrefix(2, rule)) for rule in rules]
    model = Net()
    networks = [fxlocal.transform(model, plan) for plan in plans]
    kinds = {tuple((b.shape, b.dtype, b.device) for b in net.buffers()) for net in networks}
    assert len(kinds) == 1
    for net, plan in zip(networks, plans, strict=True):
        assert ("rate" in net.additions) == (plan.rate > 0)
        assert list(net.state_dict()) == list(model.state_dict())
    pairs = itertools.permutations(networks, 2)
    for one, other in pairs:
        average = AveragedModel(one)
        average.update_parameters(other)
        average.update_parameters(one)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", SCHEDULES)
def test_norms_of_an_average_are_estimated_again(name):
    driver = driver_of(SCHEDULES[name])
    averaged, plain = None, AveragedModel(driver.model)
    for network in steps(driver):
        averaged = averaged or AveragedModel(network)
        averaged.update_parameters(network)
        plain.update_parameters(driver.model)
    batches = [X, X + 1]
    update_bn(batches, averaged)
    update_bn(batches, plain)
    laws.assert_equal(
        averaged.module.source_model.state_dict(), plain.module.state_dict(), "average"
    )
    assert torch.equal(averaged.eval()(X), plain.eval()(X))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_a_copy_is_averaged_as_the_network_is(copied):
    driver = driver_of(SCHEDULES["hebbian"])
    first = copied(next(steps(driver, 1)))
    averaged = AveragedModel(first)
    driver = driver_of(SCHEDULES["hebbian"])
    for network in steps(driver):
        averaged.update_parameters(copied(network))
    assert int(averaged.n_averaged) == 12
