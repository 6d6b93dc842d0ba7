"""What a forward does to hooks: undone when it was traced, and refused where each call does it."""

import pytest
import torch
from support import laws
from torch import nn

import fxlocal
from fxlocal import CaptureError, Plan

REGISTRIES = [name for name in vars(nn.Module()) if "_hooks" in name]  # what keeps hooks
EXAMPLE = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))


def hooks_of(model):
    return [dict(vars(module)[name]) for module in model.modules() for name in REGISTRIES]


def doubled(module, args, output):
    return output * 2


def shifted(module, args, kwargs):
    return (args[0] + 1, *args[1:]), kwargs


class Installing(nn.Module):
    """Installs hooks in its first forward, and remembers that in a flag; or in each."""

    def __init__(self, install, once=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)
        self.install, self.once, self.installed, self.seen = install, once, False, []

    def forward(self, x):
        if not (self.once and self.installed):
            self.install(self)
            self.installed = True
        y = self.last(self.first(x))
        seen = list(self.seen)
        self.seen.clear()
        return [y, *seen]


def collecting(net):
    net.first.register_forward_hook(lambda module, args, output: net.seen.append(output))


def doubling(net):
    net.first.register_forward_hook(doubled, always_call=True)


def shifting(net):
    net.first.register_forward_pre_hook(shifted, with_kwargs=True)


def nested(net):
    net.first.register_forward_hook(doubled)
    net.last.register_state_dict_pre_hook(lambda *args: None)


def on_a_leaf(net):
    net.last.register_forward_hook(doubled)


def inside_first(net):
    net.first[0].register_forward_pre_hook(shifted, with_kwargs=True)


INSTALL = [collecting, doubling, shifting, nested, on_a_leaf, inside_first]
LOOKS = [fxlocal.analyze, lambda model, x: fxlocal.transform(model, Plan(), x)]


@pytest.mark.filterwarnings("ignore:.*hooks of")
@pytest.mark.parametrize("install", INSTALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("look", LOOKS, ids=["analyze", "transform"])
def test_a_model_that_installs_hooks_in_its_first_forward_is_left_as_it_was(install, look):
    model = Installing(install)
    before = hooks_of(model)
    for _ in range(2):  # another look finds what the first one found
        try:
            look(model, EXAMPLE)
        except CaptureError as refused:
            assert "run the model once before" in str(refused)  # not before anything was undone
    assert hooks_of(model) == before and not model.installed and model.seen == []
    eager = Installing(install)
    for _ in range(2):
        laws.assert_equal(model(EXAMPLE), eager(EXAMPLE), "output")


@pytest.mark.filterwarnings("ignore:.*hooks of")
@pytest.mark.parametrize("install", INSTALL, ids=lambda f: f.__name__)
def test_a_network_computes_what_later_calls_do_or_is_refused(install):
    eager, model = Installing(install), Installing(install)
    eager(EXAMPLE)
    if install in (on_a_leaf, inside_first, nested):
        called = "last" if install is not inside_first else r"first\.0"
        with pytest.raises(
            CaptureError, match=f"changes the hooks of '{called}'.*run the model once"
        ):
            fxlocal.transform(model, Plan(), EXAMPLE)
        model(EXAMPLE)
    network = fxlocal.transform(model, Plan(), EXAMPLE)
    for _ in range(2):
        laws.assert_equal(laws.step(network, (EXAMPLE,)), laws.step(eager, (EXAMPLE,)), "output")
        laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")
        model(EXAMPLE)  # which installs them


@pytest.mark.parametrize("install", [on_a_leaf, doubling, inside_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("inputs", [(), (EXAMPLE,)], ids=["", "inputs"])
def test_a_forward_that_installs_hooks_in_each_call_is_refused(install, inputs):
    model = Installing(install, once=False)
    model.installed, before = True, hooks_of(model)
    with pytest.raises(CaptureError, match=r"assigns hooks of '(last|first|first\.0)'"):
        fxlocal.capture(model, *inputs)
    assert hooks_of(model) == before


def test_hooks_that_a_forward_takes_away_again_are_no_change():
    class Cleaning(Installing):
        def forward(self, x):
            handle = self.first.register_forward_hook(doubled)
            y = self.last(self.first(x))
            handle.remove()
            return y

    model = Cleaning(collecting)
    assert torch.equal(fxlocal.capture(model)(EXAMPLE), model(EXAMPLE))


def test_a_hook_of_the_users_that_a_forward_removes_is_put_back():
    model = Installing(lambda net: net.handle.remove(), once=False)
    model.installed, model.handle = True, model.last.register_forward_hook(doubled)
    before = hooks_of(model)
    with pytest.raises(CaptureError, match=r"hooks of 'last'"):
        fxlocal.capture(model, EXAMPLE)
    assert hooks_of(model) == before
    assert torch.equal(model.last(torch.ones(1, 8)), 2 * model.last.forward(torch.ones(1, 8)))
