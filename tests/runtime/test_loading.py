"""A checkpoint is loaded as a whole or not at all, from whatever device its tensors come."""

import copy
import random

import numpy
import pytest
import torch
from support.drivers import SGD, X, run, small
from test_resume import same
from torch import nn

from fxlocal import CheckpointError, Driver, LocalModules, Plan
from fxlocal.ir.random_state import random_state, restore_random_state
from fxlocal.schedules import Constant, Dynamic


class OnGpu(torch.Tensor):
    """Refuses what a tensor on a GPU refuses, and has ``.cpu()``."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            name = function.__name__
            if name == "cpu":
                return args[0].as_subclass(torch.Tensor).clone()
            if name not in ("__get__", "detach", "shape"):
                raise TypeError(f"can't use a cuda:0 device type tensor in {name}")
            return function(*args, **(kwargs or {}))


def of_torch(change):
    return lambda state: state.update(torch=change(state["torch"]))


def of_numpy(change):
    def changed(state):
        name, keys, *rest = state["numpy"]
        state["numpy"] = name, change(keys), *rest

    return changed


def on_gpu(tensor):
    return tensor.as_subclass(OnGpu)


def of_python(change):
    def changed(state):
        version, internal, gauss = state["python"]
        state["python"] = version, change(internal), gauss

    return changed


TAKEN = {
    "torch on a GPU": of_torch(on_gpu),
    "numpy on a GPU": of_numpy(on_gpu),
    "a parameter": of_torch(lambda t: nn.Parameter(t, requires_grad=False)),
    "a list": of_python(list),
    "as read": of_torch(lambda t: t),
}
REFUSED = {
    "torch on meta": (of_torch(lambda t: t.to("meta")), "Cannot copy out of meta"),
    "torch as floats": (of_torch(torch.Tensor.float), "ByteTensor"),
    "torch cut off": (of_torch(lambda t: t[:9]), "state size"),
    "torch zeroed": (of_torch(torch.zeros_like), "Invalid mt19937"),
    "numpy on meta": (of_numpy(lambda t: t.to("meta")), "Cannot copy out of meta"),
    "numpy rounded": (of_numpy(torch.Tensor.float), r"torch\.float32, not torch\.uint32"),
    "numpy halved": (of_numpy(torch.Tensor.half), r"torch\.float16, not"),
    "numpy cut off": (of_numpy(lambda t: t[:3]), "out of bounds"),
    "python cut off": (of_python(lambda internal: internal[:3]), "wrong size"),
    "no numpy's": (lambda state: state.update(numpy=None), "TypeError"),
}


def drawn():
    return torch.rand(3).tolist(), random.random(), numpy.random.rand(3).tolist()


def trained(epochs=2):
    torch.manual_seed(1)
    model = small()
    driver = Driver(model, Dynamic(5), optimizer=torch.optim.SGD(model.parameters(), **SGD))
    run(driver, epochs, X)
    return driver


@pytest.mark.parametrize("name", TAKEN)
def test_generators_take_their_states_from_any_device(name):
    state = copy.deepcopy(trained().state_dict())
    expected = drawn()
    TAKEN[name](state["random"])
    trained(1).load_state_dict(state)
    assert drawn() == expected


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", REFUSED)
def test_a_state_that_a_generator_does_not_take_is_refused_untouched(name):
    change, message = REFUSED[name]
    state = copy.deepcopy(trained(3).state_dict())
    change(state["random"])
    assert_refused(trained(), state, message)


def assert_refused(driver, state, message):
    before = copy.deepcopy(driver.state_dict())
    with pytest.raises(CheckpointError, match=f"{message}.*Nothing was loaded"):
        driver.load_state_dict(state)
    assert same(driver.state_dict(), before), "the refused state was loaded in part"
    run(driver, 1, X)
    assert driver.epoch == before["epoch"] + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_states_of_gpus_that_are_not_there_are_warned_of():
    state = random_state() | {"cuda": [torch.get_rng_state()]}
    expected = drawn()
    with pytest.warns(UserWarning, match="of 1 GPUs, and there are 0"):
        restore_random_state(state)
    assert drawn() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_checkpoint_that_was_loaded_onto_the_gpu_resumes(tmp_path):
    model = small().cuda()
    driver = Driver(model, Constant(), optimizer=torch.optim.Adam(model.parameters()))
    run(driver, 1, (X[0].cuda(),))
    torch.save(driver.state_dict(), tmp_path / "driver.pt")
    state = torch.load(tmp_path / "driver.pt", map_location="cuda", weights_only=True)
    expected = drawn(), torch.rand(3, device="cuda").tolist()
    driver.load_state_dict(state)
    assert (drawn(), torch.rand(3, device="cuda").tolist()) == expected


# --- what fails half-way --------------------------------------------------------------------------


class Particular(nn.Linear):
    """Takes up no state of a run that went further than its own limit."""

    limit = 1

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.seen = 0

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        if state["seen"] > self.limit:
            raise ValueError(f"{state['seen']} is too far")
        self.seen = state["seen"]


class Proud(torch.optim.SGD):
    """Refuses a state after it has taken it up."""

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if state["param_groups"][0]["lr"] > 1:
            raise RuntimeError("too fast")


def with_modules():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), Particular(4, 4), nn.Linear(4, 3))
    plan = Plan(modules=LocalModules(2, num_classes=3, balance=("1",), replay=2))
    driver = Driver(model, Constant(plan), example_inputs=X)
    driver.optimizer = Proud(driver.parameters(), lr=0.1, momentum=0.9)
    return driver


def learn(driver, epochs):
    for _ in range(epochs):
        driver.start_epoch()
        _, loss = driver.network()(*X, torch.tensor([0, 1, 2]))
        loss.backward()
        driver.optimizer.step()
        driver.optimizer.zero_grad()
        driver.observe(loss)
        driver.end_epoch()


def spoil(path, value):
    def spoiled(state):
        *parents, name = path
        for parent in parents:
            state = state[parent]
        state[name] = value(state[name]) if callable(value) else value

    return spoiled


def to_meta(tensor):
    return tensor.to("meta")


HALF_WAY = {
    "a weight without data": (spoil(["model", "2.weight"], to_meta), "Cannot copy out of meta"),
    "a module's own refusal": (spoil(["model", "1._extra_state", "seen"], 2), "2 is too far"),
    "a head without data": (spoil(["heads", "0.1.bias"], to_meta), "Cannot copy out of meta"),
    "no heads": (lambda state: state.pop("heads"), "Missing key"),
    "an optimizer's momentum": (spoil(["optimizer", "state", 0, "momentum_buffer"], to_meta), ""),
    "an optimizer's own refusal": (spoil(["optimizer", "param_groups", 0, "lr"], 2.0), "too fast"),
    "an optimizer's groups": (spoil(["optimizer", "param_groups"], []), "parameter group"),
    "a buffer's batches": (spoil(["replay", 0], [1]), "TypeError"),
    "an epoch": (spoil(["epoch"], None), "its epoch None"),
    "losses": (spoil(["losses"], None), "TypeError"),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", HALF_WAY)
def test_what_fails_half_way_leaves_everything_as_it_was(name):
    change, message = HALF_WAY[name]
    driver, other = with_modules(), with_modules()
    learn(driver, 2)
    learn(other, 3)
    state = copy.deepcopy(other.state_dict())
    change(state)
    before = copy.deepcopy(driver.state_dict())
    with pytest.raises(CheckpointError, match=f"{message}.*Nothing was loaded"):
        driver.load_state_dict(state)
    assert same(driver.state_dict(), before), "the refused state was loaded in part"
    straight = with_modules()
    for one in (driver, straight):
        learn(one, 1 if one is driver else 3)
    assert same(driver.state_dict()["model"], straight.state_dict()["model"])
