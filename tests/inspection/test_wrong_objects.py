"""Objects of another kind than a function takes: said in a line, before anything is changed."""

import copy

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import CaptureError, CheckpointError, Driver, LocalPrefix, Plan, PlanError, PruneTrain
from fxlocal.schedules import Constant, Static

X = torch.ones(3, 4)


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def accumulating(given):
    with fxlocal.accumulate(given):
        pass


def foreign():
    return torch.optim.SGD(model().parameters(), lr=0.1)


NO_GRAPH = "give what fxlocal.transform, fxlocal.capture or Driver.network returned"
WRONG = {
    "format a model": (lambda: fxlocal.format_graph(model()), TypeError, NO_GRAPH),
    "format nothing": (lambda: fxlocal.format_graph(None), TypeError, "format_graph got NoneType"),
    "diff models": (lambda: fxlocal.diff_graphs(model(), model()), TypeError, NO_GRAPH),
    "stages": (lambda: fxlocal.find_stages(model()), TypeError, "find_stages got Sequential"),
    "accumulate a model": (lambda: accumulating(model()), TypeError, NO_GRAPH),
    "accumulate 3": (lambda: accumulating(3), TypeError, "accumulate got int"),
    "attach 3": (lambda: fxlocal.attach(3, Constant()), TypeError, "give a torch.nn.Module"),
    "verify a loss": (lambda: fxlocal.verify(model(), X, loss=3), TypeError, "loss=3: give a"),
    "verify a name": (
        lambda: fxlocal.verify(model(), X, optimizer="sgd"),
        TypeError,
        "optimizer='sgd': give a torch.optim.Optimizer",
    ),
    "prune foreign": (lambda: PruneTrain(model(), foreign()), PlanError, "is of another model"),
    "prune a name": (lambda: PruneTrain(model(), "sgd"), PlanError, "give a torch.optim.Optimizer"),
    "shrink foreign": (
        lambda: fxlocal.shrink(model(), {"0": [1]}, optimizer=foreign()),
        PlanError,
        "is of another model",
    ),
    "leaves": (
        lambda: fxlocal.transform(model(), Plan(), leaf_modules=(3,)),
        CaptureError,
        r"leaf_modules=\(3,\): give classes",
    ),
    "a tensor of examples": (
        lambda: Driver(model(), Constant(), example_inputs=X),
        TypeError,
        r"example_inputs=Tensor: give a tuple, \(x,\), or a dict",
    ),
    "no boundary": (lambda: fxlocal.analyze(model(), X).saved_bytes(4), PlanError, "from 0 to 3"),
    "below 0": (lambda: fxlocal.analyze(model(), X).saved_bytes(-1), PlanError, "from 0 to 3"),
    "an int": (lambda: fxlocal.capture(3), CaptureError, "what is of class int"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_it_is_said_what_was_given_and_what_to_give(wrong):
    call, kind, match = WRONG[wrong]
    with pytest.raises(kind, match=match):
        call()


DAMAGED = {
    "no state": lambda state: 3,
    "epoch": lambda state: state | {"epoch": -5},
    "no number": lambda state: state | {"epoch": "1"},
    "no fingerprint": lambda state: state | {"fingerprint": {}},
    "another fingerprint": lambda state: state | {"fingerprint": "?"},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_of_a_driver_is_refused_whole(damage):
    driver = Driver(model(), Static(epochs=4))
    before = copy.deepcopy(driver.state_dict())
    with pytest.raises(CheckpointError, match="Driver's state"):
        driver.load_state_dict(DAMAGED[damage](before))
    assert repr(driver.state_dict()) == repr(before)


def test_a_network_of_no_modules_has_no_stages():
    with pytest.raises(PlanError, match="local modules only"):
        fxlocal.find_stages(fxlocal.transform(model(), Plan(local=LocalPrefix(1))))
