"""A driver's optimizer: what it must hold, what is refused, and that it leaves the prefix alone."""

import copy
import gc
import weakref

import pytest
import torch
from support.drivers import SGD, X, local, small
from torch import nn
from torch.nn.utils import parameters_to_vector

from fxlocal import (
    ConvHead,
    Driver,
    Freeze,
    Hebbian,
    InfoProHead,
    LinearHead,
    LocalModules,
    LocalPrefix,
    Plan,
    PlanError,
)
from fxlocal.schedules import Constant, Static

# --- heads ----------------------------------------------------------------------------------------

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def with_heads(head, count=3):
    torch.manual_seed(0)
    convs = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(3 * 64, 5))
    plan = Plan(modules=LocalModules(count, num_classes=5, head=head, balance="blocks"))
    return Driver(model, Constant(plan), example_inputs=(IMAGES,))


def all_but(driver, *left_out):
    heads = dict(driver.heads.named_parameters())
    kept = [p for name, p in heads.items() if name not in left_out]
    return torch.optim.SGD([*driver.model.parameters(), *kept], lr=0.1)


HEADS = {"linear": LinearHead(), "conv": ConvHead(), "reconstructing": InfoProHead()}


@pytest.mark.sample(4)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("missing", ["all", "first", "last"])
def test_an_optimizer_without_the_heads_is_refused(head, missing):
    driver = with_heads(HEADS[head])
    names = [name for name, _ in driver.heads.named_parameters()]
    left_out = {"all": names, "first": names[:1], "last": names[-1:]}[missing]
    driver.optimizer = all_but(driver, *left_out)
    before = copy.deepcopy(driver.state_dict())
    with pytest.raises(PlanError, match=rf"hold '{left_out[0]}' .*driver\.parameters\(\)"):
        driver.start_epoch()
    assert repr(driver.state_dict()) == repr(before)
    with pytest.raises(RuntimeError, match="was not begun"):
        driver.end_epoch()
    driver.optimizer = torch.optim.SGD(driver.parameters(), lr=0.1)
    driver.start_epoch()


def test_heads_may_come_in_a_group_of_their_own_be_frozen_or_be_the_users_affair():
    driver = with_heads(LinearHead())
    driver.start_epoch()  # without an optimizer
    driver.end_epoch()
    driver.optimizer = torch.optim.SGD(driver.model.parameters(), lr=0.1)
    driver.optimizer.add_param_group({"params": list(driver.heads.parameters()), "lr": 1.0})
    driver.start_epoch()
    driver.end_epoch()
    driver.heads[0].requires_grad_(False)
    driver.optimizer = all_but(driver, *(f"0.{n}" for n, _ in driver.heads[0].named_parameters()))
    driver.start_epoch()
    driver.observe(torch.tensor(3.0))
    driver.optimizer = torch.optim.SGD(driver.model.parameters(), lr=0.1)
    with pytest.raises(PlanError, match=r"hold '1\."):
        driver.start_epoch()
    driver.end_epoch()
    assert driver.losses[-1] == 3.0  # nothing of the epoch was reset


# --- several forwards in a step -------------------------------------------------------------------


class Secant(torch.optim.Optimizer):
    """Needs two losses a step."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure):
        closure()
        return closure()


class FullBatch(torch.optim.LBFGS):
    def step(self, closure=None):
        return super().step(closure)


class Launched(torch.optim.Optimizer):
    """As a launcher wraps an optimizer: nothing of the base class is set up."""

    def __init__(self, optimizer):
        self.inside = optimizer

    @property
    def param_groups(self):
        return self.inside.param_groups

    @property
    def state(self):
        return self.inside.state

    def state_dict(self):
        return self.inside.state_dict()

    def load_state_dict(self, state):
        self.inside.load_state_dict(state)

    def zero_grad(self, set_to_none=True):
        self.inside.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.inside.step(closure)


MANY = {
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=5),
    "with a line search": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
    "a subclass": FullBatch,
    "wrapped": lambda p: Launched(Launched(torch.optim.LBFGS(p))),
    "one of the user's": Secant,
}


@pytest.mark.parametrize("name", MANY)
def test_an_optimizer_of_several_forwards_is_refused(name):
    model = small()
    many = MANY[name](model.parameters())
    with pytest.raises(
        PlanError, match=r"(LBFGS|FullBatch|Secant) calls the forward several times"
    ):
        Driver(model, Constant(local(2)), many)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    driver = Driver(model, Constant(local(2, Freeze())), own)
    driver.start_epoch()
    with pytest.raises(PlanError, match="several times in a step"):
        driver.optimizer = many
    assert driver.optimizer is own
    assert not moved_by_penalty(driver)


def test_a_closure_that_is_called_once_moves_the_prefix_once():
    nets = [small(), small()]
    for net, with_closure in zip(nets, (True, False), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        driver = Driver(net, Constant(local(2, Hebbian(0.1))), optimizer)
        driver.start_epoch()
        network = driver.network()

        def closure(network=network):
            loss = network(*X).square().sum()
            loss.backward()
            return loss

        if with_closure:
            driver.observe(optimizer.step(closure))
        else:
            driver.observe(closure())
            optimizer.step()
        driver.end_epoch()
    vectors = [parameters_to_vector(net.parameters()) for net in nets]
    assert torch.equal(*vectors) and not torch.equal(vectors[0], flat(small()))


# --- penalties on all parameters ------------------------------------------------------------------


def flat(module):
    return parameters_to_vector(module.parameters()).detach()


START = flat(small())
PENALTIES = {
    "squares": lambda net: 0.1 * sum(p.square().sum() for p in net.parameters()),
    "absolute values": lambda net: 0.1 * sum(p.abs().sum() for p in net.parameters()),
    "distance from the start": lambda net: (
        0.1 * (parameters_to_vector(net.parameters()) - START - 1).square().sum()
    ),
    "orthogonality": lambda net: sum(
        (p @ p.T - torch.eye(len(p))).square().sum() for p in net.parameters() if p.dim() == 2
    ),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, **SGD),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=True),
    "wrapped": lambda p: Launched(torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1)),
}


def step(driver, penalty=PENALTIES["squares"]):
    network = driver.network()
    (network(*X).square().sum() + penalty(network)).backward()
    driver.optimizer.step()
    driver.optimizer.zero_grad()


def moved_by_penalty(driver):
    before = driver.model[0].weight.detach().clone()
    step(driver)
    return not torch.equal(before, driver.model[0].weight)


@pytest.mark.sample(8)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("rule", [Freeze(), Hebbian(0.01)], ids=["freeze", "hebbian"])
def test_a_penalty_moves_what_back_propagation_moves_and_nothing_else(rule, penalty, optimizer):
    """The oracle's prefix is frozen by requires_grad=False, or learns by the rule alone."""
    ours, theirs = small(), small()
    driver = Driver(ours, Constant(local(2, rule)), OPTIMIZERS[optimizer](ours.parameters()))
    oracle = Driver(theirs, Constant(local(2, rule)))
    after = [*theirs[4].parameters()]
    oracle.optimizer = OPTIMIZERS[optimizer](after)
    for one in (driver, oracle):
        one.start_epoch()
        for _ in range(3):
            step(one, PENALTIES[penalty])
        one.end_epoch()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=0)
    if isinstance(rule, Freeze):
        assert torch.equal(flat(ours[:4]), flat(small()[:4]))


def test_as_the_boundary_moves_the_penalty_reaches_less_and_less():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    driver = Driver(model, Static(4, largest=0.9, start=0.2, rule=Freeze()), optimizer)
    for epoch in range(4):
        driver.start_epoch()
        for _ in range(2):
            before = [flat(model[i]) for i in (0, 2, 4)]
            step(driver)
            moved = [
                not torch.equal(b, flat(model[i])) for b, i in zip(before, (0, 2, 4), strict=True)
            ]
            assert moved == [layer >= driver.boundary for layer in range(3)], epoch
        driver.end_epoch()
    assert len(set(driver.history)) == 3


class Alternate:
    """Freezes one layer in every second step."""

    def plan(self, analysis, epoch, step=0, rank=0):
        return local(1, Freeze()) if step % 2 else Plan()


def test_steps_that_train_everything_and_what_comes_after_the_run_keep_their_gradients():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    driver = Driver(model, Alternate(), optimizer)
    for _ in range(2):
        driver.start_epoch()
        assert [moved_by_penalty(driver) for _ in range(4)] == [True, False, True, False]
        driver.end_epoch()
        before = model[0].weight.detach().clone()
        model(*X).sum().backward()  # the model's own, between epochs
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(before, model[0].weight)


def test_the_optimizer_follows_the_driver_in_use_and_keeps_none_alive():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    broken_off = Driver(model, Constant(local(2, Freeze())), optimizer)
    broken_off.start_epoch()
    assert not moved_by_penalty(broken_off)
    driver = Driver(model, Constant(), optimizer)
    assert not moved_by_penalty(broken_off)
    copied = copy.deepcopy(broken_off)
    copied.end_epoch()
    copied.start_epoch()
    assert not moved_by_penalty(copied)
    driver.start_epoch()
    assert moved_by_penalty(driver)
    told = weakref.ref(driver)
    del driver, broken_off
    gc.collect()
    assert told() is None
    model(*X).sum().backward()
    optimizer.step()


def test_an_optimizer_that_is_changed_in_an_epoch_is_kept_off_at_once():
    model = small()
    driver = Driver(model, Constant(local(2, Freeze())))
    driver.start_epoch()
    for make in OPTIMIZERS.values():
        driver.optimizer = make(model.parameters())
        assert not moved_by_penalty(driver)
        network = driver.network()
        (network(*X).sum() + PENALTIES["squares"](network)).backward()
        driver.optimizer = make(model.parameters())  # between backward and step
        before = flat(model[:4])
        driver.optimizer.step()
        driver.optimizer.zero_grad()
        assert torch.equal(before, flat(model[:4]))


def test_a_loaded_driver_starts_with_no_prefix():
    model = small()
    driver = Driver(
        model, Constant(local(2, Freeze())), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    state = copy.deepcopy(driver.state_dict())
    driver.start_epoch()
    assert not moved_by_penalty(driver)
    driver.load_state_dict(state)
    model(*X).sum().backward()
    before = model[0].weight.detach().clone()
    driver.optimizer.step()
    assert not torch.equal(before, model[0].weight)


def test_two_models_under_one_optimizer_keep_their_prefixes():
    nets = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], 0.1)
    plan = Plan(local=LocalPrefix(until=1, rule=Freeze()))
    drivers = [Driver(net, Constant(plan), optimizer) for net in nets]
    before = [net[0].weight.detach().clone() for net in nets]
    for driver in drivers:
        driver.start_epoch()
    sum(driver.network()(torch.ones(2, 4)).sum() for driver in drivers).backward()
    sum(net[0].weight.square().sum() for net in nets).backward()  # a penalty of its own
    optimizer.step()
    assert all(torch.equal(net[0].weight, w) for net, w in zip(nets, before, strict=True))
    assert not any(torch.equal(net[2].weight.grad, torch.zeros(2, 4)) for net in nets)
