"""What an attached model keeps: class, signature, state, copies, wrappers; and detaching."""

import copy
import gc
import inspect
import pickle
import warnings
from functools import partial, wraps
from types import MethodType

import pytest
import torch
from support import laws
from support.attached import LEARNING, MODULES, Y, attached, moves
from support.drivers import X, local, small
from support.tiny import same_state
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fxlocal
from fxlocal import Plan
from fxlocal.runtime.attach import _DRIVERS
from fxlocal.schedules import Constant

# --- what stays ----------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A model with keyword and optional inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, *, scale=1.0):
        """Own words."""
        return self.b(self.a(x) * scale)


def test_class_signature_and_state_stay():
    model, plain = Scaled(), Scaled()
    names = list(model.state_dict())
    attached(model, Constant(local("b")))
    assert type(model) is Scaled and list(model.state_dict()) == names
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__doc__ == "Own words." and model.forward.__self__ is model
    assert callable(model.forward.__func__)
    assert model.load_state_dict(plain.state_dict()).missing_keys == []


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "average"])
def test_a_copy_is_a_plain_model(how, tmp_path):
    model = small()
    driver = attached(model)
    if how == "save":
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        twin = copy.deepcopy(model) if how == "deepcopy" else AveragedModel(model).module
    assert same_state(twin.state_dict(), model.state_dict())
    assert not moves(twin) and moves(model) and driver.model is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = fxlocal.attach(twin, LEARNING)
    second.network()
    assert moves(twin)
    second.detach()
    assert not moves(twin)


def wrapped(forward):
    """What launchers do: keep the function of the bound method, set another on the instance."""

    @wraps(forward)
    def cast(self, *args, **kwargs):
        return forward(self, *args, **kwargs) * 2

    return cast


def test_a_wrapper_of_the_forward_wraps_that_of_the_step():
    model = small()
    driver = attached(model)
    plain = small()
    model.forward = MethodType(wrapped(model.forward.__func__), model)
    assert moves(model)
    assert torch.equal(model.eval()(*X), 2 * copy.deepcopy(model)(*X) / 2)
    driver.detach()
    model.train()
    assert not moves(model)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(*X), 2 * plain(*X))


def in_autocast(forward):
    """What accelerate does: one context for all calls, and one more wrapper around it."""

    def widened(*args, **kwargs):
        return cast(*args, **kwargs).float()

    cast = torch.autocast("cpu", torch.bfloat16)(forward)
    widened.__wrapped__ = cast
    return widened


class AsksForAutocast(nn.Sequential):
    """Is run beside its graph in the first step under autocast."""

    def forward(self, x):
        return super().forward(x if torch.is_autocast_enabled("cpu") else x.float())


def test_autocast_around_the_forward_ends_with_it():
    model = AsksForAutocast(*small())
    expected = copy.deepcopy(model)
    driver = attached(model, Constant(local(1)))
    for net in (model, expected):
        net.forward = MethodType(in_autocast(net.forward.__func__), net)
    output = model(*X)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(output, expected(*X)) and output.grad_fn is not None
    driver.detach()  # and what was put around it is the model's own now
    assert torch.equal(fxlocal.capture(model, *X)(*X), model(*X))


def test_who_takes_wrappers_off_leaves_the_attached_forward():
    """As accelerate's unwrap_model(keep_fp32_wrapper=False), in the middle of a run."""
    model = small()
    signature = inspect.signature(model.forward)
    attached(model)
    model.forward = MethodType(wrapped(model.forward.__func__), model)
    model.forward = MethodType(inspect.unwrap(model.forward.__func__), model)
    assert moves(model) and inspect.signature(model.forward) == signature


@pytest.mark.parametrize("plan", [local(2), Plan()], ids=["prefix", "plain"])
def test_what_learns_before_a_part_with_a_prefix_is_told_that_it_does_not(plan):
    stem, model = nn.Linear(4, 4), small()
    attached(model, Constant(plan))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            model(stem(X[0])).sum().backward()
    said = [str(one.message) for one in told if "gets none" in str(one.message)]
    assert len(said) == (plan != Plan()) and (stem.weight.grad is None) == bool(said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X[0])


def test_a_forward_of_the_instances_is_put_back():
    for forward in ("method", "function"):
        model, plain = small(), small()
        own = MethodType(wrapped(type(model).forward), model)
        model.forward = own if forward == "method" else partial(wrapped(type(model).forward), model)
        kept = vars(model)["forward"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will not run in training
            driver = attached(model)
        assert torch.equal(model.eval()(*X), 2 * plain(*X))
        driver.detach()
        assert vars(model)["forward"] is kept


def test_heads_are_no_part_of_the_models_own_forward():
    model, plain = small(), small()
    attached(model, Constant(MODULES), example_inputs=X)
    assert len(model) == len(plain) + 1
    assert torch.equal(model.eval()(*X), plain(*X))
    assert len(fxlocal.analyze(model).layers) == len(fxlocal.analyze(plain).layers)
    net = fxlocal.transform(model.train(), local(2))
    assert moves(net) and "fxlocal_heads" not in net.code
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.eval()(*X), model.eval()(*X))


def test_detach_puts_all_back():
    model = small()
    keys = set(vars(model))
    driver = attached(model, Constant(MODULES), example_inputs=X)
    optimizer = driver.optimizer
    laws.loss_of(model(X[0], Y)).backward()
    driver.detach()
    assert set(vars(model)) == keys and list(model._modules) == list(small()._modules)
    assert not optimizer._optimizer_step_post_hooks
    assert not moves(model)
    again = attached(model)  # and may be attached again
    assert moves(model)
    again.detach()
    again.detach()


def test_a_driver_ends_with_its_model():
    model = small()
    attached(model)
    del model
    gc.collect()
    assert not [driver for driver in _DRIVERS if isinstance(driver.model, nn.Sequential)]
