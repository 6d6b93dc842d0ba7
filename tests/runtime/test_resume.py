"""A checkpoint of a driver: an exact resume in a new process, and what is refused untouched."""

import copy
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from support.drivers import SGD, STATIC, X, local, run, small
from support.nets import NETS
from torch import nn

from fxlocal import CheckpointError, Driver, Freeze
from fxlocal.schedules import Constant, Static

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, **SGD),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def seeded_driver(optimizer):
    """A network with dropout and running statistics, and a loop that draws from each generator."""
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    model = NETS["dropout"].build()
    return Driver(model, STATIC, optimizer=OPTIMIZERS[optimizer](model.parameters()))


def train(driver, epochs):
    """Train on inputs drawn anew; return what must be equal after a resume."""
    for _ in range(epochs):
        scale = random.random() + numpy.random.rand()
        driver.model.train()
        run(driver, 1, (torch.randn(2, 3, 8, 8) * scale,))
    drawn = torch.rand(1).item(), random.random(), float(numpy.random.rand())
    return {**driver.state_dict(), "boundary": driver.boundary, "drawn": drawn}


def same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


RESUME = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
torch.set_num_threads(1)
import test_resume
for name in test_resume.OPTIMIZERS:
    driver = test_resume.seeded_driver(name)
    driver.load_state_dict(torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True))
    torch.save(test_resume.train(driver, 3), f"{sys.argv[1]}/{name}.end.pt")
"""


@pytest.mark.slow
def test_a_run_resumes_exactly_in_a_new_process(tmp_path):
    straight = {}
    for name in OPTIMIZERS:
        driver = seeded_driver(name)
        random_of_the_script = train(driver, 3)["drawn"]
        torch.save(driver.state_dict(), tmp_path / f"{name}.pt")
        straight[name] = train(driver, 3)
        assert straight[name]["drawn"] != random_of_the_script
        assert len(set(straight[name]["history"])) == 3
    command = [sys.executable, "-c", RESUME, str(tmp_path), *map(str, Path(__file__).parents[:2])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, expected in straight.items():
        resumed = torch.load(tmp_path / f"{name}.end.pt", weights_only=False)
        assert list(resumed) == list(expected)
        for part in expected:
            assert same(resumed[part], expected[part]), f"{name}: {part} differs"


def other_shapes():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def other_layers():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def of_two_groups(parameters):
    first, *rest = parameters
    return torch.optim.SGD([{"params": [first]}, {"params": rest}], **SGD)


FOREIGN = {
    "shapes": (other_shapes, STATIC, OPTIMIZERS["sgd"], r"another model.*'2\.weight'"),
    "layers": (other_layers, STATIC, OPTIMIZERS["sgd"], r"another model"),
    "schedule": (small, Constant(local(1)), OPTIMIZERS["sgd"], r"another schedule"),
    "rate": (small, Static(epochs=6, rule=Freeze()), OPTIMIZERS["sgd"], r"another schedule"),
    "optimizer": (small, STATIC, OPTIMIZERS["adamw"], r"another optimizer"),
    "groups": (small, STATIC, of_two_groups, r"another optimizer"),
    "no optimizer": (small, STATIC, None, r"another optimizer"),
}


def driver_of(make, schedule, make_optimizer):
    model = make()
    optimizer = make_optimizer(model.parameters()) if make_optimizer else None
    return Driver(model, schedule, optimizer=optimizer)


def assert_refused(driver, state, message):
    run(driver, 1, X)
    before = copy.deepcopy(driver.state_dict())
    with pytest.raises(CheckpointError, match=message):
        driver.load_state_dict(state)
    assert same(driver.state_dict(), before), "the refused state was loaded in part"


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_of_another_run_is_refused_untouched(name):
    *other, message = FOREIGN[name]
    mine = small, STATIC, OPTIMIZERS["sgd"]
    for ours, theirs in ((mine, other), (other, mine)):
        assert_refused(driver_of(*ours), driver_of(*theirs).state_dict(), message)


@pytest.mark.parametrize("part", ["fingerprint", "model", "optimizer", "epoch", "random"])
def test_an_incomplete_checkpoint_is_refused_untouched(part):
    state = driver_of(small, STATIC, OPTIMIZERS["sgd"]).state_dict()
    del state[part]
    assert_refused(driver_of(small, STATIC, OPTIMIZERS["sgd"]), state, part)


def test_a_state_that_is_no_tensor_is_saved_and_loaded():
    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    drivers = [Driver(nn.Sequential(Counting(4, 4), nn.Linear(4, 2)), Constant()) for _ in "ab"]
    drivers[0].model[0].seen = 3
    drivers[1].load_state_dict(drivers[0].state_dict())
    assert drivers[1].model[0].seen == 3
