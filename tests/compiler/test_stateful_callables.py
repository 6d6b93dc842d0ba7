"""Losses and rules that keep something from call to call are called as often as they should be."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlocal
from fxlocal import Custom, Driver, LinearHead, LocalModules, LocalPrefix, Plan, PlanError
from fxlocal.ops.custom import for_trial
from fxlocal.schedules import Constant

X, Y = torch.linspace(-1, 1, 24).reshape(4, 6), torch.tensor([0, 1, 2, 3])
LOG = []


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


class Running:
    """A loss that is divided by its own running mean."""

    def __init__(self):
        self.mean, self.calls = None, 0

    def __call__(self, output, target):
        self.calls += 1
        loss = F.cross_entropy(output, target)
        self.mean = loss.detach() if self.mean is None else 0.9 * self.mean + 0.1 * loss.detach()
        return loss / self.mean


def logged(output, target):
    LOG.append(F.cross_entropy(output, target))
    return LOG[-1]


def drawn(output, target):
    return F.cross_entropy(output, target) * random.random()


def modules(loss, count=2):
    head = {"head": LinearHead(), "num_classes": 4, "balance": ("4",)}
    return Plan(modules=LocalModules(count, loss=loss, **head))


def test_a_loss_that_keeps_its_mean_trains():
    model, loss = network(), Running()
    net = fxlocal.transform(model, modules(loss), X)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for rows in (4, 4, 3):
        net(X[:rows], Y[:rows])[1].backward()
        assert type(model[0].weight.grad) is torch.Tensor
        optimizer.step()
        optimizer.zero_grad()
    assert loss.calls == 6
    assert not any(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("loss", [logged, lambda o, t: logged(o, t)], ids=["logged", "lambda"])
def test_a_list_of_losses_holds_each_once(loss):
    LOG.clear()
    net = fxlocal.transform(network(), modules(loss), X)
    net(X, Y)[1].backward()
    assert len(LOG) == 2 and all(type(one) is torch.Tensor for one in LOG)


def test_numbers_that_a_loss_draws_are_drawn_once_for_each_module():
    net = fxlocal.transform(network(), modules(drawn), X)
    random.seed(0)
    net(X, Y)
    after = random.getstate()
    random.seed(0)
    for _ in range(2):
        random.random()
    assert random.getstate() == after


class Centred:
    """A rule that keeps a running mean of the output."""

    def __init__(self):
        self.mean, self.calls = None, 0

    def __call__(self, weight, pre, post):
        self.calls += 1
        mean = post.mean(0)
        self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return (post - self.mean).T @ pre

    def method(self, weight, pre, post):
        return self(weight, pre, post)


@pytest.mark.parametrize("how", ["transform", "driver"])
@pytest.mark.parametrize("given", ["object", "method"])
def test_a_rule_that_keeps_its_mean_is_called_once_a_step(given, how):
    model, mine, rule = network(), network(), Centred()
    delta = rule if given == "object" else rule.method
    plan = Plan(local=LocalPrefix("2", Custom(delta, 0.1)))
    if how == "driver":
        driver = Driver(model, Constant(plan))
        driver.start_epoch()
    net = driver.network() if how == "driver" else fxlocal.transform(model, plan)
    net(X)
    z = mine[0](X)
    step = (z - z.mean(0)).T @ X
    torch.testing.assert_close(model[0].weight, mine[0].weight + 0.1 * step / step.norm())
    assert rule.calls == 1


def test_an_object_without_state_is_tried_before_anything_is_edited():
    class Wrong:
        def __call__(self, weight, pre, post):
            return post

    with pytest.raises(PlanError, match="return a tensor of the weight's shape"):
        fxlocal.transform(network(), Plan(local=LocalPrefix("2", Custom(Wrong()))))


def counting():
    count = 0

    def loss(output, target):
        nonlocal count
        count += 1
        return F.cross_entropy(output, target)

    return loss


def smoothed(amount):
    def loss(output, target):
        return F.cross_entropy(output, target, label_smoothing=amount)

    return loss


def default(output, target, log=[]):  # noqa: B006
    log.append(target)
    return F.cross_entropy(output, target)


def by_attribute(output, target):
    by_attribute.calls = 1
    return F.cross_entropy(output, target)


def by_class(output, target):
    Running.seen = 1
    return F.cross_entropy(output, target)


def by_inner(output, target):
    def note():
        LOG.append(1)

    note()
    return F.cross_entropy(output, target)


def by_own_inner(output, target):
    losses = []

    def note():
        nonlocal losses
        losses = [F.cross_entropy(output, target)]

    note()
    return losses[0]


def test_what_is_tried_as_it_is_on_a_copy_or_not():
    module, running = nn.CrossEntropyLoss(), Running()
    for one in (smoothed(0.1), F.mse_loss, by_own_inner):
        assert for_trial(one) is one
    for one in (module, running):
        assert type(for_trial(one)) is type(one) and for_trial(one) is not one
    for one in (
        counting(),
        default,
        logged,
        drawn,
        by_attribute,
        by_class,
        by_inner,
        Centred().method,
    ):
        assert for_trial(one) is None
    holding = Running()
    holding.model = network()
    assert for_trial(holding) is None
