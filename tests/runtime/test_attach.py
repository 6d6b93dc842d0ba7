"""A model that runs the networks of a schedule itself: the same training as by hand."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support.attached import EVERY_OTHER, LEARNING, MODULES, Y, attached, moves
from support.drivers import SGD, STATIC, X, local, small
from support.nets import NETS
from support.tiny import same_state
from torch import nn
from torch.optim.swa_utils import update_bn

import fxlocal
from fxlocal import Driver, Freeze, Hebbian, LocalModules, Plan, Random
from fxlocal.runtime.attach import _loss_in
from fxlocal.schedules import Approximation, Constant, Static, combine


def state(model):
    return copy.deepcopy(model.state_dict())


# --- the same training ---------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ["residual", "unet", "dropout", "functional", "gate"])
@pytest.mark.parametrize(
    "schedule",
    [
        STATIC,
        Static(epochs=4, rule=Hebbian(0.01), update_every=2, weak_supervision=True),
        combine(Static(epochs=4, rule=Freeze()), Approximation(Random(), batches=slice(0, 4, 2))),
    ],
    ids=["moving", "every other", "approximated"],
)
def test_the_models_own_calls_train_as_the_drivers_networks_do(name, schedule):
    inputs, states = NETS[name].inputs(), []
    for attach in (False, True):
        model = NETS[name].build()
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        make = fxlocal.attach if attach else Driver
        driver = make(model, schedule, optimizer)
        torch.manual_seed(1)

        for _ in range(4):
            driver.start_epoch()
            for _ in range(3):
                net = model if attach else driver.network()
                loss = laws.loss_of(net(*inputs)).square().log1p()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                driver.observe(loss)
            driver.end_epoch()
        states.append((state(model), driver.history, driver.losses))
    assert same_state(*states)
    assert not same_state(states[0][0], NETS[name].build().state_dict())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_is_the_optimizers(scaled):
    """All forwards before it run one network, those after it the next."""
    model = small()
    driver = attached(model, EVERY_OTHER)
    assert driver.boundary
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    found = []
    for _ in range(4):
        found += [moves(model) for _ in range(3)]
        scaler.scale(laws.loss_of(model(*X))).backward()
        scaler.step(driver.optimizer)
        scaler.update()
    assert found == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    assert driver.step == 4


def test_a_step_that_a_scaler_skips_is_none():
    model = small()
    driver = attached(model, EVERY_OTHER)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(laws.loss_of(model(*X)) * torch.inf).backward()
    scaler.step(driver.optimizer)
    scaler.update()
    assert moves(model) and driver.step == 1


def test_micro_batches_add_up():
    """By hand: the plan's network for each half, one step of the optimizer."""
    model, twin = small(), small()
    driver = attached(model)
    optimizer = torch.optim.SGD(twin.parameters(), **SGD)
    net = fxlocal.transform(twin, LEARNING.fixed)
    for _ in range(3):
        for half in (X[0][:2], X[0][2:]):
            laws.loss_of(model(half)).backward()
            laws.loss_of(net(half)).backward()
        for one in (driver.optimizer, optimizer):
            one.step()
            one.zero_grad()
    assert same_state(model.state_dict(), twin.state_dict())


def test_without_an_optimizer_the_user_tells_the_steps():
    model = small()
    driver = fxlocal.attach(model, EVERY_OTHER)
    driver.start_epoch()
    with pytest.raises(RuntimeError, match=r"set driver.optimizer = ..., or call driver.network"):
        model(*X)
    found = []
    for _ in range(3):
        driver.network()
        found += [moves(model), moves(model)]
    assert found == [True, True, False, False, True, True]


def test_the_optimizer_may_be_wrapped_or_changed():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner, self.param_groups, self.defaults = inner, inner.param_groups, {}

        def step(self, closure=None):
            self.inner.step()

    model = small()
    driver = attached(model, EVERY_OTHER)
    first = driver.optimizer
    driver.optimizer = Wrapper(torch.optim.Adam(model.parameters()))
    found = []
    for _ in range(3):
        found.append(moves(model))
        laws.loss_of(model(*X)).backward()
        driver.optimizer.step()
    assert found == [True, False, True]
    first.step()
    driver.optimizer.zero_grad()
    assert driver.step == 3 and not driver._steps[1:] and not first._optimizer_step_post_hooks


# --- what is called when -------------------------------------------------------------------------


def test_evaluation_and_calls_without_gradient_are_the_models_own():
    model, plain = NETS["residual"].build(), NETS["residual"].build()
    inputs = NETS["residual"].inputs()
    attached(model)
    before = state(model)
    model.eval(), plain.eval()
    for _ in range(2):
        assert torch.equal(laws.loss_of(model(*inputs)), laws.loss_of(plain(*inputs)))
    assert same_state(model.state_dict(), before)
    model.train(), plain.train()
    with torch.no_grad():
        assert torch.equal(laws.loss_of(model(*inputs)), laws.loss_of(plain(*inputs)))
    assert same_state(model.state_dict(), plain.state_dict())


def test_norms_are_reset_without_a_local_update():
    model = NETS["residual"].build()
    attached(model)
    before = [p.detach().clone() for p in model.parameters()]
    update_bn([NETS["residual"].inputs()[0]], model)
    assert same_state(before, list(model.parameters()))


def test_hooks_of_the_model_run_once():
    model, calls = small(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a network would not run them
        model.register_forward_hook(lambda *_: calls.append(model.training))
        attached(model)
    model(*X), model.eval()(*X)
    assert calls == [True, False]


def test_what_looks_at_an_attached_model_sees_its_own_forward():
    model, plain = NETS["residual"].build(), NETS["residual"].build()
    inputs = NETS["residual"].inputs()
    driver = attached(model)
    whole = nn.Sequential(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(fxlocal.analyze(model)) == str(fxlocal.analyze(plain))
        assert str(fxlocal.analyze(whole)) == str(fxlocal.analyze(nn.Sequential(plain)))
        net = fxlocal.transform(model, local(1))
        assert fxlocal.format_graph(fxlocal.capture(copy.deepcopy(model))) == fxlocal.format_graph(
            fxlocal.capture(plain)
        )
        trained = [layer.trained_by for layer in fxlocal.verify(model, *inputs).layers]
        assert trained == ["back-propagation"] * len(trained)
        trained = [layer.trained_by for layer in fxlocal.verify(net, *inputs).layers]
        assert trained == ["local rule"] + ["back-propagation"] * (len(trained) - 1)
        trained = [layer.trained_by for layer in fxlocal.verify(driver.network(), *inputs).layers]
        assert trained[:3] == ["local rule"] * 2 + ["back-propagation"]
    assert vars(model)["forward"].__self__ is model


def test_an_exported_capture_sees_the_models_own_forward():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            if x.shape[0] > 1:
                x = self.a(x)
            return self.b(x)

    model = Branches()
    attached(model, Constant(local("b")), example_inputs=X)
    assert moves(model)
    assert len(fxlocal.analyze(model, *X).layers) == 2


# --- losses --------------------------------------------------------------------------------------


class Told(nn.Module):
    """A model that returns its own loss, in one of the ways in which models do."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 8), nn.Linear(8, 2), how

    def forward(self, x, labels):
        scores = self.b(torch.relu(self.a(x)))
        return {"loss": F.cross_entropy(scores, labels), "scores": scores}


def test_a_loss_in_the_output_is_observed():
    model = Told("dict")
    driver = attached(model, Constant(local("b")))
    expected = [float(model(X[0], Y)["loss"]) for _ in range(2)]
    driver.end_epoch()
    assert driver.losses == [pytest.approx(sum(expected) / 2)]


def test_a_loss_in_an_attribute_is_observed():
    loss = torch.ones(())
    assert _loss_in(SimpleNamespace(loss=loss)) is loss
    for other in (loss, {"loss": None}, {"loss": 1.0}, SimpleNamespace(), torch.ones(3), None):
        assert _loss_in(other) is None
    assert _loss_in({"loss": torch.ones(2)}) is None  # of two devices, say


def test_what_the_user_observes_takes_its_place():
    driver = attached(model := Told("dict"), Constant(local("b")))
    model(X[0], Y)
    for value in (1.0, 3.0):
        driver.observe(torch.tensor(value))
        model(X[0], Y)
    driver.end_epoch()
    assert driver.losses == [2.0]


# --- local modules -------------------------------------------------------------------------------


def test_heads_are_there_before_the_optimizer():
    model = small()
    driver = fxlocal.attach(model, Constant(MODULES), example_inputs=X)
    heads = {id(p) for p in driver.heads.parameters()}
    assert heads and heads <= {id(p) for p in model.parameters()}
    assert len(list(driver.parameters())) == len({id(p) for p in driver.parameters()})
    assert list(model.state_dict()) == list(small().state_dict())
    whole = nn.Sequential(model)
    assert whole.load_state_dict(nn.Sequential(small()).state_dict()).missing_keys == []
    with pytest.raises(RuntimeError, match="Missing key"):
        whole.load_state_dict({})
    model.to(torch.float64)
    assert {p.dtype for p in driver.heads.parameters()} == {torch.float64}


@pytest.mark.parametrize("plan", [MODULES, Plan(modules=LocalModules(3, link=1, num_classes=2))])
def test_local_modules_learn_as_the_drivers(plan):
    states = []
    for attach in (False, True):
        model = small()
        make = fxlocal.attach if attach else Driver
        torch.manual_seed(2)
        driver = make(model, Constant(plan), example_inputs=X)
        driver.optimizer = torch.optim.SGD(driver.parameters(), **SGD)
        driver.start_epoch()
        for _ in range(3):
            net = model if attach else driver.network()
            output, loss = net(X[0], Y)
            loss.backward()
            driver.optimizer.step()
            driver.optimizer.zero_grad()
            driver.observe(loss)
        driver.end_epoch()
        states.append((state(model), state(driver.heads), driver.losses))
    assert same_state(*states)
    assert model.eval()(*X).shape == output.shape


def test_an_argument_of_the_model_is_the_target():
    class Labelled(nn.Module):
        """Returns scores and does nothing with the labels."""

        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x, labels=None):
            return self.net(x)

    model, plain = Labelled(), Labelled()
    torch.manual_seed(2)
    driver = attached(model, Constant(MODULES), target="labels", example_inputs=(*X, Y))
    torch.manual_seed(2)
    net = fxlocal.transform(plain, MODULES, *X, Y)
    scores = model(X[0], labels=Y)
    assert isinstance(scores, torch.Tensor)
    F.cross_entropy(scores, Y).backward()
    net(X[0], Y, target=Y)[1].backward()
    gradients = [[p.grad for p in one.net.parameters()] for one in (model, plain)]
    assert same_state(*gradients)
    with pytest.raises(ValueError, match="no target"):
        model(X[0], labels=None)
    assert driver.model.eval()(*X).shape == scores.shape


def test_soft_targets():
    model = small()
    attached(model, Constant(MODULES), example_inputs=X)
    soft = torch.rand(3, 2).softmax(1)
    assert model(X[0], soft)[1].requires_grad
