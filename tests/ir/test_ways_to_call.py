"""Networks that are made or called in other ways: what they return, checkpointing, contexts."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxlocal
from fxlocal import Driver, Freeze, Hebbian, LocalModules, LocalPrefix, Plan, StochasticDepth
from fxlocal.schedules import Static

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """Returns its temperature too, as contrastive models do."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(6, 6), nn.Linear(6, 2), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.b(self.a(x).relu()), self.scale


def back_propagate(model):
    output, scale = model(X)
    (output * scale).square().mean().backward()


def test_a_parameter_that_is_returned_gets_no_hook():
    model = Scaled()
    network = fxlocal.transform(model, Plan(local=LocalPrefix("b", Freeze())))
    back_propagate(network)
    assert model.a.weight.grad is None and model.scale.grad is not None
    assert not model.scale._backward_hooks
    for whole in (model, fxlocal.transform(model, Plan())):
        back_propagate(whole)
        assert model.a.weight.grad is not None
        model.zero_grad()


def test_full_steps_between_those_of_a_prefix_train_all():
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    driver = Driver(
        model,
        Static(1, "step", largest=0.9, start=0.0, rule=Freeze(), refresh_every=2),
        optimizer,
    )
    driver.start_epoch()
    trained = []
    for _ in range(4):
        back_propagate(driver.network())
        trained.append(model.a.weight.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        driver.observe(torch.tensor(1.0))
    assert sorted(trained) == [False, False, True, True]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.norm = *(nn.Linear(6, 6) for _ in range(3)), nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.norm(x + self.a(x).relu())
        x = x + self.b(x).relu()
        return self.c(x)


FIXED = Plan(local=LocalPrefix("c", Freeze(), norm="eval"))
ROWS = Plan(drop=StochasticDepth(0.5))
BLOCKS = Plan(drop=StochasticDepth(0.5, mode="block"))


@pytest.mark.parametrize("plan", [FIXED, ROWS], ids=["norm", "rows"])
def test_checkpointing_that_runs_without_gradients_first_is_refused(plan):
    model = Residual()
    network = fxlocal.transform(model, plan, X)
    before = copy.deepcopy(model.state_dict())
    x = X.clone().requires_grad_(True)
    with pytest.raises(RuntimeError, match="give use_reentrant=False"):
        checkpoint(network, x, use_reentrant=True)
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    torch.manual_seed(1)
    found = checkpoint(network, x, use_reentrant=False)
    torch.manual_seed(1)
    torch.testing.assert_close(found, network(x))
    with torch.no_grad():
        network(x)  # as averages estimate norms


def test_blocks_that_would_be_drawn_again_are_refused():
    network = fxlocal.transform(Residual(), BLOCKS, X)
    for reentrant in (False, True):
        with pytest.raises(RuntimeError, match="draw other blocks"):
            checkpoint(network, X.clone().requires_grad_(True), use_reentrant=reentrant)
    network.place = 0, 3  # as a driver says
    found, wanted = checkpoint(network, X, use_reentrant=False), network(X)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()


def test_transformed_under_inference_mode():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    modules = Plan(modules=LocalModules(2, num_classes=2, balance="blocks"))
    with torch.inference_mode():
        network = fxlocal.transform(model, modules, X)
        local = fxlocal.transform(model, Plan(local=LocalPrefix("2", Hebbian(0.1))))
    network(X, torch.zeros(8, dtype=torch.long))[1].backward()
    assert all(p.grad is not None for p in network.parameters())
    local.additions["rate"].fill_(0.5)
    local(X).sum().backward()


@pytest.mark.parametrize("assign", [False, True])
def test_transformed_on_the_meta_device(assign):
    with torch.device("meta"):
        model = Residual()
        network = fxlocal.transform(model, Plan(local=LocalPrefix("c", Hebbian(0.1))))
    if not assign:
        network.to_empty(device="cpu")
    network.load_state_dict(Residual().state_dict(), assign=assign)
    before = network.a.weight.clone()
    network(X).sum().backward()
    assert not torch.equal(network.a.weight, before)


def renaming(forward):
    """Let ``old`` stand for ``new``, unless that is given too."""

    @functools.wraps(forward)
    def renamed(*args, **kwargs):
        if "old" in kwargs:
            kwargs.setdefault("new", kwargs.pop("old"))
        return forward(*args, **kwargs)

    return renamed


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

    @renaming
    def forward(self, x, new=None, scale=1.0, **others):
        return self.b(self.a(x) if new is None else self.a(x) * new) * scale


@pytest.mark.parametrize(
    "given", [{"old": X}, {"old": X, "scale": 2.0}, {"new": X}], ids=lambda given: "-".join(given)
)
def test_evaluation_gives_a_decorator_what_was_given_alone(given):
    model = Renamed()
    network = fxlocal.transform(model, Plan(), X, **given)
    for mode in (True, False):
        network.train(mode)
        assert torch.equal(network(X, **given), model(X, **given))
    exported = torch.export.export(network, (X,), given).module()
    assert torch.equal(exported(X, **given), model(X, **given))
