"""The part of a Plan that says how weight gradients are computed: its values, what is refused."""

import copy
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from support import laws
from support.nets import NETS
from torch import nn
from torch.nn.utils import parametrizations

import fxlocal
from fxlocal import (
    Freeze,
    Full,
    Hebbian,
    LocalPrefix,
    NoEffectWarning,
    Plan,
    PlanError,
    Random,
    TopK,
    Zero,
    capture,
    diff_graphs,
    transform,
)

METHODS = {"a": Zero(), "b.c": Random(0.5), "d": TopK(3, 0.25, force=True), "e": Full()}


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(weight_grads={}),
        Plan(weight_grads=METHODS),
        Plan(
            weight_grads={"a": Zero(none=True), "b": Random(), "c": TopK(), "d": TopK(scale=None)}
        ),
        Plan(local=LocalPrefix("stem", Hebbian(0.1)), weight_grads={"fc": Random(0)}),
    ],
    ids=repr,
)
def test_the_repr_is_the_plan(plan):
    again = eval(repr(plan), vars(fxlocal))
    assert again == plan and hash(again) == hash(plan) and repr(again) == repr(plan)
    assert ("weight_grads" in repr(plan)) == bool(plan.weight_grads)
    assert copy.deepcopy(plan) == plan and pickle.loads(pickle.dumps(plan)) == plan


def test_the_order_of_the_layers_does_not_count():
    plan, other = (
        Plan(weight_grads=dict(items)) for items in (METHODS.items(), [*METHODS.items()][::-1])
    )
    assert plan == other and hash(plan) == hash(other) and len({plan, other}) == 1
    changed = [
        Plan(),
        Plan(weight_grads=METHODS | {"a": Zero(none=True)}),
        Plan(weight_grads=METHODS | {"d": TopK(3, 0.25)}),
        Plan(weight_grads=METHODS | {"f": Full()}),
        Plan(local=LocalPrefix(1), weight_grads=METHODS),
    ]
    assert len({plan, *changed}) == 1 + len(changed)


def test_what_is_given_may_change_later():
    given = dict(METHODS)
    plan = Plan(weight_grads=given)
    expected, before = Plan(weight_grads=METHODS), hash(plan)
    given["a"] = Full()
    given.pop("b.c")
    given["z"] = Zero()
    assert plan == expected and hash(plan) == before and dict(plan.weight_grads) == METHODS
    with pytest.raises(TypeError):
        plan.weight_grads["a"] = Full()
    with pytest.raises(AttributeError):
        plan.weight_grads = {}


def test_the_methods_are_a_mapping():
    methods = Plan(weight_grads=METHODS).weight_grads
    assert methods == METHODS and dict(methods) == METHODS and list(methods) == list(METHODS)
    assert methods["d"] == TopK(3, 0.25, force=True) and "z" not in methods
    assert methods.get("z", Full()) == Full() and len(methods) == 4
    assert Plan(weight_grads=methods) == Plan(weight_grads=METHODS)
    assert methods != {} and methods != None and methods != 3  # noqa: E711


ELSEWHERE = """
import pickle, sys
plan = pickle.load(sys.stdin.buffer)
import fxlocal
same = fxlocal.Plan(local=fxlocal.LocalPrefix("stem"), weight_grads=dict(plan.weight_grads))
assert plan == same and hash(plan) == hash(same) and {same: 1}[plan] == 1
sys.stdout.buffer.write(pickle.dumps((same, hash("a"))))
"""


def test_a_plan_is_the_same_in_a_process_with_other_hashes():
    plan = Plan(local=LocalPrefix("stem"), weight_grads=METHODS)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=pickle.dumps(plan),
        env={**os.environ, "PYTHONHASHSEED": "31"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    again, hashed = pickle.loads(done.stdout)
    assert hashed != hash("a")
    assert again == plan and hash(again) == hash(plan) and {plan: 1}[again] == 1


def test_a_change_of_rate_keeps_the_methods():
    plan = Plan(local=LocalPrefix(1, Hebbian(0.5)), weight_grads=METHODS).with_rate(0.25)
    assert plan.weight_grads == METHODS and plan.rate == 0.25
    assert Plan(weight_grads=METHODS).rate == 0.0


# --- values that are none ------------------------------------------------------------------------

NO_NUMBERS = [math.nan, math.inf, -math.inf, True, "1", 1j, torch.tensor(1.0), [1]]
BAD_VALUES = [
    *[(TopK, "k", value) for value in (0, -1, 1.0, "1", True, None, math.nan)],
    *[(TopK, "scale", value) for value in NO_NUMBERS],
    *[(TopK, "force", value) for value in (1, 0, "yes", None)],
    *[(Zero, "none", value) for value in (1, 0, "none", None)],
    *[(Random, "std", value) for value in (*NO_NUMBERS, -1, -1e-30)],
    *[(TopK, "scale", 10**400), (Random, "std", 10**400)],
]


@pytest.mark.parametrize("method,name,value", BAD_VALUES, ids=range(len(BAD_VALUES)))
def test_a_value_that_means_nothing_is_refused(method, name, value):
    with pytest.raises(PlanError, match=rf"{method.__name__}\({name}=.*: give "):
        method(**{name: value})


@pytest.mark.parametrize(
    "given,message",
    [
        ([("a", Zero())], r"weight_grads=\[.*give a mapping from module paths to methods"),
        (Zero(), r"weight_grads=Zero\(none=False\): give a mapping"),
        ({"a"}, "weight_grads={'a'}: give a mapping"),
        ("layer1", "weight_grads='layer1': give a mapping"),
        ({"a": Zero}, r"weight_grads\['a'\]=<class .*give Full\(\), Zero\(\), Random\(\) or TopK"),
        ({"a": "zero"}, r"weight_grads\['a'\]='zero': give Full\(\), Zero"),
        ({"a": None}, r"weight_grads\['a'\]=None: give Full"),
        ({"a": Zero(), "b": Hebbian()}, r"weight_grads\['b'\]=Hebbian.*: give Full"),
        ({0: Zero()}, "weight_grads: 0 is no module path, which is a string"),
        ({None: Zero()}, "weight_grads: None is no module path"),
    ],
)
def test_what_is_no_mapping_of_methods_is_refused(given, message):
    with pytest.raises(PlanError, match=message):
        Plan(weight_grads=given)


# --- plans that do not fit a model ---------------------------------------------------------------


def chain(change=lambda model: None):
    model = NETS["chain"].build()
    change(model)
    return model


def hooked(register):
    return lambda: chain(lambda model: getattr(model.conv2, register)(lambda *args: None))


def normed():
    return chain(lambda model: parametrizations.weight_norm(model.conv2))


class Sized(nn.Module):
    """A transposed convolution that is told its output's size."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 3, 3, 2, 1)

    def forward(self, x):
        return self.up(self.down(x), output_size=(8, 8))


class Leaf(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def with_leaf():
    return capture(nn.Sequential(nn.Conv2d(3, 4, 1), Leaf(4, 4, 1)), leaf_modules=(Leaf,))


def frozen(until, **methods):
    return Plan(local=LocalPrefix(until, Freeze()), weight_grads=methods)


def methods(**given):
    return Plan(weight_grads={name.replace("__", "."): m for name, m in given.items()})


IMAGES = NETS["chain"].inputs()
FITS_NOT = {  # model, plan, example inputs, message
    "unknown path": (chain, methods(conv9=Zero()), (), r"\['conv9'\]=Zero.*no such .*'conv1'"),
    "a norm": (chain, methods(bn1=Zero()), (), r"\['bn1'\].*no such layer"),
    "a block": (NETS["residual"].build, methods(block1=Full()), (), "'block1'.*'block1.conv1'"),
    "a weight": (chain, methods(conv1__weight=Zero()), (), "'conv1.weight'.*Nearest: 'conv1'"),
    "k too large": (chain, methods(conv2=TopK(17)), IMAGES, r"'conv2', whose map of \(4, 4\) has"),
    "so in a linear layer": (chain, methods(fc=TopK(2)), IMAGES, r"'fc', whose map of \(\) has 1 "),
    "so of tokens": (
        NETS["tokens"].build,
        methods(up=TopK(65)),
        IMAGES,
        r"'up', .* \(64,\) has 64",
    ),
    "behind a prefix": (chain, frozen("conv2", conv3=TopK(17)), IMAGES, r"'conv3', whose map of"),
    "transposed": (
        NETS["unet"].build,
        methods(up2=TopK()),
        (),
        "'up2' is a transposed .*give Zero",
    ),
    "of an output size": (Sized, methods(up=Zero()), (), "'up' is called with an output size"),
    "parametrised": (
        normed,
        methods(conv1=Zero(), conv2=TopK()),
        (),
        "'conv2' computes its weight",
    ),
    "a forward of its own": (with_leaf, methods(**{"1": Zero()}), (), "'1' is a Leaf with"),
}
PREFIX = {
    "in the prefix": (chain, frozen("conv2", conv1=Zero()), r"\['conv1'\]=.*until='conv2'"),
    "exact": (chain, frozen(2, conv2=Full()), r"\['conv2'\].*inside the local prefix"),
    "two calls": (NETS["shared"].build, frozen(3, conv=TopK()), r"\['conv'\].*inside the local"),
}
HOOKS = {
    name: (hooked(f"register_{name}"), methods(conv2=method), "'conv2' has .*hooks")
    for name, method in (
        *(("forward_hook", Zero()), ("forward_pre_hook", Random())),
        *(("full_backward_hook", TopK(force=True)), ("full_backward_pre_hook", Zero())),
    )
}
REFUSED = FITS_NOT | {n: (*case[:2], (), case[2]) for n, case in (PREFIX | HOOKS).items()}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_does_not_fit_leaves_everything_as_it_was(name):
    make, plan, inputs, message = REFUSED[name]
    captured = capture(make())
    model = captured._source
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i))
    optimizer.step()
    fxlocal.analyze(captured, *inputs)  # notes the shapes, which are printed then
    text, names = fxlocal.format_graph(captured), laws._attributes(model)
    state, steps = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for target in (model, captured) if name != "a forward of its own" else (captured,):
        with pytest.raises(PlanError, match=message):
            transform(target, plan, *inputs)
    assert fxlocal.format_graph(captured) == text and laws._attributes(model) == names
    laws.assert_equal(model.state_dict(), state, "state")
    laws.assert_equal(
        [s["momentum_buffer"] for s in optimizer.state_dict()["state"].values()],
        [s["momentum_buffer"] for s in steps["state"].values()],
        "momentum",
    )
    for i, parameter in enumerate(model.parameters()):
        assert parameter.grad is not None and bool((parameter.grad == i).all())


@pytest.mark.parametrize(
    "layer,shape,k", [(nn.Conv2d(3, 4, 3), (3, 6, 5), 12), (nn.Conv1d(3, 4, 3), (3, 6), 4)]
)
def test_all_positions_of_an_input_without_a_batch_dimension_fit(layer, shape, k):
    plan = Plan(weight_grads={"0": TopK(k, force=True)})
    transform(nn.Sequential(layer), plan, torch.zeros(shape))(torch.ones(shape)).sum().backward()
    assert layer.weight.grad is not None


# --- does nothing when it should -----------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", [methods(conv1=Full()), methods(conv1=Full(), fc=Full())], ids=repr
)
def test_a_plan_of_exact_gradients_changes_nothing(plan):
    model = chain()
    with pytest.warns(NoEffectWarning, match="approximate_weight_grads.* changed nothing"):
        net = transform(model, plan)
    assert diff_graphs(capture(model), net) == ""


UNTOUCHED = {"hooked": hooked("register_forward_hook"), "parametrised": normed}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_any_layer_may_have_its_exact_gradient(name):
    model = UNTOUCHED[name]()
    net = transform(model, methods(conv1=Zero(), conv2=Full()))
    assert "conv2" not in diff_graphs(capture(model), net)


def test_an_empty_plan_runs_no_pass(no_warnings):
    net = transform(chain(), Plan(weight_grads={}))
    assert "no pass ran" in fxlocal.explain(net)
