"""What a forward counts outside of its modules: refused, and put back."""

import functools
import gc
import types
import weakref

import pytest
import torch
from support.captures import BOTH_WAYS, EXAMPLE, build, plain
from torch import nn

import fxlocal
from fxlocal import CaptureError

CALLS = 0
COUNTS = {"calls": 0, "of": [0]}
TOLD = False
SHAPES: dict[int, tuple[int, ...]] = {}


class Tally:
    """Counts, as the model's own code does."""

    shared = 0

    def __init__(self):
        self.calls, self.inside = 0, types.SimpleNamespace()


class Slots:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0


class Outer:
    def __init__(self):
        self.tally, self.slots, self.counts = Tally(), Slots(), {"calls": 0, "each": [0, 0]}


TALLY = Tally()


def by_global(net, x):
    global CALLS
    CALLS += 1
    return plain(net, x) * CALLS


def by_dict(net, x):
    COUNTS["calls"] += 1
    return plain(net, x) * COUNTS["calls"]


def by_nested_list(net, x):
    COUNTS["of"][0] += 1
    return plain(net, x) * COUNTS["of"][0]


def by_object(net, x):
    TALLY.calls += 1
    return plain(net, x) * TALLY.calls


def by_class(net, x):
    Tally.shared += 1
    return plain(net, x) * Tally.shared


def in_a_helper(net, x):
    return plain(net, x) * count()


def count():
    global CALLS
    CALLS += 1
    return CALLS


def in_a_closure():
    calls = 0

    def body(net, x):
        nonlocal calls
        calls += 1
        return plain(net, x) * calls

    return body


OUTSIDE = {
    "global": (by_global, "CALLS"),
    "dict": (by_dict, "COUNTS"),
    "nested list": (by_nested_list, "COUNTS"),
    "object": (by_object, "TALLY.calls"),
    "class": (by_class, "Tally.shared"),
    "helper": (in_a_helper, "CALLS"),
    "closure": (in_a_closure(), "calls"),
}


def counted():
    cell = OUTSIDE["closure"][0].__closure__[0].cell_contents
    return CALLS, COUNTS["calls"], COUNTS["of"][0], TALLY.calls, Tally.shared, cell


@BOTH_WAYS
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_count_outside_of_the_model_is_refused_and_put_back(name, by_shape):
    body, said = OUTSIDE[name]
    with pytest.raises(CaptureError, match=f"forward assigns '{said}', outside of the model"):
        fxlocal.capture(build(body, by_shape), EXAMPLE)
    assert counted() == (0,) * 6


class Missing:
    """Stands for a package that is not there, as optional imports do."""

    def __getattr__(self, name):
        raise ImportError(f"no {name}")


ABSENT = Missing()


def names_it(net, x):
    return plain(net, x) if ABSENT is not None else ABSENT.relu(x)


@BOTH_WAYS
def test_what_the_code_names_is_not_asked_for_attributes(by_shape):
    model = build(names_it, by_shape)
    assert torch.equal(fxlocal.capture(model, EXAMPLE)(EXAMPLE), model(EXAMPLE))


TABLE = {str(i): i for i in range(1_000_000)}
DEEP: list[object] = []
for _ in range(3000):
    DEEP = [DEEP]


def reads_tables(net, x):
    return plain(net, x) * TABLE["2"] * len(DEEP)


def test_large_tables_and_deep_lists_are_no_matter(no_warnings):
    model = build(reads_tables)
    assert torch.equal(fxlocal.capture(model, EXAMPLE)(EXAMPLE), model(EXAMPLE))


def test_a_captured_model_is_freed():
    model = build(plain)
    model.method, model.part = model.forward, functools.partial(plain, model)
    gone = weakref.ref(model)
    fxlocal.transform(model, fxlocal.Plan(), EXAMPLE)
    del model
    gc.collect()
    assert gone() is None


def with_default(net, x, calls=[0]):  # noqa: B006
    calls[0] += 1
    return plain(net, x) * calls[0]


def helper(factor):
    helper.calls += 1
    return factor * helper.calls


helper.calls = 0


@torch.no_grad()
def in_a_wrapper():
    global CALLS
    CALLS += 1
    return CALLS


WRAPPED = {
    "a default of with_default": with_default,
    "helper.calls": lambda net, x: plain(net, x) * helper(2),
    "CALLS": lambda net, x: plain(net, x) * in_a_wrapper(),
}


@BOTH_WAYS
@pytest.mark.parametrize("said", WRAPPED)
def test_so_is_one_of_a_function(said, by_shape):
    with pytest.raises(CaptureError, match=f"forward assigns '{said}', outside of the model"):
        fxlocal.capture(build(WRAPPED[said], by_shape), EXAMPLE)
    assert (helper.calls, CALLS, with_default.__defaults__) == (0, 0, ([0],))


class Counting(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        type(self).calls += 1
        return self.layer(x) * self.calls


def test_a_count_on_the_class_is_refused_and_put_back():
    for inputs in ((), (EXAMPLE,)):
        with pytest.raises(CaptureError, match=r"forward assigns 'Counting\.calls', outside"):
            fxlocal.capture(nn.Sequential(Counting()), *inputs)
    assert Counting.calls == 0


def one_more(owner, key):
    owner[key] += 1
    return owner[key]


def calls(owner):
    owner.calls += 1
    return owner.calls


INSIDE = {
    "listed.calls": lambda net: calls(net.listed[0]),
    "outer.tally.calls": lambda net: calls(net.outer.tally),
    "outer.slots.calls": lambda net: calls(net.outer.slots),
    "outer.counts": lambda net: one_more(net.outer.counts["each"], 1),
    "slots.calls": lambda net: calls(net.slots),
    "held.calls": lambda net: calls(net.held),
}


@BOTH_WAYS
@pytest.mark.parametrize("path", INSIDE)
def test_a_count_in_an_object_of_the_models_is_refused_and_put_back(path, by_shape):
    model = build(lambda net, x: plain(net, x) * INSIDE[path](net), by_shape)
    model.outer, model.slots, model.held = Outer(), Slots(), Tally()
    model.listed = (Tally(),)
    with pytest.raises(CaptureError, match=f"forward assigns '{path}'"):
        fxlocal.capture(model, EXAMPLE)
    outer = model.outer
    assert outer.counts == {"calls": 0, "each": [0, 0]}
    assert outer.tally.calls == outer.slots.calls == model.slots.calls == model.held.calls == 0


def told_once(net, x):
    global TOLD
    TOLD = True
    SHAPES.setdefault(4, (4, 2))
    return plain(net, x) * SHAPES[4][1]


@BOTH_WAYS
def test_a_flag_and_an_entry_are_no_counts(by_shape):
    model = build(told_once, by_shape)
    assert torch.equal(fxlocal.capture(model, EXAMPLE)(EXAMPLE), model(EXAMPLE))


def counts_unless_compiled(net, x):
    global CALLS
    if not torch.compiler.is_compiling():
        CALLS += 1
    return plain(net, x) * CALLS


def test_what_is_refused_in_training_is_not_captured_as_compiled():
    with pytest.raises(CaptureError, match="forward assigns 'CALLS'"):
        fxlocal.capture(build(counts_unless_compiled, by_shape=True), EXAMPLE)
    assert CALLS == 0
