"""What a model's own class does to its state, its network does too."""

import pickle

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import Freeze, Hebbian, LocalModules, LocalPrefix, Plan

PLAN = Plan(local=LocalPrefix("b", Freeze()))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Counting(Model):
    seen = 0

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


class Hooked(Model):
    """Adds a key by a hook, and takes it out again by another."""

    def __init__(self):
        super().__init__()
        self.met = []
        self.register_state_dict_post_hook(
            lambda model, state, prefix, _: state.update({prefix + "added": torch.ones(1)})
        )
        self.register_load_state_dict_pre_hook(
            lambda model, state, prefix, *_: model.met.append(state.pop(prefix + "added"))
        )
        self.register_load_state_dict_post_hook(lambda model, keys: model.met.append(keys))


class Versioned(Model):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[prefix + "a.weight"] = state[prefix + "a.weight"].t()
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Renaming(Model):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {f"old.{name}": value for name, value in state.items()}

    def load_state_dict(self, state_dict, strict=True):
        state = {name.removeprefix("old."): value for name, value in state_dict.items()}
        return super().load_state_dict(state, strict)


KINDS = [Counting, Hooked, Versioned, Renaming]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_saves_and_loads_as_its_model(kind):
    model, other = kind(), kind()
    model.seen = 5
    network, again = fxlocal.transform(model, PLAN), fxlocal.transform(other, PLAN)
    assert list(network.state_dict()) == list(model.state_dict())
    for state, into in [
        (network.state_dict(), other),
        (model.state_dict(), again),
        (network.state_dict(), again),
    ]:
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        other.seen = 0
        into.load_state_dict(state)
        assert torch.equal(other.a.weight, model.a.weight)
        assert torch.equal(other.b.bias, model.b.bias)
        assert kind is not Counting or other.seen == 5
    assert kind is not Hooked or len(other.met) == 6


@pytest.mark.parametrize("kind", [Counting, Hooked, Versioned])
def test_as_a_part_too(kind):
    model, other = kind(), kind()
    network, again = fxlocal.transform(model, PLAN), fxlocal.transform(other, PLAN)
    whole = nn.ModuleList([network])
    assert list(whole.state_dict()) == list(nn.ModuleList([model]).state_dict())
    nn.ModuleList([again]).load_state_dict(whole.state_dict())
    assert torch.equal(other.a.weight, model.a.weight)


def test_what_is_missing_or_too_much_is_told():
    network = fxlocal.transform(Model(), PLAN)
    state = dict(network.state_dict())
    state["c"] = state.pop("b.bias")
    keys = network.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["b.bias"] and keys.unexpected_keys == ["c"]
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict(state)


def test_a_child_that_the_model_got_since_is_loaded_too():
    model, other = Model(), Model()
    network, again = fxlocal.transform(model, PLAN), fxlocal.transform(other, PLAN)
    model.more, other.more = nn.Linear(2, 2), nn.Linear(2, 2)
    again.load_state_dict(network.state_dict())
    assert torch.equal(other.more.weight, model.more.weight)


def test_heads_of_a_model_that_loads_in_a_way_of_its_own():
    modules = Plan(modules=LocalModules(2, num_classes=2, balance="blocks"))
    x = torch.ones(3, 4)
    network = fxlocal.transform(Renaming(), modules, x)
    again = fxlocal.transform(Renaming(), modules, x)
    again.load_state_dict(network.state_dict())
    for mine, theirs in zip(again.parameters(), network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    without = network.source_model.state_dict()
    again.load_state_dict(without, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict(without)


@pytest.mark.parametrize("kind", [Model, Renaming])
def test_heads_that_a_network_lacks_are_unexpected(kind):
    modules = Plan(modules=LocalModules(2, num_classes=2, balance="blocks"))
    state = fxlocal.transform(kind(), modules, torch.ones(2, 4)).state_dict()
    plain = fxlocal.transform(kind(), Plan())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*heads\.0"):
        plain.load_state_dict(state)
    plain.load_state_dict(state, strict=False)


def test_hooks_of_the_network_itself_run():
    network = fxlocal.transform(Model(), PLAN)
    network.register_state_dict_post_hook(lambda net, state, *_: state.update(mine=torch.ones(1)))
    assert list(network.state_dict())[-1] == "mine"
    network.register_load_state_dict_pre_hook(lambda net, state, *_: state.pop("mine"))
    network.load_state_dict(network.state_dict())


def test_a_pickled_network_keeps_its_rate():
    network = fxlocal.transform(Model(), Plan(local=LocalPrefix("b", Hebbian(0.1))))
    network.additions["rate"].fill_(0.5)
    assert pickle.loads(pickle.dumps(network)).additions["rate"] == 0.5
